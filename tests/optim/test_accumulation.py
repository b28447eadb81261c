"""Micro-batches add up to the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import FOUR, batch, network, optimizer_of, train, values

from natgrad import (
    KPSVD,
    AdaptiveKLLimit,
    Automatic,
    Constant,
    CorrectedKFAC,
    Deflated,
    ExactQuadraticModel,
    KLLimit,
    Lanczos,
    NaturalGradient,
    QuadraticModel,
)
from oracles import assert_equal

POLICIES = [Automatic(), Constant(), KLLimit(), AdaptiveKLLimit(), QuadraticModel(), ExactQuadraticModel()]
STEPS = 8


def in_parts(model: nn.Module, optimizer: NaturalGradient, parts: int, together: bool = False) -> None:
    """One step on every batch, in micro-batches: each with its own backward pass, or all with one."""
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        losses = []
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = F.cross_entropy(model(x_part), y_part) / parts
            losses.append(loss)
            if not together:
                loss.backward()
        if together:
            torch.stack(losses).sum().backward()
        optimizer.step()


def check(parts: int = 4, together: bool = False, approximation: Any = None, **settings: Any) -> None:
    settings = {"observe_fraction": 1.0, **settings}
    whole, split = network(), network()
    train(whole, optimizer_of(whole, approximation, **settings), [batch(step) for step in range(STEPS)])
    in_parts(split, optimizer_of(split, approximation, **settings), parts, together)
    for found, expected in zip(values(split), values(whole), strict=True):
        assert_equal(found, expected, 1e-10)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_four_micro_batches_equal_the_one_batch(policy: Any) -> None:
    check(step_size=policy)


@pytest.mark.parametrize("make", [*FOUR, KPSVD, Deflated, Lanczos, CorrectedKFAC])
def test_four_micro_batches_equal_the_one_batch_under_every_approximation(make: Any) -> None:
    check(approximation=make(), step_size=KLLimit())


def test_micro_batches_without_a_likelihood_equal_the_one_batch() -> None:
    check(likelihood=None)


def test_several_draws_of_micro_batches_equal_those_of_the_one_batch() -> None:
    check(draws=3)


def test_several_forwards_before_one_backward_equal_the_one_batch() -> None:
    check(together=True)
    check(together=True, likelihood=None)
