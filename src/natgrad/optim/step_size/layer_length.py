"""Steps of a length that is set, and not computed: what holds on noisy batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from natgrad.optim.geometry import Geometry, Spectral
from natgrad.optim.step_size.base import Decision, Memory, Situation, StepSize

if TYPE_CHECKING:
    from natgrad.optim.directions import Directions


@dataclass(frozen=True)
class LayerLength(StepSize):
    """An average of gradients, then the map, then a length: every layer's step has a root mean square of rms lr.

    V <- momentum V + (1 - momentum) M; D = map(momentum V + (1 - momentum) M) for the map of the ``geometry``; theta <-
    theta - lr rms D / |D|, |D| the root mean square of the entries of D in the layer.
    """

    rms: float = 0.2
    momentum: float = 0.95
    norm: Geometry = Spectral()
    settle: float | None = None
    power: float = 0.5

    chooses_momentum = True
    lr = 0.01

    def geometry(self, memory: Memory) -> Geometry:
        """That of the settings."""
        return self.norm

    def averages(self, memory: Memory) -> float | None:
        """The momentum."""
        return self.momentum

    def prepare(self, directions: Directions, damping: float, memory: Memory) -> Directions:
        """Every layer's D at its length; one factor for all where a map joins the layers."""
        sizes = {name: D.numel() for name, D in directions.D.items()}
        squares = torch.stack([D.square().sum() for D in directions.D.values()])
        count = torch.tensor([float(n) for n in sizes.values()], dtype=squares.dtype, device=squares.device)
        means = squares.sum() / count.sum() if directions.joint else squares / count
        tiny = torch.finfo(squares.dtype).tiny
        return directions.scaled((self.rms / means.clamp(min=tiny).sqrt()).expand(len(sizes)))

    def products(self, directions: Directions, damping: float, memory: Memory) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def decide(self, now: Situation) -> Decision:
        """alpha = 1, or what is left of it without a schedule."""
        steps = now.memory.get("settling", 0.0)
        alpha = 1.0 if self.settle is None or now.scheduled else (1 + steps / self.settle) ** -self.power
        return Decision(alpha, 0.0, memory={"averaged": 1.0, "settling": steps + 1})
