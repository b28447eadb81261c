"""Jets: derivatives in the input against autograd, and the Fisher of a loss that reads them against its GGN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap

import natgrad
from natgrad import (
    KFAC,
    Constant,
    ExactFisher,
    ExactQuadraticModel,
    Gaussian,
    Jets,
    JointFisher,
    JointWoodbury,
    LossSum,
    NaturalGradient,
    QuadraticModel,
)
from natgrad.look import look
from oracles import assert_equal, error, ggn

N = 6


def network(activation: nn.Module, bias: bool = True) -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(3, 5, bias=bias), activation, nn.Identity())
    return nn.Sequential(inner, nn.Linear(5, 4), activation, nn.Linear(4, 2))


class Waves(nn.Module):
    """An activation of one's own, not elementwise."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.sin(), (2 * x).cos()], -1)[..., ::2]


ACTIVATIONS = [nn.Tanh(), nn.SiLU(), nn.GELU(), nn.Softplus(), nn.Softmax(-1), nn.Mish(), Waves()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("bias", [True, False])
def test_a_jet_is_the_value_and_the_derivatives_along_every_axis(activation: nn.Module, bias: bool) -> None:
    model, x = network(activation, bias).requires_grad_(False), torch.randn(N, 3)
    jet = Jets(model)(x)
    assert_equal(jet.value, model(x))
    assert_equal(jet.first, vmap(jacrev(model))(x).mT)
    assert_equal(jet.second, vmap(hessian(model))(x).diagonal(dim1=-2, dim2=-1).mT)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_jet_needs_no_graph(activation: nn.Module, without: Any) -> None:
    jets, x = Jets(network(activation)), torch.randn(N, 3)
    expected = jets(x)
    with without():
        found = jets(x)
    assert not found.second.requires_grad
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other.detach())


@pytest.mark.parametrize("inplace", [nn.SiLU(inplace=True), nn.ELU(inplace=True)])
def test_a_module_that_writes_in_place_is_left_as_it_was(inplace: Any) -> None:
    model, x = network(inplace).requires_grad_(False), torch.randn(N, 3)
    jet = Jets(model)(x)
    assert inplace.inplace
    inplace.inplace = False
    for found, expected in zip(jet, Jets(model)(x), strict=True):
        assert_equal(found, expected)


def test_modules_see_rows_as_the_network_gives_them() -> None:
    """Softmax over dimension 1, and a flattening, mean the same as in the network."""
    first, last = nn.Linear(3, 5).requires_grad_(False), nn.Linear(5, 2).requires_grad_(False)
    x = torch.randn(N, 3)
    found = Jets(nn.Sequential(first, nn.Softmax(1), nn.Flatten(), last))(x)
    expected = Jets(nn.Sequential(first, nn.Softmax(-1), last))(x)
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


def test_mixed_derivatives_come_from_directions() -> None:
    directions = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.3, -2.0, 1.0]])
    model, x = network(nn.GELU()).requires_grad_(False), torch.randn(N, 3)
    jet = Jets(model, directions)(x)
    assert_equal(jet.first, directions @ vmap(jacrev(model))(x).mT)
    H = vmap(hessian(model))(x)
    assert_equal(jet.second, torch.einsum("ka,noab,kb->nko", directions, H, directions))
    assert_equal((jet.second[:, 2] - jet.second[:, 0] - jet.second[:, 1]) / 2, H[..., 0, 1])


def test_an_ansatz_is_part_of_what_is_differentiated() -> None:
    """u = x_1 (1 - x_1) + exp(x_2 network(x)): products, and a nonlinearity of the network."""

    def ansatz(x: Tensor, u: Tensor) -> Tensor:
        return x[..., :1] * (1 - x[..., :1]) + (x[..., 1:2] * u).exp()

    model, x = network(nn.Tanh()).requires_grad_(False), torch.randn(N, 3)

    def whole(x: Tensor) -> Tensor:
        return ansatz(x, model(x))

    jet = Jets(model, ansatz=ansatz)(x)
    assert_equal(jet.value, whole(x))
    assert_equal(jet.first, vmap(jacrev(whole))(x).mT)
    assert_equal(jet.second, vmap(hessian(whole))(x).diagonal(dim1=-2, dim2=-1).mT)


def test_a_jet_is_differentiable_and_shares_the_weights() -> None:
    model, x = network(nn.SiLU()), torch.randn(N, 3)
    jets = Jets(model)
    assert {id(p) for p in jets.parameters()} == {id(p) for p in model.parameters()}
    jets(x).second.square().sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    second = vmap(hessian(lambda x: torch.func.functional_call(model, dict(model.named_parameters()), x)))(x)
    second.diagonal(dim1=-2, dim2=-1).square().sum().backward()
    for gradient, p in zip(found, model.parameters(), strict=True):
        if p.grad is not None:
            assert gradient is not None
            assert_equal(gradient, p.grad)


