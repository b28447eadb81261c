"""A matrix written out in full."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from natgrad.matrix.base import Matrix, check_damping
from natgrad.matrix.factor import floored
from natgrad.matrix.factorise import cholesky_inverse


@dataclass(frozen=True)
class Dense(Matrix):
    """A full matrix: ``values`` (*groups, out * in, out * in), acting on tensors of ``block`` = (out, in).

    A product costs 2 (out in)^2 flops, an inverse (out in)^3.
    """

    values: Tensor
    block: tuple[int, int]

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""
        return torch.Size((*self.values.shape[:-2], *self.block))

    def __matmul__(self, M: Tensor) -> Tensor:
        """The product with vec(M), as a tensor like M."""
        flat = M.flatten(-2).to(self.values.dtype).unsqueeze(-1)
        return (self.values @ flat).squeeze(-1).unflatten(-1, self.block).to(M.dtype)

    def dense(self) -> Tensor:
        """``values``."""
        return self.values

    def inverse(self, damping: float) -> Dense:
        """(F + damping I)^-1 through Cholesky."""
        return Dense(cholesky_inverse(self.values, check_damping(damping)), self.block)

    def floored(self, eps: float) -> Self:
        """A floor under F."""
        return replace(self, values=floored(self.values, eps))

    def trace(self) -> Tensor:
        """The sum of the diagonal."""
        return self.values.diagonal(dim1=-2, dim2=-1).sum(-1)
