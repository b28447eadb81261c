"""Spectral descent in the coordinates that a matrix whitens: D = S polar(S M) with S = F^(-1/2).

No root of the larger side of a Kronecker product is needed. With the smaller side's root R, the larger side's inverse B
and N = R M, the Gram matrix of S M is N B N^T, polar multiplies by its inverse root Q, and D = R Q R M B. With T = R Q
R, which is as large as the smaller side, the step is a product like that with the inverse of F.
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
    """What :func:`turn` and :func:`turned` step with; ``None`` for a matrix without a root.

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


def turn(S: LinearMap, M: Tensor, iterations: int | None = 5) -> Tensor:
    """What makes of :func:`whitened` the linear map that takes M to F^(-1/2) polar(F^(-1/2) M), see :func:`turned`.

    2 m n^2 + 4 m^2 n + 38 m^3 flops for sides m <= n of a Kronecker product. The map holds for gradients near M as
    well: it is a preconditioner by the second moment of M itself, in the coordinates of F.
    """
    M = M.to(next(iter(S.tensors().values())).dtype)
    if isinstance(S, (Kronecker, OneSided)):
        wide = M.shape[-2] <= M.shape[-1]
        Q = _inverse_root(_gram(*_halves(S, M), wide), iterations)
        R = _sides(S)[0 if wide else 1]
        return Q if R is None else factor.times_right(factor.left_times(R, Q), R)
    X = _projected(S, M) if isinstance(S, Spectral) else S @ M
    wide = X.shape[-2] <= X.shape[-1]
    return _inverse_root(_gram(X, X, wide), iterations)


def turned(S: LinearMap, T: Tensor, M: Tensor) -> Tensor:
    """The product of that map with M, T the :func:`turn`: 2 m n^2 + 2 m^2 n flops, as for the inverse of F."""
    wide = M.shape[-2] <= M.shape[-1]
    if isinstance(S, (Kronecker, OneSided)):
        left, right = _sides(S)
        X = M.to(S.left.dtype if isinstance(S, Kronecker) else S.factor.dtype)
        if wide:
            X = X if right is None else factor.times_right(X, right)
        else:
            X = X if left is None else factor.left_times(left, X)
        return _times(T.to(X.dtype), X, wide).to(M.dtype)
    if isinstance(S, Spectral):  # in the eigenbasis: the polar factor turns with it
        X = _projected(S, M.to(S.left.dtype))
        X = factor.left_times(S.left, _times(T.to(X.dtype), X, wide) * S.values)
        return factor.times_right(X, factor.transposed(S.right)).to(M.dtype)
    return S @ _times(T.to(M.dtype), S @ M, wide)


def dual(S: LinearMap, X: Tensor, Y: Tensor) -> Tensor:
    """<X, F^-1 Y> for what :func:`whitened` gives of F."""
    if isinstance(S, (Kronecker, OneSided)):
        return (_halves(S, X)[0] * _halves(S, Y)[1]).sum()
    return ((S @ X) * (S @ Y)).sum()


def _halves(S: Kronecker | OneSided, M: Tensor) -> tuple[Tensor, Tensor]:
    """N: M times the smaller side's root; Z: N times the larger side's inverse."""
    left, right = _sides(S)
    N = M.to(S.left.dtype if isinstance(S, Kronecker) else S.factor.dtype)
    if M.shape[-2] <= M.shape[-1]:
        N = N if left is None else factor.left_times(left, N)
        return N, N if right is None else factor.times_right(N, right)
    N = N if right is None else factor.times_right(N, right)
    return N, N if left is None else factor.left_times(left, N)


def _sides(S: Kronecker | OneSided) -> tuple[Tensor | None, Tensor | None]:
    """The left and the right side, ``None`` for an identity."""
    if isinstance(S, Kronecker):
        return S.left, S.right
    return (None, S.factor) if S.side == "right" else (S.factor, None)


def _projected(S: Spectral, M: Tensor) -> Tensor:
    """S M in the eigenbasis."""
    return factor.times_right(factor.left_times(factor.transposed(S.left), M), S.right) * S.values


def _gram(N: Tensor, Z: Tensor, wide: bool) -> Tensor:
    return Z @ N.mT if wide else Z.mT @ N


def _times(Q: Tensor, Z: Tensor, wide: bool) -> Tensor:
    return Q @ Z if wide else Z @ Q


def _inverse_root(X: Tensor, iterations: int | None) -> Tensor:
    """X^(-1/2) for the Gram matrix X (..., m, m), or nearly: 34 m^3 flops for five iterations; 0 for X = 0.

    With p(x) = a + b x + c x^2, the quintic Newton-Schulz iteration on a matrix with this Gram matrix multiplies it by
    p(X) and X by p(X)^2: the products of p alone are needed.
    """
    trace = factor.trace(X)[..., None, None]
    scale = torch.where(trace > 0, trace, torch.inf)
    if iterations is None:
        values, Q = torch.linalg.eigh(X / scale)
        kept = values > torch.finfo(X.dtype).eps * X.shape[-1]
        return (Q * torch.where(kept, values, 1.0).rsqrt().mul(kept).unsqueeze(-2)) @ Q.mT / scale.sqrt()
    if X.shape[-1] == 1:
        return scale.rsqrt()
    a, b, c = _QUINTIC
    X = X / scale
    total: Tensor | None = None
    for left in reversed(range(iterations)):
        P = b * X + c * (X @ X)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        total = P if total is None else P @ total
        X = P @ (P @ X) if left else X
    assert total is not None
    return total / scale.sqrt()
