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
    report = natgrad.coverage(model, BATCHES[0][0], exclude=["3"])
    named = [name for row in report.rows for name in row.parameters]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    assert {row.name: (row.structure, row.why) for row in report.rows} == {
        "0": ("Kronecker", "linear"),
        "2.weight": ("AdamW", "used by abs: no rule"),
        "2.bias": ("AdamW", "used by tanh: no rule"),
        "3.weight": ("AdamW", "excluded"),
        "3.bias": ("frozen", "not trained"),
        "4.weight": ("frozen", "not trained"),
        "4.bias": ("frozen", "not trained"),
    }
    assert report.covered == 36 / (36 + 12 + 18)
    assert report.fallbacks == {"2.weight": "used by abs: no rule", "2.bias": "used by tanh: no rule"}
    assert all(row.name in str(report) and row.why in str(report) for row in report.rows)
    assert str(report).splitlines()[-1].startswith("54.5 % of 66 trained parameters") and not report.expected


def test_without_inputs_the_report_is_what_is_expected_by_the_classes_of_modules() -> None:
    model = nn.Sequential(*network(), nn.Flatten(), nn.PReLU(), nn.ParameterList([torch.zeros(2)]))
    report = natgrad.coverage(model, exclude=["3"])
    assert {row.name: (row.structure, row.why) for row in report.rows} == {
        "0": ("Kronecker", "Linear"),
        "2": ("Kronecker", "OwnNorm"),  # as of any LayerNorm
        "5": ("Kronecker", "PReLU"),
        "3.weight": ("AdamW", "excluded"),
        "3.bias": ("AdamW", "excluded"),
        "6.0": ("AdamW", "known after a pass"),
    }
    assert report.expected and "expected before the first pass: 68.1 % of 72 trained" in str(report)
    assert report.fallbacks == {"6.0": "known after a pass"}


def test_the_report_is_that_of_the_optimizer_before_its_first_step() -> None:
    model: Any = network()
    report = natgrad.coverage(torch.compile(model), approximation=EKFAC())  # type: ignore[arg-type]
    assert words(optimizer_of(model, EKFAC())) == words(report)


def words(table: object) -> list[str]:
    """Those of a table, without the line below its header."""
    return [word for word in str(table).replace("; not seen yet", "").split() if word.strip("-")]


def test_the_report_on_a_pass_is_that_of_the_optimizer_after_one() -> None:
    model = network()
    before, random = copy_of(optimizer_of(model)), torch.get_rng_state()
    report = natgrad.coverage(model, BATCHES[0][0])
    assert same(values(model), values(network())) and torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    optimizer = optimizer_of(model)
    assert same(copy_of(optimizer), before)
    model(BATCHES[0][0])
    assert words(optimizer) == words(report)
    assert list(optimizer.layers) == ["0", "3"] and list(optimizer.uncovered) == ["2.weight", "2.bias"]


class Reads(nn.Module):
    """Reads a number of its input, which a tensor without data has none of; called by name, by another method."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.value = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor, *, flip: bool = False) -> Tensor:
        return self.high(x) if (float(x.sum()) > 0) != flip else self.low(x)

    def values(self, x: Tensor) -> Tensor:
        return self.value(x)


def test_a_pass_may_read_values_and_be_of_another_method() -> None:
    model, x = Reads(), torch.ones(2, 5)
    for report, name in (
        (natgrad.coverage(model, x), "high"),
        (natgrad.coverage(model, x, flip=True), "low"),
        (natgrad.coverage(model, x=x, flip=True), "low"),
        (natgrad.coverage(model, x, method="values"), "value"),
    ):
        assert {row.name for row in report.rows if row.rule == "natural"} == {name}
        assert set(report.fallbacks.values()) == {"not used in what was seen"} and len(report.fallbacks) == 4
    assert "forward" not in vars(model)


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
    assert (found.step, found.memory) == (product, 8 * blocks * 2 * (out**2 + width**2) + 4)  # and the size of inputs
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
    for row in natgrad.coverage(model, BATCHES[0][0], approximation=case.make(), examples=8).rows:
        assert row.cost is not None and min(row.cost.step, row.cost.refresh) >= 0
        now = optimizer._now[row.name]
        means = {type(statistic).__name__ for statistic in now.stats.values()} == {"Mean"}
        if means and not case.make().together:
            assert row.cost.memory == size(v for v in now.state().values() if isinstance(v, Tensor))


def test_bad_arguments_of_the_report_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="exclude names no module"):
        natgrad.coverage(network(), exclude=["head"])
    with pytest.raises(ValueError, match="layer '0'"):
        natgrad.coverage(nn.Sequential(nn.Linear(200, 100)), approximation=ExactFisher())
    with pytest.raises(TypeError, match=r"write approximation=\.\.\."):
        natgrad.coverage(network(), KFAC())


# strict.


def test_strict_lists_what_falls_back_and_why_at_the_first_step_and_changes_nothing() -> None:
    model = network().append(nn.PReLU())  # which is covered
    optimizer = optimizer_of(model, strict=True)
    before = values(model), copy_of(optimizer)["state"]
    backward(model, optimizer, BATCHES[0])
    with pytest.raises(RuntimeError, match="name their modules in exclude") as raised:
        optimizer.step()
    for word in ("no rule reads", "2.weight (used by abs: no rule)", "2.bias (used by tanh: no rule)"):
        assert word in str(raised.value)
    assert "4.weight" not in str(raised.value) and "observed" not in str(raised.value)
    assert same((values(model), copy_of(optimizer)["state"]), before) and optimizer.steps == 0
    with pytest.raises(TypeError, match="strict"):
        optimizer_of(model, strict=1)


def test_strict_raises_for_a_use_in_two_ways_that_have_no_common_block() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x)) + self.last.weight.exp().sum(1)

    model = Twice()
    for strict in (False, True):
        optimizer = optimizer_of(model, strict=strict)
        backward(model, optimizer, BATCHES[0])
        assert optimizer.uncovered == {"last.weight": "used by exp too, which has no rule"}
        assert list(optimizer.layers) == ["first", "last.bias"]
        if strict:
            with pytest.raises(RuntimeError, match=r"last.weight \(used by exp too, which has no rule\)"):
                optimizer.step()
        else:
            optimizer.step()


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
    with pytest.warns(UserWarning, match=r"not observed: 0.weight, 0.bias, 2.weight, 2.bias; AdamW"):
        train(model, optimizer, BATCHES[:1])
    train(model, optimizer, BATCHES)  # a second warning would be an error
    assert "not seen yet" in repr(optimizer) and "expected before the first pass" in repr(optimizer)


def test_strict_raises_at_the_step_that_would_demote_and_changes_nothing() -> None:
    model, optimizer = demoted(True)
    before = values(model), copy_of(optimizer)
    backward(model, optimizer, BATCHES[0])
    with pytest.raises(RuntimeError, match=r"not observed: 0.weight, 0.bias, 2.weight, 2.bias;"):
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
