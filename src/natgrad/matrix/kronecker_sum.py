"""The sum of two Kronecker products, and its damped inverse by simultaneous diagonalisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from natgrad.matrix import factor
from natgrad.matrix.base import Matrix
from natgrad.matrix.congruence import Congruence
from natgrad.matrix.damping import Factored, FactoredRule
from natgrad.matrix.factorise import generalised_eigh, shifted


class Guard(Protocol):
    """What stands in for the eigenvalues of I + (second term) / (damped first term) where they may be negative."""

    def guarded(self, second: Tensor) -> Tensor:
        """The positive (*groups, out, in) that is divided by, from the eigenvalues ``second`` of the quotient."""


@dataclass(frozen=True)
class Clamp:
    """max(1 + x, tau): the second term takes at most 1 - tau of the damped first one."""

    tau: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a ``tau`` that could not keep the inverse positive, or that would change the first term."""
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be in (0, 1], got {self.tau!r}")

    def guarded(self, second: Tensor) -> Tensor:
        """max(1 + x, tau)."""
        return (1 + second).clamp(min=self.tau)


@dataclass(frozen=True)
class Magnitude:
    """1 + |x|, as the code released with the paper: positive, but no inverse where the second term is negative."""

    def guarded(self, second: Tensor) -> Tensor:
        """1 + |x|."""
        return 1 + second.abs()


@dataclass(frozen=True)
class FirstOnly:
    """1 + x where that is at least ``tau`` everywhere in the block, else 1: the inverse of the first term alone."""

    tau: float = 0.1

    def __post_init__(self) -> None:
        """As ``Clamp``."""
        Clamp(self.tau)

    def guarded(self, second: Tensor) -> Tensor:
        """1 + x, or 1."""
        total = 1 + second
        return torch.where(total.amin((-2, -1), keepdim=True) < self.tau, torch.ones_like(total), total)


@dataclass(frozen=True)
class KroneckerSum(Matrix):
    """S kron R + Q kron P, which acts as ``M -> S M R + Q M P`` (all four symmetric, S and R positive semi-definite).

    ``left`` is S and ``second_left`` Q (*groups, out, out); ``right`` is R and ``second_right`` P (*groups, in, in).
    Other than the interface says, the **sum may be indefinite**: the best approximation of a positive matrix by two
    products need not be positive. Its damped inverse always is. ``rule`` damps the first product, ``guard`` says what
    the inverse does with directions in which the sum is negative or nearly so. A product costs 4 out in (out + in).
    """

    left: Tensor
    right: Tensor
    second_left: Tensor
    second_right: Tensor
    rule: FactoredRule = Factored()
    guard: Guard = Clamp()

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""
        return torch.Size((*self.left.shape[:-1], self.right.shape[-1]))

    def __matmul__(self, M: Tensor) -> Tensor:
        """S M R + Q M P."""
        X = M.to(self.left.dtype)
        return (self.left @ X @ self.right + self.second_left @ X @ self.second_right).to(M.dtype)

    def dense(self) -> Tensor:
        """kron(S, R) + kron(Q, P)."""
        size = self.shape[-1] * self.shape[-2]
        terms = (self.left, self.right), (self.second_left, self.second_right)
        return sum(
            (torch.einsum("...op,...ij->...oipj", *term).reshape(*self.shape[:-2], size, size) for term in terms),
            start=self.left.new_zeros(()),
        )

    def floored(self, eps: float) -> Self:
        """A floor under each factor of the first product."""
        return replace(self, left=factor.floored(self.left, eps), right=factor.floored(self.right, eps))

    def trace(self) -> Tensor:
        """tr(S) tr(R) + tr(Q) tr(P)."""
        return _trace(self.left) * _trace(self.right) + _trace(self.second_left) * _trace(self.second_right)

    def norm(self) -> Tensor:
        """The root of |S|^2 |R|^2 + 2 <S, Q> <R, P> + |Q|^2 |P|^2."""
        squares = _inner(self.left, self.left) * _inner(self.right, self.right)
        squares = squares + 2 * _inner(self.left, self.second_left) * _inner(self.right, self.second_right)
        squares = squares + _inner(self.second_left, self.second_left) * _inner(self.second_right, self.second_right)
        return squares.clamp(min=0).sqrt()

    def inverse(self, damping: float) -> KroneckerSumInverse:
        """(S_l kron R_l + Q kron P)^-1 with S_l and R_l damped by ``rule``, guarded.

        With K_2^T S_l K_2 = I, K_2^T Q K_2 = diag(l_2) and the same for R_l and P, it is
        ``M -> K_2 ((K_2^T M K_1) / guard(l_2 l_1^T)) K_1^T``; the guard divides by 1 + l_2 l_1^T where it can. Two
        Cholesky factorisations and two eigh.
        """
        left, right = self.rule.shifts(self, damping)
        l2, K2 = generalised_eigh(self.second_left, shifted(self.left, left))
        l1, K1 = generalised_eigh(self.second_right, shifted(self.right, right))
        second = l2.unsqueeze(-1) * l1.unsqueeze(-2)
        divisor = self.guard.guarded(second)
        changed = (divisor != 1 + second).to(second.dtype).mean((-2, -1))
        return KroneckerSumInverse(K2, K1, 1 / divisor, changed)


@dataclass(frozen=True)
class KroneckerSumInverse(Congruence):
    """K_2 ((K_2^T M K_1) * values) K_1^T; ``guarded`` (*groups) is the share of values that the guard has changed."""

    guarded: Tensor


def _inner(X: Tensor, Y: Tensor) -> Tensor:
    return (X * Y).sum((-2, -1))


def _trace(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1).sum(-1)
