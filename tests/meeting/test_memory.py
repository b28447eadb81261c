"""Nothing grows: not with steps, nor with passes that are dropped, nor with optimizers and copies that are gone."""

from __future__ import annotations

import copy
import gc
import resource
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop import N, backward, batch, mlp, optimizer_of, train
from torch import Tensor, nn

from natgrad import EKFAC, FNGD, KFAC, Automatic, Categorical, NaturalGradient


def live() -> tuple[int, int]:
    """The numbers of tensors and of all objects of the collector that are alive."""
    gc.collect()
    objects = gc.get_objects()
    return sum(issubclass(type(x), Tensor) for x in objects), len(objects)


def resident() -> int:
    """The bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def steady(tensors: int = 0) -> Iterator[None]:
    """What is done here leaves no more tensors than this behind, and neither objects nor memory."""
    before, memory = live(), resident()
    yield
    after, grown = live(), resident() - memory
    assert after[0] - before[0] <= tensors
    assert after[1] - before[1] <= 50 + tensors
    assert grown < 3 * 2**20


SETTINGS: dict[str, dict[str, Any]] = {
    "limit": {},
    "default": {"step_size": Automatic(), "observe_every": 4, "refresh_every": 10},
    "own loss": {"likelihood": None},
    "eigenbasis": {"approximation": EKFAC(), "refresh_every": 10},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_steps_leave_nothing_behind(settings: str) -> None:
    model = mlp()
    chosen = dict(SETTINGS[settings])
    optimizer = optimizer_of(model, chosen.pop("approximation", None), **chosen)
    train(model, optimizer, range(30))
    data = batch(0)
    with steady():
        for _ in range(200):
            backward(model, optimizer, data)
            optimizer.step()


def test_two_thousand_steps_leave_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    optimizer = optimizer_of(model, observe_every=4, refresh_every=10)
    train(model, optimizer, range(30))
    data = batch(0)
    with steady():
        for _ in range(2000):
            backward(model, optimizer, data)
            optimizer.step()


DROPPED: dict[str, Callable[[nn.Module, NaturalGradient, tuple[Tensor, Tensor]], Any]] = {
    "never sent back": lambda model, optimizer, data: model(data[0]),
    "reset": lambda model, optimizer, data: optimizer.zero_grad() if model(data[0]) is not None else None,
    "a loss": lambda model, optimizer, data: F.cross_entropy(model(data[0]), data[1]),
    "a gradient": lambda model, optimizer, data: torch.autograd.grad(model(data[0]).sum(), list(model.parameters())),
    "a backward pass without a step": backward,
    "evaluation": lambda model, optimizer, data: torch.no_grad()(model)(data[0]),
}


@pytest.mark.parametrize("likelihood", [Categorical(), None], ids=["likelihood", "own loss"])
@pytest.mark.parametrize("dropped", DROPPED)
def test_passes_without_a_step_leave_nothing_behind(dropped: str, likelihood: Any) -> None:
    model = mlp()
    optimizer = optimizer_of(model, likelihood=likelihood)
    train(model, optimizer, range(5))
    backward(model, optimizer, batch(0))
    for _ in range(10):
        DROPPED[dropped](model, optimizer, batch(0))
    data = batch(0)
    with steady(tensors=4):
        for _ in range(300):
            DROPPED[dropped](model, optimizer, data)
    train(model, optimizer, range(5, 8))


def test_inputs_and_activations_of_dropped_passes_are_free_at_once() -> None:
    """Without the collector: a training loop that fills its memory between two collections is out of it, too."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for likelihood in (Categorical(), None):
        optimizer = optimizer_of(model, likelihood=likelihood)
        train(model, optimizer, range(5))
        gc.collect()
        gc.disable()
        try:
            counts = []
            for _ in range(20):
                model(torch.randn(N, 4))
                counts.append(sum(issubclass(type(x), Tensor) for x in gc.get_objects(generation=0)))
        finally:
            gc.enable()
        assert counts[-1] <= counts[2]
        optimizer._engine.close()


MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "KFAC": lambda model: NaturalGradient(model, KFAC(), likelihood=Categorical()),
    "default": lambda model: NaturalGradient(model),
    "EKFAC": lambda model: NaturalGradient(model, EKFAC(), likelihood=Categorical(), calls=("forward",)),
    "FNGD": lambda model: FNGD(model, 10, lr=1e-3),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("own", [True, False], ids=["own model", "one model"])
@pytest.mark.parametrize("maker", MAKERS)
def test_optimizers_that_are_gone_leave_nothing_behind(maker: str, own: bool, trained: bool) -> None:
    shared, data = mlp(), batch(0)

    def once() -> None:
        model = mlp() if own else shared
        optimizer = MAKERS[maker](model)
        if trained:
            backward(model, optimizer, data)
            optimizer.step()
        model.zero_grad()

    for _ in range(5):
        once()
    keys = set(vars(shared))
    with steady():
        for _ in range(40 if trained else 200):
            once()
    assert set(vars(shared)) == keys and not any(getattr(m, "_forward_hooks", {}) for m in shared.modules())
    for p in shared.parameters():
        assert not p._post_accumulate_grad_hooks and not p._backward_hooks


@pytest.mark.parametrize("pending", [True, False])
def test_copies_leave_nothing_behind(pending: bool) -> None:
    model = mlp()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    output = model(batch(0)[0]) if pending else None
    for _ in range(5):
        copy.deepcopy(model)
    with steady():
        for _ in range(100):
            copy.deepcopy(model)
            copy.deepcopy(optimizer.state_dict())
    kept = [copy.deepcopy(model) for _ in range(10)]
    parameters = sum(1 for twin in kept for _ in twin.parameters())
    before, _ = live()
    del kept
    assert before - live()[0] == parameters
    assert output is None or output.requires_grad


def test_a_model_is_free_while_its_optimizer_is_gone_and_the_other_way_round() -> None:
    model = mlp()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None and "_compiled_call_impl" not in vars(model)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    lost = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert lost() is None
