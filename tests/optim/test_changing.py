"""Parameters that come and go during training: frozen, unfrozen, added; and schedules for those that fell back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from training import batch, copy_of, network, optimizer_of, same, through_a_file, train, values

from natgrad import EKFAC, KLLimit, NaturalGradient
from oracles import assert_equal

BATCHES = [batch(step) for step in range(8)]


class Deep(nn.Sequential):
    """Three covered layers, the middle one of which sees gradients pass when it is frozen."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def test_a_layer_frozen_for_a_while_keeps_its_curvature_and_goes_on() -> None:
    model: Any = Deep()
    optimizer = optimizer_of(model, EKFAC(), observe_every=1)
    train(model, optimizer, BATCHES[:2])
    model[2].requires_grad_(False)
    before, seen = values(model[2]), optimizer.state[model[2].weight]["observations"]
    train(model, optimizer, BATCHES[2:5])
    assert same(values(model[2]), before)
    assert optimizer.state[model[2].weight]["observations"] == seen
    assert optimizer.state[model[0].weight]["observations"] == seen + 3
    model[2].requires_grad_(True)
    train(model, optimizer, BATCHES[5:])
    assert not same(values(model[2]), before)
    assert optimizer.state[model[2].weight]["observations"] == seen + 3


def test_a_run_that_is_resumed_while_a_layer_is_frozen_is_the_unbroken_one() -> None:
    found = []
    for breaks in ((), (3, 4)):
        model: Any = Deep()
        optimizer = optimizer_of(model, EKFAC(), observe_every=1)
        for step, data in enumerate(BATCHES):
            if step in breaks:
                saved = copy_of(optimizer)
                optimizer = optimizer_of(model.requires_grad_(True), EKFAC(), observe_every=1)
                optimizer.load_state_dict(saved)
            model[2].requires_grad_(step not in (2, 3))
            train(model, optimizer, [data])
        found.append((values(model), copy_of(optimizer)))
    assert same(*found)


def test_a_bias_frozen_on_the_way_stays_and_its_layer_starts_anew() -> None:
    model: Any = Deep()
    optimizer = optimizer_of(model, EKFAC(), observe_every=1, step_size=KLLimit())
    train(model, optimizer, BATCHES[:3])
    model[2].bias.requires_grad_(False)
    bias, weight = model[2].bias.detach().clone(), model[2].weight.detach().clone()
    train(model, optimizer, BATCHES[3:5])
    assert torch.equal(model[2].bias, bias) and not torch.equal(model[2].weight, weight)
    state = optimizer.state[model[2].weight]
    assert state["observations"] == 2 and state["stats.A"].shape == state["momentum"].shape == (6, 6)
    model[2].bias.requires_grad_(True)
    train(model, optimizer, BATCHES[5:])
    assert not torch.equal(model[2].bias, bias)
    assert optimizer.state[model[2].weight]["momentum"].shape == (6, 7)


@pytest.mark.parametrize("form", [list, iter])
def test_a_layer_unfrozen_later_is_added_with_its_curvature(form: Callable[[Any], Any]) -> None:
    model: Any = Deep()
    model[2].requires_grad_(False)
    optimizer = optimizer_of(model)
    train(model, optimizer, BATCHES[:3])
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": form(list(model[2].parameters())), "lr": 0.5})
    assert list(optimizer.layers) == ["0", "4"]  # what a pass has shown
    assert optimizer.param_groups[-1]["rule"] == "natural" and optimizer.param_groups[-1]["lr"] == 0.5
    before = values(model[2])
    LambdaLR(optimizer, lambda step: 0.9**step)  # sees all groups
    train(model, optimizer, BATCHES[3:])
    assert list(optimizer.layers) == ["0", "2", "4"]
    assert not same(values(model[2]), before)
    assert optimizer.state[model[2].weight]["observations"] > 0


def test_a_layer_added_before_the_first_pass_is_expected() -> None:
    model: Any = Deep()
    model[2].requires_grad_(False)
    optimizer = optimizer_of(model)
    assert list(optimizer.layers) == ["0", "4"]
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters()})
    assert list(optimizer.layers) == ["0", "2", "4"]


