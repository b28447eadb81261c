"""Block-tridiagonal KFAC: neighbouring layers are joined, by a matrix whose inverse is block-tridiagonal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.fishers.base import Coupled, Part
from natgrad.fishers.kfac import KFAC
from natgrad.fishers.statistics import Mean, Stats, pool
from natgrad.matrix import Factored, FactorisationError, Kronecker, LinearMap, Matrix, NetworkMap, factor
from natgrad.matrix.base import check_damping
from natgrad.matrix.factorise import cholesky_inverse, eigh, shifted


@dataclass(frozen=True)
class BlockTridiagonal(Coupled):
    """F^-1 ~ Xi^T Lambda Xi, block-tridiagonal, with KFAC's blocks F_ij = G_ij kron A_ij for i = j and |i - j| = 1.

    A_ij = E[a_i a_j^T] and G_ij = E[g_i g_j^T]. The gradients of the layers are taken for a Markov chain: that of layer
    i depends on those after it through layer j = i + 1 alone,

    * (Xi M)_i = M_i - Psi_i M_j, Psi_i = F_ij F_jj^-1 = (G_ij G_jj^-1) kron (A_ij A_jj^-1);
    * Lambda = diag(Sigma_i^-1), Sigma_i = F_ii - Psi_i F_jj Psi_i^T, or F_ii for the end of a chain.

    It is the one matrix with these blocks on the three diagonals and a block-tridiagonal inverse. Damping is KFAC's, on
    the factors A_ii and G_ii wherever they occur. Two layers are joined if they follow each other in the order of the
    model, norms left aside, use their weights once an example and saw the same examples; elsewhere (norms,
    convolutions, sequences, a layer that was left out) it is KFAC, with Sigma_i = F_ii. A layer that M lacks counts as
    one of gradient 0.

    Cost: KFAC's; 2 n (in_i in_j + out_i out_j) an observation; about 12 to 30 (in^3 + out^3) a refresh (``eigh``);
    four products of 2 out in (out + in) a step for KFAC's one; memory four times KFAC's. Raises ``FactorisationError``,
    at a refresh, where damping is too small for Sigma_i to be positive definite.
    Reference: Martens and Grosse, arXiv 1503.05671, sections 4.3 and 6.3, and appendix B.
    """

    def observe(self, seen: Capture) -> Stats:
        """KFAC's covariances; those with the next layer are of width 0."""
        a, g = seen.flat_a, seen.flat_g
        groups = a.shape[:-2]
        none = {
            "A_next": Mean(a.new_zeros(*groups, 0, 0)),
            "G_next": Mean(g.new_zeros(*groups, 0, 0)),
            "A_cross": Mean(a.new_zeros(*groups, a.shape[-1], 0)),
            "G_cross": Mean(g.new_zeros(*groups, g.shape[-1], 0)),
        }
        return {**KFAC().observe(seen), **none}

    def observe_together(self, seen: Mapping[str, Sequence[Capture]]) -> dict[str, Stats]:
        """KFAC's covariances, those of the next layer, and those between the two."""
        stats: dict[str, Stats] = {name: pool(map(self.observe, captures)) for name, captures in seen.items()}
        for name, after in pairwise(name for name in seen if not _featurewise(seen[name])):
            if _linked(seen[name], seen[after]):
                between = pool(_between(one, other) for one, other in zip(seen[name], seen[after], strict=True))
                stats[name] = {**stats[name], **between}
        return {name: own for name, own in stats.items() if own}

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """Moving averages; of two layers that were not seen together now, or never before, the covariance is 0."""
        if old is not None:
            old, new = _completed(old, new), _completed(new, old)
        return super().merge(old, new, decay)

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Link:
        """The block of one layer, and what it takes to join it to the next."""
        names = ("G", "A", "G_next", "A_next", "G_cross", "A_cross")
        G, A, G_next, A_next, G_cross, A_cross = (stats[name].value for name in names)
        return Link(G, A, G_next=G_next, A_next=A_next, G_cross=G_cross, A_cross=A_cross)

    def couple(self, parts: Mapping[str, Part]) -> NetworkMap:
        """Xi^T Lambda Xi."""
        return TridiagonalMap({name: part.inverse for name, part in parts.items() if isinstance(part.inverse, LinkMap)})


@dataclass(frozen=True, kw_only=True)
class Link(Kronecker):
    """G kron A of one layer, with G_jj, A_jj of the next layer j and G_ij, A_ij; of width 0 where there is none."""

    G_next: Tensor
    A_next: Tensor
    G_cross: Tensor
    A_cross: Tensor

    def floored(self, eps: float) -> Self:
        """A floor under each factor, also of the next layer."""
        G_next, A_next = factor.floored(self.G_next, eps), factor.floored(self.A_next, eps)
        return replace(super().floored(eps), G_next=G_next, A_next=A_next)

    def inverse(self, damping: float) -> LinkMap:  # type: ignore[override]
        """Psi_i and Sigma_i^-1, under factored damping."""
        G, A = _damped(self.left, self.right, damping)
        G_next, A_next = _damped(self.G_next, self.A_next, damping)
        psi_left, psi_right = self.G_cross @ cholesky_inverse(G_next), self.A_cross @ cholesky_inverse(A_next)
        left, g = _diagonalised(G, psi_left @ self.G_cross.mT)
        right, a = _diagonalised(A, psi_right @ self.A_cross.mT)
        values = 1 - g.unsqueeze(-1) * a.unsqueeze(-2)
        if not (values > 0).all():
            raise FactorisationError(f"a block of shape {tuple(self.shape)} is singular given the next: raise damping")
        return LinkMap(left, right, 1 / values, psi_left, psi_right)


