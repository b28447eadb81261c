"""What is refreshed, and when."""

from __future__ import annotations

from typing import Any

import pytest
from training import batch, copy_of, network, optimizer_of, same, train

from cases import CASES, Case
from natgrad import Deflated, KLLimit
from natgrad.fishers import Coupled


@pytest.mark.parametrize("case", CASES, ids=str)
def test_law_29_a_refresh_happens_after_the_first_one(case: Case) -> None:
    """Statistics and inverse change at steps 1 and 2, which warm up, at 3 and at 6, and at no other."""
    model = network()
    optimizer = optimizer_of(model, case.make(), observe_every=3, refresh_every=3, step_size=KLLimit())
    kinds = ("stats.",) if isinstance(case.make(), Coupled) else ("stats.", "inverse.")  # some join the layers afresh
    before: list[dict[str, Any]] = []
    for step in range(9):
        train(model, optimizer, [batch(step)])
        layers = [entry for entry in copy_of(optimizer)["state"].values() if "refreshes" in entry]
        for new, old in zip(layers, before, strict=bool(before)):
            for kind in kinds:
                names = [name for name in new if name.startswith(kind)]
                assert all(same(new[name], old[name]) for name in names) is (step not in (1, 2, 3, 6))
        before = layers
    assert [entry["refreshes"] for entry in before] == [5, 5]


def test_the_share_of_guarded_values_is_among_the_statistics() -> None:
    model = network()
    optimizer = optimizer_of(model, Deflated())
    assert "guarded" not in optimizer.statistics()
    train(model, optimizer, [batch(0)])
    assert 0 <= optimizer.statistics()["guarded"] < 1
    plain = optimizer_of(model)
    train(model, plain, [batch(0)])
    assert "guarded" not in plain.statistics()
