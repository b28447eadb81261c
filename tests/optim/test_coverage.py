"""What becomes of every parameter, what it costs, and that nothing falls back in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import backward, batch, copy_of, network, optimizer_of, same, train, values

import natgrad
from cases import CASES, Case
from natgrad import EKFAC, KFAC, ExactFisher, KLLimit, NaturalGradient
from natgrad.layers import Layer, expected
from natgrad.optim.cost import cost, size

BATCHES = [batch(step) for step in range(6)]


def frozen_in_part() -> nn.Sequential:
    model: Any = network()
    model.append(nn.Linear(3, 3))
    model[4].requires_grad_(False)
    model[3].bias.requires_grad_(False)
    return model


# The report.


def test_every_parameter_is_in_one_row_with_a_structure_and_a_reason() -> None:
    model: Any = frozen_in_part()
    report = natgrad.coverage(model, exclude=["3"])
    named = [name for row in report.rows for name in row.parameters]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    assert {row.name: (row.structure, row.why) for row in report.rows} == {
        "0": ("Kronecker", "Linear"),
        "2.weight": ("AdamW", "no adapter for OwnNorm"),
        "2.bias": ("AdamW", "no adapter for OwnNorm"),
        "3.weight": ("AdamW", "excluded"),
        "3.bias": ("frozen", "not trained"),
        "4.weight": ("frozen", "not trained"),
        "4.bias": ("frozen", "not trained"),
    }
    assert report.covered == 36 / (36 + 12 + 18)
    assert report.fallbacks == {f"2.{name}": "no adapter for OwnNorm" for name in ("weight", "bias")}
    assert all(row.name in str(report) and row.why in str(report) for row in report.rows)
    assert "54.5 % of 66 trained parameters" in str(report)


def test_the_report_is_that_of_the_optimizer_before_its_first_step() -> None:
    model: Any = network()
    table = str(natgrad.coverage(torch.compile(model), EKFAC()))  # type: ignore[arg-type]
    assert repr(optimizer_of(model, EKFAC())).replace("; not seen yet", "").split() == table.split()


def layer_of(module: nn.Module) -> Layer:
    (layer,) = expected(module).layers.values()
    return layer


@pytest.mark.parametrize("groups", [(), (3,)])
def test_costs_are_those_of_the_formulas(groups: tuple[int, ...]) -> None:
    out, width, blocks = 20, 31, 3 if groups else 1
    cubes, product = blocks * (out**3 + width**3), blocks * 2 * out * width * (out + width)
    layer = layer_of(nn.Conv1d(30 * blocks, out * blocks, 1, groups=blocks) if groups else nn.Linear(30, out))
    assert layer.shape == (*groups, out, width)
    found = cost(KFAC(), layer)
    assert found is not None and found.structure == "Kronecker"
    assert (found.step, found.memory) == (product, 8 * blocks * 2 * (out**2 + width**2))
    assert found.refresh == pytest.approx(cubes, abs=blocks)
    found = cost(EKFAC(), layer)
    assert found is not None and (found.step, found.refresh) == (2 * product, 9 * cubes)
    dense = cost(ExactFisher(), layer)
    assert dense is not None and dense.step == blocks * 2 * (out * width) ** 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_approximation_tells_its_costs_and_the_memory_that_training_takes(case: Case) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = optimizer_of(model, case.make(), observe_every=1)
    train(model, optimizer, BATCHES[:1])
    for row in natgrad.coverage(model, case.make(), examples=8).rows:
        assert row.cost is not None and min(row.cost.step, row.cost.refresh) >= 0
        now = optimizer._now[row.name]
        means = {type(statistic).__name__ for statistic in now.stats.values()} == {"Mean"}
        if means and not case.make().together:
            assert row.cost.memory == size(v for v in now.state().values() if isinstance(v, Tensor))


def test_bad_arguments_of_the_report_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="exclude names no module"):
        natgrad.coverage(network(), exclude=["head"])
    with pytest.raises(ValueError, match="layer '0'"):
        natgrad.coverage(nn.Sequential(nn.Linear(200, 100)), ExactFisher())


# strict.


def test_strict_lists_what_would_fall_back_and_why_and_leaves_no_hook() -> None:
    model: Any = network()
    model.append(nn.PReLU())
    with pytest.raises(ValueError, match="strict=True") as raised:
        optimizer_of(model, strict=True)
    for word in (
        "3 parameters",
        "2.weight (no adapter for OwnNorm)",
        "2.bias (no adapter",
        "4.weight (no adapter for PReLU)",
    ):
        assert word in str(raised.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(TypeError, match="strict"):
        optimizer_of(model, strict=1)


def test_strict_accepts_what_is_excluded() -> None:
    model, reference = network(), network()
    train(model, optimizer_of(model, strict=True, exclude=["2"]), BATCHES)
    train(reference, optimizer_of(reference), BATCHES)
    assert same(values(model), values(reference))


# Nothing is demoted in silence while training (kfac-jax 114 and 344).


def demoted(strict: bool, **settings: Any) -> tuple[nn.Module, NaturalGradient]:
    """A model that trains in eval mode, as for a fixed batch normalisation: no pass is observed."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    return model, optimizer_of(model, step_size=KLLimit(), strict=strict, **settings)


