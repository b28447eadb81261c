"""A matrix known by its rows: a sum of outer products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.matrix.base import LinearMap, Matrix, check_damping
from natgrad.matrix.factorise import FactorisationError, cholesky_inverse


@dataclass(frozen=True)
class LowRank(Matrix):
    """U^T U = sum_n vec(U_n) vec(U_n)^T with ``rows`` U (*groups, n, out, in).

    A product costs 4 n out in flops and memory is n out in; the rank is at most n.
    """

    rows: Tensor

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""
        return torch.Size((*self.rows.shape[:-3], *self.rows.shape[-2:]))

    def __matmul__(self, M: Tensor) -> Tensor:
        """sum_n U_n <U_n, M>."""
        inner = torch.einsum("...noi,...oi->...n", self.rows, M.to(self.rows.dtype))
        return torch.einsum("...noi,...n->...oi", self.rows, inner).to(M.dtype)

    def dense(self) -> Tensor:
        """U^T U with U as (n, out * in)."""
        U = self.rows.flatten(-2)
        return U.mT @ U

    def inverse(self, damping: float) -> LowRankInverse:
        """(U^T U + damping I)^-1 by Woodbury's identity: n^2 out in + n^3 flops; damping must be > 0."""
        if check_damping(damping) == 0:
            raise FactorisationError("a low-rank matrix is singular: give a damping > 0")
        U = self.rows.flatten(-2)
        return LowRankInverse(self.rows, cholesky_inverse(U @ U.mT, damping), damping)

    def trace(self) -> Tensor:
        """|U|^2."""
        return self.rows.square().sum((-3, -2, -1))


@dataclass(frozen=True)
class LowRankInverse(LinearMap):
    """(I - U^T ``kernel`` U) / ``damping``, kernel = (U U^T + damping I)^-1 (*groups, n, n)."""

    rows: Tensor
    kernel: Tensor
    damping: float

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""
        return torch.Size((*self.rows.shape[:-3], *self.rows.shape[-2:]))

    def __matmul__(self, M: Tensor) -> Tensor:
        """(M - U^T kernel U M) / damping."""
        inner = torch.einsum("...noi,...oi->...n", self.rows, M.to(self.rows.dtype))
        weight = (self.kernel @ inner.unsqueeze(-1)).squeeze(-1)
        return (M - torch.einsum("...noi,...n->...oi", self.rows, weight).to(M.dtype)) / self.damping

    def dense(self) -> Tensor:
        """The full matrix."""
        U = self.rows.flatten(-2)
        eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
        return (eye - U.mT @ self.kernel @ U) / self.damping
