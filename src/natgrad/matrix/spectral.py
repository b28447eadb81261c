"""A matrix known by eigenvalues in a Kronecker-factored eigenbasis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.matrix import factor
from natgrad.matrix.base import Matrix, check_damping
from natgrad.matrix.congruence import Congruence
from natgrad.matrix.damping import SpectralRule, Tikhonov
from natgrad.matrix.factorise import FactorisationError


@dataclass(frozen=True)
class Spectral(Congruence, Matrix):
    """Q diag(s) Q^T with Q = Q_G kron Q_A, which acts as ``M -> Q_G ((Q_G^T M Q_A) * s) Q_A^T``.

    ``left`` is Q_G (*groups, out, out), ``right`` is Q_A (*groups, in, in), both orthogonal; ``values`` is s
    (*groups, out, in). The identity as a basis is a column of ones. A product costs 4 out in (out + in) flops.
    """

    rule: SpectralRule = Tikhonov()

    def inverse(self, damping: float) -> Spectral:
        """(F + damping I)^-1 by the default rule; costs one pass over the eigenvalues, and shares the basis."""
        return self._with_values(self.values + self.rule.shift(self.values, damping), -1.0)

    def trace(self) -> Tensor:
        """The sum of the eigenvalues."""
        return self.values.sum((-2, -1))

    def norm(self) -> Tensor:
        """The root of the sum of the squared eigenvalues."""
        return torch.linalg.matrix_norm(self.values)

    def power(self, exponent: float, damping: float = 0.0) -> Spectral:
        """(F + damping I)^exponent."""
        return self._with_values(self.values + check_damping(damping), exponent)

    def _with_values(self, shifted: Tensor, exponent: float) -> Spectral:
        if exponent < 0 and not (shifted > 0).all():
            raise FactorisationError(f"a block of shape {tuple(self.shape)} is singular: give a damping > 0")
        return Spectral(self.left, self.right, shifted**exponent, self.rule)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det(F + damping I), of shape (*groups)."""
        return (self.values + check_damping(damping)).log().sum((-2, -1))

    def sample(self, draws: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Draws (draws, *groups, out, in) from the normal distribution N(0, F)."""
        noise = torch.randn(
            (draws, *self.shape), generator=generator, dtype=self.values.dtype, device=self.values.device
        )
        scaled = factor.left_times(self.left, noise * self.values.sqrt())
        return factor.times_right(scaled, factor.transposed(self.right))

    def effective_rank(self) -> Tensor:
        """exp of the entropy of the normalised eigenvalues (Roy and Vetterli 2007), of shape (*groups)."""
        share = self.values.flatten(-2) / self.trace().unsqueeze(-1)
        return torch.special.entr(share).sum(-1).exp()

    def spectral(self) -> Spectral:
        """Itself."""
        return self
