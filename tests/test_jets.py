"""Jets: derivatives in the input against autograd, and the Fisher of a loss that reads them against its GGN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap

import natgrad
from natgrad import KFAC, ExactFisher, Gaussian, Jets, JointWoodbury, LossSum, NaturalGradient
from natgrad.layers import cover
from oracles import assert_equal, error, ggn

N = 6


def network(activation: nn.Module, bias: bool = True) -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(3, 5, bias=bias), activation, nn.Identity())
    return nn.Sequential(inner, nn.Linear(5, 4), activation, nn.Linear(4, 2))


ACTIVATIONS = [nn.Tanh(), nn.SiLU(), nn.GELU(), nn.Softplus(), nn.Softmax(-1)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("bias", [True, False])
def test_a_jet_is_the_value_and_the_derivatives_along_every_axis(activation: nn.Module, bias: bool) -> None:
    model, x = network(activation, bias).requires_grad_(False), torch.randn(N, 3)
    jet = Jets(model)(x)
    assert_equal(jet.value, model(x))
    assert_equal(jet.first, vmap(jacrev(model))(x).mT)
    assert_equal(jet.second, vmap(hessian(model))(x).diagonal(dim1=-2, dim2=-1).mT)


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
    found = cover(Jets(network(nn.Tanh())))
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


# Refusals.


def test_networks_and_points_that_jets_cannot_read_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"Jets reads nn.Linear, nn.Sequential and modules without parameters, not LayerN"
    ):
        Jets(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    with pytest.raises(ValueError, match=r"Jets needs points x \(n, d\), got shape \(3,\)"):
        Jets(nn.Linear(3, 4))(torch.randn(3))
