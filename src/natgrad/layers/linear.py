"""nn.Linear, with any leading dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.layers.base import Adapter, weigh, with_ones


class LinearAdapter(Adapter):
    """s = W x + b on the last dimension; the first dimension is the example, those between are positions."""

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """(n, ..., in)."""
        return x if x.ndim > 1 else x.unsqueeze(0)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """(n, t, in)."""
        return with_ones(_positions(x), self.has_bias(module))

    def outputs(self, module: nn.Module, y: Tensor) -> Tensor:
        """(n, t, out)."""
        return _positions(y)

    def pack(self, module: nn.Module, tensors: list[Tensor]) -> Tensor:
        """[W | b]."""
        return tensors[0] if len(tensors) == 1 else torch.cat([tensors[0], tensors[1].unsqueeze(-1)], -1)

    def unpack(self, module: nn.Module, block: Tensor) -> list[Tensor]:
        """W and b, as views."""
        return [block[..., :-1], block[..., -1]] if self.has_bias(module) else [block]

    def forward(self, module: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        """x W^T + b."""
        return F.linear(x, *tensors)

    def gradient(self, module: nn.Module, x: Tensor, g: Tensor, w: Tensor) -> list[Tensor]:
        """g^T diag(w) x, and g^T w."""
        y, h = weigh(x, g, w)
        weight = h.flatten(0, -2).mT @ y.flatten(0, -2)
        return [weight, (w @ g.flatten(1)).view(-1, g.shape[-1]).sum(0)] if self.has_bias(module) else [weight]


@dataclass(frozen=True)
class SequenceLinear(LinearAdapter):
    """A linear layer on sequences (n, t, in), or (t, n, in) without ``batch_first``, or the one sequence (t, in)."""

    batch_first: bool

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """(n, t, in)."""
        if x.ndim != 3:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)


def _positions(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1, x.shape[-1])
