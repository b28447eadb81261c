"""The default in odd programs: what once went wrong in them."""

from __future__ import annotations

import copy

import pytest
import torch
from loop import mlp, train
from torch import nn

from natgrad import Automatic, Categorical, NaturalGradient
from natgrad.optim.averages import mean_squares
from natgrad.optim.step_size import Situation


def _of_the_model() -> tuple[nn.Module, NaturalGradient]:
    model = mlp()
    optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=Automatic(look=2, agreement=0.0))
    train(model, optimizer, [0] * 6)
    assert optimizer.statistics()["precise"] == 1.0
    return model, optimizer


def test_steps_of_learning_rate_zero_say_nothing_against_the_model() -> None:
    model, optimizer = _of_the_model()
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, [0])  # compares the step before
    before = optimizer.statistics()
    train(model, optimizer, [0] * 12)
    after = optimizer.statistics()
    assert [after.get(name) for name in ("precise", "trust", "seen")] == [
        before[name] for name in ("precise", "trust", "seen")
    ]


def test_a_step_of_length_zero_leaves_no_promise() -> None:
    ones = dict.fromkeys(("DBD", "DFD", "PBP", "PFP", "DID", "PIP"), 1.0)
    read = {"slope": 1.0, "drift": 0.0, **ones, "DBP": 0.0, "DFP": 0.0, "DIP": 0.0}
    memory = {"precise": 1.0, "moved": 1.0, "slope": -1.0, "promise": 1.0, "known": 0.0, "bend": 0.0, "last": 0.1}
    promised = {lr: "promise" in Automatic().decide(Situation(read, lr, memory=memory)).memory for lr in (0.0, 1.0)}
    assert promised == {0.0: False, 1.0: True}


def test_mean_squares_of_half_precision_do_not_vanish() -> None:
    blocks = {"a": torch.full((3, 4), 1e-4, dtype=torch.float16)}
    torch.testing.assert_close(mean_squares(blocks), torch.full((1,), 1e-8, dtype=torch.float32), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("schedule", [torch.optim.lr_scheduler.LambdaLR, None])
def test_a_checkpoint_without_a_schedule_loads_after_one_was_made(schedule: type | None) -> None:
    model, resumed = mlp(), mlp()
    optimizer = NaturalGradient(model, likelihood=Categorical())
    train(model, optimizer, range(2))
    second = NaturalGradient(resumed, likelihood=Categorical())
    if schedule is not None:
        schedule(second, lambda step: 1.0)
    resumed.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained, own in ((model, optimizer), (resumed, second)):
        train(trained, own, range(2, 5))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))
