"""Accelerate: prepared models and optimizers, accumulation, bfloat16, ``save_state``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import classifier, digits, distance, plain_digits, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from natgrad import EKFAC, Categorical, NaturalGradient

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _accelerators_do_not_share_a_state() -> Iterator[None]:
    reset()
    yield
    reset()


def reset() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(
    model: nn.Module, n: int = 256, size: int = 64, steps: dict[str, Any] | None = None, **settings: Any
) -> tuple[Any, Any, Any, Any]:
    """An accelerator, and what it makes of the model, its optimizer and the digits in their order."""
    reset()
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    optimizer = NaturalGradient(model, EKFAC(), likelihood=Categorical(), **(steps or {}))
    loader = DataLoader(TensorDataset(*digits(n)), size)
    return accelerator, *accelerator.prepare(model, optimizer, loader)


def epoch(accelerator: Any, model: nn.Module, optimizer: Any, loader: Any) -> float:
    """The mean of the losses."""
    losses = []
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def trained(model: nn.Module, epochs: int = 2, **settings: Any) -> list[float]:
    accelerator, *rest = prepared(model, **settings)
    return [epoch(accelerator, *rest) for _ in range(epochs)]


def plainly(epochs: int = 2, size: int = 64, autocast: bool = False) -> nn.Module:
    model = classifier().float() if autocast else classifier()
    x, y = digits(256)
    data = [[xs.to(model[0].weight.dtype), ys] for xs, ys in zip(x.split(size), y.split(size), strict=True)]
    return plain_digits(model, NaturalGradient(model, EKFAC(), likelihood=Categorical()), data * epochs, autocast)


def test_training_is_a_plain_loop_and_learns() -> None:
    model = classifier()
    losses = trained(model, 14)
    assert losses[0] > 1.0
    assert losses[-1] < 0.1
    assert same(model, plainly(14))


def test_four_micro_batches_equal_the_one_batch() -> None:
    whole, split = classifier(), classifier()
    trained(whole, size=64)
    trained(split, size=16, gradient_accumulation_steps=4)
    assert distance(split, whole) < 1e-10


def test_an_incomplete_accumulation_at_the_end_steps_too() -> None:
    """6 micro-batches in groups of 4: the last two make a step, which Accelerate still divides by 4."""
    model = classifier()
    accelerator, *rest = prepared(model, n=96, size=16, gradient_accumulation_steps=4)
    epoch(accelerator, *rest)
    optimizer = rest[1].optimizer
    assert optimizer.steps == 2
    assert not optimizer._engine.pending


def test_bfloat16_is_a_plain_loop_under_autocast() -> None:
    torch.set_default_dtype(torch.float32)
    model = classifier()
    losses = trained(model, 14, mixed_precision="bf16")
    assert losses[-1] < 0.1
    assert same(model, plainly(14, autocast=True))
    single = classifier()
    trained(single, 14)
    assert not same(model, single)  # it was in bfloat16


def test_a_run_from_a_saved_state_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    """Dropout included: its random numbers are in the saved state, those of the labels depend on the step alone."""

    def noisy() -> tuple[Any, nn.Module, Any, Any, Any]:
        model = nn.Sequential(nn.Dropout(0.2), *classifier())
        accelerator, model, optimizer, loader = prepared(model, steps={"refresh_every": 3})
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return accelerator, model, optimizer, loader, accelerator.prepare(schedule)

    accelerator, model, optimizer, loader, schedule = noisy()
    for k in range(4):
        if k == 2:
            accelerator.save_state(str(tmp_path))
        epoch(accelerator, model, optimizer, loader)
        schedule.step()

    accelerator, resumed, second, loader, schedule = noisy()
    accelerator.load_state(str(tmp_path))
    for _ in range(2):
        epoch(accelerator, resumed, second, loader)
        schedule.step()
    assert second.optimizer.steps == optimizer.optimizer.steps == 16
    assert second.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 1
    assert same(resumed, model)


def test_clipping_acts_on_the_gradient() -> None:
    model, reference = classifier(), classifier()
    accelerator, wrapped, optimizer, loader = prepared(model)
    plain = NaturalGradient(reference, EKFAC(), likelihood=Categorical())
    for x, y in loader:
        accelerator.backward(F.cross_entropy(wrapped(x), y))
        accelerator.clip_grad_norm_(wrapped.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        plain.step()
        plain.zero_grad()
    assert same(model, reference)


# accelerate, issue 3178: Shampoo had a state_dict of its own kind, which needed the names of parameters.


def halfway() -> tuple[nn.Module, NaturalGradient]:
    """A model that has already been trained, by an optimizer that is handed over with its curvature."""
    model = classifier()
    optimizer = NaturalGradient(model, EKFAC(), likelihood=Categorical())
    x, y = digits(256)
    plain_digits(model, optimizer, [[xs, ys] for xs, ys in zip(x.split(64), y.split(64), strict=True)])
    return model, optimizer


def as_it_is(optimizer: Any) -> Any:
    return optimizer


def wrapped(optimizer: Any) -> Any:
    """``prepare`` moves the state to the device and loads it again."""
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


@pytest.mark.parametrize("how", [as_it_is, wrapped])
def test_non_standard_state_dict_with_accelerate(how: Callable[[Any], Any], tmp_path: Path) -> None:
    """``state_dict`` needs no arguments, holds tensors and plain values, is keyed by numbers, and loads anywhere."""
    model, optimizer = halfway()
    saved = how(optimizer).state_dict()
    assert saved.keys() == {"state", "param_groups"}
    assert all(isinstance(key, int) for key in saved["state"])
    assert all(
        isinstance(value, (Tensor, int, float, str)) for values in saved["state"].values() for value in values.values()
    )
    torch.save({"model": model.state_dict(), "optimizer": saved}, tmp_path / "both.pt")
    both = torch.load(tmp_path / "both.pt", weights_only=True)
    resumed = classifier()
    second = how(NaturalGradient(resumed, EKFAC(), likelihood=Categorical()))
    resumed.load_state_dict(both["model"])
    second.load_state_dict(both["optimizer"])
    x, y = digits(256)
    plain_digits(model, optimizer, [[x, y]] * 3)
    plain_digits(resumed, second, [[x, y]] * 3)
    assert same(resumed, model)
