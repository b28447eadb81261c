"""Bad settings are refused at the door; a bad batch changes nothing; a factor that cannot be inverted is survived."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import FOUR, backward, batch, copy_of, network, optimizer_of, same, train, values, without_counters

from natgrad import (
    KFAC,
    AdaptiveKLLimit,
    Automatic,
    Bernoulli,
    Categorical,
    Constant,
    ExactFisher,
    ExactQuadraticModel,
    Gaussian,
    KLLimit,
    LevenbergMarquardt,
    NaturalGradient,
    QuadraticModel,
)
from natgrad.matrix import FactorisationError
from natgrad.optim.layerwise import State

# At the constructor.

WRONG_VALUES: list[tuple[str, Any]] = [
    ("lr", -0.1), ("lr", float("nan")), ("lr", float("inf")), ("lr", "fast"), ("lr", True),
    ("momentum", 1.0), ("momentum", -0.1), ("momentum", None), ("weight_decay", -1.0),
    ("decay", 1.0), ("decay", -0.1), ("damping", 0), ("damping", -1.0), ("damping", float("nan")),
    ("damping", "auto"), ("damping", LevenbergMarquardt), ("observe_every", 0), ("observe_every", 1.5),
    ("refresh_every", 0), ("refresh_every", True), ("observe_fraction", 0), ("observe_fraction", 1.1),
    ("draws", 0), ("seed", -1), ("estimator", "mc"), ("weight_sharing", "sum"), ("precision", "bf16"),
    ("precision", torch.int8), ("exclude", ["4"]), ("exclude", "head"), ("adamw", {"learning_rate": 1.0}),
    ("adamw", {"lr": -1.0}),
]  # fmt: skip
WRONG_TYPES: list[tuple[str, Any]] = [
    ("approximation", KFAC), ("approximation", "kfac"), ("likelihood", Categorical), ("likelihood", F.cross_entropy),
    ("step_size", KLLimit), ("step_size", 0.1), ("grad_scaler", 2.0), ("nesterov", 1), ("staggered", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES, ids=lambda value: repr(value)[:30])
def test_a_setting_out_of_range_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        optimizer_of(network(), **{name: value})


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=lambda value: repr(value)[:30])
def test_a_setting_of_the_wrong_type_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        optimizer_of(network(), **{name: value})


def test_a_refused_constructor_leaves_no_hook_on_the_model() -> None:
    model = network()
    for name, value in [*WRONG_VALUES, *WRONG_TYPES]:
        with pytest.raises((ValueError, TypeError)):
            optimizer_of(model, **{name: value})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_parameters_in_place_of_the_model_are_refused() -> None:
    parameters: Any = network().parameters()
    with pytest.raises(TypeError, match="the model itself, not its parameters"):
        NaturalGradient(parameters)


@pytest.mark.parametrize("settings", [{"estimator": "sampled"}, {"estimator": "exact"}])
def test_an_estimator_that_draws_labels_needs_a_likelihood(settings: Any) -> None:
    with pytest.raises(ValueError, match="likelihood"):
        NaturalGradient(network(), **settings)


@pytest.mark.parametrize("settings", [{"likelihood": None}, {"estimator": "empirical"}])
def test_the_exact_quadratic_model_needs_a_likelihood_to_differentiate(settings: Any) -> None:
    with pytest.raises(ValueError, match="ExactQuadraticModel"):
        optimizer_of(network(), step_size=ExactQuadraticModel(), **settings)


def test_a_layer_too_large_for_the_approximation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="layer '0'"):
        optimizer_of(network(), ExactFisher(limit=10))


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"weight_decay": -1.0}, {"momentum": 1.0}])
def test_a_group_with_a_setting_out_of_range_is_refused(settings: Any) -> None:
    model = network()
    with pytest.raises(ValueError, match=next(iter(settings))):
        optimizer_of(model, groups=[{"params": model[0].parameters(), **settings}])


@pytest.mark.parametrize("step_size", [ExactQuadraticModel(), QuadraticModel()])
def test_a_policy_that_reads_samples_refuses_a_step_without_a_forward_pass_in_training_mode(step_size: Any) -> None:
    model = network()
    optimizer = optimizer_of(model, step_size=step_size)
    train(model, optimizer, [batch(step) for step in range(3)])
    before = (values(model), copy_of(optimizer))
    model.eval()
    backward(model, optimizer, batch(3))
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        optimizer.step()
    assert same((values(model), copy_of(optimizer)), before)


@pytest.mark.parametrize(
    "settings", [{"limit": -1.0}, {"limit": 0.0}, {"decay": 1.0}, {"longest": 0.0}, {"rate": -1.0}]
)
def test_settings_of_the_adaptive_limit_outside_their_range_are_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match="need limit > 0"):
        AdaptiveKLLimit(**settings)


@pytest.mark.parametrize("settings", [{"threshold": 2.0}, {"patience": -1}, {"decay": 1.0}])
def test_settings_of_the_automatic_policy_outside_their_range_are_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match="need 0 <= threshold"):
        Automatic(**settings)


@pytest.mark.parametrize("step_size", [Automatic(), QuadraticModel()])
def test_nesterov_is_refused_where_the_policy_chooses_the_momentum(step_size: Any) -> None:
    with pytest.raises(ValueError, match="nesterov"):
        optimizer_of(network(), step_size=step_size, nesterov=True)


def test_groups_of_foreign_repeated_or_no_parameters_are_refused() -> None:
    model, other = network(), network()
    first = list(model[0].parameters())
    for groups in ([{"params": other[0].parameters()}], [{"params": first}, {"params": first}], [{"lr": 1.0}]):
        with pytest.raises(ValueError, match="params"):
            optimizer_of(model, groups=groups)


@pytest.mark.parametrize(
    ("likelihood", "width"), [(Categorical(), 1), (Categorical(class_dim=2), 3), (Categorical(output="logits"), 3)]
)
def test_a_likelihood_that_does_not_fit_the_output_is_named_and_stores_nothing(likelihood: Any, width: int) -> None:
    model = nn.Linear(5, width)
    optimizer = optimizer_of(model, likelihood=likelihood)
    with pytest.raises(ValueError, match="Categorical"):
        model(batch()[0])
    assert not optimizer._engine.pending


def test_ignore_index_without_targets_is_a_clear_error_and_with_them_trains() -> None:
    model = network()
    optimizer = optimizer_of(model, likelihood=Categorical(ignore_index=-100))
    x, y = batch()
    y[:3] = -100
    with pytest.raises(ValueError, match=r"optimizer.targets\(y\)"):
        model(x)
    before = values(model)
    optimizer.targets(y)
    train(model, optimizer, [(x, y)])
    assert not same(values(model), before)


class WithLoss(nn.Module):
    """A network that is given its labels and returns its loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": F.cross_entropy(logits, labels)}


