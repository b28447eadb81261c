"""Physics-informed networks (Raissi et al. 2019): Poisson's equation on the unit square, by residuals at points."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

import natgrad
from natgrad.race.data import Dataset, Pair

WIDTH = 32
BOUNDARY = 10.0  # what a residual on the boundary weighs


def exact(x: Tensor) -> Tensor:
    """sin(pi x) sin(pi y), the solution (n, 1) of -Laplace u = f with u = 0 on the boundary."""
    return (math.pi * x).sin().prod(-1, keepdim=True)


def force(x: Tensor) -> Tensor:
    """f = 2 pi^2 sin(pi x) sin(pi y)."""
    return 2 * math.pi**2 * exact(x)


class Residuals(nn.Module):
    """A network u whose output are residuals: Laplace u + f inside the square, BOUNDARY u on its boundary."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.u = natgrad.Jets(network)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1) at points x (n, 2)."""
        u = self.u(x)
        boundary = ((x == 0) | (x == 1)).any(-1, keepdim=True)
        return torch.where(boundary, BOUNDARY * u.value, u.second.sum(1) + force(x))


def points(n: int, seed: int) -> Pair:
    """Uniform points (n, 2) in float64, every eighth on the boundary, and the residuals to aim at, which are 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    edge = torch.arange(0, n, 8)
    side = torch.randint(4, edge.shape, generator=generator)
    x[edge, side % 2] = (side // 2).double()
    return x, torch.zeros(n, 1, dtype=torch.float64)


def square(folder: Path | None) -> Dataset:
    """4,096 points for training, 1,024 for test."""
    return Dataset("points of the unit square", points(4096, seed=0), points(1024, seed=1))


def residuals(data: Dataset) -> Residuals:
    """One hidden layer of tanh, in float64."""
    return Residuals(nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).double())


@torch.no_grad()
def relative_error(model: nn.Module, data: Dataset) -> float:
    """|u - exact| / |exact| on a grid of 50 x 50 points."""
    assert isinstance(model, Residuals)
    axis = torch.linspace(0, 1, 50, dtype=torch.float64, device=next(model.parameters()).device)
    x = torch.cartesian_prod(axis, axis)
    return float((model.u(x).value - exact(x)).norm() / exact(x).norm())
