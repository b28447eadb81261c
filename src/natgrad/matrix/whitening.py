"""Spectral descent in the coordinates that a matrix whitens: D = S polar(S M) with S = F^(-1/2).

No root of the larger side of a Kronecker product is needed. With the smaller side's root R, the larger side's inverse B
and N = R M, the Gram matrix of S M is N B N^T, polar multiplies by its inverse root Q, and D = R Q N B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natgrad.matrix import factor
from natgrad.matrix.base import LinearMap, Matrix, check_damping
from natgrad.matrix.diagonal import Diagonal
from natgrad.matrix.kronecker import Kronecker
from natgrad.matrix.one_sided import OneSided
from natgrad.matrix.roots import inverse_roots, root_of_side
from natgrad.matrix.rows import Rows
from natgrad.matrix.spectral import Spectral

_FLOOR = 1e-30  # under the mean eigenvalue of a side that has seen nothing
_QUINTIC = 3.4445, -4.7750, 2.0315  # Jordan's coefficients: steep at 0, singular values end between .7 and 1.2


@dataclass(frozen=True)
class Means:
    """What adding ``damping`` times the mean eigenvalue of each side to that side adds to the eigenvalues."""

    def shift(self, values: Tensor, damping: float) -> Tensor:
        """By the row and column means of ``values``, which stand for the sides."""
        mean = values.mean((-2, -1), keepdim=True).clamp(min=_FLOOR)
        rows, columns = values.mean(-1, keepdim=True), values.mean(-2, keepdim=True)
        return check_damping(damping) * (rows + columns + damping * mean)


def whitened(matrix: Matrix, damping: float) -> LinearMap | None:
    """What :func:`steepest` and :func:`turned` step with; ``None`` for a matrix without a root.

    ``damping`` times its mean eigenvalue is added to every factor.
    Of Kronecker products and one-sided matrices the root of the smaller side and the inverse of the larger one, of
    spectral, row-wise and diagonal matrices F^(-1/2). What is added follows the matrix, so that the unit of the loss
    and that of the inputs change D by a number alone. Cost: one eigendecomposition of the smaller side, d^3 of the
    larger. Raises ``FactorisationError``.
    """
    check_damping(damping)
    if isinstance(matrix, Kronecker):
        left, right = (damping * factor.mean_eigenvalue(X).clamp(min=_FLOOR) for X in (matrix.left, matrix.right))
        if matrix.shape[-2] <= matrix.shape[-1]:
            return replace(matrix, left=root_of_side(matrix.left, left)[1], right=factor.inverse(matrix.right, right))
        return replace(matrix, left=factor.inverse(matrix.left, left), right=root_of_side(matrix.right, right)[1])
    if isinstance(matrix, OneSided):
        out, width = matrix.block
        shift = matrix.ridge(0.0) + damping * factor.mean_eigenvalue(matrix.factor).clamp(min=_FLOOR)
        smaller = (width < out) if matrix.side == "right" else (out <= width)
        X = root_of_side(matrix.factor, shift)[1] if smaller else factor.inverse(matrix.factor, shift)
        return replace(matrix, factor=X, eps=0.0)
    if isinstance(matrix, Spectral):
        return inverse_roots(replace(matrix, rule=Means()), damping)[0]
    if isinstance(matrix, Rows):
        return inverse_roots(replace(matrix, eps=max(matrix.eps, damping / matrix.shape[-1])), _FLOOR)[0]
    if isinstance(matrix, Diagonal):
        mean = matrix.values.mean((-2, -1), keepdim=True).clamp(min=_FLOOR)
        return Diagonal(matrix.values + damping * mean).power(-0.5)
    return None


def steepest(S: LinearMap, M: Tensor, iterations: int | None = 3) -> tuple[Tensor, Tensor]:
    """D = F^(-1/2) polar(F^(-1/2) M), for what :func:`whitened` gives of F, and T, which is all that :func:`turned`
    needs beside S.

    For sides m <= n of a Kronecker product 2 m n^2 + 8 m^2 n + 22 m^3 flops with three iterations, where the product
    with the inverse of F takes 2 m n^2 + 2 m^2 n.
    """
    X, wide = M.to(_dtype(S)), M.shape[-2] <= M.shape[-1]
    Z = _before(S, X, wide)
    if isinstance(S, (Kronecker, OneSided)):
        R = _smaller_and_larger(S, wide)[0]
        T = _inverse_root(_gram(_with_root(X, R, wide), _with_root(Z, R, wide), wide), iterations)
        T = T if R is None else factor.times_right(factor.left_times(R, T), R)
    else:
        T = _inverse_root(_gram(Z, Z, wide), iterations)
    return _after(S, _times(T, Z, wide)).to(M.dtype), T


def turned(S: LinearMap, T: Tensor, M: Tensor) -> Tensor:
    """The product of M with the linear map that is steepest for the gradient which T was made for.

    That is a preconditioner by the second moment of that gradient, in the coordinates of F. 2 m n^2 + 2 m^2 n flops for
    a Kronecker product, as for the inverse of F.
    """
    wide = M.shape[-2] <= M.shape[-1]
    Z = _before(S, M.to(_dtype(S)), wide)
    return _after(S, _times(T.to(Z.dtype), Z, wide)).to(M.dtype)


def _before(S: LinearMap, X: Tensor, wide: bool) -> Tensor:
    """What T multiplies: X times the larger side's inverse, or S X, in the eigenbasis where there is one."""
    if isinstance(S, (Kronecker, OneSided)):
        return _with_larger(X, _smaller_and_larger(S, wide)[1], wide)
    return _projected(S, X) if isinstance(S, Spectral) else S @ X