def test_a_weight_that_is_added_without_its_bias_trains_alone() -> None:
    model: Any = Deep()
    model[2].requires_grad_(False)
    optimizer = optimizer_of(model, observe_every=1)
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].weight})
    weight, bias = values(model[2])
    with pytest.warns(UserWarning, match=r"unfrozen since: 2.bias; hand them to add_param_group"):
        train(model, optimizer, BATCHES[:3])
    assert torch.equal(model[2].bias, bias) and not torch.equal(model[2].weight, weight)
    state = optimizer.state[model[2].weight]
    assert state["observations"] == 3 and state["momentum"].shape == (6, 6)
    assert optimizer.uncovered == {"2.bias": "in no group of parameters"}
    optimizer.add_param_group({"params": model[2].bias})
    train(model, optimizer, BATCHES[3:])
    assert not torch.equal(model[2].bias, bias) and not optimizer.uncovered
    assert optimizer.state[model[2].weight]["momentum"].shape == (6, 7)


def test_a_run_with_an_added_group_resumes_bit_for_bit() -> None:
    def start() -> tuple[Deep, NaturalGradient]:
        model: Any = Deep()
        model[2].requires_grad_(False)
        optimizer = optimizer_of(model)
        train(model, optimizer, BATCHES[:3])
        model[2].requires_grad_(True)
        optimizer.add_param_group({"params": model[2].parameters()})
        return model, optimizer

    for steps in (0, 2):
        model, optimizer = start()
        train(model, optimizer, BATCHES[3 : 3 + steps])
        saved = copy_of(optimizer), through_a_file(model.state_dict())
        fresh, renewed = start()
        renewed.load_state_dict(saved[0])
        fresh.load_state_dict(saved[1])
        train(model, optimizer, BATCHES[5:])
        train(fresh, renewed, BATCHES[5:])
        assert same((values(fresh), copy_of(renewed)), (values(model), copy_of(optimizer)))


def test_an_added_norm_is_stepped_by_adamw_with_the_settings_of_the_optimizer() -> None:
    model: Any = network()
    model[2].requires_grad_(False)
    optimizer = optimizer_of(model, adamw={"lr": 0.02})
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters()})
    before = model[2].bias.detach().clone()
    train(model, optimizer, BATCHES[:1])
    assert_equal((model[2].bias.detach() - before).abs(), torch.full((6,), 0.02), 1e-3)
    assert optimizer.uncovered["2.weight"] == "used by abs: no rule" and "used by tanh: no rule" in repr(optimizer)


def test_parameters_that_cannot_be_added_are_refused_and_change_nothing() -> None:
    model: Any = Deep()
    model[2].requires_grad_(False)
    optimizer = optimizer_of(model)
    hooks = len(model[2]._forward_hooks)
    model[2].requires_grad_(True)
    foreign, known = nn.Linear(5, 6).weight, model[0].weight
    twice = [model[2].weight, model[2].weight]
    wrong: list[dict[str, Any]] = [{"params": []}, {"params": foreign}, {"params": known}, {"params": twice}]
    for group in [*wrong, {"params": model[2].parameters(), "lr": -1.0}, {}]:
        with pytest.raises(ValueError, match=r"a group needs params|one parameter group|lr of the"):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1 and list(optimizer.layers) == ["0", "4"]
        assert len(model[2]._forward_hooks) == hooks


# Schedules.


class Unread(nn.Module):
    """Its second layer uses its weight in a way that has no rule, if ``by`` is none that stands for the weight."""

    def __init__(self, by: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.seen, self.hidden, self.by = nn.Linear(5, 5), nn.Linear(5, 3), by

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.hidden.parameters()
        return F.linear(self.seen(x), self.by(weight), bias)


def steps_of(share: float, training: bool, by: Callable[[Tensor], Tensor]) -> Tensor:
    """What the second step moves the weight by, at this share of the learning rate."""
    model = Unread(by).train(training)
    optimizer = optimizer_of(model, step_size=KLLimit())
    scheduler = LambdaLR(optimizer, [1.0, share].__getitem__)
    with nullcontext() if training else pytest.warns(UserWarning, match="not observed: seen.weight, .* hidden.weight"):
        train(model, optimizer, BATCHES[:1])
    scheduler.step()
    before = model.hidden.weight.detach().clone()
    train(model, optimizer, BATCHES[1:2])
    return model.hidden.weight.detach() - before


@pytest.mark.parametrize(("training", "by"), [(True, torch.sinh), (False, torch.sinh), (False, torch.clone)])
def test_what_has_no_curvature_follows_the_schedule_under_adamw(training: bool, by: Callable[[Tensor], Tensor]) -> None:
    """For want of a rule, or of a pass in training mode."""
    whole, quarter, none = (steps_of(share, training, by) for share in (1.0, 0.25, 0.0))
    assert_equal(whole.abs().mean(), torch.tensor(1e-3), 0.3)
    assert_equal(quarter, 0.25 * whole, 1e-10)
    assert whole.abs().min() > 0 and not none.any()