@dataclass(frozen=True)
class LinkMap(LinearMap):
    """Sigma_i^-1 = K diag(values) K^T with K = ``left`` kron ``right``, and Psi_i = ``psi_left`` kron ``psi_right``."""

    left: Tensor
    right: Tensor
    values: Tensor
    psi_left: Tensor
    psi_right: Tensor

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""
        return self.values.shape

    @property
    def following(self) -> torch.Size:
        """(*groups, out, in) of the next layer, 0 where there is none."""
        return torch.Size((*self.psi_left.shape[:-2], self.psi_left.shape[-1], self.psi_right.shape[-1]))

    def __matmul__(self, M: Tensor) -> Tensor:
        """Sigma_i^-1 M."""
        inner = (self.left.mT @ M.to(self.left.dtype) @ self.right) * self.values
        return (self.left @ inner @ self.right.mT).to(M.dtype)

    def dense(self) -> Tensor:
        """Sigma_i^-1."""
        K = Kronecker(self.left, self.right).dense()
        return (K * self.values.flatten(-2).unsqueeze(-2)) @ K.mT

    def psi(self, M: Tensor) -> Tensor:
        """Psi_i M for M of the next layer."""
        return (self.psi_left @ M.to(self.psi_left.dtype) @ self.psi_right.mT).to(M.dtype)

    def psi_transposed(self, M: Tensor) -> Tensor:
        """Psi_i^T M, of the shape of the next layer."""
        return (self.psi_left.mT @ M.to(self.psi_left.dtype) @ self.psi_right).to(M.dtype)


@dataclass(frozen=True)
class TridiagonalMap:
    """Xi^T Lambda Xi on dicts of blocks, for layers in the order of the model."""

    links: Mapping[str, LinkMap]

    def __matmul__(self, M: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The image of M, for its layers."""
        like = next(iter(M.values()), None)
        if like is None:
            return {}
        full = {name: M[name] if name in M else like.new_zeros(link.shape) for name, link in self.links.items()}
        chain = [name for name, link in self.links.items() if len(link.shape) == 2]
        pairs = [(i, j) for i, j in pairwise(chain) if self.links[i].following == self.links[j].shape]
        D = dict(full)
        for i, j in pairs:
            D[i] = full[i] - self.links[i].psi(full[j])
        weighted = {name: link @ D[name] for name, link in self.links.items()}
        D = dict(weighted)
        for i, j in pairs:
            D[j] = D[j] - self.links[i].psi_transposed(weighted[i])
        return {name: D[name] for name in M}


def _featurewise(seen: Sequence[Capture]) -> bool:
    """Whether a layer is groups that are used once an example, as a norm is."""
    return any(capture.a.ndim > 3 and not capture.shared for capture in seen)


def _linked(seen: Sequence[Capture], after: Sequence[Capture]) -> bool:
    examples, others = ([capture.a.shape[:-1] for capture in captures] for captures in (seen, after))
    return bool(examples) and examples == others and all(len(size) == 2 and size[1] == 1 for size in examples)


def _between(seen: Capture, after: Capture) -> Stats:
    """With the divisors of the first, so that the covariance of both together is positive semi-definite."""
    a, g, a_next, g_next = seen.flat_a, seen.flat_g, after.flat_a, after.flat_g
    return {
        "A_next": Mean(a_next.mT @ a_next, seen.rows),
        "G_next": Mean(g_next.mT @ g_next, seen.count),
        "A_cross": Mean(a.mT @ a_next, seen.rows),
        "G_cross": Mean(g.mT @ g_next, seen.count),
    }


def _completed(stats: Stats, other: Stats) -> Stats:
    """With a next layer, of which nothing but its own covariance is known, if only ``other`` has one."""
    if stats["A_next"].value.shape == other["A_next"].value.shape or not other["A_next"].value.numel():
        return stats
    cross = {name: Mean(torch.zeros_like(other[name].value)) for name in ("A_cross", "G_cross")}
    return {**stats, **cross, **{name: Mean(other[name].value) for name in ("A_next", "G_next")}}


def _damped(G: Tensor, A: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """G + sqrt(damping)/pi I and A + pi sqrt(damping) I."""
    pi, root = Factored().ratio(Kronecker(G, A)), check_damping(damping) ** 0.5
    return shifted(G, root / pi), shifted(A, root * pi)


def _diagonalised(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """K, y with K^T X K = I and K^T Y K = diag(y) for X positive definite and Y positive semi-definite (..., d, d)."""
    L, failed = torch.linalg.cholesky_ex(X)
    if not ((failed == 0).all() & torch.isfinite(L).all()):
        raise FactorisationError(f"a factor of shape {tuple(X.shape)} is not positive definite with this damping")
    half = torch.linalg.solve_triangular(L, Y, upper=False)
    y, Q = eigh(torch.linalg.solve_triangular(L.mT, half, upper=True, left=False))
    return torch.linalg.solve_triangular(L.mT, Q, upper=True), y
