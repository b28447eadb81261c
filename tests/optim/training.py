"""A small task, and the few lines of a training loop that the tests of the optimizer share."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad import EKFAC, FNGD, KFAC, TEKFAC, TKFAC, Categorical, NaturalGradient
from snapshots import same as same
from snapshots import values as values

FOUR = [KFAC, EKFAC, TKFAC, TEKFAC]
Batch = tuple[Tensor, Tensor]


class OwnNorm(nn.LayerNorm):
    """A norm whose parameters are used in ways that have no rule, and do at first what they do in any."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, tuple(self.normalized_shape)) * self.weight.abs() + self.bias.tanh()


def network(seed: int = 3) -> nn.Sequential:
    """Two covered layers (``0``, ``3``) and a norm that AdamW trains (``2``)."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), OwnNorm(6), nn.Linear(6, 3))


def batch(seed: int = 0, n: int = 8) -> Batch:
    """Correlated inputs, and labels that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x, (x[:, :3] + 0.5 * x[:, 2:]).argmax(1)


def noise(seed: int = 0, n: int = 4) -> Batch:
    """Labels that have nothing to do with the inputs."""
    x, _ = batch(seed, n)
    return x, torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed + 77))


def optimizer_of(model: nn.Module, approximation: Any = None, **settings: Any) -> NaturalGradient:
    settings = {"likelihood": Categorical(), "refresh_every": 5, **settings}
    return NaturalGradient(model, approximation, **settings)


def backward(model: nn.Module, optimizer: torch.optim.Optimizer, data: Batch) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(data[0]), data[1])
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> list[Tensor]:
    """The losses."""
    losses = []
    for data in batches:
        losses.append(backward(model, optimizer, data))
        optimizer.step()
    return losses


def weights(optimizer: NaturalGradient | FNGD) -> list[nn.Parameter]:
    return [layer.parameters[0] for layer in optimizer.layers.values()]


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def copy_of(optimizer: torch.optim.Optimizer) -> Any:
    """The state as it is now, which later steps do not change."""
    return through_a_file(optimizer.state_dict())


def without_counters(state: dict[str, Any]) -> dict[str, Any]:
    """A copied ``state_dict()`` without the numbers of steps done and skipped."""
    for group in state["param_groups"]:
        for name in ("steps", "skipped"):
            group.get("clock", {}).pop(name, None)
    return state
