"""What the gradient that a loss leaves at an output says of the loss: its form, and the weight of its terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MISFIT = 1e-4
"""The largest share of |g|^2 that a form which is the loss's own leaves open: one per cent of g, for half precision."""
_CHUNK = 1 << 20  # entries that are looked at at once
_MANY = 1 << 19  # entries, of which a part tells as much as all


@dataclass(frozen=True)
class Reading:
    """The weights that the loss gives its terms, summed: between ``low`` and ``high``; equal and exact if ``clear``."""

    low: float
    high: float
    clear: bool

    def times(self, factor: float) -> Reading:
        """Of so many times the loss."""
        return Reading(factor * self.low, factor * self.high, self.clear)


@dataclass(frozen=True)
class Form:
    """How g (N, d) fits c (p - y), p the mean and y a label of one of its kinds.

    ``apart`` and ``together`` are the shares of |g|^2 that are left with a c of every term's own and with one for all;
    ``counted`` is the number of terms, ``c`` the one for all, ``low`` and ``high`` bound the sum of the terms' own,
    where there are any (``dense``). ``varied``: whether p differs enough from entry to entry to tell losses apart.
    """

    counted: float
    c: float
    together: float
    apart: float
    low: float
    high: float
    dense: bool = False
    varied: bool = False

    @property
    def own(self) -> bool:
        """Whether all terms have the form, with the same c."""
        return self.counted > 0 and self.together <= MISFIT

    @property
    def sure(self) -> bool:
        """Whether no other loss has such a gradient."""
        return self.own and self.varied

    @property
    def reading(self) -> Reading | None:
        """The weights of the terms."""
        if self.own:
            return Reading(self.c * self.counted, self.c * self.counted, True)
        return Reading(self.low, self.high, False) if self.dense and self.low > 0 else None


