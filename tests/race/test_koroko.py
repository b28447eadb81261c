"""The rule of Koroko et al. in the units of this library, and their curvature that is never refreshed."""

import pytest
import torch

from natgrad import KFAC, KLLimit, NaturalGradient
from natgrad.fishers import pool
from natgrad.matrix import Dense
from natgrad.optim.step_size import Situation
from natgrad.race.networks import perceptron
from natgrad.race.reproduce.koroko import Frozen, UnscaledKLLimit, row
from oracles import assert_equal, random_capture


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_a_step_is_theirs_whatever_the_scale_of_the_loss(size: float) -> None:
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    s, lr, damping, kappa = 1 / 784, 0.1, 3e-3, 1e-2
    X, M = torch.randn(12, 20, generator=generator), size * torch.randn(3, 4, generator=generator)
    F = X @ X.mT / 20  # of the loss; theirs is s F
    theirs = (Dense(s * F, (3, 4)).inverse(damping)) @ M
    expected = lr * min(1, (kappa / float((theirs * M).sum())) ** 0.5) * theirs

    entry = row("kfac", "kfac", s, lr, damping)
    D = Dense(F, (3, 4)).inverse(entry.first["damping"]) @ M
    now = Situation({"slope": float((D * M).sum()), "drift": 0.0}, lr=entry.first["lr"])
    alpha = entry.settings["step_size"].decide(now).alpha
    assert_equal(entry.first["lr"] * alpha * D, expected)
    assert (alpha < 1) == (size > 1)


def test_the_limit_does_not_shrink_with_the_learning_rate() -> None:
    short, long = (Situation({"slope": 4.0, "drift": 0.0}, lr=lr) for lr in (0.01, 10.0))
    policy = UnscaledKLLimit(1.0)
    assert policy.decide(short).alpha == policy.decide(long).alpha == pytest.approx(0.5)
    assert KLLimit(1.0).decide(short).alpha == 1 and KLLimit(1.0).decide(long).alpha == pytest.approx(0.05)


def test_frozen_statistics_are_those_of_the_first_observation() -> None:
    torch.set_default_dtype(torch.float64)
    frozen, first, second = Frozen(KFAC()), random_capture(0), random_capture(1)
    kept = frozen.merge(frozen.merge(None, frozen.observe(first), 0.0), frozen.observe(second), 0.95)
    assert_equal(frozen.assemble(kept).dense(), KFAC().assemble(pool([KFAC().observe(first)])).dense())


def test_frozen_curvature_does_not_change_in_training() -> None:
    torch.manual_seed(0)
    model = perceptron(8, 6, 4)
    optimizer = NaturalGradient(
        model, Frozen(KFAC()), damping=0.1, observe_every=1, refresh_every=1, step_size=KLLimit()
    )
    x, y = torch.randn(32, 8), torch.randint(4, (32,))
    inverses = []
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        inverses.append(optimizer.state[next(model.parameters())]["inverse.left"].clone())
    assert all(torch.equal(inverse, inverses[0]) for inverse in inverses)
