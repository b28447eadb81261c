"""What is refreshed, and when."""

from __future__ import annotations

from typing import Any

import pytest
from torch.testing import assert_close
from training import batch, copy_of, network, optimizer_of, same, train

from cases import CASES, Case
from natgrad import KFAC, Deflated, EigenCorrected, KLLimit
from natgrad.fishers import Coupled
from natgrad.matrix import Spectral
from natgrad.optim.curvature import LayerCurvature
from oracles import random_capture


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


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize(("carry", "before"), [("reseed", 16 / 40), ("rotate", 2), ("keep", 2)])
def test_what_is_measured_in_a_new_basis_starts_anew_where_it_is_seeded(carry: Any, before: float, draws: int) -> None:
    """A mean of batches: what a refresh finds counts as 16 of 40 examples, or as the two batches that are in it."""
    approximation = EigenCorrected(KFAC(), carry=carry)
    seen = [random_capture(number, "unshared") for number in range(4)]
    layer = LayerCurvature(approximation.observe(seen[0]), None, KFAC().assemble(KFAC().observe(seen[0])))
    for number, capture in enumerate(seen):
        layer = layer.merge(approximation, approximation.observe(capture), 0.99)
        if number % 2 == 0:
            layer = layer.refresh(approximation, 0.1)
            assert isinstance(layer.matrix, Spectral)
            start = layer.matrix.values
        layer = layer.correct(approximation, [capture] * draws, 0.99, 0.1)
    assert isinstance(layer.matrix, Spectral)
    third, fourth = (approximation.correct(layer.matrix, [capture], 0.0) for capture in seen[2:])
    assert isinstance(third, Spectral) and isinstance(fourth, Spectral)
    assert_close(layer.matrix.values, (before * start + third.values + fourth.values) / (before + 2))
