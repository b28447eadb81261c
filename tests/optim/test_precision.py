"""Lower precision by itself where the processor has matrix units for it: tested the same on every processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import batch, optimizer_of, train, values

from natgrad import Constant
from natgrad.optim.precision import fast_dtype
from oracles import assert_equal, error


def give_tiles(monkeypatch: pytest.MonkeyPatch, tiles: bool) -> None:
    """A processor with matrix units for bfloat16, or one without, whichever it is."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles, raising=False)


@pytest.mark.parametrize("tiles", [True, False])
def test_only_large_blocks_in_float32_on_a_processor_with_matrix_units_are_multiplied_in_bfloat16(
    tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_tiles(monkeypatch, tiles)
    large = torch.zeros(128, 128, dtype=torch.float32)
    assert fast_dtype("auto", large) == (torch.bfloat16 if tiles else None)
    for other in (large[1:], large.double(), large.bfloat16()):
        assert fast_dtype("auto", other) is None
    assert fast_dtype(torch.bfloat16, large[1:]) == torch.bfloat16  # asked for by name
    assert fast_dtype(torch.float32, large) is None


def moved(**settings: Any) -> Tensor:
    """Where one step leads a network with one large layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 3)).float()
    start = values(model)
    optimizer = optimizer_of(model, step_size=Constant(), damping=0.1, **settings)
    x, y = batch(0, 32)
    train(model, optimizer, [(x.float(), y)])
    return torch.cat([(p - old).flatten() for p, old in zip(values(model), start, strict=True)])


def test_a_step_with_matrix_units_is_that_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a few units of rounding of bfloat16, 2^-8; in float32 alone to the last bit."""
    give_tiles(monkeypatch, True)
    fast, named = moved(), moved(precision=torch.bfloat16)
    give_tiles(monkeypatch, False)
    slow = moved()
    assert error(fast, slow) > 0 and error(fast, named) > 0  # the named one has small layers in it too
    assert_equal(fast, slow, 0.03)
    assert torch.equal(slow, moved(precision=torch.float32))
