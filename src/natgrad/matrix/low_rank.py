"""A matrix known by per-example gradients, which are never formed: a sum of n outer products, inverted n by n."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.matrix.base import LinearMap, Matrix, check_damping
from natgrad.matrix.factorise import FactorisationError, cholesky, cholesky_inverse

_CHUNK = 1 << 25  # elements held at once in float64


@dataclass(frozen=True)
class LowRank(Matrix):
    """F = 1/count sum_n vec(DW_n) vec(DW_n)^T with DW_n = sum_t g_nt a_nt^T; of rank n at most.

    ``a`` (*groups, n, t, in) and ``g`` (*groups, n, t, out) are kept; the gradients DW are not formed. A product costs
    4 n t in out flops; memory is n t (in + out).
    """

    a: Tensor
    g: Tensor
    count: Tensor

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""
        return torch.Size((*self.a.shape[:-3], self.g.shape[-1], self.a.shape[-1]))

    @property
    def seen(self) -> Capture:
        """The examples."""
        count = self.count.clamp(min=torch.finfo(torch.float32).tiny)  # no loss terms: F = 0
        return Capture(self.a, self.g, count, count)

    def __matmul__(self, M: Tensor) -> Tensor:
        """1/count sum_n DW_n <DW_n, M>."""
        seen = self.seen
        return seen.combine(seen.along(M) / seen.count).to(M.dtype)

    def dense(self) -> Tensor:
        """U^T U / count with U = DW as (n, out * in)."""
        U = _rows(self.seen)
        return U.mT @ U / self.seen.count

    def gram(self) -> Tensor:
        """K_nm = <DW_n, DW_m> (*groups, n, n), in float64."""
        return self.seen.to(torch.float64).gram()

    def inverse(self, damping: float) -> LowRankInverse:
        """(F + damping I)^-1 by Woodbury's identity: n^2 (in + out) + n^3 / 3 flops if t = 1; damping > 0.

        A ``damping`` that is so small beside the mean eigenvalue tr(K) / n of the Gram matrix that rounding would take
        over is raised to max(8 eps, n^2 eps64) tr(K) / (n count), with the eps of the dtype of ``a`` and of float64.
        """
        return LowRankInverse(self.a, self.g, self.count, *_factorised(self.gram(), self, damping))

    def trace(self) -> Tensor:
        """sum_n |DW_n|^2 / count."""
        return self.seen.second_moment().sum((-2, -1)) / self.seen.count

    def norm(self) -> Tensor:
        """|K| / count: the matrix and the Gram matrix have the same eigenvalues, but for the count and zeros."""
        return torch.linalg.matrix_norm(self.seen.gram()) / self.seen.count


@dataclass(frozen=True)
class LowRankInverse(LinearMap):
    """(I - U^T (K + count damping I)^-1 U) / damping, U the gradients of ``a`` and ``g`` and K = U U^T.

    ``factor`` (*groups, n, n) is the Cholesky factor of the inner matrix. For an M in the span of the gradients the
    difference nearly vanishes: factor and products are in float64, whatever the dtype of ``a`` and ``g``. A product
    costs 4 n t in out flops.
    """

    a: Tensor
    g: Tensor
    count: Tensor
    factor: Tensor
    damping: Tensor

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""
        return torch.Size((*self.a.shape[:-3], self.g.shape[-1], self.a.shape[-1]))

    def __matmul__(self, M: Tensor) -> Tensor:
        """(M - sum_n c_n DW_n) / damping with c = (K + count damping I)^-1 <DW, M>."""
        c = torch.cholesky_solve(_along(self.a, self.g, M).unsqueeze(-1), self.factor).squeeze(-1)
        return ((M - _combine(self.a, self.g, c)) / self.damping[..., None, None]).to(M.dtype)

    def dense(self) -> Tensor:
        """(U^T U / count + damping I)^-1, the other side of the identity."""
        F = LowRank(self.a.double(), self.g.double(), self.count.double()).dense()
        return cholesky_inverse(F, self.damping).to(self.a.dtype)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same map moved, and never cast: in fewer digits nothing would be left of the difference."""
        device = self.damping.to(*args, **kwargs).device
        return self.with_tensors({name: value.to(device) for name, value in self.tensors().items()})


@dataclass(frozen=True)
class JointInverse:
    """(F + damping I)^-1 on dicts of blocks, for the F of whole gradients: DW_n are those of all ``layers`` together.

    One ``factor`` (n, n) serves all of them, that of sum of the layers' K + count damping I. Blocks that M lacks are
    taken as 0.
    """

    layers: Mapping[str, LowRank]
    factor: Tensor
    damping: Tensor

    @classmethod
    def of(cls, layers: Mapping[str, LowRank], damping: float) -> Self:
        """The inverse for layers that saw the same examples: n^2 sum (in + out) + n^3 / 3 flops if t = 1."""
        K = torch.stack([layer.seen.to(torch.float64).joint_gram() for layer in layers.values()]).sum(0)
        return cls(layers, *_factorised(K, next(iter(layers.values())), damping))

    def __matmul__(self, M: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(M - sum_n c_n DW_n) / damping with <DW, M> summed over the layers; for the layers in both."""
        here = {name: (layer.a, layer.g) for name, layer in self.layers.items() if name in M}
        w = torch.zeros_like(self.factor[0])
        for name, factors in here.items():
            w += _along(*factors, M[name]).reshape(-1, len(w)).sum(0)
        c = torch.cholesky_solve(w.unsqueeze(-1), self.factor).squeeze(-1)
        return {name: ((M[name] - _combine(*here[name], c)) / self.damping).to(M[name].dtype) for name in here}


def _factorised(K: Tensor, like: LowRank, damping: float) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of K + count damping I, and the damping in it; count and precision are those of ``like``."""
    if check_damping(damping) == 0:
        raise FactorisationError("a low-rank matrix is singular: give a damping > 0")
    count = torch.as_tensor(like.seen.count).double()
    rounding = max(8 * torch.finfo(like.a.dtype).eps, K.shape[-1] ** 2 * torch.finfo(K.dtype).eps)
    floor = rounding * K.diagonal(dim1=-2, dim2=-1).mean(-1) / count
    held = floor.clamp(min=damping)
    return cholesky(K, held * count), held


def _doubled(a: Tensor, g: Tensor) -> Iterator[Capture]:
    """The examples in float64, a few at a time."""
    step = max(1, _CHUNK * a.shape[-3] // max(1, a.numel() + g.numel()))
    for x, y in zip(a.split(step, -3), g.split(step, -3), strict=True):
        yield Capture(x.double(), y.double(), 1.0, 1.0)


def _along(a: Tensor, g: Tensor, M: Tensor) -> Tensor:
    return torch.cat([seen.along(M) for seen in _doubled(a, g)], -1)


def _combine(a: Tensor, g: Tensor, c: Tensor) -> Tensor:
    total, start = torch.zeros((), dtype=c.dtype, device=c.device), 0
    for seen in _doubled(a, g):
        stop = start + seen.a.shape[-3]
        total, start = total + seen.combine(c[..., start:stop]), stop
    return total


def _rows(seen: Capture) -> Tensor:
    return torch.cat(list(seen.weight_gradients()), -3).flatten(-2)
