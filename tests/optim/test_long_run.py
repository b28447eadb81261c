"""Some hundred steps on noisy labels: what a schedule and a checkpoint meet in a long run."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from training import Batch, backward, batch, network, noise, optimizer_of, through_a_file

from natgrad import NaturalGradient

STEPS, CUT = 600, 303


def noisy(step: int) -> Batch:
    """One label in five is drawn at random."""
    x, y = batch(step, n=16)
    drawn = torch.rand(16, generator=torch.Generator().manual_seed(step)) < 0.2
    return x, torch.where(drawn, noise(step, n=16)[1], y)


def schedule_of(optimizer: NaturalGradient) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, T_max=STEPS)


def flat(model: nn.Module) -> Tensor:
    covered = [p for name, p in model.named_parameters() if not name.startswith("2.")]
    return nn.utils.parameters_to_vector(covered).detach()


@cache
def run(scheduled: bool, cut: int | None = None) -> tuple[Tensor, list[float], list[float]]:
    """The weights at the end; the lengths of the steps and the losses."""
    model = network()
    optimizer = optimizer_of(model, refresh_every=None)
    schedule = schedule_of(optimizer) if scheduled else None
    lengths, losses, before = [], [], flat(model)
    for step in range(STEPS):
        if step == cut:
            parts = (model.state_dict(), optimizer.state_dict(), schedule.state_dict() if schedule else {})
            saved = through_a_file(parts)
            model = network(seed=9)
            optimizer = optimizer_of(model, refresh_every=None)
            model.load_state_dict(saved[0])
            if schedule is not None:
                schedule = schedule_of(optimizer)
                schedule.load_state_dict(saved[2])
            optimizer.load_state_dict(saved[1])
        losses.append(backward(model, optimizer, noisy(step)).item())
        optimizer.step()
        if schedule is not None:
            schedule.step()
        after = flat(model)
        lengths.append((after - before).norm().item())
        before = after
    return before, lengths, losses


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_without_a_schedule_steps_shorten_no_faster_than_1_over_t() -> None:
    _, lengths, _ = run(scheduled=False)
    means = {t: mean(lengths[t - 50 : t]) for t in (75, 150, 300, 600)}
    powers = [math.log2(means[2 * t] / means[t]) for t in (75, 150, 300)]
    assert all(-1 < power < 0 for power in powers), powers


def test_under_a_cosine_steps_shorten_with_it_and_the_loss_falls() -> None:
    _, lengths, losses = run(scheduled=True)
    means = [mean(lengths[t - 50 : t]) for t in (150, 300, 450, 600)]
    assert means == sorted(means, reverse=True)
    falling = [mean(losses[t - 150 : t]) for t in (150, 300, 450, 600)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("scheduled", [False, True], ids=["no schedule", "cosine"])
def test_a_long_run_resumes_bit_for_bit(scheduled: bool) -> None:
    assert torch.equal(run(scheduled=scheduled, cut=CUT)[0], run(scheduled=scheduled)[0])
