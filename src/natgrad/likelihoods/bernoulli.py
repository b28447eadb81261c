"""Binary outputs, given as logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from natgrad.likelihoods.elementwise import Elementwise


@dataclass(frozen=True, kw_only=True)
class Bernoulli(Elementwise):
    """Independent Bernoulli outputs given as logits; the NLL is ``binary_cross_entropy_with_logits``."""

    @property
    def entropy(self) -> float:
        """log 2."""
        return math.log(2)

    def residual(self, output: Tensor, uniform: Tensor, targets: Tensor | None = None) -> Tensor:
        """sigmoid(f) - y."""
        p = self.events(output).sigmoid()
        return p - (uniform < p).to(p.dtype)

    def curvature(self, events: Tensor) -> Tensor:
        """p (1 - p)."""
        p = events.sigmoid()
        return p * (1 - p)

    def nll(self, output: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy on logits, summed."""
        return F.binary_cross_entropy_with_logits(output, targets.to(output.dtype), reduction="sum")
