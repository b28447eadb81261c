"""Dense layers on jets: a value and its derivatives, of which the value alone has a bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.layers.base import weigh
from natgrad.layers.linear import LinearAdapter


class JetAdapter(LinearAdapter):
    """s_t = W x_t, plus b at the first position: its input has a last entry of 1 there and of 0 elsewhere."""

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """(n, t, in)."""
        if not self.has_bias(module):
            return x
        first = torch.zeros_like(x[..., :1])
        first[:, 0] = 1.0
        return torch.cat([x, first], -1)

    def forward(self, module: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        """x W^T, plus b at the first position."""
        y = F.linear(x, tensors[0])
        return y if len(tensors) == 1 else torch.cat([y[:, :1] + tensors[1], y[:, 1:]], 1)

    def gradient(self, module: nn.Module, x: Tensor, g: Tensor, w: Tensor) -> list[Tensor]:
        """g^T diag(w) x, and the weighted sum of g at the first position."""
        y, h = weigh(x, g, w)
        weight = h.flatten(0, -2).mT @ y.flatten(0, -2)
        return [weight, w @ g[:, 0]] if self.has_bias(module) else [weight]