def test_targets_are_found_in_the_arguments_of_the_model() -> None:
    found: list[list[Tensor]] = []
    for told in (False, True):
        model = WithLoss()
        optimizer = optimizer_of(model, likelihood=Categorical(output="logits", ignore_index=-100))
        if not told:
            optimizer.targets(lambda x, labels: labels)
        for step in range(4):
            x, y = batch(step)
            y[: step + 1] = -100
            if told:
                optimizer.targets(y)
            optimizer.zero_grad()
            model(x, labels=y)["loss"].backward()
            optimizer.step()
        found.append(values(model))
    assert same(*found)
    for find in (lambda x, labels: labels, lambda *_, labels, **rest: labels):
        optimizer.targets(find)
        with pytest.raises(TypeError, match="labels"):  # of the function, which was not given what it asks for
            model(x)
    assert not optimizer._engine.pending


# A bad batch.


def nan_input(model: nn.Module, optimizer: Any) -> None:
    x, y = batch(50)
    x[2, 1] = float("nan")
    backward(model, optimizer, (x, y))


def infinite_input(model: nn.Module, optimizer: Any) -> None:
    x, y = batch(50)
    x[2, 1] = float("inf")
    backward(model, optimizer, (x, y))


def nan_label(model: nn.Module, optimizer: Any) -> None:
    x, _ = batch(50)
    optimizer.zero_grad()
    target = torch.full((8, 3), 1 / 3)
    target[1, 0] = float("nan")
    F.cross_entropy(model(x), target).backward()


def nan_gradient(model: nn.Module, optimizer: Any) -> None:
    backward(model, optimizer, batch(50))
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    gradient[0, 0] = float("nan")


def infinite_gradient_of_an_uncovered_parameter(model: nn.Module, optimizer: Any) -> None:
    backward(model, optimizer, batch(50))
    gradient = model.get_parameter("2.weight").grad
    assert gradient is not None
    gradient[0] = float("inf")


