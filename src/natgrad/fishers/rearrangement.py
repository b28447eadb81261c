"""Van Loan's rearrangement of the Fisher, as a pair of linear maps that never form it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.fishers.statistics import Mean

Pair = tuple[Tensor, Tensor]
"""Factors (*groups, in, in) and (*groups, out, out) of one Kronecker product, the second being the left one of it."""

_CHUNK = 1 << 25  # elements held at once


@dataclass(frozen=True)
class Rearrangement:
    """Z: V -> E[DW^T V DW] and its adjoint Z^T: U -> E[DW U DW^T] on symmetric matrices, less some known terms.

    |F - S kron R| = |Z - vec(R) vec(S)^T| in the Frobenius norm, so that the singular triples of Z are the Kronecker
    products nearest to F (Van Loan and Pitsianis 1993). Both maps take positive matrices to positive ones.

    Unshared weights need no per-example gradients: 2 n (in^2 + out^2) flops a product. Shared ones are exact, by the
    cheaper of pairs of positions, n (t (in^2 + out^2) + t^2 (in + out)), and per-example gradients, n in out
    (t + in + out); ``location`` leaves the cross terms between positions out, at the cost of n t unshared examples.
    The product ``less`` is subtracted. The directions of ``aside`` are projected out on both sides, which is the same
    where ``aside`` is a singular triple of Z, and where it is one of an average keeps the batch's deviation out.
    """

    seen: Capture
    location: bool = False
    less: Pair | None = None
    aside: Pair | None = None

    def __matmul__(self, V: Tensor) -> Tensor:
        """Z(V) for symmetric V (*groups, out, out): (*groups, in, in)."""
        return self._product(self.seen.a, self.seen.g, V, 0)

    def adjoint(self, U: Tensor) -> Tensor:
        """Z^T(U) for symmetric U (*groups, in, in): (*groups, out, out)."""
        return self._product(self.seen.g, self.seen.a, U, 1)

    def minus(self, pair: Pair) -> Rearrangement:
        """The rearrangement of F less a product."""
        return replace(self, less=pair)

    def without(self, pair: Pair) -> Rearrangement:
        """The rearrangement of F on what is orthogonal to the factors of a product."""
        return replace(self, aside=pair)

    @property
    def rounding(self) -> Tensor:
        """The size (*groups, 1, 1) below which a product is nothing but the rounding of what was subtracted."""
        size = self.seen.a.new_zeros((*self.seen.a.shape[:-3], 1, 1))
        for R, S in filter(None, (self.less, self.aside)):
            size = size + norm(R) * norm(S)
        return 100 * torch.finfo(size.dtype).eps * size

    def _product(self, a: Tensor, g: Tensor, V: Tensor, side: int) -> Tensor:
        """Z(V), or Z^T(V) with a and g exchanged and ``side`` 1: the place of the image's factor in a pair."""
        if self.aside is not None:
            V = _off(V, self.aside[1 - side])
        X = self._mean(a, g, V)
        if self.less is not None:
            X = X - inner(self.less[1 - side], V) * self.less[side]
        if self.aside is not None:
            X = _off(X, self.aside[side])
        return (X + X.mT) / 2

    def _mean(self, a: Tensor, g: Tensor, V: Tensor) -> Tensor:
        """E[DW^T V DW] with DW = sum_t g_t a_t^T."""
        if self.location or not self.seen.shared:
            a, g = a.flatten(-3, -2), g.flatten(-3, -2)
            total = (a * ((g @ V) * g).sum(-1, keepdim=True)).mT @ a
        else:
            t, width, out = *a.shape[-2:], g.shape[-1]
            pairs = t * (width**2 + out**2) + t**2 * (width + out) < width * out * (t + width + out)
            size = (t * (t + width + out) if pairs else width * out) * a.shape[:-3].numel()
            products = _by_pairs if pairs else _by_gradients
            chunks = zip(*(x.split(max(1, _CHUNK // size), -3) for x in (a, g)), strict=True)
            total = torch.stack([products(a, g, V.unsqueeze(-3)) for a, g in chunks]).sum(0)
        return Mean(total, self.seen.count).value


def _by_pairs(a: Tensor, g: Tensor, V: Tensor) -> Tensor:
    """sum_n sum_ts a_t (g_t^T V g_s) a_s^T."""
    return a.flatten(-3, -2).mT @ (g @ V @ g.mT @ a).flatten(-3, -2)


def _by_gradients(a: Tensor, g: Tensor, V: Tensor) -> Tensor:
    """sum_n DW^T (V DW)."""
    DW = g.mT @ a
    return DW.flatten(-3, -2).mT @ (V @ DW).flatten(-3, -2)


def inner(X: Tensor, Y: Tensor) -> Tensor:
    """<X, Y> over the last two dimensions, kept: (..., 1, 1)."""
    return (X * Y).sum((-2, -1), keepdim=True)


def norm(X: Tensor) -> Tensor:
    """The Frobenius norm of the last two dimensions, (..., 1, 1); row by row, as one float32 sum is too coarse."""
    rows = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(rows, dim=-2, keepdim=True)


def unit(X: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """X / |X|; where X is zero, ``otherwise`` of unit norm, or zero."""
    size = norm(X)
    scaled = X / torch.where(size > 0, size, 1.0)
    return scaled if otherwise is None else torch.where(size > 0, scaled, unit(otherwise))


def _off(X: Tensor, B: Tensor) -> Tensor:
    """X less its part along B."""
    direction = unit(B)
    return X - inner(direction, X) * direction
