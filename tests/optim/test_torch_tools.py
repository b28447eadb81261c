"""What surrounds an optimizer in torch: schedulers, scaled and clipped gradients, autocast, closures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from training import backward, batch, copy_of, network, optimizer_of, same, train, values

from natgrad import Automatic, Constant, KLLimit, NaturalGradient
from oracles import assert_equal

# Schedulers.


def test_lambda_lr_scales_the_step() -> None:
    steps = []
    for scale in (1.0, 0.25):
        model = network()
        optimizer = optimizer_of(model, step_size=Constant())
        LambdaLR(optimizer, {1.0: lambda step: 1.0, 0.25: lambda step: 0.25}[scale])
        before = values(model)
        train(model, optimizer, [batch()])
        steps.append([new - old for new, old in zip(values(model), before, strict=True)])
    for whole, quarter in zip(*steps, strict=True):
        assert_equal(quarter, 0.25 * whole, 1e-6)


@pytest.mark.parametrize("step_size", [Automatic(), Constant(), KLLimit()], ids=lambda policy: type(policy).__name__)
def test_a_learning_rate_of_zero_moves_nothing_and_training_goes_on_afterwards(step_size: Any) -> None:
    model = network()
    optimizer = optimizer_of(model, step_size=step_size, weight_decay=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 0.0 if step in (0, 3) else 1.0)
    for step in range(6):
        before = values(model)
        train(model, optimizer, [batch(step)])
        assert same(values(model), before) == (step in (0, 3))
        scheduler.step()


def test_one_cycle_lr_drives_lr_and_momentum() -> None:
    model = network()
    optimizer = optimizer_of(model, step_size=KLLimit())
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    seen = []
    for step in range(5):
        train(model, optimizer, [batch(step)])
        assert optimizer.statistics()["mu"] == optimizer.param_groups[0]["momentum"]
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        scheduler.step()
    assert len(set(seen)) == 5
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_reduce_lr_on_plateau_reduces() -> None:
    model = network()
    optimizer = optimizer_of(model)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for step in range(3):
        train(model, optimizer, [batch(step)])
        scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005]


# Scaled gradients.


def scaled_step(model: nn.Module, optimizer: NaturalGradient, scaler: Any, data: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(data[0]), data[1])).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("empirical", [False, True])
def test_a_grad_scaler_changes_nothing(empirical: bool) -> None:
    plain, scaled = network(), network()
    likelihood: Any = {"likelihood": None} if empirical else {}
    train(plain, optimizer_of(plain, **likelihood), [batch(step) for step in range(6)])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    optimizer = optimizer_of(scaled, grad_scaler=scaler if empirical else None, **likelihood)
    for step in range(6):
        scaled_step(scaled, optimizer, scaler, batch(step))
    for found, expected in zip(values(scaled), values(plain), strict=True):
        assert_equal(found, expected, 1e-10)


@pytest.mark.parametrize("empirical", [False, True])
def test_a_step_that_the_scaler_skips_leaves_no_record_and_uses_no_labels(empirical: bool) -> None:
    def few(disturbed: bool) -> list[Tensor]:
        model = network()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        settings: Any = {"likelihood": None, "grad_scaler": scaler} if empirical else {}
        optimizer = optimizer_of(model, **settings)
        for step in range(4):
            if disturbed and step == 2:
                x, y = batch(40)
                scaled_step(model, optimizer, scaler, (x * float("inf"), y))
                assert optimizer.steps == 2
                optimizer.zero_grad()
                assert not optimizer._engine.pending
            scaled_step(model, optimizer, scaler, batch(step))
            assert not optimizer._engine.pending
        return values(model)

    for found, expected in zip(few(True), few(False), strict=True):
        assert_equal(found, expected, 1e-12)


@pytest.mark.parametrize("likelihood", [True, False])
def test_bfloat16_autocast_with_a_scaler_trains_a_float32_model(likelihood: bool) -> None:
    model = network().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    settings: Any = {} if likelihood else {"likelihood": None, "grad_scaler": scaler}
    optimizer = optimizer_of(model, **settings)
    losses = []
    for step in range(12):
        x, y = batch(step, 32)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert optimizer.steps == 12
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)], ids=str)
@pytest.mark.parametrize("likelihood", [True, False])
def test_a_step_under_autocast_is_that_in_single_precision(
    likelihood: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """To a few units of rounding of the lower precision: 2^-8 of bfloat16, 2^-11 of float16."""
    settings: Any = {"step_size": Constant(), "momentum": 0.0, "damping": 0.1, "estimator": "exact"}
    settings |= {} if likelihood else {"likelihood": None, "estimator": None}
    steps = []
    for enabled in (True, False):
        model = network().float()
        before = values(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=enabled)
        optimizer = optimizer_of(model, grad_scaler=None if likelihood else scaler, **settings)
        x, y = batch(0, 64)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = F.cross_entropy(model(x.float()), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(torch.cat([(p - old).flatten() for p, old in zip(values(model), before, strict=True)]))
    assert_equal(steps[0], steps[1], tolerance)


# Clipped gradients.


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_clipping_acts_on_the_gradient_and_not_on_the_curvature(clip: Callable[[Any, float], Any]) -> None:
    model, reference = network(), network()
    optimizer, unclipped = (optimizer_of(m, step_size=Constant(), momentum=0.0) for m in (model, reference))
    backward(model, optimizer, batch())
    backward(reference, unclipped, batch())
    clip(model.parameters(), 0.05)
    optimizer.step()
    unclipped.step()
    for name, layer in optimizer.layers.items():
        state, other = (
            o.state[m.get_parameter(f"{name}.weight")] for o, m in ((optimizer, model), (unclipped, reference))
        )
        assert torch.equal(state["stats.A"], other["stats.A"])
        assert torch.equal(state["stats.G"], other["stats.G"])
        clipped = layer.pack([p.grad for p in layer.parameters if p.grad is not None])
        assert torch.equal(state["momentum"], unclipped._now[name].inverse @ clipped)
        assert not torch.equal(state["momentum"], other["momentum"])


# Closures.


def test_step_with_a_closure_returns_its_loss_and_equals_the_step_without() -> None:
    plain, closed = network(), network()
    losses = train(plain, optimizer_of(plain), [batch(step) for step in range(4)])
    optimizer = optimizer_of(closed)
    for step, expected in enumerate(losses):
        assert torch.equal(optimizer.step(partial(backward, closed, optimizer, batch(step))), expected)
    assert same(values(closed), values(plain))
    assert optimizer_of(network()).step() is None


@pytest.mark.parametrize("where", ["after the forward", "after the backward"])
def test_a_closure_that_raises_leaves_everything_as_before(where: str) -> None:
    model, reference = network(), network()
    optimizer = optimizer_of(model)
    train(model, optimizer, [batch(0), batch(1)])
    before = values(model), copy_of(optimizer)

    def closure() -> Tensor:
        loss = F.cross_entropy(model(batch(9)[0]), batch(9)[1])
        if where == "after the backward":
            loss.backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert same((values(model), copy_of(optimizer)), before)
    assert not optimizer._engine.pending
    train(model, optimizer, [batch(2), batch(3)])
    train(reference, optimizer_of(reference), [batch(step) for step in range(4)])
    assert same(values(model), values(reference))