def _after(S: LinearMap, X: Tensor) -> Tensor:
    """D from the product with T; the polar factor turns with an eigenbasis."""
    if isinstance(S, (Kronecker, OneSided)):
        return X
    if isinstance(S, Spectral):
        return factor.times_right(factor.left_times(S.left, X * S.values), factor.transposed(S.right))
    return S @ X


def halves(S: LinearMap, X: Tensor) -> tuple[Tensor, Tensor]:
    """H and K for what :func:`whitened` gives of F, such that <X, F^-1 Y> is <H of X, K of Y>: 2 m n^2 + 2 m^2 n flops
    for a Kronecker product."""
    X = X.to(_dtype(S))
    if isinstance(S, (Kronecker, OneSided)):
        wide = X.shape[-2] <= X.shape[-1]
        R, B = _smaller_and_larger(S, wide)
        H = _with_root(X, R, wide)
        return H, _with_larger(H, B, wide)
    H = S @ X
    return H, H


def _with_larger(M: Tensor, B: Tensor | None, wide: bool) -> Tensor:
    """M times the larger side's inverse."""
    return M if B is None else factor.times_right(M, B) if wide else factor.left_times(B, M)


def _with_root(M: Tensor, R: Tensor | None, wide: bool) -> Tensor:
    """M times the smaller side's root."""
    return M if R is None else factor.left_times(R, M) if wide else factor.times_right(M, R)


def _smaller_and_larger(S: Kronecker | OneSided, wide: bool) -> tuple[Tensor | None, Tensor | None]:
    """The root of the smaller side and the inverse of the larger one, ``None`` for an identity."""
    if isinstance(S, Kronecker):
        left: Tensor | None = S.left
        right: Tensor | None = S.right
    else:
        left, right = (None, S.factor) if S.side == "right" else (S.factor, None)
    return (left, right) if wide else (right, left)


def _dtype(S: LinearMap) -> torch.dtype:
    return next(iter(S.tensors().values())).dtype


def _projected(S: Spectral, M: Tensor) -> Tensor:
    """S M in the eigenbasis."""
    return factor.times_right(factor.left_times(factor.transposed(S.left), M), S.right) * S.values


def _gram(N: Tensor, Z: Tensor, wide: bool) -> Tensor:
    return Z @ N.mT if wide else Z.mT @ N


def _times(Q: Tensor, Z: Tensor, wide: bool) -> Tensor:
    return Q @ Z if wide else Z @ Q


def _inverse_root(X: Tensor, iterations: int | None) -> Tensor:
    """X^(-1/2) for the Gram matrix X (..., m, m), or nearly: 8 m^3 flops an iteration, less 6; 0 for X = 0.

    With p(x) = a + b x + c x^2, the quintic Newton-Schulz iteration on a matrix with this Gram matrix multiplies it by
    p(X) and X by p(X)^2: the products of p alone are needed. X is scaled by |X^2|^(1/2), which is hardly above its
    largest eigenvalue, so that three iterations raise what is above .017 of the largest singular value.
    """
    scale = factor.trace(X)[..., None, None]  # squares of small numbers vanish
    X = X / torch.where(scale > 0, scale, torch.inf)
    if iterations is None:
        values, Q = torch.linalg.eigh(X)
        kept = values > torch.finfo(X.dtype).eps * X.shape[-1]
        return (Q * torch.where(kept, values, 1.0).rsqrt().mul(kept).unsqueeze(-2)) @ Q.mT / _root(scale)
    if X.shape[-1] == 1:
        return _root(scale).reciprocal()
    square = X @ X
    norm = torch.linalg.vector_norm(square, dim=(-2, -1), keepdim=True).sqrt()
    norm = torch.where(norm > 0, norm, 1.0)
    X, square, scale = X / norm, square / norm.square(), scale * norm
    a, b, c = _QUINTIC
    total: Tensor | None = None
    for left in reversed(range(iterations)):
        P = b * X + c * square
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        total = P if total is None else P @ total
        if left:
            X = P @ (P @ X)
            square = X @ X
    assert total is not None
    return total / _root(scale)


def _root(scale: Tensor) -> Tensor:
    """Its square root, infinite for 0."""
    return torch.where(scale > 0, scale, torch.inf).sqrt()
