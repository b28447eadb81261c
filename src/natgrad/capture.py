"""What one layer saw on one batch: the only thing that an approximation reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

_CHUNK = 1 << 25  # elements of per-example gradients, or of products of positions, held at once
_LARGE = 512  # from where a symmetric product is worth its blocks


@dataclass(frozen=True)
class Examples:
    """Which examples these are: those from position ``start`` of the step's examples on."""

    start: int = 0


Kind = Literal["plain", "wide", "tokens", "mixed"]
"""How a layer uses its weight: as any; with a side too wide for a matrix; on tokens; both on tokens and as a head."""


@dataclass(frozen=True)
class Capture:
    """Layer inputs and output gradients of one batch.

    * ``a`` (*groups, n, t, in): inputs, with the 1 of the bias appended, at the t positions where the weight is
      used (patches of a convolution, tokens of a sequence, calls of a module; t = 1 for an ordinary layer);
    * ``g`` (*groups, n, t, out): gradients of the *sum* of the loss terms at the layer's output (un-averaged);
    * ``count``: number of loss terms; F = 1/count sum_n vec(DW_n) vec(DW_n)^T with DW_n = sum_t g_nt a_nt^T;
    * ``rows``: number of positions (n t less the masked ones), the divisor of the input covariance;
    * ``examples``: which ones they are;
    * ``diagonal``: of which sides (out, in) no covariance is formed, but its diagonal.
    """

    a: Tensor
    g: Tensor
    count: float | Tensor
    rows: float | Tensor
    examples: Examples = Examples()
    diagonal: tuple[bool, bool] = (False, False)

    @cached_property
    def flat_a(self) -> Tensor:
        """``a`` with examples and positions as one dimension: (*groups, n t, in)."""
        return self.a.flatten(-3, -2)

    @cached_property
    def flat_g(self) -> Tensor:
        """``g`` with examples and positions as one dimension: (*groups, n t, out)."""
        return self.g.flatten(-3, -2)

    @property
    def size(self) -> int:
        """The number n of examples."""
        return self.g.shape[-3]

    @property
    def shared(self) -> bool:
        """Whether the weight is used at more than one position."""
        return self.a.shape[-2] > 1

    @property
    def norm_a(self) -> Tensor:
        """|a|^2 at every position: (*groups, n t, 1)."""
        return self.flat_a.square().sum(-1, keepdim=True)

    @property
    def norm_g(self) -> Tensor:
        """|g|^2 at every position: (*groups, n t, 1)."""
        return self.flat_g.square().sum(-1, keepdim=True)

    def moment_a(self, weights: Tensor | None = None) -> Tensor:
        """sum w a a^T over positions, w (*groups, n t, 1): (*groups, in, in); or its diagonal (*groups, in, 1)."""
        return _moment(self.flat_a, weights, self.diagonal[1])

    def moment_g(self, weights: Tensor | None = None) -> Tensor:
        """sum w g g^T over positions, w (*groups, n t, 1): (*groups, out, out); or its diagonal (*groups, out, 1)."""
        return _moment(self.flat_g, weights, self.diagonal[0])

    def weight_gradients(self) -> Iterator[Tensor]:
        """Per-example gradients DW (*groups, n', out, in), in chunks of examples that fit in memory."""
        step = per_chunk(self.a.shape[-1] * self.g.shape[-1] * self.a.shape[:-3].numel())
        for a, g in zip(self.a.split(step, -3), self.g.split(step, -3), strict=True):
            yield torch.einsum("...nto,...nti->...noi", g, a)

    def second_moment(self) -> Tensor:
        """sum_n DW_n^2, element by element (*groups, out, in); without per-example gradients if t = 1."""
        if not self.shared:
            return self.flat_g.square().mT @ self.flat_a.square()
        total = torch.zeros((), dtype=self.g.dtype, device=self.g.device)
        for DW in self.weight_gradients():
            total = total + DW.square().sum(-3)
        return total

    def along(self, V: Tensor) -> Tensor:
        """u_n = <DW_n, V> = sum_t g_nt^T V a_nt for V (*groups, out, in): (*groups, n); 2 n t out in flops."""
        return ((self.flat_g @ V.to(self.g.dtype)) * self.flat_a).sum(-1).unflatten(-1, self.a.shape[-3:-1]).sum(-1)

    def combine(self, w: Tensor) -> Tensor:
        """sum_n w_n DW_n for w (*groups, n): (*groups, out, in), without per-example gradients; 2 n t out in flops."""
        weighted = self.g * w.to(self.g.dtype)[..., None, None]
        return weighted.flatten(-3, -2).mT @ self.flat_a

    def gram(self) -> Tensor:
        """K_nm = <DW_n, DW_m> (*groups, n, n), the Gram matrix of the per-example gradients, in the dtype of ``a``.

        K = sum over positions s, t of (a_ns . a_mt)(g_ns . g_mt): n^2 (in + out) flops if t = 1, t^2 times that if the
        weight is shared; or DW DW^T, (n^2 + n t) in out flops. The cheaper is taken, in chunks that fit in memory.
        """
        n, t, width = self.a.shape[-3:]
        out = self.g.shape[-1]
        if (n + t) * width * out < n * t**2 * (width + out):
            return self._gram_of_gradients()
        return self._gram_of_positions()

    def joint_gram(self) -> Tensor:
        """The sum of :meth:`gram` over the groups (n, n): some at a time, or all at once if each has one output."""
        n = self.a.shape[-3]
        if self.a.ndim > 3 and self.g.shape[-1] == 1:
            U = torch.cat(list(self.weight_gradients()), -3).movedim(-3, 0).flatten(1)
            return U @ U.mT
        a, g = (x.reshape(-1, *x.shape[-3:]).split(max(1, _CHUNK // n**2)) for x in (self.a, self.g))
        return sum((Capture(*pair, 1.0, 1.0).gram().sum(0) for pair in zip(a, g, strict=True)), self.a.new_zeros(n, n))

    def _gram_of_positions(self) -> Tensor:
        n, t = self.a.shape[-3:-1]
        step = max(1, _CHUNK // (n * t**2 * max(1, self.a.shape[:-3].numel())))
        rows = []
        for a, g in zip(self.a.split(step, -3), self.g.split(step, -3), strict=True):
            product = (a.flatten(-3, -2) @ self.flat_a.mT) * (g.flatten(-3, -2) @ self.flat_g.mT)
            rows.append(product.unflatten(-1, (n, t)).unflatten(-3, (-1, t)).sum((-3, -1)))
        return torch.cat(rows, -2)

    def _gram_of_gradients(self) -> Tensor:
        n, _, width = self.a.shape[-3:]
        step = max(1, _CHUNK // (n * width * max(1, self.a.shape[:-3].numel())))
        K = self.a.new_zeros(*self.a.shape[:-3], n, n)
        for g in self.g.split(step, -1):
            DW = torch.einsum("...nto,...nti->...noi", g, self.a).flatten(-2)
            K += DW @ DW.mT
        return K

    def project(self, left: Tensor, right: Tensor) -> Capture:
        """The same examples in other coordinates: a @ right, g @ left, so that DW becomes left^T DW right.

        A column (*groups, d, 1) stands for a diagonal matrix.
        """
        a, g = _changed(self.a, right), _changed(self.g, left)
        return Capture(a, g, self.count, self.rows, self.examples, self.diagonal)

    def to(self, dtype: torch.dtype) -> Capture:
        """The same with ``a`` and ``g`` cast."""
        return Capture(self.a.to(dtype), self.g.to(dtype), self.count, self.rows, self.examples, self.diagonal)

    def swapped(self) -> Capture:
        """The capture of the transposed weight: inputs for gradients, and the reverse."""
        return Capture(self.g, self.a, self.count, self.rows, self.examples, self.diagonal[::-1])


def per_chunk(size: int) -> int:
    """The number of examples of ``size`` elements that are held at once."""
    return max(1, _CHUNK // max(1, size))


def _moment(x: Tensor, weights: Tensor | None, diagonal: bool) -> Tensor:
    y = x if weights is None else x * weights
    return (y * x).sum(-2).unsqueeze(-1) if diagonal else symmetric(y, x)


def symmetric(y: Tensor, x: Tensor) -> Tensor:
    """y^T x (*groups, d, d) for y (*groups, n, d) that is x times weights of rows: as such it is symmetric.

    On a CPU a large one by block rows from the diagonal on, and their mirror: 5/8 of the flops.
    """
    n, d = x.shape[-2:]
    if x.ndim > 2 or x.device.type != "cpu" or d < _LARGE or 2 * n < d:
        return y.mT @ x
    result, step = x.new_empty(d, d), -(-d // 4)
    for start in range(0, d, step):
        end = min(start + step, d)
        result[start:end, start:] = y[:, start:end].mT @ x[:, start:]
        result[end:, start:end] = result[start:end, end:].mT
    return result


def _changed(x: Tensor, basis: Tensor) -> Tensor:
    """x (*groups, n, t, d) times a basis (*groups, d, d), or a diagonal one (*groups, d, 1)."""
    basis = basis.to(x.dtype)
    if basis.shape[-1] != basis.shape[-2]:
        return x * basis.mT.unsqueeze(-3)
    return (x.flatten(-3, -2) @ basis).unflatten(-2, x.shape[-3:-1])
