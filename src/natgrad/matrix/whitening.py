"""Whitening by an inverse root of a matrix, and the polar factor: what spectral descent is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natgrad.matrix import factor
from natgrad.matrix.base import LinearMap, Matrix, check_damping
from natgrad.matrix.diagonal import Diagonal
from natgrad.matrix.kronecker import Kronecker
from natgrad.matrix.kronecker_sum import KroneckerSum
from natgrad.matrix.one_sided import OneSided
from natgrad.matrix.roots import inverse_roots
from natgrad.matrix.rows import Rows
from natgrad.matrix.spectral import Spectral

_FLOOR = 1e-30  # under the mean eigenvalue of a side that has seen nothing
_QUINTIC = 3.4445, -4.7750, 2.0315  # Jordan's coefficients: steep at 0, singular values end between .7 and 1.2


@dataclass(frozen=True)
class Means:
    """``damping`` times the mean eigenvalue of a side is added to that side, in every group."""

    def shift(self, values: Tensor, damping: float) -> Tensor:
        """The same cross terms on the product of the row and column means of ``values``."""
        mean = values.mean((-2, -1), keepdim=True).clamp(min=_FLOOR)
        rows, columns = values.mean(-1, keepdim=True), values.mean(-2, keepdim=True)
        return check_damping(damping) * (rows + columns + damping * mean)

    def invert(self, matrix: Kronecker, damping: float) -> LinearMap:
        """(G + damping m(G) I)^-1 kron (A + damping m(A) I)^-1."""
        sides = zip((matrix.left, matrix.right), self.shifts(matrix, damping), strict=True)
        left, right = (factor.inverse(X, shift) for X, shift in sides)
        return replace(matrix, left=left, right=right)

    def shifts(self, matrix: Kronecker | KroneckerSum, damping: float) -> tuple[Tensor, Tensor]:
        """damping m(G) and damping m(A)."""
        check_damping(damping)
        left, right = (factor.mean_eigenvalue(X).clamp(min=_FLOOR) * damping for X in (matrix.left, matrix.right))
        return left, right


def whitening(matrix: Matrix, damping: float) -> LinearMap | None:
    """S = F^(-1/2), symmetric, with ``damping`` times its mean eigenvalue added to every factor; ``None`` without root.

    For Kronecker products, one-sided, spectral, row-wise and diagonal matrices. What is added follows the matrix, so
    that the unit of the loss and that of the inputs change S by a number alone. Costs two eigendecompositions, or none
    where the spectrum is known. Raises ``FactorisationError``.
    """
    check_damping(damping)
    if isinstance(matrix, Kronecker):
        return inverse_roots(replace(matrix, rule=Means()), damping)[0]
    if isinstance(matrix, Spectral):
        return inverse_roots(replace(matrix, rule=Means()), damping)[0]
    if isinstance(matrix, (OneSided, Rows)):
        width = matrix.factor.shape[-2] if isinstance(matrix, OneSided) else matrix.shape[-1]
        return inverse_roots(replace(matrix, eps=max(matrix.eps, damping / width)), _FLOOR)[0]
    if isinstance(matrix, Diagonal):
        mean = matrix.values.mean((-2, -1), keepdim=True).clamp(min=_FLOOR)
        return Diagonal(matrix.values + damping * mean).power(-0.5)
    return None


def polar(M: Tensor, iterations: int | None = 5) -> Tensor:
    """The orthogonal factor U V^T of M = U diag(s) V^T (..., out, in), or nearly: singular values from .7 to 1.2.

    X <- a X + b X X^T X + c (X X^T)^2 X from M / |M|, a quintic Newton-Schulz iteration: 4 m^2 n + 2 m^3 flops each
    for sides m <= n. With ``None`` iterations exactly, by an SVD. Singular values below some 1e-4 of the norm stay
    small. References: Higham, "Functions of Matrices", section 8.3, 2008; coefficients of K. Jordan's Muon, 2024.
    """
    if iterations is None:
        U, _, V = torch.linalg.svd(M, full_matrices=False)
        return U @ V
    if min(M.shape[-2:]) == 1:
        return M / torch.linalg.matrix_norm(M, keepdim=True).clamp(min=torch.finfo(M.dtype).tiny)
    a, b, c = _QUINTIC
    X = M if M.shape[-2] <= M.shape[-1] else M.mT
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=torch.finfo(M.dtype).tiny)
    for _ in range(iterations):
        S = X @ X.mT
        X = a * X + (b * S + c * (S @ S)) @ X
    return X if M.shape[-2] <= M.shape[-1] else X.mT
