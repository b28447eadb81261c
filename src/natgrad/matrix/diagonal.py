"""A diagonal matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.matrix.base import Matrix, check_damping
from natgrad.matrix.factorise import FactorisationError


@dataclass(frozen=True)
class Diagonal(Matrix):
    """diag(``values``), ``values`` (*groups, out, in) >= 0: acts element by element."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""
        return self.values.shape

    def __matmul__(self, M: Tensor) -> Tensor:
        """values * M."""
        return (self.values * M.to(self.values.dtype)).to(M.dtype)

    def dense(self) -> Tensor:
        """diag(vec(values))."""
        return torch.diag_embed(self.values.flatten(-2))

    def inverse(self, damping: float) -> Diagonal:
        """1 / (values + damping)."""
        return self.power(-1.0, damping)

    def power(self, exponent: float, damping: float = 0.0) -> Diagonal:
        """(values + damping)^exponent; exponent -1/2 gives an Adam-like scaling."""
        shifted = self.values + check_damping(damping)
        if exponent < 0 and not (shifted > 0).all():
            raise FactorisationError(f"a block of shape {tuple(self.shape)} is singular: give a damping > 0")
        return Diagonal(shifted**exponent)

    def trace(self) -> Tensor:
        """The sum of the values."""
        return self.values.sum((-2, -1))

    def norm(self) -> Tensor:
        """The root of the sum of the squared values."""
        return torch.linalg.matrix_norm(self.values)
