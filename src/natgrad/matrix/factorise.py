"""Cholesky inverse and eigendecomposition that fail loudly: with a message, never with a NaN."""

from __future__ import annotations

import torch
from torch import Tensor


class FactorisationError(RuntimeError):
    """A factor could not be factorised: not finite, or not positive definite after damping."""


def shifted(X: Tensor, shift: Tensor | float) -> Tensor:
    """X + shift I for X (..., d, d) and shift of shape (...)."""
    result = X.clone()
    diagonal = result.diagonal(dim1=-2, dim2=-1)
    diagonal += shift.unsqueeze(-1) if isinstance(shift, Tensor) else shift
    return result


def cholesky(X: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """The lower factor L of X + shift I = L L^T for symmetric X (..., d, d): d^3 / 3 flops."""
    factor, info = torch.linalg.cholesky_ex(shifted(X, shift))
    if ((info == 0).all() & torch.isfinite(factor).all()).item():  # an infinite factor would have the inverse 0
        return factor
    raise FactorisationError(f"a factor of shape {tuple(X.shape)} is not positive definite with this damping")


def cholesky_inverse(X: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """(X + shift I)^-1 for symmetric X (..., d, d), through Cholesky: d^3 flops."""
    inverse = torch.cholesky_inverse(cholesky(X, shift))
    if torch.isfinite(inverse).all():
        return inverse
    raise FactorisationError(f"a factor of shape {tuple(X.shape)} is not positive definite with this damping")


def eigh(X: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., d), clamped at 0, and eigenvectors (..., d, d) of symmetric PSD X: 9 to 25 d^3 flops."""
    values, vectors = _eigh(X)
    return values.clamp(min=0), vectors


def generalised_eigh(X: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """l (..., d) and K (..., d, d) with K^T X K = diag(l) and K^T B K = I, for symmetric X and positive definite B."""
    factor, info = torch.linalg.cholesky_ex(B)
    if not ((info == 0).all() & torch.isfinite(factor).all()).item():
        raise FactorisationError(f"a factor of shape {tuple(B.shape)} is not positive definite with this damping")
    half = torch.linalg.solve_triangular(factor, X, upper=False)
    values, vectors = _eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
    return values, torch.linalg.solve_triangular(factor.mT, vectors, upper=True)


def _eigh(X: Tensor) -> tuple[Tensor, Tensor]:
    if not torch.isfinite(X).all():
        raise FactorisationError(f"a factor of shape {tuple(X.shape)} is not finite")
    try:
        values, vectors = torch.linalg.eigh(X)
    except torch.linalg.LinAlgError as error:
        raise FactorisationError(f"eigh of a factor of shape {tuple(X.shape)} did not converge") from error
    if not (torch.isfinite(values).all() & torch.isfinite(vectors).all()):  # LAPACK may return NaN and no error
        raise FactorisationError(f"eigh of a factor of shape {tuple(X.shape)} gave vectors that are not finite")
    return values, vectors