def softmax_form(z: Tensor, g: Tensor, smoothing: float = 0.0) -> Form:
    """p = softmax(z), y the class of the most negative g, smoothed. z, g (N, C).

    Where labels are others (mixed, or of a teacher), the positive entries g = c (p - y) still give a c each: y is 0 or
    small there. Of many rows every k-th is looked at, and counts for those between.
    """
    rows, every = len(z), -(-z.numel() // _MANY)
    z, g = (z[::every], g[::every]) if every > 1 else (z, g)
    times = rows / max(1, len(z))

    if not len(z):
        return _NONE

    def sums(z: Tensor, g: Tensor) -> list[Tensor]:
        p = z.softmax(-1)
        normal = z.logsumexp(-1, keepdim=True).abs() < 1e-3  # log-probabilities: the part of g along them is free
        g = torch.where(normal, g - p * g.sum(-1, keepdim=True), g)
        y = torch.full_like(p, smoothing / p.shape[-1])
        r = p - y.scatter_add(-1, g.argmin(-1, keepdim=True), torch.full_like(p[:, :1], 1 - smoothing))
        reached = (g != 0).any(-1)
        counted = reached | (p.amax(-1) > 1 - 1e-6)
        own = (g * r).sum(-1) / r.square().sum(-1).clamp(min=1e-30)
        left = (g - own.unsqueeze(-1) * r).square().sum(-1)
        up, over = g.clamp(min=0), torch.where(g > 0, p, torch.zeros_like(p))
        soft = up.mul(over).sum(-1) / over.square().sum(-1).clamp(min=1e-30)
        away = (up - soft.unsqueeze(-1) * over).square()
        return [
            counted.sum(), g.square().sum(), (g * r)[counted].sum(), r[counted].square().sum(), left.sum(),
            torch.where(reached, own, 0).sum(), soft.sum(), up.square().sum(), away.sum(), g.abs().sum(),
            g.sum(-1).abs().sum(), (p - 1 / p.shape[-1])[reached].square().sum(),
        ]  # fmt: skip

    count, size, gr, rr, left, own, soft, up, away, whole, beside, spread = _added(sums, z, g)
    if not size > 0 or not gr > 0:
        return _NONE
    apart, together = left / size, 1 - gr * gr / (rr * size)
    if beside > 1e-2 * whole:
        apart = together = 1.0
    total = own if apart <= MISFIT and z.shape[-1] > 2 else soft
    total, dense = times * total, away <= 0.5 * up and beside <= 0.25 * whole
    return Form(times * count, gr / rr, together, apart, total, total, dense, spread > 1e-3 * rr)


def sigmoid_form(z: Tensor, g: Tensor) -> Form:
    """p = sigmoid(z), y = 1 where g < 0, for every entry by itself. z, g (N, d); sums and counts are over d times N."""

    if not len(z):
        return _NONE

    def sums(z: Tensor, g: Tensor) -> list[Tensor]:
        p = z.sigmoid()
        r = p - (g < 0).to(p)
        reached = g != 0
        counted = reached | (torch.minimum(p, 1 - p) < 1e-6)
        r = torch.where(reached, r, 0)
        c = torch.where(reached, g / torch.where(reached, r, 1), 0)
        sizes = [g.square().sum(), (g * r).sum(), r.square().sum(), r.abs().sum(), reached.sum()]
        return [counted.sum(), *sizes, c.sum(), c.amax()]

    count, size, gr, rr, r, reached, total, _ = _added(sums, z, g)
    if not size > 0:
        return _NONE
    largest = max(float(sums(*chunk)[-1]) for chunk in _chunks(z, g))
    varied = 1 - r * r / (rr * reached) > 1e-2
    return Form(count, gr / rr, 1 - gr * gr / (rr * size), 0.0, total, largest * count, True, varied)


def zero_target_form(z: Tensor, g: Tensor) -> Form:
    """g = c (z - y) where many y are 0, or many are 1: many g / z, or g / (z - 1), are then the same c > 0.

    That is so of dark and bright pixels, of one-hot labels, and of residuals. At least 16 entries of the first 65,536
    and a tenth of them must agree to 1e-4, at outputs that differ.
    """
    z, g = (x.flatten()[: 1 << 16] for x in (_wide(z), _wide(g)))
    z, g = z[g != 0], g[g != 0]
    k = max(16, len(z) // 10)
    for target in (0.0, 1.0):
        x = z - target
        q, order = (g / torch.where(x == 0, torch.nan, x)).nan_to_num(-1.0).sort()
        if len(q) < k:
            break
        width = (q[k - 1 :] - q[: len(q) - k + 1]) / q[: len(q) - k + 1].clamp(min=1e-300)
        start = int(torch.where(q[: len(q) - k + 1] > 0, width, torch.inf).argmin())
        those = x[order[start : start + k]].abs()
        if q[start] > 0 and width[start] < 1e-4 and those.amax() > 1.1 * those.amin():
            return Form(1.0, float(q[start : start + k].median()), 0.0, 0.0, 0.0, 0.0)
    return _NONE


def along(g: Tensor, r: Tensor) -> Form:
    """g = c r for a given r."""

    if not len(g):
        return _NONE

    def sums(g: Tensor, r: Tensor) -> list[Tensor]:
        return [g.square().sum(), (g * r).sum(), r.square().sum()]

    size, gr, rr = _added(sums, g, r)
    return Form(1.0, gr / rr, 1 - gr * gr / (rr * size), 0.0, 0.0, 0.0) if size > 0 and gr > 0 else _NONE


def are_probabilities(z: Tensor) -> bool:
    """Whether all rows (N, C) are positive numbers that add up to 1: no logits do."""
    rounding = 1e-2 if z.dtype.itemsize < 4 else 1e-4
    return len(z) > 1 and bool((z >= 0).all() & ((z.sum(-1) - 1).abs() < rounding).all())


_NONE = Form(0.0, 0.0, 1.0, 1.0, 0.0, 0.0)


def _added(sums: Callable[[Tensor, Tensor], list[Tensor]], x: Tensor, y: Tensor) -> list[float]:
    parts = [torch.stack([s.to(a.dtype) for s in sums(a, b)]) for a, b in _chunks(x, y)]
    return torch.stack(parts).sum(0).tolist()


def _chunks(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK // max(1, x[:1].numel()))
    pairs = zip(x.split(rows), y.split(rows), strict=True) if len(x) else ()
    return [(_wide(a), _wide(b)) for a, b in pairs]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)
