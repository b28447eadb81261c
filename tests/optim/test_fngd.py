"""FNGD in training: two phases in an unchanged loop."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.overrides import _get_current_function_mode_stack
from training import Batch, OwnNorm, batch, copy_of, network, noise, same, through_a_file, values

from natgrad import FNGD, KFAC, Categorical, NaturalGradient
from natgrad.fngd import Coefficients, Iteration, PositionMean, Quantile, Recompute, Sample, Scalar
from oracles import assert_equal, per_example_gradients

RULES: list[Coefficients] = [PositionMean(), Sample(), Iteration(), Quantile(), Scalar(), Recompute()]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
every_rule_but_quantile = pytest.mark.parametrize(
    "rule", [rule for rule in RULES if rule != Quantile()], ids=lambda rule: type(rule).__name__
)
STEPS = 12
PHASE = 5


def optimizer_of(model: nn.Module, rule: Coefficients | None = None, phase: int = PHASE, **settings: Any) -> FNGD:
    return FNGD(model, phase, coefficients=rule, **{"lr": 1e-3, "momentum": 0.0, **settings})


def data(step: int, n: int = 8) -> Batch:
    """As many batches as steps in an epoch, which come back."""
    return noise(step % PHASE, n)


def ids(step: int, n: int = 8) -> Tensor:
    return torch.arange(n) + 8 * (step % PHASE)


def backward(model: nn.Module, optimizer: FNGD, step: int, parts: int = 1, n: int = 8) -> None:
    optimizer.zero_grad()
    x, y = data(step, n)
    for x_part, y_part, which in zip(x.chunk(parts), y.chunk(parts), ids(step, n).chunk(parts), strict=True):
        optimizer.examples(which)
        (F.cross_entropy(model(x_part), y_part) / parts).backward()


def train(model: nn.Module, optimizer: FNGD, steps: Sequence[int], parts: int = 1) -> None:
    for step in steps:
        backward(model, optimizer, step, parts)
        optimizer.step()


def convnet() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv1d(4, 4, 3, groups=2, bias=False), nn.Tanh(), nn.Linear(3, 2), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


NETWORKS = {"dense": network, "convolutions": convnet}
every_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def per_example(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    norms = [p for module in model.modules() if isinstance(module, OwnNorm) for p in module.parameters()]
    training = model.training
    for p in norms:
        p.requires_grad_(False)
    model.eval()
    found = per_example_gradients(model, lambda output, y: F.cross_entropy(output, y, reduction="sum"), x, y)
    model.train(training)
    for p in norms:
        p.requires_grad_(True)
    return found


def solved(DW: Tensor, mu: float = 1.0) -> Tensor:
    """N c from the dense system of one layer."""
    U = DW.flatten(1)
    n = len(U)
    return n * torch.linalg.solve(U @ U.mT + mu * U.square().sum() / n * torch.eye(n), torch.ones(n))


def weighted(DW: Tensor, w: Tensor) -> Tensor:
    """1/N sum_n w_n DW_n."""
    return (DW * w.view(-1, 1, 1)).mean(0)


def moved(optimizer: FNGD, before: dict[str, Tensor], lr: float = 1e-3) -> dict[str, Tensor]:
    """The directions of the step just taken, as blocks (out, in) with the groups of a convolution one below another."""
    found = {}
    for name, layer in optimizer.layers.items():
        old = layer.pack([before[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in before])
        new = layer.pack([p.detach() for p in layer.parameters])
        found[name] = ((old - new) / lr).flatten(0, -2)
    return found


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# The two phases.


@every_network
def test_a_step_of_the_first_phase_is_the_dense_natural_gradient_of_every_layer(make: Callable[[], nn.Module]) -> None:
    model = make()
    optimizer = optimizer_of(model)
    DW, before = per_example(model, *data(0)), snapshot(model)
    train(model, optimizer, [0])
    for name, D in moved(optimizer, before).items():
        U = DW[name].flatten(1)
        E = U.mT @ U / 8
        M = torch.linalg.solve(E + E.trace() / 8 * torch.eye(len(E)), U.mean(0))  # lambda = tr(K)/N^2 = tr(E)/N
        assert_equal(D.flatten(), M, 1e-8)


@every_network
@every_rule_but_quantile
def test_every_rule_takes_the_step_that_its_coefficients_say(make: Callable[[], nn.Module], rule: Coefficients) -> None:
    model = make()
    optimizer = optimizer_of(model, rule)
    w: dict[str, list[Tensor]] = {name: [] for name in optimizer.layers}
    for step in range(PHASE):
        for name, DW in per_example(model, *data(step)).items():
            w[name].append(solved(DW))
        train(model, optimizer, [step])
    for step in (PHASE, PHASE + 1, PHASE + 2):
        gradients, before = per_example(model, *data(step)), snapshot(model)
        train(model, optimizer, [step])
        for name, D in moved(optimizer, before).items():
            table = torch.stack(w[name])
            now = {
                PositionMean: table.mean(0),
                Sample: table[step % PHASE],
                Iteration: table[step % PHASE],
                Scalar: table.mean().expand(8),
                Recompute: solved(gradients[name]),
            }[type(rule)]
            assert_equal(D, weighted(gradients[name], now), 1e-8)


def test_quantiles_are_those_of_the_gradient_at_the_layers_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3))
    optimizer = optimizer_of(model, Quantile(), phase=1)

    def sizes(step: int) -> Tensor:
        x, y = data(step)
        return (model(x).softmax(-1) - F.one_hot(y, 3)).norm(dim=1).detach()

    ranked = solved(per_example(model, *data(0))["0"])[sizes(0).argsort()]
    train(model, optimizer, [0])
    DW, before, order = per_example(model, *data(1))["0"], snapshot(model), sizes(1).argsort()
    train(model, optimizer, [1])
    w = torch.empty(8)
    w[order] = ranked
    assert_equal(moved(optimizer, before)["0"], weighted(DW, w), 1e-8)


def test_gradients_after_the_first_phase_weigh_one_on_average() -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(PHASE))
    DW = per_example(model, *data(0))
    backward(model, optimizer, 0)
    for name, layer in optimizer.layers.items():
        gradient = layer.pack([p.grad for p in layer.parameters if p.grad is not None])
        w = torch.linalg.lstsq(DW[name].flatten(1).mT, 8 * gradient.flatten()).solution
        assert_equal(gradient, weighted(DW[name], w), 1e-8)
        table = optimizer.state[layer.parameters[0]]["total"][0]
        assert_equal(weighted(DW[name], table / table.mean()), gradient)


@pytest.mark.parametrize("nesterov", [False, True])
def test_law_18_even_coefficients_are_sgd_in_both_phases(nesterov: bool) -> None:
    """mu = 1e14 and a sum of 1: c = 1/N but for 1e-14."""
    models = [convnet(), convnet()]
    optimizer = optimizer_of(models[0], mu=1e14, normalise=True, momentum=0.9, lr=0.1, nesterov=nesterov)
    sgd = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9, nesterov=nesterov)
    train(models[0], optimizer, range(STEPS))
    for step in range(STEPS):
        sgd.zero_grad()
        x, y = data(step)
        F.cross_entropy(models[1](x), y).backward()
        sgd.step()
    for mine, theirs in zip(values(models[0]), values(models[1]), strict=True):
        assert_equal(mine, theirs, 1e-9)


@every_rule
def test_training_lowers_the_loss(rule: Coefficients) -> None:
    model = network()
    optimizer = optimizer_of(model, rule, lr=0.01, momentum=0.9, normalise=True)
    for step in range(60):
        x, y = batch(step % PHASE)
        optimizer.zero_grad()
        optimizer.examples(ids(step))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step == 0:
            first = loss.detach()
    assert loss < 0.8 * first


def by_hand(p: Tensor, P: Tensor, D: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """theta and P after a step along D."""
    if not group["lr"]:
        return p, torch.zeros_like(P)
    P = group["momentum"] * P + D
    ahead = group["momentum"] * P + D if group["nesterov"] else P
    return p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * ahead, P


@pytest.mark.parametrize("nesterov", [False, True])
def test_groups_have_settings_of_their_own_in_both_phases(nesterov: bool) -> None:
    model: Any = convnet()
    groups: list[dict[str, Any]] = [
        {"params": model[1].parameters(), "lr": 3e-4, "momentum": 0.5},
        {"params": model[3].parameters(), "lr": 0.0},
    ]
    optimizer = optimizer_of(model, Recompute(), momentum=0.9, weight_decay=0.1, nesterov=nesterov, groups=groups)
    looked_up = optimizer_of(twin := convnet(), Scalar(), phase=1, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
    for chosen, net in ((optimizer, model), (looked_up, twin)):
        layers = chosen.layers.values()
        P = {layer.name: torch.zeros(layer.shape) for layer in layers}
        for step in range(4):
            gradients = per_example(net, *data(step))
            if chosen is looked_up and step == 0:
                c = {name: solved(DW).mean() for name, DW in gradients.items()}
            before = {layer.name: layer.pack([p.detach().clone() for p in layer.parameters]) for layer in layers}
            train(net, chosen, [step])
            for layer in layers:
                DW = gradients[layer.name]
                solve = chosen is optimizer or step == 0
                D = weighted(DW, solved(DW)) if solve else c[layer.name] * DW.mean(0)
                group = next(g for g in chosen.param_groups if any(p is layer.parameters[0] for p in g["params"]))
                expected, P[layer.name] = by_hand(before[layer.name], P[layer.name], D.view(layer.shape), group)
                assert_equal(layer.pack([p.detach() for p in layer.parameters]), expected, 1e-10)


def test_the_memory_of_the_second_phase_is_the_table() -> None:
    """Nothing of the size of a layer is kept but the last direction."""
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(STEPS))
    for layer in optimizer.layers.values():
        weight, *others = (optimizer.state[p] for p in layer.parameters)
        kept = {name: x.untyped_storage().nbytes() // 8 for name, x in weight.items()}
        assert kept.pop("momentum") == layer.parameters[0].numel()
        assert all(list(state) == ["momentum"] for state in others)
        assert sum(kept.values()) == 2 * 8  # total and seen of 8 positions


def test_after_the_first_phase_nothing_is_recorded() -> None:
    model = network()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        backward(model, optimizer, step)
        assert optimizer._engine.pending == (step < PHASE)
        optimizer.step()


# Accumulation, other batches, other modes.


@every_rule_but_quantile  # its ranks are within a micro-batch
def test_four_micro_batches_equal_the_one_batch_in_both_phases(rule: Coefficients) -> None:
    whole, split = convnet(), convnet()
    train(whole, optimizer_of(whole, rule, momentum=0.9), range(STEPS))
    train(split, optimizer_of(split, rule, momentum=0.9), range(STEPS), parts=4)
    for found, expected in zip(values(split), values(whole), strict=True):
        assert_equal(found, expected, 1e-10)


def test_an_incomplete_batch_has_the_first_coefficients_times_n_over_n() -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(PHASE))
    x, y = data(0)
    DW, before = per_example(model, x[:3], y[:3]), snapshot(model)
    optimizer.zero_grad()
    F.cross_entropy(model(x[:3]), y[:3]).backward()
    optimizer.step()
    for name, D in moved(optimizer, before).items():
        state = optimizer.state[optimizer.layers[name].parameters[0]]
        c = (state["total"] / state["seen"])[0] / 8
        assert_equal(D, (DW[name] * (c[:3] * 8 / 3).view(-1, 1, 1)).sum(0), 1e-8)


def test_a_step_without_a_pass_in_training_mode_takes_the_mean_coefficient_in_both_phases() -> None:
    model = network()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        model.train(step not in (3, 8))
        DW, before = per_example(model, *data(step)), snapshot(model)
        state = {name: optimizer.state[layer.parameters[0]] for name, layer in optimizer.layers.items()}
        scale = {name: kept["total"].sum() / kept["seen"].sum() for name, kept in state.items() if kept}
        train(model, optimizer, [step])
        for name, D in moved(optimizer, before).items() if step in (3, 8) else ():
            assert_equal(D, scale[name] * DW[name].mean(0), 1e-8)


def test_uncovered_parameters_follow_adamw_and_so_do_layers_that_the_first_phase_did_not_see() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm, self.late = nn.Linear(5, 6), OwnNorm(6), nn.Linear(6, 3)
            self.both = False

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.first(x))
            return self.late(h) if self.both else h[:, :3]

    model = Half()
    optimizer = optimizer_of(model, adamw={"lr": 0.01})
    train(model, optimizer, range(PHASE))
    model.both = True
    backward(model, optimizer, PHASE)
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    adamw = torch.optim.AdamW([twins["late.weight"]], lr=0.01, weight_decay=0.0)
    twins["late.weight"].grad = model.late.weight.grad
    adamw.step()
    optimizer.step()
    assert torch.equal(model.late.weight, twins["late.weight"])
    assert "exp_avg" in optimizer.state[model.norm.weight] and "exp_avg" not in optimizer.state[model.first.weight]


def test_a_layer_frozen_in_the_second_phase_stands_still() -> None:
    model = network()
    optimizer = optimizer_of(model, momentum=0.9)
    train(model, optimizer, range(PHASE))
    model.get_parameter("0.weight").requires_grad_(False)
    before = snapshot(model)
    train(model, optimizer, range(PHASE, STEPS))
    assert torch.equal(model.get_parameter("0.weight"), before["0.weight"])
    assert not torch.equal(model.get_parameter("3.weight"), before["3.weight"])


def test_a_scaled_loss_is_unscaled_in_both_phases() -> None:
    class Scaler:
        def get_scale(self) -> float:
            return 1024.0

    plain, scaled = network(), network()
    train(plain, optimizer_of(plain), range(STEPS))
    optimizer = optimizer_of(scaled, grad_scaler=Scaler())
    for step in range(STEPS):
        x, y = data(step)
        optimizer.zero_grad()
        (1024 * F.cross_entropy(scaled(x), y)).backward()
        for p in scaled.parameters():
            p.grad = None if p.grad is None else p.grad / 1024
        optimizer.step()
    for found, expected in zip(values(scaled), values(plain), strict=True):
        assert_equal(found, expected, 1e-10)


def test_joint_coefficients_train_too() -> None:
    model = network()
    optimizer = optimizer_of(model, share="joint")
    DW, before = per_example(model, *data(0)), snapshot(model)
    train(model, optimizer, [0])
    w = solved(torch.cat([gradients.flatten(1) for gradients in DW.values()], 1))
    for name, D in moved(optimizer, before).items():
        assert_equal(D, weighted(DW[name], w), 1e-8)
    train(model, optimizer, range(1, STEPS))
    tables = [optimizer.state[layer.parameters[0]]["total"] for layer in optimizer.layers.values()]
    assert torch.equal(tables[0], tables[1])


# Checkpoints.


@every_rule
def test_a_run_broken_before_at_and_after_the_switch_is_the_unbroken_one_bit_for_bit(rule: Coefficients) -> None:
    def run(breaks: Sequence[int]) -> Any:
        model = network()
        optimizer = optimizer_of(model, rule, momentum=0.9)
        for step in range(STEPS):
            if step in breaks:
                fresh = network(seed=9)
                renewed = optimizer_of(fresh, rule, momentum=0.9)
                fresh.load_state_dict(through_a_file(model.state_dict()))
                renewed.load_state_dict(through_a_file(optimizer.state_dict()))
                model, optimizer = fresh, renewed
            train(model, optimizer, [step])
        return values(model), copy_of(optimizer)

    assert same(run((2, PHASE, PHASE + 1, 9)), run(()))


def test_an_optimizer_in_the_second_phase_returns_to_the_first_with_the_state_of_one() -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    parameters, early = through_a_file(model.state_dict()), copy_of(optimizer)
    train(model, optimizer, range(3, STEPS))
    late = values(model), copy_of(optimizer)
    model.load_state_dict(parameters)
    optimizer.load_state_dict(early)
    train(model, optimizer, range(3, STEPS))
    assert same((values(model), copy_of(optimizer)), late)


@pytest.mark.parametrize("used", [False, True])
def test_the_state_of_another_optimizer_is_refused_and_changes_nothing(used: bool) -> None:
    model = network()
    other = NaturalGradient(model, KFAC(), likelihood=Categorical())
    backward_of(model, other)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3 if used else 0))
    before = copy_of(optimizer)
    with pytest.raises(ValueError, match="the checkpoint is of another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    assert same(copy_of(optimizer), before)
    train(model, optimizer, range(STEPS))


def backward_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, y = data(0)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_a_distributed_checkpoint_resumes_bit_for_bit() -> None:
    def run(breaks: Sequence[int]) -> list[Tensor]:
        model = network()
        optimizer = optimizer_of(model, momentum=0.9)
        for step in range(STEPS):
            if step in breaks:
                saved = through_a_file((model.state_dict(), get_optimizer_state_dict(model, optimizer)))
                model = network(seed=9)
                optimizer = optimizer_of(model, momentum=0.9)
                model.load_state_dict(saved[0])
                set_optimizer_state_dict(model, optimizer, saved[1])
            train(model, optimizer, [step])
        return values(model)

    assert same(run((2, PHASE + 1)), run(()))


# Loops of other kinds.


@pytest.mark.parametrize("rule", [PositionMean(), Scalar()], ids=lambda rule: type(rule).__name__)
def test_a_compiled_model_runs_as_written_while_it_is_recorded_or_weighed_and_else_compiled(rule: Coefficients) -> None:
    torch.compiler.reset()
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            graphs.append(step)
            return graph(*args)

        return call

    found = []
    for compiled in (True, False):
        model = network()
        call: Any = torch.compile(model, backend=backend) if compiled else model
        optimizer = optimizer_of(call, rule, momentum=0.9)
        for step in range(STEPS):
            x, y = data(step)
            optimizer.zero_grad()
            F.cross_entropy(call(x), y).backward()
            optimizer.step()
        found.append(values(model))
    torch.compiler.reset()
    for mine, theirs in zip(*found, strict=True):
        assert_equal(mine, theirs, 1e-12)
    assert graphs == (list(range(PHASE, STEPS)) if rule == Scalar() else [])


def test_a_closure_is_evaluated_once_and_takes_the_step_of_the_loop() -> None:
    found = []
    for closed in (False, True):
        model = network()
        optimizer = optimizer_of(model, momentum=0.9)
        for step in range(STEPS):
            if closed:
                calls: list[int] = []

                def closure(step: int = step, calls: list[int] = calls) -> None:
                    calls.append(step)
                    backward(model, optimizer, step)  # noqa: B023

                optimizer.step(closure)
                assert calls == [step]
            else:
                train(model, optimizer, [step])
        found.append(values(model))
    assert same(*found)


def test_a_closure_that_raises_leaves_the_optimizer_as_it_was() -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    before = values(model), copy_of(optimizer)

    def closure() -> None:
        model(data(0)[0])
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert same((values(model), copy_of(optimizer)), before)
    assert not optimizer._engine.pending


def test_a_learning_rate_schedule_is_followed_in_both_phases() -> None:
    model = network()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step % 2 else 0.0)
    for step in range(STEPS):
        before = values(model)
        train(model, optimizer, [step])
        assert same(values(model), before) == (step % 2 == 0)
        schedule.step()


@pytest.mark.parametrize("after", [2, PHASE + 2])
def test_parameters_that_are_unfrozen_later_can_be_added(after: int) -> None:
    model: Any = network()
    model[3].requires_grad_(False)
    optimizer = optimizer_of(model)
    assert "3" not in optimizer.layers
    train(model, optimizer, range(after))
    assert list(optimizer.layers) == ["0"]
    model[3].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 1e-2})
    assert optimizer.param_groups[-1]["rule"] == "natural"
    optimizer.load_state_dict(copy_of(optimizer))  # which knows nothing of them yet
    before = snapshot(model)
    train(model, optimizer, range(after, STEPS))
    assert list(optimizer.layers) == (["0", "3"] if after < PHASE else ["0"])
    assert not torch.equal(model[3].weight, before["3.weight"])
    assert ("exp_avg" in optimizer.state[model[3].weight]) == (after > PHASE)  # too late for its coefficients


def test_an_optimizer_that_is_gone_takes_its_hooks_along() -> None:
    model = network()
    optimizer = optimizer_of(model, Sample())
    train(model, optimizer, range(PHASE + 1))
    del optimizer
    gc.collect()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(data(0)[0])


def test_a_copied_model_is_not_weighed() -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(PHASE))
    x, y = data(0)
    twin, plain = copy.deepcopy(model), network()
    plain.load_state_dict(model.state_dict())
    for one in (twin, plain):
        one.zero_grad()
        F.cross_entropy(one(x), y).backward()
    for mine, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]


# What is told.


def test_the_text_says_what_becomes_of_every_parameter() -> None:
    model = network()
    optimizer = optimizer_of(model, exclude=["3"])
    text = repr(optimizer)
    assert "Linear; not seen yet" in text and "excluded" in text and "expected before the first pass" in text
    train(model, optimizer, range(PHASE))
    assert "used by abs: no rule" in repr(optimizer)
    row = next(line for line in repr(optimizer).splitlines() if line.startswith("0 "))
    assert row.split() == ["0", "6", "x", "6", "weighted", "sum", "36", "0.0", "MB", "0", "FLOP", "0", "FLOP", "linear"]
    assert repr(optimizer).splitlines()[-1].startswith("52.2 % of 69 trained parameters have curvature")


def test_the_statistics_count_steps_and_measure_the_gradient() -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(3))
    found = optimizer.statistics()
    gradients = [p.grad for layer in optimizer.layers.values() for p in layer.parameters if p.grad is not None]
    assert (found["steps"], found["skipped"]) == (3, 0)
    assert found["gradient_norm"] == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()))
    assert found["direction_norm"] > 0


def test_a_layer_that_the_first_phase_does_not_see_is_named_once_or_refused() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.seen, self.aside = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.seen(x)

    def step(model: Any, optimizer: FNGD, number: int) -> None:
        optimizer.zero_grad()
        x, y = data(number)
        F.cross_entropy(model(x) + model.aside(x), y).backward()
        optimizer.step()

    for strict in (False, True):
        model = Aside()
        optimizer = optimizer_of(model, strict=strict)
        if strict:
            with pytest.raises(RuntimeError, match="not observed: aside"):
                step(model, optimizer, 0)
        else:
            with pytest.warns(UserWarning, match="not observed: aside.weight, aside.bias; AdamW steps them"):
                step(model, optimizer, 0)
            for number in range(1, STEPS):
                step(model, optimizer, number)
            assert "not used in what was seen" in repr(optimizer) and "exp_avg" in optimizer.state[model.aside.weight]


class Kinds(nn.Module):
    """Tokens, a norm, a packed attention, a weight used both ways round, and one that no example reaches alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.both, self.prior, self.head = nn.Linear(4, 6), nn.Linear(2, 4), nn.Linear(4, 3)
        self.register_buffer("base", torch.randn(11, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.tokens((10 * x).long().abs() % 7))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = torch.tanh(self.both(h)) @ self.both.weight
        return self.head(h.mean(1) + self.prior(self.base).mean(0))


def test_what_fngd_cannot_weigh_is_left_to_adamw_or_has_the_mean_coefficient_and_says_why() -> None:
    model = Kinds()
    optimizer = optimizer_of(model, adamw={"lr": 0.01})
    train(model, optimizer, range(PHASE + 2))
    assert sorted(optimizer.layers) == ["attention.out_proj", "both.bias", "head", "norm"]
    left = {
        name: optimizer.uncovered[name]
        for name in ("tokens.weight", "attention.in_proj_weight", "both.weight", "prior.weight")
    }
    assert left == {
        "tokens.weight": "embedding; FNGD has no rule for tokens",
        "attention.in_proj_weight": "linear; FNGD has no rule for a part of a parameter",
        "both.weight": "linear, matmul; FNGD has no rule for weights that are used both ways round",
        "prior.weight": "linear; FNGD has no rule for operations whose examples are not told apart",
    }
    for name, p in model.named_parameters():
        assert ("exp_avg" in optimizer.state[p]) == (name in optimizer.uncovered)
    rows = {line.split()[0]: line for line in repr(optimizer).splitlines()}
    assert rows["attention.out_proj"].endswith("linear; all examples by the mean coefficient")
    assert rows["head"].endswith("linear") and rows["norm"].endswith("layer_norm")


def test_a_run_with_layers_that_are_left_to_adamw_resumes_bit_for_bit() -> None:
    def run(breaks: Sequence[int]) -> Any:
        model = Kinds()
        optimizer = optimizer_of(model, momentum=0.9)
        for step in range(STEPS):
            if step in breaks:
                saved = through_a_file((model.state_dict(), optimizer.state_dict()))
                model = Kinds()
                optimizer = optimizer_of(model, momentum=0.9)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            train(model, optimizer, [step])
        return values(model), copy_of(optimizer)

    assert same(run((2, PHASE, PHASE + 2)), run(()))


@pytest.mark.parametrize("at", [1, PHASE + 1])
def test_an_interrupted_pass_is_forgotten_in_both_phases(at: int) -> None:
    found = []
    for interrupted in (False, True):
        model = network()
        optimizer = optimizer_of(model, momentum=0.9)
        for step in range(STEPS):
            if interrupted and step == at:
                handle = model[3].register_forward_pre_hook(interrupt)
                with pytest.raises(KeyboardInterrupt):
                    model(data(step)[0])
                handle.remove()
                assert not _get_current_function_mode_stack()
            train(model, optimizer, [step])
        found.append(values(model))
    assert same(*found)


def interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


# Bad input.


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("first_phase", 0, ValueError), ("first_phase", 2.5, ValueError), ("first_phase", True, ValueError),
        ("first_phase", None, ValueError), ("coefficients", "mean", TypeError), ("coefficients", Sample, TypeError),
        ("unit", "relative", ValueError), ("share", "all", ValueError), ("mu", 0.0, ValueError),
        ("normalise", 1, TypeError), ("lr", -1.0, ValueError), ("lr", "1", ValueError), ("momentum", 1.0, ValueError),
        ("weight_decay", -1.0, ValueError), ("nesterov", 1, TypeError), ("strict", 0, TypeError),
        ("exclude", ["4"], ValueError), ("grad_scaler", 1, TypeError), ("adamw", {"beta": 1}, ValueError),
        ("groups", [{"lr": 1.0}], ValueError), ("model", [], TypeError),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_its_name_and_leaves_the_model_alone(
    name: str, value: Any, kind: type[Exception]
) -> None:
    model = network()
    words = {"groups": "a group needs params"}.get(name, name)
    with pytest.raises(kind, match=words):
        FNGD(**{"model": model, "first_phase": 10, name: value})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_strict_refuses_what_adamw_would_step() -> None:
    model = network()
    before = values(model)
    with pytest.raises(RuntimeError, match=r"2.weight \(used by abs: no rule\), 2.bias \(used by tanh: no rule\)"):
        train(model, optimizer_of(model, strict=True), [0])
    assert same(values(model), before)
    train(model, optimizer_of(model, strict=True, exclude=["2"]), range(STEPS))


@pytest.mark.parametrize("after", [0, PHASE + 1])
def test_missing_or_wrong_ids_are_refused_in_both_phases_and_change_nothing(after: int) -> None:
    model = network()
    optimizer = optimizer_of(model, Sample())
    train(model, optimizer, range(after))
    before = values(model), copy_of(optimizer)
    x, _ = data(0)
    with pytest.raises(ValueError, match=r"optimizer\.examples\(ids\)"):
        model(x)
    optimizer.examples(torch.arange(5))
    with pytest.raises(ValueError, match="5 ids, but the batch has 8 examples"):
        model(x)
    assert same((values(model), copy_of(optimizer)), before)
    assert all(p.requires_grad for p in model.parameters())
    model.eval()
    model(x)  # nobody asks outside of training
    model.train()
    train(model, optimizer, range(after, STEPS))
    assert optimizer.steps == STEPS


@pytest.mark.parametrize("wrong", [[0, 1], torch.zeros(8), torch.zeros(2, 4).long(), torch.tensor([-1, 2])])
def test_ids_are_whole_numbers_from_zero(wrong: Any) -> None:
    optimizer = optimizer_of(network(), Sample())
    with pytest.raises(ValueError, match="ids must be"):
        optimizer.examples(wrong)


@every_rule
@pytest.mark.parametrize("at", [0, 2, PHASE, PHASE + 2])
def test_a_gradient_that_is_not_finite_skips_the_step_and_changes_nothing(rule: Coefficients, at: int) -> None:
    model = network()
    optimizer = optimizer_of(model, rule, momentum=0.9)
    train(model, optimizer, range(at))
    before = values(model), copy_of(optimizer)["state"] if at else {}
    optimizer.zero_grad()
    optimizer.examples(ids(at))
    x, y = data(at)
    x[0, 0] = float("nan")
    F.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match=f"step {at} skipped"):
        optimizer.step()
    assert same((values(model), copy_of(optimizer)["state"] if at else {}), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(at + 1, STEPS + 2))


@every_rule
def test_only_a_look_up_that_needs_ids_takes_notice_of_them(rule: Coefficients) -> None:
    found = []
    for told in (False, True):
        model = network()
        optimizer = optimizer_of(model, rule)
        for step in range(STEPS):
            optimizer.zero_grad()
            if told or rule.needs_ids:
                optimizer.examples(ids(step) if rule.needs_ids else torch.arange(3))
            x, y = data(step)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append(values(model))
    assert same(found[0], found[1])