def overflowing_statistics(model: nn.Module, optimizer: Any) -> None:
    x, y = batch(50)
    backward(model, optimizer, (1e200 * x, y))  # finite gradients, but the square of the inputs is not
    for p in model.parameters():
        assert p.grad is not None
        p.grad.clamp_(-1, 1)


BAD = [
    nan_input, infinite_input, nan_label, nan_gradient, infinite_gradient_of_an_uncovered_parameter,
    overflowing_statistics,
]  # fmt: skip
STEADY: dict[str, Any] = {  # nothing depends on the number of the step
    "estimator": "exact", "observe_every": 1, "refresh_every": 1, "damping": LevenbergMarquardt(every=1),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("make", FOUR)
def test_a_bad_step_is_counted_and_training_continues_as_if_it_had_not_been(
    make: Any, bad: Callable[[nn.Module, Any], None]
) -> None:
    good = [batch(step) for step in range(6)]
    clean, disturbed = network(), network()
    undisturbed, optimizer = optimizer_of(clean, make(), **STEADY), optimizer_of(disturbed, make(), **STEADY)
    train(clean, undisturbed, good)
    train(disturbed, optimizer, good[:3])
    before = values(disturbed), without_counters(copy_of(optimizer))
    bad(disturbed, optimizer)
    with pytest.warns(UserWarning, match="step 3 skipped"):
        optimizer.step()
    assert optimizer.statistics()["skipped"] == 1
    assert same((values(disturbed), without_counters(copy_of(optimizer))), before)
    train(disturbed, optimizer, good[3:])
    assert same(values(disturbed), values(clean))
    assert same(without_counters(copy_of(optimizer)), without_counters(copy_of(undisturbed)))


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_first_step_is_skipped_too(bad: Callable[[nn.Module, Any], None]) -> None:
    clean, disturbed = network(), network()
    train(clean, optimizer_of(clean, **STEADY), [batch(0), batch(1)])
    optimizer = optimizer_of(disturbed, **STEADY)
    bad(disturbed, optimizer)
    with pytest.warns(UserWarning, match="step 0 skipped"):
        optimizer.step()
    train(disturbed, optimizer, [batch(0), batch(1)])
    assert same(values(disturbed), values(clean))


def test_statistics_that_overflow_between_refreshes_do_not_poison_the_next_refresh() -> None:
    model = network()
    optimizer = optimizer_of(model, observe_every=1, refresh_every=50)
    train(model, optimizer, [batch(step) for step in range(3)])
    overflowing_statistics(model, optimizer)
    with pytest.warns(UserWarning, match="step 3 skipped"):
        optimizer.step()
    train(model, optimizer, [batch(step) for step in range(3)])
    assert all(
        torch.isfinite(value).all()
        for value in optimizer.state[model.get_parameter("0.weight")].values()
        if torch.is_tensor(value)
    )


# Odd but legal batches.

ODD: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "all zero": lambda: (torch.zeros(8, 5), batch()[1]),
    "one example": lambda: batch(n=1),
    "rank one": lambda: (batch()[0][:1].expand(8, 5).clone(), batch()[1]),
    "huge": lambda: (1e15 * batch()[0], batch()[1]),
    "tiny": lambda: (1e-15 * batch()[0], batch()[1]),
    "one feature huge": lambda: (batch()[0] * torch.tensor([1e15, 1, 1, 1, 1]), batch()[1]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("make", FOUR)
def test_odd_batches_train_without_a_warning_and_stay_finite(make: Any, kind: str, dtype: torch.dtype) -> None:
    model = network().to(dtype)
    optimizer = optimizer_of(model, make(), refresh_every=2)
    x, y = ODD[kind]()
    train(model, optimizer, [(x.to(dtype), y)] * 6)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.statistics()["skipped"] == optimizer.statistics()["failures"] == 0


@pytest.mark.parametrize("likelihood", [Gaussian(), Bernoulli()], ids=["Gaussian", "Bernoulli"])
def test_zero_inputs_without_a_bias_leave_the_layer_where_it_is(likelihood: Any) -> None:
    model = nn.Linear(5, 1, bias=False)
    optimizer = optimizer_of(model, likelihood=likelihood)
    before = values(model)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.zeros(8, 5)).square().sum().backward()
        optimizer.step()
    assert same(values(model), before)


# Factorisations that fail.


class Failing(KFAC):
    """KFAC whose inversions fail while ``fail`` says so of the matrix's dtype."""

    fail: Callable[[torch.dtype], bool] = staticmethod(lambda dtype: False)

    def invert(self, matrix: Any, damping: float) -> Any:
        if type(self).fail(matrix.tensors()["A"].dtype if "A" in matrix.tensors() else torch.float32):
            raise FactorisationError("a factor of shape (6, 6) is not positive definite")
        return super().invert(matrix, damping)


def failing(monkeypatch: pytest.MonkeyPatch, fail: Callable[[torch.dtype], bool]) -> None:
    monkeypatch.setattr(Failing, "fail", staticmethod(fail))


def single(step: int) -> tuple[Tensor, Tensor]:
    x, y = batch(step)
    return x.float(), y


def test_a_factorisation_that_fails_once_is_repeated_and_counted_and_its_layer_goes_on_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network().float()
    optimizer = optimizer_of(model, Failing(), refresh_every=1, observe_every=1, step_size=QuadraticModel())
    train(model, optimizer, [single(0)])
    calls: list[int] = []

    def first_of_each_layer(dtype: torch.dtype) -> bool:
        calls.append(1)
        return len(calls) % 2 == 1

    failing(monkeypatch, first_of_each_layer)
    before = values(model)
    train(model, optimizer, [single(1)])
    seen = optimizer.statistics()
    assert (seen["retries"], seen["failures"], len(calls)) == (2.0, 0.0, 4)
    assert not same(values(model), before)
    state = optimizer.state[model.get_parameter("0.weight")]
    assert state["refreshes"] == 2
    parts = {name: value.dtype for name, value in state.items() if name.startswith(("stats.", "inverse."))}
    assert set(parts.values()) == {torch.float64}
    assert state["momentum"].dtype == torch.float32


def test_a_factorisation_that_always_fails_keeps_the_old_inverse_for_two_periods_and_then_leaves_the_layer_to_adamw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network()
    optimizer = optimizer_of(model, Failing(), refresh_every=1, observe_every=1, step_size=QuadraticModel())
    train(model, optimizer, [batch(0)])
    inverse = [
        value.clone()
        for name, value in optimizer.state[model.get_parameter("0.weight")].items()
        if name.startswith("inverse")
    ]
    failing(monkeypatch, lambda dtype: True)
    for step in (1, 2):
        before = values(model)
        train(model, optimizer, [batch(step)])
        assert not same(values(model), before)
        assert optimizer.statistics()["failures"] == 2 * step
    state = optimizer.state[model.get_parameter("0.weight")]
    assert same([value for name, value in state.items() if name.startswith("inverse")], inverse)
    assert "2 failed refreshes" in repr(optimizer)
    assert optimizer.statistics()["aside"] == 0
    with pytest.warns(UserWarning, match=r"layer '0': .*\(6, 6\).*; layer '3': .*AdamW") as told:
        train(model, optimizer, [batch(3), batch(4)])
    assert len(told) == 1
    assert optimizer.statistics()["aside"] == 2
    assert "4 failed refreshes: AdamW" in repr(optimizer)


def test_a_success_after_two_failures_resets_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = optimizer_of(model, Failing(), refresh_every=1, observe_every=1, step_size=QuadraticModel())
    train(model, optimizer, [batch(0)])
    failing(monkeypatch, lambda dtype: True)
    train(model, optimizer, [batch(1), batch(2)])
    failing(monkeypatch, lambda dtype: False)
    train(model, optimizer, [batch(3)])
    assert optimizer.statistics()["failures"] == 0
    failing(monkeypatch, lambda dtype: True)
    train(model, optimizer, [batch(4), batch(5)])
    assert optimizer.statistics()["failures"] == 4


def test_a_layer_that_never_had_an_inverse_trains_by_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda dtype: False)
    model, reference = network(), network()
    optimizer = optimizer_of(model, Failing(), refresh_every=1, step_size=QuadraticModel())
    model(batch(0)[0])  # shows the layers
    optimizer._learn_layers()
    empty = optimizer._curvature.filled(State())
    monkeypatch.setattr(optimizer._curvature.__class__, "filled", lambda self, state, kept: state or empty)
    failing(monkeypatch, lambda dtype: True)
    with pytest.warns(UserWarning, match="AdamW steps what has no inverse"):
        train(model, optimizer, [batch(0), batch(1)])
    train(reference, torch.optim.AdamW(reference.parameters(), weight_decay=0.0), [batch(0), batch(1)])
    assert same(values(model), values(reference))


def test_no_warning_comes_from_a_good_step() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        train(model, optimizer_of(model, step_size=Constant()), [batch(0)])
