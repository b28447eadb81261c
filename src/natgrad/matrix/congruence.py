"""A diagonal seen through a Kronecker product: what spectral matrices and simultaneous diagonalisations are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.matrix import factor
from natgrad.matrix.base import LinearMap


@dataclass(frozen=True)
class Congruence(LinearMap):
    """K diag(s) K^T with K = K_2 kron K_1, which acts as ``M -> K_2 ((K_2^T M K_1) * s) K_1^T``.

    ``left`` is K_2 (*groups, out, out), ``right`` is K_1 (*groups, in, in), neither need be orthogonal; ``values`` is s
    (*groups, out, in). A diagonal side is a column (..., out, 1) or (..., in, 1). Positive definite where s > 0 and K
    is regular. A product costs 4 out in (out + in) flops, where a diagonal side counts 1/2.
    """

    left: Tensor
    right: Tensor
    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""
        return self.values.shape

    def __matmul__(self, M: Tensor) -> Tensor:
        """K_2 ((K_2^T M K_1) * s) K_1^T."""
        inner = factor.times_right(factor.left_times(factor.transposed(self.left), M.to(self.left.dtype)), self.right)
        outer = factor.left_times(self.left, inner * self.values)
        return factor.times_right(outer, factor.transposed(self.right)).to(M.dtype)

    def dense(self) -> Tensor:
        """K diag(s) K^T."""
        size = self.shape[-1] * self.shape[-2]
        K_2, K_1 = factor.full(self.left), factor.full(self.right)
        K = torch.einsum("...op,...ij->...oipj", K_2, K_1).reshape(*self.shape[:-2], size, size)
        return (K * self.values.flatten(-2).unsqueeze(-2)) @ K.mT
