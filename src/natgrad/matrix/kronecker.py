"""The Kronecker product of an output factor and an input factor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from natgrad.matrix import factor
from natgrad.matrix.base import Matrix
from natgrad.matrix.damping import Factored, KroneckerRule
from natgrad.matrix.spectral import Spectral


@dataclass(frozen=True)
class Kronecker(Matrix):
    """G kron A, which acts as ``M -> G M A`` (both factors symmetric).

    ``left`` is G (*groups, out, out), ``right`` is A (*groups, in, in), ``rule`` the damping of :meth:`inverse`.
    Either may be diagonal, as a column (..., out, 1) or (..., in, 1): inverse and eigenbasis then are too. A product
    costs 2 out in (out + in) flops, where a diagonal side counts 1/2.
    """

    left: Tensor
    right: Tensor
    rule: KroneckerRule = Factored()

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""
        return torch.Size((*self.left.shape[:-1], self.right.shape[-2]))

    def __matmul__(self, M: Tensor) -> Tensor:
        """G M A."""
        return factor.times_right(factor.left_times(self.left, M.to(self.left.dtype)), self.right).to(M.dtype)

    def dense(self) -> Tensor:
        """kron(G, A)."""
        size = self.shape[-1] * self.shape[-2]
        G, A = factor.full(self.left), factor.full(self.right)
        return torch.einsum("...op,...ij->...oipj", G, A).reshape(*self.shape[:-2], size, size)

    def inverse(self, damping: float) -> Kronecker | Spectral:
        """The inverse under ``rule``; by default sqrt(damping) on each factor, balanced by their traces."""
        return self.rule.invert(self, damping)  # type: ignore[return-value]

    def floored(self, eps: float) -> Self:
        """A floor under each factor."""
        return replace(self, left=factor.floored(self.left, eps), right=factor.floored(self.right, eps))

    def trace(self) -> Tensor:
        """tr(G) tr(A)."""
        return factor.trace(self.left) * factor.trace(self.right)

    def norm(self) -> Tensor:
        """|G| |A|."""
        return torch.linalg.matrix_norm(self.left) * torch.linalg.matrix_norm(self.right)

    def spectral(self) -> Spectral:
        """The same matrix in its eigenbasis, exactly: 9 to 25 (out^3 + in^3) flops, the first time."""
        return self._spectral

    @cached_property
    def _spectral(self) -> Spectral:
        (g, Q_G), (a, Q_A) = factor.spectrum(self.left), factor.spectrum(self.right)
        return Spectral(Q_G, Q_A, g.unsqueeze(-1) * a.unsqueeze(-2))
