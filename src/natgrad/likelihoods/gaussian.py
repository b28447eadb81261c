"""Real outputs with unit variance: the squared error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.likelihoods.elementwise import Elementwise


@dataclass(frozen=True, kw_only=True)
class Gaussian(Elementwise):
    """Independent unit-variance normal outputs; the NLL is half the squared error.

    ``reduction="sum"``: the loss is 1/2 |f - y|^2 per term. ``"mean"``: torch's ``MSELoss``, 2/dim times that.
    """

    def residual(self, output: Tensor, uniform: Tensor, targets: Tensor | None = None) -> Tensor:
        """f - y, a standard normal number."""
        return torch.special.ndtri(uniform)

    def curvature(self, events: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(events)

    def scale(self, output: Tensor) -> float:
        """1, or 2/dim under the mean, which torch takes of the whole square."""
        return 1.0 if self.reduction == "sum" else 2.0 / self.events(output).shape[-1]

    def nll(self, output: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error, summed."""
        return 0.5 * (output - targets).square().sum()
