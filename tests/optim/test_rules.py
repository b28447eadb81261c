"""What one step does to which parameter, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import FOUR, OwnNorm, backward, batch, network, noise, optimizer_of, same, train, values

from natgrad import (
    Automatic,
    Constant,
    ExactFisher,
    ExactQuadraticModel,
    Gaussian,
    KLLimit,
    NaturalGradient,
    QuadraticModel,
)
from oracles import assert_equal

BATCHES = [batch(step) for step in range(6)]
ADAMW: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize("make", FOUR)
def test_law_27_step_leaves_gradients_and_the_users_random_numbers_alone(make: Any) -> None:
    model = network()
    optimizer = optimizer_of(model, make())
    for data in BATCHES:
        state = torch.get_rng_state()
        backward(model, optimizer, data)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        assert same([p.grad for p in model.parameters()], gradients)
        assert torch.equal(torch.get_rng_state(), state)


def test_the_jacobian_products_of_a_model_with_dropout_use_none_of_the_users_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    optimizer = optimizer_of(model, step_size=ExactQuadraticModel())
    backward(model, optimizer, batch())
    state = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)


# AdamW.


def test_a_model_without_a_coverable_layer_is_trained_by_adamw_bit_for_bit() -> None:
    def model_of() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(OwnNorm(5), nn.Tanh(), OwnNorm(5), nn.Softplus())

    model, reference = model_of(), model_of()
    optimizer = optimizer_of(model, adamw=ADAMW)
    train(model, optimizer, BATCHES)
    train(reference, torch.optim.AdamW(reference.parameters(), **ADAMW), BATCHES)
    assert same(values(model), values(reference))
    assert "0.0 %" in repr(optimizer)


def test_excluded_and_uncovered_parameters_step_exactly_as_under_adamw() -> None:
    model = network()
    reference = network()
    optimizer = optimizer_of(model, exclude=["0"], adamw=ADAMW)
    theirs = torch.optim.AdamW(reference[:3].parameters(), **ADAMW)
    for data in BATCHES:
        reference.load_state_dict({**reference.state_dict(), **{f"3.{k}": v for k, v in model[3].state_dict().items()}})
        train(model, optimizer, [data])
        backward(reference, theirs, data)
        theirs.step()
        assert same(values(model[:3]), values(reference[:3]))


def test_a_layer_that_no_batch_reaches_stays_and_trains_once_one_does() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare, self.both = nn.Linear(5, 3), nn.Linear(5, 3), False

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.spare(x) if self.both else self.used(x)

    model = Branches()
    optimizer = optimizer_of(model, overhead=None)
    before = values(model.spare)
    train(model, optimizer, BATCHES)
    assert same(values(model.spare), before)
    assert optimizer.uncovered["spare.weight"] == "not used in what was seen" and list(optimizer.layers) == ["used"]
    model.both = True
    train(model, optimizer, BATCHES)
    assert not same(values(model.spare), before)
    assert optimizer.state[model.spare.weight]["observations"] > 0


def test_a_weight_that_is_used_without_its_module_has_its_curvature_all_the_same() -> None:
    class Functional(nn.Module):
        def __init__(self, plain: bool) -> None:
            super().__init__()
            self.seen, self.hidden = nn.Linear(5, 5), nn.Linear(5, 3)
            self.plain = plain

        def forward(self, x: Tensor) -> Tensor:
            weight, bias = self.hidden.parameters()
            return self.hidden(self.seen(x)) if self.plain else F.linear(self.seen(x), weight, bias)

    found = []
    for plain in (True, False):
        torch.manual_seed(0)
        model = Functional(plain)
        optimizer = optimizer_of(model, strict=True)
        train(model, optimizer, BATCHES)
        found.append(values(model))
    assert same(*found)


def test_a_weight_that_no_rule_reads_is_trained_by_adamw_and_its_bias_is_not() -> None:
    class Positive(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.exp(), self.bias)

    model: Any = nn.Sequential(nn.Linear(5, 5), Positive(5, 3))
    before = model[1].weight.detach().clone()
    optimizer = optimizer_of(model, adamw={"lr": 0.01})
    train(model, optimizer, BATCHES[:1])
    assert_equal((model[1].weight.detach() - before).abs(), torch.full((3, 5), 0.01), 1e-3)
    assert optimizer.uncovered == {"1.weight": "used by exp: no rule"} and list(optimizer.layers) == ["0", "1.bias"]


def test_frozen_layers_are_left_out_and_their_parameters_stay() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = optimizer_of(model)
    before = values(model[0])
    train(model, optimizer, BATCHES)
    assert list(optimizer.layers) == ["3"]
    assert same(values(model[0]), before)


def test_a_layer_frozen_during_training_stays_and_the_others_go_on() -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, BATCHES[:3])
    model[0].requires_grad_(False)
    first, last = values(model[0]), values(model[3])
    train(model, optimizer, BATCHES[3:])
    assert same(values(model[0]), first)
    assert not same(values(model[3]), last)


def test_a_model_that_is_itself_a_layer_is_covered() -> None:
    model = nn.Linear(5, 3)
    optimizer = optimizer_of(model)
    train(model, optimizer, BATCHES[:2])
    assert optimizer.state[model.weight]["observations"] > 0


# The formula of a step.

PLAIN: dict[str, Any] = {"step_size": Constant(), "momentum": 0.0, "observe_fraction": 1.0}


def dense_step(model: nn.Module, data: Any, damping: float) -> list[Tensor]:
    """(F + damping I)^-1 grad of a linear model under 1/2 |f - y|^2, written out."""
    x, y = data
    a = torch.cat([x, torch.ones(len(x), 1)], 1)
    gradient = (model(x) - y).mT @ a / len(x)
    D = gradient.detach() @ torch.linalg.inv(a.mT @ a / len(x) + damping * torch.eye(a.shape[1]))
    return [D[:, :-1], D[:, -1]]


def test_constant_with_the_exact_fisher_is_the_damped_natural_gradient_of_a_dense_solve() -> None:
    model = nn.Linear(5, 2)
    settings = {**PLAIN, "likelihood": Gaussian(), "estimator": "exact", "lr": 0.3, "damping": 0.1, "decay": 0.0}
    optimizer = optimizer_of(model, ExactFisher(), observe_every=1, refresh_every=1, **settings)
    for step in range(3):
        x = batch(step)[0]
        y = torch.randn(8, 2)
        before, D = values(model), dense_step(model, (x, y), 0.1)
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
        for new, old, move in zip(values(model), before, D, strict=True):
            assert_equal(new - old, -0.3 * move, 1e-8)


def test_groups_have_learning_rates_and_weight_decays_of_their_own() -> None:
    model, reference = network(), network()
    optimizer = optimizer_of(
        model, groups=[{"params": model[3].parameters(), "lr": 0.02, "weight_decay": 0.5}], lr=0.1, **PLAIN
    )
    before = values(reference)
    train(model, optimizer, BATCHES[:1])
    train(reference, optimizer_of(reference, lr=0.1, **PLAIN), BATCHES[:1])
    factors = [(1.0, 0.0)] * 4 + [(0.2, 0.02 * 0.5)] * 2
    for found, plain, old, (rate, decay) in zip(values(model), values(reference), before, factors, strict=True):
        assert_equal(found - old, rate * (plain - old) - decay * old, 1e-8)


def test_a_weight_and_its_bias_have_learning_rates_and_weight_decays_of_their_own() -> None:
    """Though their direction is that of one block."""
    model, reference = network(), network()
    groups = [
        {"params": [model[0].weight, model[3].weight], "lr": 0.1, "weight_decay": 0.5},
        {"params": [model[0].bias], "lr": 0.02},
    ]
    optimizer = optimizer_of(model, groups=groups, lr=0.1, **PLAIN)
    before = values(reference)
    train(model, optimizer, BATCHES[:1])
    train(reference, optimizer_of(reference, lr=0.1, **PLAIN), BATCHES[:1])
    factors = [(1.0, 0.05), (0.2, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.05), (1.0, 0.0)]
    for found, plain, old, (rate, decay) in zip(values(model), values(reference), before, factors, strict=True):
        assert_equal(found - old, rate * (plain - old) - decay * old, 1e-8)
    assert optimizer.layers["0"].biased


def test_weight_decay_is_decoupled_from_the_curvature() -> None:
    model, reference = network(), network()
    before = values(model)
    train(model, optimizer_of(model, weight_decay=0.5, lr=0.1, **PLAIN), BATCHES[:1])
    train(reference, optimizer_of(reference, lr=0.1, **PLAIN), BATCHES[:1])
    for index in (0, 1, 4, 5):
        assert_equal(values(model)[index] - values(reference)[index], -0.05 * before[index], 1e-8)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_second_step_has_the_heavy_ball_or_the_nesterov_formula(nesterov: bool) -> None:
    model = network()
    optimizer = optimizer_of(model, step_size=Constant(), momentum=0.9, nesterov=nesterov, lr=0.01)
    weight = model.get_parameter("3.weight")
    train(model, optimizer, BATCHES[:1])
    first = optimizer.state[weight]["momentum"].clone()
    before = weight.detach().clone()
    train(model, optimizer, BATCHES[1:2])
    direction = optimizer.state[weight]["momentum"]
    D = direction - 0.9 * first
    expected = 0.9 * direction + D if nesterov else direction
    assert_equal(weight.detach() - before, -0.01 * expected[:, :-1], 1e-8)


# What happens between steps.


def run(disturb: Callable[[nn.Module, NaturalGradient], None], **settings: Any) -> list[Tensor]:
    model = network()
    optimizer = optimizer_of(model, **settings)
    for data in BATCHES:
        disturb(model, optimizer)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0]), data[1])
        disturb(model, optimizer)
        loss.backward()
        disturb(model, optimizer)
        optimizer.step()
    return values(model)


def evaluate(model: nn.Module, optimizer: NaturalGradient) -> None:
    model.eval()
    model(noise(1)[0])
    model.train()
    with torch.no_grad():
        model(noise(2)[0])


def test_evaluation_passes_between_steps_do_not_matter() -> None:
    assert same(run(evaluate), run(lambda model, optimizer: None))


@pytest.mark.parametrize("likelihood", [True, False])
def test_zero_grad_between_forward_and_backward_keeps_the_record(likelihood: bool) -> None:
    settings: Any = {} if likelihood else {"likelihood": None}

    def clear(model: nn.Module, optimizer: NaturalGradient) -> None:
        if all(p.grad is None for p in model.parameters()):
            optimizer.zero_grad()

    assert same(run(clear, **settings), run(lambda model, optimizer: None, **settings))


def test_under_a_kl_limit_steps_that_do_not_observe_record_nothing() -> None:
    model = network()
    optimizer = optimizer_of(model, step_size=KLLimit(), observe_every=4, refresh_every=4)
    recorded = []
    for data in [*BATCHES, *BATCHES]:
        backward(model, optimizer, data)
        recorded.append(optimizer._engine.pending)
        optimizer.step()
    assert [step for step, kept in enumerate(recorded) if kept] == [0, 1, 2, 4, 8]


@pytest.mark.parametrize("make", FOUR)
def test_a_module_that_is_called_twice_trains(make: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))

    torch.manual_seed(0)
    model = Twice()
    losses = train(model, optimizer_of(model, make()), [batch(0, 32)] * 60)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("step_size", [Automatic(), KLLimit(), Constant()])
def test_a_group_whose_learning_rate_falls_to_zero_stands_still(step_size: Any) -> None:
    model = network()
    optimizer = optimizer_of(model, step_size=step_size, groups=[{"params": model[3].parameters()}])
    train(model, optimizer, BATCHES[:4])
    group = next(group for group in optimizer.param_groups if model[3].weight in set(group["params"]))
    group["lr"] = 0.0
    before = {id(p): p.detach().clone() for p in model.parameters()}
    train(model, optimizer, BATCHES[:3])
    for name, layer in optimizer.layers.items():
        for p in layer.parameters:
            assert torch.equal(p, before[id(p)]) == (name == "3")


# What a user reads.


def test_print_names_every_layer_every_uncovered_parameter_with_its_reason_and_the_share() -> None:
    model = network()
    optimizer = optimizer_of(model, exclude=["3"])
    for steps in (0, 2):
        train(model, optimizer, BATCHES[:steps])
        rows = {line.split()[0]: line for line in repr(optimizer).splitlines() if line}
        assert "6 x 6" in rows["0"]
        assert "Kronecker" in rows["0"] and ("not seen yet" in rows["0"]) == (steps == 0)
        assert ("Linear" in rows["0"]) == (steps == 0) and ("linear" in rows["0"]) == (steps > 0)
        if steps:
            assert "used by abs: no rule" in rows["2.weight"] and "used by tanh: no rule" in rows["2.bias"]
        else:
            assert "OwnNorm; not seen yet" in rows["2"]
        assert "excluded" in rows["3.weight"] and "excluded" in rows["3.bias"]
        share = "52.2 % of 69 trained parameters" if steps else "expected before the first pass: 69.6 % of 69 trained"
        assert any(line.startswith(share) for line in repr(optimizer).splitlines())


@pytest.mark.parametrize("make", FOUR)
def test_statistics_are_finite_floats_at_every_step(make: Any) -> None:
    model = network()
    optimizer = optimizer_of(model, make(), step_size=QuadraticModel())
    for data in [None, *BATCHES]:
        if data is not None:
            train(model, optimizer, [data])
        seen = optimizer.statistics()
        assert all(type(value) is float for value in seen.values())
        assert all(torch.isfinite(torch.tensor(value)) for value in seen.values())
        assert {"steps", "skipped", "damping", "gradient_norm", "direction_norm", "retries", "failures"} <= set(seen)
    assert {"alpha", "mu", "kl", "ratio", "refresh_seconds"} <= set(optimizer.statistics())


@pytest.mark.parametrize("make", FOUR)
def test_a_checkpoint_shares_its_memory_with_what_the_optimizer_steps_with(make: Any) -> None:
    model = network()
    optimizer = optimizer_of(model, make())
    train(model, optimizer, BATCHES)
    for name, curvature in optimizer._now.items():
        kept = optimizer.state[optimizer.layers[name].parameters[0]]
        for key, value in curvature.state().items():
            if isinstance(value, Tensor):
                assert kept[key].data_ptr() == value.data_ptr(), key
