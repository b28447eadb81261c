"""Law 19: plain SGD on a reconstructed network is explicit preconditioning; and what else reconstruction keeps."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import natgrad
from natgrad import EKFAC, FOOF, KFAC, SNGD, Approximation, Categorical, Diagonal, ExactFisher, NGPlus, UnitWise
from natgrad.capture import Capture
from natgrad.fishers import Stats
from natgrad.layers import Layer, expected
from natgrad.matrix import (
    FactorisationError,
    Grouped,
    Nystrom,
    Ridge,
    Tikhonov,
    denman_beavers,
    eigh_root,
    newton_schulz,
)
from oracles import assert_equal, error

SEED = torch.Generator().manual_seed(0)
X = torch.randn(60, 6, dtype=torch.float64, generator=SEED)
Y = torch.randint(3, (60,), generator=SEED)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, padding=1, bias=False),
        nn.Flatten(),
        nn.Unflatten(1, (3, -1)),
        nn.Conv1d(3, 2, 3),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def data(model: nn.Module, n: int = 60) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 2, 7, 7) if isinstance(model[0], nn.Conv2d) else torch.randn(n, 6)  # type: ignore[index]
    x = x @ (torch.eye(x.shape[-1]) + 0.5 * torch.randn(x.shape[-1], x.shape[-1]))
    model(x)
    return x, torch.randint(3, (n,))


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


class Explicit:
    """SGD with momentum on D = (F~ + damping)^-1 M, layer by layer: dense matrices out of dense statistics."""

    def __init__(self, model: nn.Module, lr: float, momentum: float) -> None:
        self.model, self.lr, self.momentum = model, lr, momentum
        self.layers: dict[str, Layer] = dict(expected(model).layers)
        self.stats: dict[str, Stats] = {}
        self.inverse: dict[str, Tensor] = {}
        self.velocity: dict[str, Tensor] = {}

    def refresh(self, approximation: Approximation, seen: dict[str, Capture], damping: float, decay: float) -> None:
        for name, capture in seen.items():
            self.stats[name] = approximation.merge(self.stats.get(name), approximation.observe(capture), decay)
            matrix = approximation.assemble(self.stats[name])
            self.inverse[name] = approximation.invert(matrix, damping).dense()

    def step(self) -> None:
        for name, layer in self.layers.items():
            M = layer.pack([p.grad for p in layer.parameters if p.grad is not None])
            D = (self.inverse[name] @ M.flatten(-2).unsqueeze(-1)).view_as(M)
            self.velocity[name] = D if name not in self.velocity else self.momentum * self.velocity[name] + D
            for p, change in zip(layer.parameters, layer.unpack(self.velocity[name]), strict=True):
                p.data -= self.lr * change


def captures(model: nn.Module, x: Tensor) -> dict[str, Capture]:
    """What the layers see of inputs x, with g = 1, by hand."""
    seen: dict[str, Capture] = {}
    layers = dict(expected(model).layers)

    def hook_of(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
            a, g = layer.form.inputs(args[0], layer.biased), layer.form.outputs(torch.ones_like(y))
            seen[layer.name] = Capture(a.detach(), g, len(x), a.shape[-3] * a.shape[-2])

        return hook

    handles = [model.get_submodule(layer.name).register_forward_hook(hook_of(layer)) for layer in layers.values()]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The W of every layer, reconstructed or not."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {
        f"{name}.{part}": getattr(module, part).detach().clone()
        for name, module in layers.items()
        for part in ("weight", "bias")
        if getattr(module, part) is not None
    }


def assert_same_weights(model: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    mine, theirs = weights(model), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert_equal(mine[name], theirs[name], tolerance)


def assert_moved(model: nn.Module, start: nn.Module) -> None:
    """Equal runs say nothing if neither of them moves."""
    mine, theirs = weights(model), weights(start)
    assert all(error(mine[name], theirs[name]) > 1e-3 for name in mine)


# Law 19.


@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("every", [1000, 7])
def test_law_19_sgd_is_explicit_preconditioning_between_and_across_refreshes(
    make: Callable[[], nn.Sequential], momentum: float, every: int
) -> None:
    model = make()
    x, y = data(model)
    lr = (1 - momentum) * (0.02 if make is mlp else 0.002)  # stable: else rounding is multiplied at every step
    explicit = Explicit(copy.deepcopy(model), lr, momentum)
    start = copy.deepcopy(model)
    optimizer = None
    for step in range(60):
        part = slice(10 * (step % 6), 10 * (step % 6) + 10)
        if step % every == 0:
            k = step // every + 1
            explicit.refresh(SNGD(), captures(explicit.model, x[part]), 0.0, min(1 - 1 / k, 0.7))
            if optimizer is None:
                natgrad.reconstruct(model, [(x[part], y[part])])
                optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
            else:
                natgrad.refresh(model, [(x[part], y[part])], optimizer, decay=0.7)
        assert optimizer is not None
        for here in (model, explicit.model):
            gradients(here, x[part], y[part])
        optimizer.step()
        explicit.step()
        assert_same_weights(model, explicit.model, 1e-11)
    assert_moved(model, start)


LIKELIHOODS: dict[str, tuple[Approximation, float]] = {
    "two-sided": (KFAC(rule=Ridge()), 1e-2),
    "KFAC": (KFAC(), 1e-1),
    "KFAC-Tikhonov": (KFAC(rule=Tikhonov()), 1e-1),
    "NGPlus": (NGPlus(), 1e-1),
    "UnitWise": (UnitWise(1e-2), 1e-1),
    "Diagonal": (Diagonal(), 1e-1),
}


@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize(("approximation", "damping"), LIKELIHOODS.values(), ids=LIKELIHOODS.keys())
def test_law_19_for_metrics_of_the_loss(
    make: Callable[[], nn.Sequential], approximation: Approximation, damping: float
) -> None:
    model = make()
    x, y = data(model)
    plain = copy.deepcopy(model)
    likelihood = Categorical()
    explicit, start = Explicit(plain, 2e-4, 0.9), copy.deepcopy(model)
    fisher = natgrad.fisher(plain, approximation, likelihood, [(x, y)])
    for name, matrix in fisher.items():
        inner = matrix.inner if isinstance(matrix, Grouped) else matrix
        explicit.inverse[name] = approximation.invert(inner, damping).dense()
    natgrad.reconstruct(model, [(x, y)], approximation, likelihood=likelihood, estimator="exact", damping=damping)
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-4, momentum=0.9)
    for _ in range(50):
        for here in (model, plain):
            gradients(here, x, y)
        optimizer.step()
        explicit.step()
    assert_same_weights(model, plain, 1e-11)
    assert_moved(model, start)


def test_adam_is_not_preconditioned_by_a_reconstruction() -> None:
    model, plain = mlp(), mlp()
    plain.load_state_dict(model.state_dict())
    natgrad.reconstruct(model, [(X, Y)])
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    explicit = Explicit(plain, 0.01, 0.9)
    explicit.refresh(SNGD(), captures(plain, X), 0.0, 0.0)
    for here in (model, plain):
        gradients(here, X, Y)
    adam.step()
    explicit.step()
    with pytest.raises(AssertionError):
        assert_same_weights(model, plain, 1e-3)


# The function, the architecture and the velocity stay.


@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize(
    "root", [eigh_root, denman_beavers, newton_schulz, Nystrom(4), Nystrom(100)], ids=lambda root: str(root).split()[0]
)
def test_no_verb_changes_the_function(make: Callable[[], nn.Sequential], root: Any) -> None:
    model = make()
    x, y = data(model)
    before = outputs(model, x)
    assert natgrad.reconstruct(model, [(x[:30], y[:30])], root=root) is model
    assert_equal(outputs(model, x), before, 1e-12)
    assert natgrad.refresh(model, [(x[30:], y[30:])]) is model
    assert_equal(outputs(model, x), before, 1e-12)
    assert natgrad.restore(model) is model
    assert_equal(outputs(model, x), before, 1e-12)


@pytest.mark.parametrize("make", [mlp, convnet])
def test_restore_gives_the_architecture_back(make: Callable[[], nn.Sequential]) -> None:
    model = make()
    x, y = data(model)
    modules, keys = [type(module) for module in model.modules()], list(model.state_dict())
    parameters = list(model.named_parameters())
    natgrad.reconstruct(model, [(x, y)])
    assert [type(module) for module in model.modules()] != modules
    assert {id(p) for p in model.parameters()} == {id(p) for _, p in parameters}
    natgrad.restore(model)
    assert [type(module) for module in model.modules()] == modules
    assert list(model.state_dict()) == keys
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, id(p)) for name, p in parameters]
    torch.save(model, io.BytesIO())  # an ordinary module again
    natgrad.reconstruct(model, [(x, y)])  # and again


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_frozen_half_of_a_layer_stays_out(part: str) -> None:
    model = mlp()
    getattr(model[0], part).requires_grad_(False)
    frozen, keys, before = getattr(model[0], part).clone(), list(model.state_dict()), outputs(model, X)
    natgrad.reconstruct(model, [(X, Y)])
    assert parametrize.is_parametrized(model[0]) == (part == "bias")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert_equal(outputs(model, X), before, 1e-12)
    gradients(model, X, Y)
    optimizer.step()
    natgrad.refresh(model, [(X, Y)], optimizer)
    natgrad.restore(model, optimizer)
    assert torch.equal(getattr(model[0], part), frozen)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == keys


def test_excluded_tied_and_unreached_layers_stay_as_they_are() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.unused, self.out = (nn.Linear(6, 6) for _ in range(4))
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.second(self.first(x)))

    model = Model()
    natgrad.reconstruct(model, [(X, Y)])
    assert [name for name, module in model.named_modules() if parametrize.is_parametrized(module)] == ["out"]
    with pytest.raises(ValueError, match=r"no layer that can be reconstructed|reach no covered layer"):
        natgrad.reconstruct(Model(), [(X, Y)], exclude=["out"])
    with pytest.raises(ValueError, match="exclude names no module"):
        natgrad.reconstruct(Model(), [(X, Y)], exclude=["nothing"])


def trained(momentum: float = 0.9, steps: int = 3) -> tuple[nn.Sequential, torch.optim.SGD]:
    model = mlp()
    natgrad.reconstruct(model, [(X, Y)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    for _ in range(steps):
        gradients(model, X, Y)
        optimizer.step()
    return model, optimizer


def velocity_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The velocity of W, whatever the coordinates: that of a step without a gradient."""
    model, optimizer = copy.deepcopy((model, optimizer))
    for group in optimizer.param_groups:
        group["params"] = list(model.parameters())
    before = weights(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(optimizer.state[p]["momentum_buffer"])
    return {name: W - before[name] for name, W in weights(model).items()}


def test_the_velocity_of_the_weights_is_kept_by_every_verb() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        gradients(model, X, Y)
        optimizer.step()
    expected = velocity_of(model, optimizer)
    for verb in (
        lambda: natgrad.reconstruct(model, [(X[:30], Y[:30])], optimizer=optimizer),
        lambda: natgrad.refresh(model, [(X[30:], Y[30:])], optimizer),
        lambda: natgrad.restore(model, optimizer),
    ):
        verb()
        found = velocity_of(model, optimizer)
        for name in expected:
            assert_equal(found[name], expected[name], 1e-11)


def test_the_velocity_starts_anew_if_it_is_not_kept_and_stays_in_place_without_the_optimizer() -> None:
    model, optimizer = trained()
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    natgrad.refresh(model, [(X[:20], Y[:20])])
    for p, buffer in zip(model.parameters(), buffers, strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], buffer)
    natgrad.refresh(model, [(X[:20], Y[:20])], optimizer, keep_velocity=False)
    assert all(optimizer.state[p]["momentum_buffer"] is None for p in model.parameters())
    optimizer.step()


