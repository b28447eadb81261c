"""The covariance of the patches of a convolution, without the patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from natgrad.capture import Capture, Examples, symmetric
from natgrad.layers.convolution import Convolution, TransposedConvolution

_CHUNK = 1 << 20  # entries of patches held at once
_CALL = 1 << 21  # multiplications that take as long as a correlation does for itself
_CORRELATE: dict[int, Any] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}
_ALL = Examples()

Range = tuple[int, int]


@dataclass(frozen=True)
class Patches:
    """The inputs of a convolution at ``x`` (n, ..., C, *spatial), written out for those who ask for them."""

    form: Convolution
    x: Tensor
    biased: bool

    @property
    def dtype(self) -> torch.dtype:
        """That of x."""
        return self.x.dtype

    def dense(self) -> Tensor:
        """Patches (*groups, n, t, in)."""
        return self.form.inputs(self.x, self.biased)

    def moment(self, dtype: torch.dtype) -> Tensor:
        """sum a a^T over positions (*groups, in, in).

        With stride 1 on a CPU from correlations of the images with themselves: k (2k - 1) products of C^2 at every
        pixel, where patches take k^4. Else of the patches of a few examples at a time.
        """
        if correlates(self.form, self.x):
            return _correlated(self.form, self.x.to(dtype), self.biased)
        entries = self.x[:1].numel() * math.prod(self.form.kernel)
        total: Tensor | None = None
        for x in self.x.split(max(1, _CHUNK // max(1, entries))):
            a = self.form.inputs(x, self.biased).to(dtype).flatten(-3, -2)
            total = symmetric(a, a) if total is None else total + symmetric(a, a)
        assert total is not None
        return total


class PatchCapture(Capture):
    """What a convolution saw: a :class:`~natgrad.capture.Capture` that writes ``a`` out only where it is asked for."""

    def __init__(
        self,
        inputs: Patches,
        g: Tensor,
        count: float | Tensor,
        rows: float | Tensor,
        examples: Examples = _ALL,
        diagonal: tuple[bool, bool] = (False, False),
    ) -> None:
        fields = {"inputs": inputs, "g": g, "count": count, "rows": rows, "examples": examples, "diagonal": diagonal}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    inputs: Patches

    @cached_property
    def a(self) -> Tensor:
        """The patches (*groups, n, t, in)."""
        return self.inputs.dense().to(self.g.dtype)

    @property
    def shared(self) -> bool:
        """Whether the weight is used at more than one position."""
        return self.g.shape[-2] > 1

    def moment_a(self, weights: Tensor | None = None) -> Tensor:
        """sum w a a^T over positions, w (*groups, n t, 1): (*groups, in, in); or its diagonal (*groups, in, 1)."""
        if weights is not None or self.diagonal[1] or "a" in self.__dict__:
            return super().moment_a(weights)
        return self.inputs.moment(self.g.dtype)


def correlates(form: Convolution, x: Tensor) -> bool:
    """Whether the covariance is had by correlations: on a CPU, with stride 1, with half the products or less."""
    if isinstance(form, TransposedConvolution) or set(form.stride) != {1} or x.device.type != "cpu":
        return False
    sizes = tuple(x.shape[-len(form.kernel) :])
    distinct = [{r for own in axis for r in own} for axis in _left_out(form, sizes)]
    spans = [size + sum(b - a for a, b in ranges) for size, ranges in zip(sizes, distinct, strict=True)]
    products = math.prod(spans) * math.prod(_lags(form.kernel))
    of_patches = math.prod(_positions(form, sizes)) * math.prod(form.kernel) ** 2
    channels = x.shape[-form.inner]
    images = x.numel() // (channels * math.prod(sizes))
    saved = (of_patches - products) * images * channels**2 // form.count
    return 2 * products <= of_patches and saved >= _CALL * math.prod(1 + len(ranges) for ranges in distinct)


def _correlated(form: Convolution, x: Tensor, biased: bool) -> Tensor:
    """A(c u, c' v) = sum over pixels q of x_c(q) x_c'(q + v - u), q + the padding being where offset u can be.

    One correlation with lags v - u for all pixels, less those of the few rows and columns that an offset never meets;
    lags with v_1 >= u_1 alone, for A is symmetric.
    """
    images = form._images(x)
    (n, channels, *sizes), kernel, groups = images.shape, form.kernel, form.count
    own = channels // groups
    reach = [(k - 1) * d for k, d in zip(kernel, form.dilation, strict=True)]
    pads = [(0 if axis == 0 else r, r) for axis, r in enumerate(reach)]
    padded = F.pad(images, [side for pair in reversed(pads) for side in pair])
    known: dict[tuple[Range, ...], Tensor] = {}

    def correlation(ranges: tuple[Range, ...]) -> Tensor:
        """For pixels q in the ranges: (channels, own, *lags)."""
        if ranges not in known:
            here, there = images, padded
            for axis, ((a, b), (before, after)) in enumerate(zip(ranges, pads, strict=True), start=2):
                here, there = here.narrow(axis, a, b - a), there.narrow(axis, a, b - a + before + after)
            shape = (channels, own, *_lags(kernel))
            correlate = _CORRELATE[len(kernel)]
            known[ranges] = correlate(there, shape, here, dilation=form.dilation, groups=groups)
        return known[ranges]

    left_out = _left_out(form, sizes)
    half = images.new_zeros(groups, math.prod(kernel), own, own, *kernel)
    for number, u in enumerate(product(*map(range, kernel))):
        terms = [[(1, (0, size)), *((-1, r) for r in out[i])] for size, out, i in zip(sizes, left_out, u, strict=True)]
        R = sum(
            math.prod(sign for sign, _ in term) * correlation(tuple(r for _, r in term)) for term in product(*terms)
        )
        assert isinstance(R, Tensor)
        for axis, (k, i) in enumerate(zip(kernel, u, strict=True), start=2):
            R = R.narrow(axis, 0, k - i) if axis == 2 else R.narrow(axis, k - 1 - i, k)
        R[:, :, 0] /= 2  # its transpose comes from the other offset
        half[:, number, :, :, u[0] :] = R.unflatten(0, (groups, own))
    S = half.transpose(1, 2).reshape(groups, own * math.prod(kernel), -1)
    A = S + S.mT
    if biased:
        sums = form.inputs(images.sum(0, keepdim=True), False).sum(-2).reshape(groups, -1, 1)
        count = torch.full((groups, 1, 1), n * math.prod(_positions(form, sizes)), dtype=A.dtype)
        A = torch.cat([torch.cat([A, sums], -1), torch.cat([sums.mT, count], -1)], -2)
    return A if groups > 1 else A.squeeze(0)


def _lags(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of differences of two offsets, those of the first axis not negative."""
    first, *rest = kernel
    return (first, *(2 * k - 1 for k in rest))


def _positions(form: Convolution, sizes: Sequence[int]) -> list[int]:
    """The numbers of outputs of a convolution with stride 1."""
    axes = zip(sizes, form.kernel, form.padding, form.dilation, strict=True)
    return [size + sum(padding) - d * (k - 1) for size, k, padding, d in axes]


def _left_out(form: Convolution, sizes: Sequence[int]) -> list[list[list[Range]]]:
    """For every axis and offset the ranges of pixels that the offset meets at no output."""
    found = []
    axes = zip(sizes, _positions(form, sizes), form.kernel, form.padding, form.dilation, strict=True)
    for size, positions, k, (before, _), d in axes:
        starts = [u * d - before for u in range(k)]
        firsts = [min(size, max(0, start)) for start in starts]
        lasts = [max(a, min(size, start + positions)) for a, start in zip(firsts, starts, strict=True)]
        found.append([[r for r in ((0, a), (b, size)) if r[0] < r[1]] for a, b in zip(firsts, lasts, strict=True)])
    return found
