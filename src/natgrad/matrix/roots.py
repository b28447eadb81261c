"""Square roots of symmetric positive definite matrices, and of the structured ones made of them.

A root is a function ``root(X, shift)`` of X (*batch, d, d) and a shift (*batch), which returns the pair
(X + shift I)^(1/2), (X + shift I)^(-1/2). All raise ``FactorisationError`` where the shifted matrix is not positive
definite or not finite. :func:`eigh_root` is the most accurate; :func:`denman_beavers` and :func:`newton_schulz` need
no eigenvectors, the latter products alone; :class:`Nystrom` is approximate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natgrad.matrix.base import LinearMap, Matrix
from natgrad.matrix.damping import FactoredRule
from natgrad.matrix.diagonal import Diagonal
from natgrad.matrix.factor import is_column
from natgrad.matrix.factorise import FactorisationError, eigh, shifted
from natgrad.matrix.kronecker import Kronecker
from natgrad.matrix.one_sided import OneSided
from natgrad.matrix.rows import Rows
from natgrad.matrix.spectral import Spectral

Root = Callable[[Tensor, Tensor | float], tuple[Tensor, Tensor]]


def eigh_root(X: Tensor, shift: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Q (v + shift)^(+-1/2) Q^T from X = Q v Q^T: 9 to 25 d^3 flops."""
    values, Q = eigh(X)
    root = _positive(values + _column(X, shift), X).sqrt().unsqueeze(-2)
    return (Q * root) @ Q.mT, (Q / root) @ Q.mT