def test_a_refresh_between_backward_and_step_keeps_the_gradient() -> None:
    model = mlp()
    natgrad.reconstruct(model, [(X[:20], Y[:20])])
    waiting = copy.deepcopy(model)
    gradients(waiting, X, Y)
    for here in (model, waiting):
        natgrad.refresh(here, [(X[20:], Y[20:])])
    gradients(model, X, Y)
    for p, q in zip(model.parameters(), waiting.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert_equal(q.grad, p.grad, 1e-11)


def test_a_plain_sgd_without_momentum_is_accepted() -> None:
    model, optimizer = trained(momentum=0.0)
    natgrad.refresh(model, [(X, Y)], optimizer)
    natgrad.restore(model, optimizer)


# Statistics.


def metric_of(model: nn.Sequential, layer: int = 0) -> Any:
    chain: Any = model[layer].parametrizations
    return chain.weight[0].metric


def test_the_metric_is_the_covariance_of_the_inputs_over_all_batches() -> None:
    model = mlp()
    natgrad.reconstruct(model, [(X[:10], Y[:10]), (X[10:], Y[10:])])
    a = torch.cat([X, torch.ones(60, 1)], -1)
    A = a.mT @ a / 60
    metric = metric_of(model)
    assert_equal(metric.stats["A"].value, A)
    S, ridge = metric.S.factor, 1e-4 * A.trace() * torch.eye(7)
    assert_equal(S @ S @ (A + ridge), torch.eye(7))


def test_the_average_over_refreshes() -> None:
    model = mlp()
    natgrad.reconstruct(model, [(X[:20], Y[:20])])
    natgrad.refresh(model, [(X[20:40], Y[20:40])], decay=0.9)
    a = torch.cat([X, torch.ones(60, 1)], -1)
    assert_equal(metric_of(model).stats["A"].value, a[:40].mT @ a[:40] / 40)  # the first ones weigh equally
    natgrad.refresh(model, [(X[40:], Y[40:])], decay=0.2)
    assert_equal(metric_of(model).stats["A"].value, 0.2 * a[:40].mT @ a[:40] / 40 + 0.8 * a[40:].mT @ a[40:] / 20)


def test_rows_with_slopes_of_1_are_the_shared_metric() -> None:
    for make in (mlp, convnet):
        shared = make()
        x, y = data(shared)
        rows = copy.deepcopy(shared)
        natgrad.reconstruct(shared, [(x, y)], SNGD(1e-3))
        natgrad.reconstruct(rows, [(x, y)], UnitWise(1e-3), activations={})
        for p, q in zip(shared.parameters(), rows.parameters(), strict=True):
            assert_equal(q.detach(), p.detach(), 1e-11)


def test_rows_with_activations_are_the_relative_fisher_of_each_neuron() -> None:
    model = mlp()
    with torch.no_grad():
        slope = 1 - model[:2](X).square()  # tanh'(s)
    natgrad.reconstruct(model, [(X, Y)], UnitWise(), activations={"0": torch.tanh})
    a = torch.cat([X, torch.ones(60, 1)], -1)
    for j, R in enumerate(metric_of(model).stats["R"].value):
        assert_equal(R, (slope[:, j : j + 1].square() * a).mT @ a / 60)


def test_one_step_of_gradient_descent_solves_least_squares_in_the_metric_of_the_inputs() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    natgrad.reconstruct(model, [(X, Y)], FOOF())
    target = torch.randn(60, 3)
    (0.5 * (model(X) - target).square().sum() / 60).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    natgrad.restore(model)
    design = torch.cat([X, torch.ones(60, 1)], -1)
    solution = torch.linalg.lstsq(design, target).solution.mT
    found = weights(model)
    assert_equal(torch.cat([found["0.weight"], found["0.bias"][:, None]], -1), solution)


def test_sampled_labels_are_fresh_at_every_refresh_and_the_same_for_the_same_seed() -> None:
    models = [mlp()]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        natgrad.reconstruct(model, [(X, Y)], KFAC(rule=Ridge()), likelihood=Categorical(), damping=1e-3, seed=seed)
    G = [metric_of(model).stats["G"].value for model in models]
    assert torch.equal(G[0], G[1]) and error(G[2], G[0]) > 1e-3
    natgrad.refresh(models[0], [(X, Y)], decay=0.0)
    assert error(metric_of(models[0]).stats["G"].value, G[0]) > 1e-3


class Uncovered(nn.PReLU):
    """Slopes that are used in a way that no rule reads."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.prelu(input, self.weight.abs())


def test_the_observing_pass_leaves_modes_running_statistics_and_gradients_alone() -> None:
    norm = nn.BatchNorm1d(5)
    uncovered = Uncovered(5)
    model = nn.Sequential(nn.Linear(6, 5), norm, uncovered, nn.Dropout(0.5).eval(), nn.Linear(5, 3))
    gradients(model, X, Y)
    assert uncovered.weight.grad is not None and norm.running_mean is not None
    gradient, running = uncovered.weight.grad.clone(), norm.running_mean.clone()
    modes = [part.training for part in model]
    random = torch.random.get_rng_state()
    natgrad.reconstruct(model, [(X, Y)])
    natgrad.refresh(model, [(X, Y)])
    assert torch.equal(norm.running_mean, running) and torch.equal(uncovered.weight.grad, gradient)
    assert [part.training for part in model] == modes
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(part._forward_hooks for part in model.modules())


# Ordinary torch tools.


def test_deep_copies_are_independent() -> None:
    model, _ = trained()
    before = outputs(model, X)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2.0)
    assert error(outputs(other, X), before) > 0.1
    assert_equal(outputs(model, X), before, 1e-15)
    natgrad.refresh(other, [(X[:9], Y[:9])])
    natgrad.restore(other)
    assert parametrize.is_parametrized(model[0])
    assert_equal(outputs(model, X), before, 1e-15)
    natgrad.restore(model)
    assert_equal(outputs(model, X), before, 1e-12)


def test_a_state_dict_resumes_the_run() -> None:
    model, optimizer = trained()
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    other = mlp()
    natgrad.reconstruct(other, [(X[:9], Y[:9])])
    resumed = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    state, optimizer_state = torch.load(file)
    other.load_state_dict(state)
    resumed.load_state_dict(optimizer_state)
    for here, steps in ((model, optimizer), (other, resumed)):
        natgrad.refresh(here, [(X[9:30], Y[9:30])], steps)
        gradients(here, X, Y)
        steps.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_casting_the_model_casts_the_metric() -> None:
    model, _ = trained()
    before = outputs(model, X)
    model.float()
    assert_equal(outputs(model, X.float()).double(), before, 1e-5)
    natgrad.refresh(model, [(X.float(), Y)])
    assert_equal(outputs(model, X.float()).double(), before, 1e-5)
    model.bfloat16()
    natgrad.refresh(model, [(X.bfloat16(), Y)])
    assert metric_of(model).S.factor.dtype == torch.float32


def test_functional_call_sees_other_parameters() -> None:
    model, _ = trained()
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, doubled, (X,))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    assert_equal(found.detach(), outputs(model, X), 1e-14)


def test_the_weights_are_not_rounded_by_autocast() -> None:
    model, _ = trained()
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = weights(model)
    assert all(torch.equal(W, V) for W, V in zip(found.values(), weights(model).values(), strict=True))


def test_layers_that_are_called_twice_or_without_a_batch() -> None:
    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](torch.tanh(self[0](x)))

    model = Twice(nn.Linear(6, 6))
    natgrad.reconstruct(model, [(X, Y), (X[0], Y[0])])
    W, b = weights(model).values()
    second = torch.cat([torch.tanh(F.linear(x, W, b)) for x in (X, X[:1])])
    a = torch.cat([torch.cat([X, X[:1], second]), torch.ones(122, 1)], -1)
    assert_equal(metric_of(model).stats["A"].value, a.mT @ a / 122)


# Bad input leaves everything as it was.


class Unfinished(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        raise RuntimeError("broken forward")


BAD: dict[str, tuple[type[Exception], str, Callable[[nn.Module], Any]]] = {
    "a class": (TypeError, "approximation must be", lambda m: natgrad.reconstruct(m, [(X, Y)], SNGD)),  # type: ignore[arg-type]
    "no gradients": (ValueError, "give a likelihood, or", lambda m: natgrad.reconstruct(m, [(X, Y)], KFAC())),
    "a likelihood class": (
        TypeError,
        "likelihood must be",
        lambda m: natgrad.reconstruct(m, [(X, Y)], likelihood=Categorical),  # type: ignore[arg-type]
    ),
    "both": (
        ValueError,
        "not both",
        lambda m: natgrad.reconstruct(m, [(X, Y)], UnitWise(), likelihood=Categorical(), activations={}),
    ),
    "activations": (
        ValueError,
        "activations name no covered layer: 1",
        lambda m: natgrad.reconstruct(m, [(X, Y)], UnitWise(), activations={"1": torch.tanh}),
    ),
    "corrected": (
        ValueError,
        "cannot be reconstructed",
        lambda m: natgrad.reconstruct(m, [(X, Y)], EKFAC(), likelihood=Categorical()),
    ),
    "dense": (
        ValueError,
        "no square root",
        lambda m: natgrad.reconstruct(m, [(X, Y)], ExactFisher(), likelihood=Categorical(), damping=1.0),
    ),
    "estimator": (
        ValueError,
        "estimator must be",
        lambda m: natgrad.reconstruct(m, [(X, Y)], estimator="true"),  # type: ignore[arg-type]
    ),
    "damping": (ValueError, "damping must be", lambda m: natgrad.reconstruct(m, [(X, Y)], damping=-1.0)),
    "root": (TypeError, "root must be", lambda m: natgrad.reconstruct(m, [(X, Y)], root="eigh")),  # type: ignore[arg-type]
    "no data": (ValueError, "batches are empty", lambda m: natgrad.reconstruct(m, [])),
    "too large": (
        ValueError,
        "UnitWise: layer '0' has 5 outputs of 7 inputs",
        lambda m: natgrad.reconstruct(m, [(X, Y)], UnitWise(limit=100), activations={}),
    ),
    "singular": (
        FactorisationError,
        "layer '0'",
        lambda m: natgrad.reconstruct(m, [(X[:2], Y[:2])], FOOF()),
    ),
    "not finite": (FactorisationError, "layer '0'", lambda m: natgrad.reconstruct(m, [(X * float("nan"), Y)])),
    "adam": (
        TypeError,
        "must be a torch.optim.SGD, got a Adam",
        lambda m: natgrad.reconstruct(m, [(X, Y)], optimizer=torch.optim.Adam(m.parameters())),
    ),
    "another's optimizer": (
        ValueError,
        "holds no parameter",
        lambda m: natgrad.reconstruct(m, [(X, Y)], optimizer=torch.optim.SGD(mlp().parameters())),
    ),
    "refresh": (ValueError, "not reconstructed", lambda m: natgrad.refresh(m, [(X, Y)])),
    "restore": (ValueError, "not reconstructed", natgrad.restore),
}


@pytest.mark.parametrize(("kind", "message", "use"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_and_changes_nothing(
    kind: type[Exception], message: str, use: Callable[[nn.Module], Any]
) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=message):
        use(model)
    assert_untouched(model, before)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


WORSE: dict[str, tuple[type[Exception], str, Callable[[nn.Module], Any]]] = {
    "twice": (ValueError, "reconstructed already", lambda m: natgrad.reconstruct(m, [(X, Y)])),
    "decay": (ValueError, "decay must be", lambda m: natgrad.refresh(m, [(X, Y)], decay=1.0)),
    "no data": (ValueError, "batches are empty", lambda m: natgrad.refresh(m, [])),
    "not finite": (FactorisationError, "layer '0'", lambda m: natgrad.refresh(m, [(X * float("inf"), Y)])),
    "adam": (
        TypeError,
        "must be a torch.optim.SGD",
        lambda m: natgrad.refresh(m, [(X, Y)], torch.optim.Adam(m.parameters())),
    ),
    "restore for adam": (TypeError, "SGD", lambda m: natgrad.restore(m, torch.optim.Adam(m.parameters()))),
}


@pytest.mark.parametrize(("kind", "message", "use"), WORSE.values(), ids=WORSE.keys())
def test_bad_input_leaves_a_reconstructed_model_as_it_was(
    kind: type[Exception], message: str, use: Callable[[nn.Module], Any]
) -> None:
    model, _ = trained()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=message):
        use(model)
    assert_untouched(model, before)


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_broken_forward_leaves_no_hooks() -> None:
    for settings in ({}, {"approximation": KFAC(), "likelihood": Categorical()}):
        model = Unfinished()
        with pytest.raises(RuntimeError, match="broken forward"):
            natgrad.reconstruct(model, [(X, Y)], **settings)  # type: ignore[arg-type]
        assert model.training and not model._forward_hooks and not model.inner._forward_hooks


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer that can be reconstructed"):
        natgrad.reconstruct(nn.Sequential(nn.Tanh()), [(X, Y)])


def test_parts_are_refreshed_apart() -> None:
    first, second = mlp(), nn.Sequential(nn.Linear(3, 3))
    natgrad.reconstruct(first, [(X, Y)])
    natgrad.reconstruct(second, [(X[:, :3], Y)])
    whole = nn.Sequential(first, second)
    with pytest.raises(ValueError, match="in parts"):
        natgrad.refresh(whole, [(X, Y)])
    natgrad.refresh(first, [(X, Y)])
    natgrad.restore(whole)
    assert not any(parametrize.is_parametrized(module) for module in whole.modules())


def test_a_weight_that_was_parametrized_once_more_is_not_restored() -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, _ = trained()
    parametrize.register_parametrization(model[0], "weight", Twice())
    before = outputs(model, X)
    with pytest.raises(ValueError, match=r"0.weight was parametrized once more"):
        natgrad.restore(model)
    assert_equal(outputs(model, X), before, 1e-15)
