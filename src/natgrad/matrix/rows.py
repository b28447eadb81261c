"""One matrix per output: block-diagonal over the rows of the weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from natgrad.matrix.base import Matrix, check_damping
from natgrad.matrix.factor import floored
from natgrad.matrix.factorise import cholesky_inverse


@dataclass(frozen=True)
class Rows(Matrix):
    """diag(R_1, ..., R_out), which acts as ``M_j -> M_j R_j`` on the rows M_j; ``values`` is R (*groups, out, in, in).

    A product costs 2 out in^2 flops, an inverse out in^3. ``eps`` is a relative ridge that every inverse contains.
    """

    values: Tensor
    eps: float = 0.0

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""
        return self.values.shape[:-1]

    def __matmul__(self, M: Tensor) -> Tensor:
        """M_j R_j for every row."""
        return (M.to(self.values.dtype).unsqueeze(-2) @ self.values).squeeze(-2).to(M.dtype)

    def dense(self) -> Tensor:
        """The block-diagonal matrix."""
        out, width = self.shape[-2:]
        eye = torch.eye(out, dtype=self.values.dtype, device=self.values.device)
        return torch.einsum("op,...oij->...oipj", eye, self.values).reshape(*self.shape[:-2], out * width, out * width)

    def ridge(self, damping: float) -> Tensor:
        """eps tr R_j + damping, of shape (*groups, out)."""
        return self.eps * self.values.diagonal(dim1=-2, dim2=-1).sum(-1) + check_damping(damping)

    def inverse(self, damping: float) -> Rows:
        """(R_j + (eps tr R_j + damping) I)^-1 for every row, through Cholesky."""
        return replace(self, values=cholesky_inverse(self.values, self.ridge(damping)), eps=0.0)

    def floored(self, eps: float) -> Self:
        """A floor under every R_j."""
        return replace(self, values=floored(self.values, eps))

    def trace(self) -> Tensor:
        """The sum of the rows' traces."""
        return self.values.diagonal(dim1=-2, dim2=-1).sum((-2, -1))