def denman_beavers(X: Tensor, shift: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Y <- (Y + Z^-1)/2, Z <- (Z + Y^-1)/2 from (X, I) (Denman and Beavers 1976): 4 d^3 flops an iteration.

    About 5 + log2(condition)/2 iterations. Reference: Higham, "Functions of Matrices", section 6.3, 2008.
    """

    def iterate(Y: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
        return (Y + torch.linalg.inv(Z)) / 2, (Z + torch.linalg.inv(Y)) / 2

    return _iterated(iterate, shifted(X, shift), 50)


def newton_schulz(X: Tensor, shift: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """T = (3I - ZY)/2, Y <- YT, Z <- TZ from (X, I): three products, 6 d^3 flops, an iteration and no inverse.

    About 5 + 0.85 log2(condition) iterations. Reference: Higham, "Functions of Matrices", section 6.3, 2008.
    """
    three = 3 * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)

    def iterate(Y: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
        T = (three - Z @ Y) / 2
        return Y @ T, T @ Z

    return _iterated(iterate, shifted(X, shift), 100)


@dataclass(frozen=True)
class Nystrom:
    """X ~ C W^+ C^T of rank ``rank`` from C = X Omega, W = Omega^T X Omega, Omega random and orthonormal.

    The roots are those of the approximation plus ``shift``, which must be > 0: exact where X has at most that rank, and
    where ``rank`` is d. Cost: 2 d^2 rank + 4 d rank^2 flops, and the products that write the roots out as (d, d).
    Reference: Tropp, Yurtsever, Udell and Cevher, arXiv 1706.05736; the shift of 1e-16 |X| is theirs.
    """

    rank: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a rank that is not a whole number of at least 1."""
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}")

    def __call__(self, X: Tensor, shift: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Both roots of the approximation."""
        c = _positive(torch.zeros_like(X[..., 0]) + _column(X, shift), X)[..., :1].sqrt()
        values, U = self._spectrum(X)
        root = (values + c.square()).sqrt()
        return _lifted(U, root, c), _lifted(U, 1 / root, 1 / c)

    def _spectrum(self, X: Tensor) -> tuple[Tensor, Tensor]:
        d, generator = X.shape[-1], torch.Generator().manual_seed(self.seed)
        normal = torch.randn(d, min(self.rank, d), generator=generator, dtype=torch.float64)
        Omega = torch.linalg.qr(normal).Q.to(X)
        nu = _norm(X).clamp(min=torch.finfo(X.dtype).tiny) * torch.finfo(X.dtype).eps
        C = X @ Omega + nu * Omega
        W = Omega.mT @ C
        L, info = torch.linalg.cholesky_ex((W + W.mT) / 2)
        if not ((info == 0).all() & torch.isfinite(L).all()):
            raise FactorisationError(f"the Nystrom sketch of a factor of shape {tuple(X.shape)} is not positive")
        U, s, _ = torch.linalg.svd(torch.linalg.solve_triangular(L, C.mT, upper=False).mT, full_matrices=False)
        return (s.square() - nu.squeeze(-1)).clamp(min=0), U


def inverse_roots(matrix: Matrix, damping: float = 0.0, root: Root = eigh_root) -> tuple[LinearMap, LinearMap]:
    """S and S^-1 with S S = ``matrix.inverse(damping)``, the damping rule included; both symmetric.

    For Kronecker products (whose rule damps each factor), one-sided and row-wise matrices by ``root``; for matrices
    with a known spectrum by powers of it. ``ValueError`` for any other matrix.
    """
    if isinstance(matrix, OneSided):
        half, inverse = root_of_side(matrix.factor, matrix.ridge(damping), root)
        return replace(matrix, factor=inverse, eps=0.0), replace(matrix, factor=half, eps=0.0)
    if isinstance(matrix, Rows):
        half, inverse = root(matrix.values, matrix.ridge(damping))
        return Rows(inverse), Rows(half)
    if isinstance(matrix, Kronecker) and isinstance(matrix.rule, FactoredRule):
        left, right = matrix.rule.shifts(matrix, damping)
        (G, G_inverse), (A, A_inverse) = root_of_side(matrix.left, left, root), root_of_side(matrix.right, right, root)
        return Kronecker(G_inverse, A_inverse), Kronecker(G, A)
    inverted = matrix.inverse(damping)
    if isinstance(inverted, (Spectral, Diagonal)):
        return inverted.power(0.5), inverted.power(-0.5)
    raise ValueError(f"no square root for a {type(matrix).__name__} matrix")


def root_of_side(X: Tensor, shift: Tensor, root: Root = eigh_root) -> tuple[Tensor, Tensor]:
    """Both roots of one side of a Kronecker product, which may be a column."""
    if not is_column(X) or X.shape[-2] == 1:
        return root(X, shift)
    half = _positive(X + shift[..., None, None], X).sqrt()
    return half, 1 / half


def _iterated(
    iterate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], X: Tensor, limit: int
) -> tuple[Tensor, Tensor]:
    """The fixed point from X / |X| and I, scaled back; convergence is quadratic, so one small change is the last."""
    scale, enough = _norm(X), torch.finfo(X.dtype).eps ** 0.5
    Y, Z = X / scale, torch.eye(X.shape[-1], dtype=X.dtype, device=X.device).expand_as(X)
    for _ in range(limit):
        before = Y
        try:
            Y, Z = iterate(Y, Z)
        except torch.linalg.LinAlgError as error:
            raise FactorisationError(f"a factor of shape {tuple(X.shape)} is singular") from error
        change = (_norm(Y - before) / _norm(Y)).max()
        if not torch.isfinite(change) or change <= enough:
            break
    if not change <= enough or not (Y.diagonal(dim1=-2, dim2=-1) > 0).all():
        raise FactorisationError(f"the root of a factor of shape {tuple(X.shape)} did not converge: is it definite?")
    return Y * scale.sqrt(), Z / scale.sqrt()


def _lifted(U: Tensor, values: Tensor, rest: Tensor) -> Tensor:
    """The matrix with eigenvalues ``values`` along U, and ``rest`` elsewhere."""
    if U.shape[-2] == U.shape[-1]:
        return (U * values.unsqueeze(-2)) @ U.mT
    eye = torch.eye(U.shape[-2], dtype=U.dtype, device=U.device)
    return (U * (values - rest).unsqueeze(-2)) @ U.mT + rest.unsqueeze(-1) * eye


def _positive(values: Tensor, X: Tensor) -> Tensor:
    if not ((values > 0) & torch.isfinite(values)).all():
        raise FactorisationError(f"a factor of shape {tuple(X.shape)} is not positive definite: give a damping > 0")
    return values


def _column(X: Tensor, shift: Tensor | float) -> Tensor:
    return torch.as_tensor(shift, dtype=X.dtype, device=X.device).unsqueeze(-1)


def _norm(X: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(X, keepdim=True)