def test_all_layers_of_jets_are_covered() -> None:
    found = look(Jets(network(nn.Tanh())), [torch.randn(4, 3)]).coverage()
    assert [layer.shape for layer in found.layers.values()] == [(5, 4), (4, 6), (2, 5)] and not found.uncovered


# The Fisher.


class Residuals(nn.Module):
    """u'' summed over the axes, plus u squared: nonlinear in u and in its derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.u = Jets(network(nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        u = self.u(x)
        return u.second.sum(1) + u.value**2 + (u.first**2).sum(1)


def test_law_25_the_fisher_of_a_residual_is_its_gauss_newton_matrix() -> None:
    model, x = Residuals(), torch.randn(N, 3)
    found = natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)])
    for name, expected in ggn(model, x, lambda r: 0.5 * r.square().sum() / N).items():
        assert_equal(found[name].dense(), expected)


class System(nn.Module):
    """Two equations for two unknowns: first order in time, mixed in space, with a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        twice = nn.Linear(5, 5)
        layers = nn.Linear(3, 5), nn.SiLU(), twice, nn.SiLU(), twice, nn.SiLU(), nn.Linear(5, 2)
        directions = torch.cat([torch.eye(3), torch.tensor([[1.0, 1.0, 0.0]])])
        self.u = Jets(nn.Sequential(*layers), directions, ansatz=lambda x, u: x[..., 2:] * u)

    def forward(self, x: Tensor) -> Tensor:
        u = self.u(x)
        mixed = (u.second[:, 3] - u.second[:, 0] - u.second[:, 1]) / 2
        return torch.stack([u.first[:, 2, 0] - mixed[:, 1], u.first[:, 2, 1] + u.value[:, 0] * u.first[:, 0, 1]], 1)


def test_law_25_the_fisher_of_a_system_in_time_with_mixed_derivatives() -> None:
    model, x = System(), torch.randn(N, 3)
    found = natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)])
    expected = ggn(model, x, lambda r: 0.5 * r.square().sum() / N)
    assert found.keys() == expected.keys() and len(found) == 3
    for name in expected:
        assert_equal(found[name].dense(), expected[name])


def test_the_quadratic_model_differentiates_jets_forwards() -> None:
    x, steps = torch.randn(N, 3), []
    for policy in (QuadraticModel(limit=None, per_layer=False), ExactQuadraticModel(limit=None, per_layer=False)):
        torch.manual_seed(5)
        model = System()
        optimizer = NaturalGradient(
            model, likelihood=Gaussian(), estimator="exact", step_size=policy, precision=torch.float64
        )
        (0.5 * model(x).square().sum(1).mean()).backward()
        optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_equal(steps[0], steps[1], 1e-9)