def test_layers_that_train_unobserved_are_named_once() -> None:
    model, optimizer = demoted(False)
    with pytest.warns(UserWarning, match=r"not observed: 0, 2; AdamW steps them"):
        train(model, optimizer, BATCHES[:1])
    train(model, optimizer, BATCHES)  # a second warning would be an error
    assert "not seen: AdamW" in repr(optimizer)


def test_strict_raises_at_the_step_that_would_demote_and_changes_nothing() -> None:
    model, optimizer = demoted(True)
    before = values(model), copy_of(optimizer)
    backward(model, optimizer, BATCHES[0])
    with pytest.raises(RuntimeError, match=r"not observed: 0, 2;"):
        optimizer.step()
    assert same((values(model), copy_of(optimizer)), before)
    train(model.train(), optimizer, BATCHES)


def test_a_gradient_of_zeros_is_no_reason_for_a_warning() -> None:
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "spare": nn.Linear(5, 3)})
    model.forward = model["used"].forward
    whole = nn.Sequential(model)
    optimizer = optimizer_of(whole, exclude=["0.used"], strict=True, step_size=KLLimit())
    for p in model["spare"].parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()


def test_parameters_that_no_group_holds_are_named_once_they_are_unfrozen() -> None:
    model: Any = frozen_in_part()
    optimizer = optimizer_of(model)
    train(model, optimizer, BATCHES[:2])
    model.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"unfrozen since: 3.bias, 4.weight, 4.bias; hand them to add_param_group"):
        train(model, optimizer, BATCHES[2:])


# What others have stumbled over.


def plain(value: Any) -> bool:
    """Of tensors, numbers, strings and containers of them alone."""
    if isinstance(value, dict):
        return type(value) is dict and all(isinstance(key, (str, int)) and plain(value[key]) for key in value)
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return type(value) in (Tensor, int, float, bool, str, type(None))


def moved(value: Any) -> Any:
    """The state as accelerate rebuilds it: every container anew, every tensor by ``to``."""
    if isinstance(value, dict):
        return type(value)({key: moved(each) for key, each in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(map(moved, value))
    return value.to("cpu", copy=True) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_state_dict_is_plain_and_survives_a_wrapper_that_rebuilds_it(case: Case, steps: int) -> None:
    """accelerate 3178: it takes the state at once, moves it to its device, and gives it back."""
    model, reference = network(), network()
    optimizer = optimizer_of(model, case.make())
    train(model, optimizer, BATCHES[:steps])
    assert plain(optimizer.state_dict())
    optimizer.load_state_dict(moved(optimizer.state_dict()))
    train(model, optimizer, BATCHES[steps:])
    train(reference, optimizer_of(reference, case.make()), BATCHES)
    assert same(values(model), values(reference))
