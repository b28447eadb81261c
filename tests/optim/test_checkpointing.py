"""Activation checkpoints, of both kinds and at every level: the same parameters, and every call counted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from training import backward, batch, network, optimizer_of, same, train, values, weights

from natgrad import FNGD, KLLimit, NaturalGradient
from natgrad.fngd import Quantile
from oracles import assert_equal

BATCHES = [batch(step) for step in range(6)]
SETTINGS: dict[str, dict[str, Any]] = {
    "drawn labels": {},
    "the user's gradients": {"likelihood": None},
    "a policy that seldom reads": {"step_size": KLLimit(), "observe_every": 2},
    "weighed examples": {"first_phase": 2},
    "examples weighed by their rank": {"first_phase": 2, "coefficients": Quantile()},
}


class Checkpointed(nn.Module):
    """``network()`` under checkpoints that ``run`` places."""

    def __init__(self, run: Callable[[nn.Sequential, Tensor], Tensor], dropout: float = 0.0) -> None:
        super().__init__()
        self.net, self.run = network(), run
        self.net.insert(2, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.net, x.detach().requires_grad_())


def plain(net: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = net(x)
    return y


def part(reentrant: bool) -> Callable[[nn.Sequential, Tensor], Tensor]:
    return lambda net, x: plain(net[2:], checkpoint(net[:2], x, use_reentrant=reentrant))


def whole(reentrant: bool) -> Callable[[nn.Sequential, Tensor], Tensor]:
    return lambda net, x: checkpoint(net, x, use_reentrant=reentrant)


def segments(reentrant: bool) -> Callable[[nn.Sequential, Tensor], Tensor]:
    return lambda net, x: checkpoint_sequential(net, 2, x, use_reentrant=reentrant)


def nested(reentrant: bool) -> Callable[[nn.Sequential, Tensor], Tensor]:
    def inner(net: nn.Sequential, x: Tensor) -> Tensor:
        return plain(net[4:], checkpoint(net[:4], x, use_reentrant=reentrant))

    return lambda net, x: checkpoint(lambda x: inner(net, x), x, use_reentrant=reentrant)


def made(model: nn.Module, settings: dict[str, Any]) -> NaturalGradient | FNGD:
    return FNGD(model, **settings) if "first_phase" in settings else optimizer_of(model, **settings)


def observations(optimizer: NaturalGradient | FNGD) -> list[int]:
    """How often every layer was observed; by FNGD, how many batches had the position that most had."""
    states = [optimizer.state[weight] for weight in weights(optimizer)]
    return [int(state["seen"].max()) if "seen" in state else state["observations"] for state in states]


def trained(run: Callable[[nn.Sequential, Tensor], Tensor], **settings: Any) -> tuple[list[Tensor], list[int]]:
    model = Checkpointed(run)
    optimizer = made(model, settings)
    train(model, optimizer, BATCHES)
    return values(model), observations(optimizer)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("place", [part, whole, segments, nested])
def test_checkpoints_within_the_model_change_nothing(place: Any, reentrant: bool, settings: Any) -> None:
    found, expected = trained(place(reentrant), **settings), trained(plain, **settings)
    assert found[1] == expected[1] and min(found[1]) >= 2
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert_equal(mine, theirs, 1e-12)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_model_changes_nothing(reentrant: bool, settings: Any) -> None:
    found = []
    for checkpointed in (True, False):
        model: Any = network()
        optimizer = made(model, settings)
        for x, y in BATCHES:
            optimizer.zero_grad()
            for micro in range(2):  # of which the second comes after a backward pass of the first
                part_x, part_y = x.chunk(2)[micro], y.chunk(2)[micro]
                if checkpointed:
                    output = checkpoint(model, part_x.requires_grad_(), use_reentrant=reentrant)
                else:
                    output = model(part_x)
                (F.cross_entropy(output, part_y) / 2).backward()
            optimizer.step()
        found.append((values(model), observations(optimizer)))
    assert found[0][1] == found[1][1] and min(found[0][1]) >= 2
    for mine, theirs in zip(found[0][0], found[1][0], strict=True):
        assert_equal(mine, theirs, 1e-12)


@pytest.mark.parametrize("place", [part, whole, segments, nested])
def test_dropout_and_gradients_are_those_of_the_reentrant_checkpoint(place: Any) -> None:
    found = []
    for observed in (True, False):
        model = Checkpointed(place(True), dropout=0.4)
        optimizer = optimizer_of(model) if observed else torch.optim.SGD(model.parameters())
        torch.manual_seed(4)
        backward(model, optimizer, BATCHES[0])
        found.append([p.grad for p in model.parameters()])
    assert same(*found)


def test_an_input_without_gradient_leaves_a_reentrant_checkpoint_without_gradients() -> None:
    model: Any = network()
    optimizer = optimizer_of(model)
    body = model[:2]
    model.forward = lambda x: model[2:](checkpoint(body, x, use_reentrant=True))
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        backward(model, optimizer, BATCHES[0])
    assert model[0].weight.grad is None and model[3].weight.grad is not None
    optimizer.step()
