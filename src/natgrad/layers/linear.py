"""nn.Linear with any leading dimensions, the transposed one of Hugging Face's GPT-2, and nn.Bilinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.layers.base import Adapter, examples_first, positions, with_ones


class LinearAdapter(Adapter):
    """s = W x + b on the last dimension; the first dimension is the example, those between are positions."""

    def forward(self, module: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        """x W^T + b."""
        return F.linear(x, self.to_matrix(module, tensors[0]), *tensors[1:])


@dataclass(frozen=True)
class SequenceLinear(LinearAdapter):
    """A linear layer on sequences (n, t, in), or (t, n, in) without ``batch_first``, or the one sequence (t, in)."""

    batch_first: bool

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """(n, t, in)."""
        return examples_first(x, self.batch_first)


class TransposedLinearAdapter(LinearAdapter):
    """The same with the weight as (in, out): ``transformers.pytorch_utils.Conv1D``."""

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(out, in)."""
        return weight.mT

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """(in, out)."""
        return matrix.mT


class BilinearAdapter(Adapter):
    """s = W vec(x1 x2^T) + b: the input is the outer product of the two, up to a width of ``limit``."""

    limit: ClassVar[int] = 4096

    def refuses(self, module: nn.Module) -> str | None:
        """Above ``limit``."""
        assert isinstance(module, nn.Bilinear)
        width = module.in1_features * module.in2_features
        if width <= self.limit:
            return None
        return f"Bilinear of {module.in1_features} x {module.in2_features} = {width} inputs, more than {self.limit}"

    def read(self, module: nn.Module, input1: Tensor, input2: Tensor) -> Tensor:
        """Both inputs, side by side."""
        return torch.cat([input1, input2], -1)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """(n, t, in1 in2): costs that many times the memory of x."""
        x1, x2 = self._both(module, positions(x))
        return with_ones((x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-2), self.has_bias(module))

    def forward(self, module: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        """x1^T W x2 + b."""
        return F.bilinear(*self._both(module, x), *tensors)

    def _both(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(module, nn.Bilinear)
        x1, x2 = x.split([module.in1_features, module.in2_features], -1)
        return x1.contiguous(), x2.contiguous()
