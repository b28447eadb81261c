"""Dense layers on jets: a value and its derivatives, of which the value alone has a bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from natgrad.layers.base import Adapter


class JetAdapter(Adapter):
    """s_t = W x_t, plus b at the first position: its input has a last entry of 1 there and of 0 elsewhere."""

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """(n, t, in)."""
        if not self.has_bias(module):
            return x
        first = torch.zeros_like(x[..., :1])
        first[:, 0] = 1.0
        return torch.cat([x, first], -1)
