"""One side of a Kronecker product: a matrix (*groups, d, d), or a diagonal one as its column (*groups, d, 1).

A column serves where a matrix would be impossible or is known to be diagonal: the input covariance of an embedding,
the 50,000 outputs of a head. For d = 1 both are the same. Everything that structured matrices do with a side is here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from natgrad.matrix.factorise import FactorisationError, cholesky_inverse, eigh, shifted


def is_column(X: Tensor) -> bool:
    """Whether X stands for a diagonal matrix."""
    return X.shape[-1] == 1


def left_times(X: Tensor, M: Tensor) -> Tensor:
    """X M: 2 d^2 m flops for M (d, m), or d m for a column."""
    return X * M if is_column(X) else X @ M


def times_right(M: Tensor, X: Tensor) -> Tensor:
    """M X for symmetric X or a basis X."""
    return M * X.mT if is_column(X) else M @ X


def transposed(X: Tensor) -> Tensor:
    """X^T, which for a column is X."""
    return X if is_column(X) else X.mT


def product(X: Tensor, Y: Tensor) -> Tensor:
    """X Y for two of the same kind."""
    return X * Y if is_column(X) else X @ Y


def trace(X: Tensor) -> Tensor:
    """tr X, of shape (*groups)."""
    return X.sum((-2, -1)) if is_column(X) else X.diagonal(dim1=-2, dim2=-1).sum(-1)


def mean_eigenvalue(X: Tensor) -> Tensor:
    """tr X / d, of shape (*groups)."""
    return X.mean((-2, -1)) if is_column(X) else X.diagonal(dim1=-2, dim2=-1).mean(-1)


def floored(X: Tensor, eps: float) -> Tensor:
    """X + eps tr(X) I; a diagonal one is itself, since sums of squares keep their digits."""
    return X if _diagonal(X) else shifted(X, eps * trace(X))


def inverse(X: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """(X + shift I)^-1 of the same kind, for PSD X and a shift (*groups); ``FactorisationError`` where it has none."""
    if not _diagonal(X):
        return cholesky_inverse(X, shift)
    values = X + (shift[..., None, None] if isinstance(shift, Tensor) else shift)
    if not ((values > 0) & torch.isfinite(values)).all():
        raise FactorisationError(f"a diagonal factor of {X.shape[-2]} values is not positive with this damping")
    return values.reciprocal()


def spectrum(X: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (*groups, d) and an eigenbasis of the same kind: the identity for a column."""
    if not _diagonal(X):
        return eigh(X)
    if not torch.isfinite(X).all():
        raise FactorisationError(f"a diagonal factor of {X.shape[-2]} values is not finite")
    return X.squeeze(-1).clamp(min=0), torch.ones_like(X)


def full(X: Tensor) -> Tensor:
    """X as a matrix (*groups, d, d)."""
    return torch.diag_embed(X.squeeze(-1)) if is_column(X) else X


def _diagonal(X: Tensor) -> bool:
    """Whether X is a column and not a matrix too, as for d = 1."""
    return is_column(X) and X.shape[-2] > 1
