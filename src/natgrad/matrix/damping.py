"""Damping rules: how a matrix and a number ``damping`` become an inverse.

A rule is a value that a matrix carries; ``matrix.inverse(damping)`` follows it. With lambda = damping:

* :class:`Tikhonov`: (F + lambda I)^-1, exactly.
* :class:`Factored`: (G + sqrt(lambda)/pi I)^-1 kron (A + pi sqrt(lambda) I)^-1 (Martens and Grosse 2015, section 6.3);
  it equals (F + pi sqrt(lambda) G kron I + sqrt(lambda)/pi I kron A + lambda I)^-1.
* :class:`Unit`: the same with pi = 1, TKFAC's "normal" damping (Gao et al. 2021, eq. 5.14-5.15).
* :class:`Ridge`: (G + lambda tr(G) I)^-1 kron (A + lambda tr(A) I)^-1.
* :class:`Relative`: one of the first three with lambda times the mean eigenvalue of the block (TEKFAC eq. 3.4-3.5 at
  lambda = 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from natgrad.matrix import factor
from natgrad.matrix.base import LinearMap, check_damping

if TYPE_CHECKING:
    from natgrad.matrix.kronecker import Kronecker
    from natgrad.matrix.kronecker_sum import KroneckerSum
    from natgrad.matrix.spectral import Spectral


class SpectralRule(Protocol):
    """A rule that a spectral matrix can carry."""

    def shift(self, values: Tensor, damping: float) -> Tensor | float:
        """What is added to the eigenvalues ``values`` (*groups, out, in)."""


class KroneckerRule(Protocol):
    """A rule that a Kronecker product can carry."""

    def invert(self, matrix: Kronecker, damping: float) -> LinearMap:
        """The damped inverse of ``matrix``."""


@runtime_checkable
class FactoredRule(KroneckerRule, Protocol):
    """A rule that adds a multiple of the identity to each factor."""

    def shifts(self, matrix: Kronecker | KroneckerSum, damping: float) -> tuple[Tensor, Tensor]:
        """What is added to the eigenvalues of the left and of the right factor, (*groups) each."""


@dataclass(frozen=True)
class Tikhonov:
    """(F + lambda I)^-1, through the eigenbasis."""

    def shift(self, values: Tensor, damping: float) -> Tensor | float:
        """lambda, for every eigenvalue."""
        return check_damping(damping)

    def invert(self, matrix: Kronecker, damping: float) -> Spectral:
        """(G kron A + lambda I)^-1 in the eigenbasis of G and A."""
        return matrix.spectral().inverse(damping)


@dataclass(frozen=True)
class Factored:
    """sqrt(lambda) on each factor, balanced by pi = sqrt((tr A / in) / (tr G / out)), or 1 where that has no value."""

    def invert(self, matrix: Kronecker, damping: float) -> Kronecker:
        """(G + sqrt(lambda)/pi I)^-1 kron (A + pi sqrt(lambda) I)^-1."""
        return _invert(matrix, self.shifts(matrix, damping))

    def shifts(self, matrix: Kronecker | KroneckerSum, damping: float) -> tuple[Tensor, Tensor]:
        """sqrt(lambda)/pi and pi sqrt(lambda)."""
        root, pi = check_damping(damping) ** 0.5, self.ratio(matrix)
        return root / pi, root * pi

    def shift(self, values: Tensor, damping: float) -> Tensor:
        """The same cross terms on the Kronecker product g a^T with the row and column sums of ``values``."""
        mean = values.mean((-2, -1), keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
        g, a = values.mean(-1, keepdim=True) / mean.sqrt(), values.mean(-2, keepdim=True) / mean.sqrt()
        return check_damping(damping) ** 0.5 * (g + a) + damping

    def ratio(self, matrix: Kronecker | KroneckerSum) -> Tensor:
        """pi, of shape (*groups): the choice that minimises the trace norm of the two cross terms."""
        pi = (
            factor.mean_eigenvalue(matrix.right).sqrt() / factor.mean_eigenvalue(matrix.left).sqrt()
        )  # the ratio may overflow
        return torch.where(torch.isfinite(pi) & (pi > 0), pi, torch.ones_like(pi))


@dataclass(frozen=True)
class Unit:
    """sqrt(lambda) on each factor, pi = 1."""

    def invert(self, matrix: Kronecker, damping: float) -> Kronecker:
        """(G + sqrt(lambda) I)^-1 kron (A + sqrt(lambda) I)^-1."""
        return _invert(matrix, self.shifts(matrix, damping))

    def shifts(self, matrix: Kronecker | KroneckerSum, damping: float) -> tuple[Tensor, Tensor]:
        """sqrt(lambda), twice."""
        root = torch.full_like(matrix.trace(), check_damping(damping) ** 0.5)
        return root, root


@dataclass(frozen=True)
class Ridge:
    """lambda max(trace, floor) on each factor: a number without a unit, of the order of 1e-4."""

    floor: float = 1e-8

    def invert(self, matrix: Kronecker, damping: float) -> Kronecker:
        """(G + lambda tr(G) I)^-1 kron (A + lambda tr(A) I)^-1."""
        return _invert(matrix, self.shifts(matrix, damping))

    def shifts(self, matrix: Kronecker | KroneckerSum, damping: float) -> tuple[Tensor, Tensor]:
        """lambda tr(G) and lambda tr(A)."""
        check_damping(damping)
        left, right = (X.shape[-2] * factor.mean_eigenvalue(X) for X in (matrix.left, matrix.right))
        return damping * left.clamp(min=self.floor), damping * right.clamp(min=self.floor)


@dataclass(frozen=True)
class Relative:
    """``rule`` with lambda_l = damping * max(mean eigenvalue of the block, floor)."""

    rule: Factored | Unit | Tikhonov = Tikhonov()
    floor: float = 1e-8

    def shift(self, values: Tensor, damping: float) -> Tensor:
        """damping times the mean of the eigenvalues, for each group (*groups, 1, 1)."""
        return check_damping(damping) * values.mean((-2, -1), keepdim=True).clamp(min=self.floor)

    def invert(self, matrix: Kronecker, damping: float) -> LinearMap:
        """The inverse by ``rule``; groups share the mean of their mean eigenvalues."""
        scale = float((matrix.trace() / (matrix.shape[-1] * matrix.shape[-2])).mean().clamp(min=self.floor))
        return self.rule.invert(matrix, check_damping(damping) * scale)


def _invert(matrix: Kronecker, shifts: tuple[Tensor, Tensor]) -> Kronecker:
    left, right = (factor.inverse(*pair) for pair in zip((matrix.left, matrix.right), shifts, strict=True))
    return type(matrix)(left, right, rule=matrix.rule)
