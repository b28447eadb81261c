"""Lower precision by itself where products in it are faster: tested the same on every processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import batch, copy_of, optimizer_of, same, through_a_file, train, values

from natgrad import Constant, NaturalGradient
from natgrad.layers import Layer
from natgrad.optim import precision
from natgrad.optim.precision import Precision
from oracles import assert_equal, error

Pair = tuple[nn.Sequential, NaturalGradient]


def measure(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """A processor that gains by bfloat16, or one that does not, whichever it is."""
    monkeypatch.setattr(precision, "fast_bfloat16", lambda kind: fast)


def layer_of(module: nn.Module) -> Layer:
    (layer,) = optimizer_of(nn.Sequential(module)).layers.values()
    return layer


@pytest.mark.parametrize("fast", [True, False])
def test_only_large_blocks_in_float32_on_a_processor_that_gains_are_multiplied_in_bfloat16(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(monkeypatch, fast)
    auto = Precision("auto")
    large, small = (layer_of(nn.Linear(128, out, bias=False).float()) for out in (128, 127))
    assert auto.fast(large) == (torch.bfloat16 if fast else None)
    assert auto.fast(layer_of(nn.Conv2d(16, 114, 3, bias=False).float())) == auto.fast(large)  # of the block's size
    others = [nn.Linear(128, 128).double(), nn.Linear(128, 128).bfloat16(), nn.Conv2d(16, 113, 3, bias=False).float()]
    for other in [small, *map(layer_of, others)]:
        assert auto.fast(other) is None
    assert Precision(torch.bfloat16).fast(small) == torch.bfloat16  # asked for by name
    assert Precision(torch.float32).fast(large) is None


def test_the_processor_is_measured_once_and_the_answer_is_the_same_ever_after() -> None:
    assert precision.fast_bfloat16("cpu") in (True, False)
    assert len({precision.fast_bfloat16("cpu") for _ in range(20)}) == 1
    assert precision.fast_bfloat16.cache_info().misses <= 2  # one for each kind of device
    assert not precision.fast_bfloat16("meta")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 3)).float()


def begun(**settings: Any) -> Pair:
    """A network with one large layer."""
    model = network()
    return model, optimizer_of(model, step_size=Constant(), damping=0.1, **settings)


def step(model: nn.Module, optimizer: NaturalGradient) -> None:
    x, y = batch(0, 32)
    train(model, optimizer, [(x.float(), y)])


def moved(**settings: Any) -> Tensor:
    """Where one step leads."""
    model, optimizer = begun(**settings)
    start = values(model)
    step(model, optimizer)
    return torch.cat([(p - old).flatten() for p, old in zip(values(model), start, strict=True)])


def test_a_step_in_bfloat16_is_that_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """To a few units of rounding of bfloat16, 2^-8; in float32 alone to the last bit."""
    measure(monkeypatch, True)
    fast, named = moved(), moved(precision=torch.bfloat16)
    measure(monkeypatch, False)
    slow = moved()
    assert error(fast, slow) > 0 and error(fast, named) > 0  # the named one has small layers in it too
    assert_equal(fast, slow, 0.03)
    assert torch.equal(slow, moved(precision=torch.float32))


@pytest.mark.parametrize("fast", [True, False])
def test_a_run_keeps_its_choice_where_it_resumes(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine where another one would be made."""
    measure(monkeypatch, fast)
    unbroken = begun()
    step(*unbroken)
    weights, state = through_a_file(unbroken[0].state_dict()), copy_of(unbroken[1])
    measure(monkeypatch, not fast)
    resumed = begun()
    resumed[0].load_state_dict(weights)
    resumed[1].load_state_dict(state)
    for model, optimizer in (unbroken, resumed):
        step(model, optimizer)
        step(model, optimizer)
    assert same(values(unbroken[0]), values(resumed[0]))


def test_a_checkpoint_that_is_refused_leaves_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, True)
    model, optimizer = begun()
    step(model, optimizer)
    state = copy_of(optimizer)
    state["param_groups"][0]["bfloat16"] = {"cpu": False}
    state["state"][2]["inverse.left"] = torch.eye(3)
    other = begun()
    for pair in ((model, optimizer), other):
        step(*pair)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(state)
    step(model, optimizer)
    step(*other)
    step(*other)
    assert optimizer.param_groups[0]["bfloat16"] == {"cpu": True}
    assert same(values(model), values(other[0]))
