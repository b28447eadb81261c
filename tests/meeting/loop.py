"""Small networks, and the few lines of a training loop that the tests of meetings share."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad import Categorical, KLLimit, NaturalGradient
from snapshots import same as same
from snapshots import values as values

N = 6


class OwnNorm(nn.LayerNorm):
    """A norm whose parameters are used in ways that have no rule."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, tuple(self.normalized_shape)) * self.weight.abs() + self.bias.tanh()


def mlp(width: int = 5) -> Any:
    """Two linear layers, and a norm that no rule reads."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), OwnNorm(width), nn.Linear(width, 3))


def transposed() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3))


def batch(seed: int = 0, shape: tuple[int, ...] = (4,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, *shape, generator=generator), torch.randint(3, (N,), generator=generator)


def optimizer_of(model: nn.Module, approximation: Any = None, **settings: Any) -> NaturalGradient:
    settings = {"likelihood": Categorical(), "step_size": KLLimit(), "refresh_every": 2, "observe_every": 1, **settings}
    return NaturalGradient(model, approximation, **settings)


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: Any, shape: tuple[int, ...] = (4,)) -> None:
    for seed in seeds:
        backward(model, optimizer, batch(seed, shape))
        optimizer.step()


def everything(model: nn.Module, optimizer: NaturalGradient) -> Any:
    """All that a failure must leave as it was."""
    found = optimizer.state_dict()
    return values(model), copy.deepcopy(found["state"]), copy.deepcopy(found["param_groups"]), str(optimizer)