def test_law_06_kfac_is_exact_for_a_linear_network_where_positions_are_apart() -> None:
    """Without an activation u' and u are linear in every layer; each output of the jet is a term of its own."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u = Jets(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))

        def forward(self, x: Tensor) -> Tensor:
            u = self.u(x)
            return torch.cat([u.value.unsqueeze(1), u.first, u.second], 1)

    model, x = Linear(), torch.randn(N, 3)
    found = natgrad.fisher(model, KFAC(), Gaussian(), [(x, None)])
    for name, expected in ggn(model, x, lambda r: 0.5 * r.square().sum() / (7 * N)).items():
        assert_equal(found[name].dense(), expected)


# Training.


class Heat(nn.Module):
    """-u'' = f inside (0, 1) and u on its ends, in one pass each."""

    def __init__(self) -> None:
        super().__init__()
        self.u = Jets(nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1)))

    def forward(self, x: Tensor, inside: bool) -> dict[str, Tensor | None]:
        u = self.u(x)
        residual = u.second[:, 0] + math.pi**2 * (math.pi * x).sin()
        return {"inside": residual if inside else None, "ends": None if inside else u.value}


@pytest.mark.parametrize("seed", range(3))
def test_a_boundary_value_problem_is_solved_from_two_forward_passes(seed: int) -> None:
    """-u'' = f with u = 0 on the ends: in 40 steps, all settings at their defaults, to a relative error below 1e-3."""
    torch.manual_seed(seed)
    model, x, ends = Heat(), torch.rand(60, 1), torch.tensor([[0.0], [1.0]])
    likelihood = LossSum([(1.0, Gaussian(output="inside")), (100.0, Gaussian(output="ends"))])
    optimizer = NaturalGradient(model, JointWoodbury(), likelihood=likelihood, estimator="exact")
    for _ in range(40):
        optimizer.zero_grad()
        inside, outside = model(x, True)["inside"], model(ends, False)["ends"]
        assert inside is not None and outside is not None
        (0.5 * inside.square().mean() + 100 * 0.5 * outside.square().mean()).backward()
        optimizer.step()
    grid = torch.linspace(0, 1, 50).unsqueeze(1)
    exact = (math.pi * grid).sin()
    with torch.no_grad():
        assert error(model.u(grid).value, exact) < 1e-3


class Unknown(nn.Module):
    """k u'' = -3 pi^2 sin(pi x) with u measured to be sin(pi x): the coefficient k is a layer on ones."""

    def __init__(self) -> None:
        super().__init__()
        self.u = Jets(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)))
        self.k = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, wave = self.u(x), (math.pi * x).sin()
        equation = self.k(torch.ones_like(x)) * u.second[:, 0] + 3 * math.pi**2 * wave
        return torch.cat([equation, 10 * (u.value - wave)], 1)


@pytest.mark.parametrize("make", [JointWoodbury, JointFisher])
def test_a_step_is_that_of_gauss_newton_in_the_network_and_the_coefficient(make: Any) -> None:
    """(J^T J / n + damping I)^-1 J^T r / n, J by autograd in all parameters at once."""
    model, x = Unknown(), torch.rand(20, 1)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def residuals(*tensors: Tensor) -> Tensor:
        found = torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,))
        assert isinstance(found, Tensor)
        return found.flatten()

    before = tuple(p.detach().clone() for p in parameters)
    J = torch.cat([part.flatten(1) for part in torch.func.jacrev(residuals, tuple(range(len(before))))(*before)], 1)
    expected = torch.linalg.solve(J.mT @ J / 20 + 1e-3 * torch.eye(J.shape[1]), J.mT @ residuals(*before) / 20)
    optimizer = NaturalGradient(
        model, make(), likelihood=Gaussian(), estimator="exact", damping=1e-3, step_size=Constant(), lr=1.0
    )
    assert not optimizer.uncovered
    (0.5 * model(x).square().sum(1).mean()).backward()
    optimizer.step()
    assert_equal(torch.cat([(p - q).flatten() for p, q in zip(before, parameters, strict=True)]).detach(), expected)


# Refusals.


class Stacked(nn.Module):
    """Two calls one above the other: rows of the output that the layers saw as one example."""

    def __init__(self) -> None:
        super().__init__()
        self.u = Jets(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))

    def forward(self, inside: Tensor, boundary: Tensor) -> Tensor:
        return torch.cat([self.u(inside).second.sum(1), self.u(boundary).value])


def test_calls_that_are_stacked_as_examples_have_random_signs_with_exact_labels() -> None:
    """One seed reaches both calls of a layer, whose examples are not those of the output: their signs are random."""
    model, x = Stacked(), (torch.randn(N, 3), torch.randn(N, 3))
    signs = [natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)], seed=seed) for seed in range(400)]
    drawn = natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)], estimator="sampled", draws=1500)
    for name, expected in ggn(model, x, lambda r: 0.5 * r.square().sum() / (2 * N)).items():
        assert error(torch.stack([found[name].dense() for found in signs]).mean(0), expected) < 0.05
        assert error(drawn[name].dense(), expected) < 0.1


def test_calls_with_batches_of_different_sizes_are_refused() -> None:
    model, x = Stacked(), (torch.randn(N, 3), torch.randn(N, 3))
    optimizer = NaturalGradient(model, likelihood=Gaussian())
    model(x[0], x[1][:4]).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"batches of different sizes .* make one forward pass for each batch"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Dropout(0.5), r"treat all rows alike at every call, not Dropout"),
        (nn.BatchNorm1d(3, affine=False), r"treat all rows alike at every call, not BatchNorm1d"),
        (nn.RReLU(), r"treat all rows alike at every call, not RReLU"),
        (nn.LayerNorm(3, elementwise_affine=False), r"cannot differentiate LayerNorm twice"),
        (lambda x: x, r"not function"),
    ],
)
def test_modules_that_are_no_functions_of_rows_are_refused(module: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Jets(module)


def test_directions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"directions must be vectors \(m, d\), got torch.float64 of shape \(3,\)"):
        Jets(nn.Linear(3, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"directions of 2 entries, and got points of 3"):
        Jets(nn.Linear(3, 4), torch.eye(2))(torch.randn(N, 3))


def test_networks_and_points_that_jets_cannot_read_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"Jets reads nn.Linear, nn.Sequential and modules without parameters, not LayerN"
    ):
        Jets(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    with pytest.raises(ValueError, match=r"Jets needs points x \(n, d\), got shape \(3,\)"):
        Jets(nn.Linear(3, 4))(torch.randn(3))
