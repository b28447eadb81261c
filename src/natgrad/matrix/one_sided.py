"""The Kronecker product with an identity: a matrix that acts on the inputs alone, or on the outputs alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

from natgrad.matrix.base import Matrix, check_damping
from natgrad.matrix.factor import floored, full, inverse, left_times, times_right, trace
from natgrad.matrix.kronecker import Kronecker
from natgrad.matrix.spectral import Spectral


@dataclass(frozen=True)
class OneSided(Matrix):
    """I kron X, which acts as ``M -> M X`` (side ``"right"``), or X kron I, ``M -> X M`` (``"left"``).

    ``factor`` is X (*groups, d, d) with d = in or out, ``block`` is (out, in). A product costs 2 out in d flops: the
    identity is neither stored nor multiplied with. A diagonal X is a column (..., d, 1). ``eps`` is a relative ridge
    that every inverse contains.
    """

    factor: Tensor
    block: tuple[int, int]
    side: Literal["left", "right"] = "right"
    eps: float = 0.0

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""
        return torch.Size((*self.factor.shape[:-2], *self.block))

    def __matmul__(self, M: Tensor) -> Tensor:
        """M X or X M."""
        wide = M.to(self.factor.dtype)
        return (times_right(wide, self.factor) if self.side == "right" else left_times(self.factor, wide)).to(M.dtype)

    def dense(self) -> Tensor:
        """kron(I, X) or kron(X, I)."""
        out, width = self.block
        eye = torch.eye(out if self.side == "right" else width, dtype=self.factor.dtype, device=self.factor.device)
        letters = "op,...ij->...oipj" if self.side == "right" else "ij,...op->...oipj"
        return torch.einsum(letters, eye, full(self.factor)).reshape(*self.shape[:-2], out * width, out * width)

    def ridge(self, damping: float) -> Tensor:
        """eps tr X + damping, of shape (*groups)."""
        return self.eps * trace(self.factor) + check_damping(damping)

    def inverse(self, damping: float) -> OneSided:
        """(F + (eps tr X + damping) I)^-1, through one Cholesky factorisation of X: d^3 flops."""
        return replace(self, factor=inverse(self.factor, self.ridge(damping)), eps=0.0)

    def floored(self, eps: float) -> Self:
        """A floor under X."""
        return replace(self, factor=floored(self.factor, eps))

    def trace(self) -> Tensor:
        """out tr X or in tr X."""
        return trace(self.factor) * self.block[0 if self.side == "right" else 1]

    def spectral(self) -> Spectral:
        """The same matrix in an eigenbasis; the identity's is its own, a column of ones."""
        one = self.factor.new_ones(*self.factor.shape[:-2], self.block[0 if self.side == "right" else 1], 1)
        return Kronecker(*((one, self.factor) if self.side == "right" else (self.factor, one))).spectral()
