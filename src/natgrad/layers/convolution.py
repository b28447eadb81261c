"""Convolutions, with stride, dilation, padding and groups, and transposed ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.layers.form import Form, form, split, with_ones

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@form
@dataclass(frozen=True)
class Convolution(Form):
    """A convolution as s_t = W a_t on the patches a_t; rows of a are (channel, kernel position), as in the weight.

    A grouped convolution has one block per group, in a leading dimension of every tensor. x is (n, C, *spatial).
    """

    thins: ClassVar[bool] = True

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    count: int = 1
    """The number of groups."""

    @property
    def inner(self) -> int:  # type: ignore[override]
        """(C, *spatial)."""
        return 1 + len(self.kernel)

    @property
    def outer(self) -> int:  # type: ignore[override]
        """(C_out, *spatial)."""
        return 1 + len(self.kernel)

    @property
    def layout(self) -> tuple[object, ...]:
        """The groups."""
        return (type(self).__name__, self.count)

    def matrix(self, operand: Tensor) -> Tensor:
        """(C_out, C k), or (groups, C_out/groups, C/groups k)."""
        flat = operand.flatten(1)
        return flat if self.count == 1 else flat.unflatten(0, (self.count, -1))

    def operand(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """(C_out, C/groups, *kernel)."""
        return matrix.reshape(shape)

    def inputs(self, x: Tensor, biased: bool) -> Tensor:
        """Patches (n, t, C k), or (groups, n, t, C/groups k); costs k times the memory of x."""
        return self.some(x, biased, 1, 0)

    def some(self, x: Tensor, biased: bool, stride: int, turn: int) -> Tensor:
        """Patches at a grid of positions."""
        windows = self._windows(self._images(x))
        a = _patches(windows[grid(windows.shape[2 : 2 + len(self.kernel)], stride, turn)], len(self.kernel))
        return with_ones(_together(split(a, self.count), len(x)), biased)

    def index(self, y: Tensor, stride: int, turn: int) -> Tensor:
        """That grid."""
        sizes = y.shape[y.ndim - len(self.kernel) :]
        numbers = torch.arange(self.places(y), device=y.device).view(-1, 1, *sizes)
        return numbers[grid(sizes, stride, turn)].flatten()

    def places(self, y: Tensor) -> int:
        """Of all images of an example."""
        return y.numel() // max(1, len(y) * y.shape[-len(self.kernel) - 1])

    def outputs(self, y: Tensor) -> Tensor:
        """(n, t, C_out), or (groups, n, t, C_out/groups)."""
        return _together(split(self._images(y).flatten(2).mT, self.count), len(y))

    def product(self, operand: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The convolution."""
        even = all(before == after for before, after in self.padding)
        x = x if even else F.pad(x, _sides(self.padding))
        padding = tuple(before for before, _ in self.padding) if even else 0
        convolve: Any = _CONVOLVE[len(self.kernel)]
        y = convolve(self._images(x), operand, bias, self.stride, padding, self.dilation, self.count)
        return y.unflatten(0, x.shape[: -self.inner])

    def features(self, y: Tensor) -> Tensor:
        """(n, *spatial, C_out)."""
        return y.movedim(-self.outer, -1)

    def _windows(self, images: Tensor) -> Tensor:
        """(n, C, *positions, *kernel), a view of the padded images (n, C, *spatial)."""
        return _unfolded(F.pad(images, _sides(self.padding)), self.kernel, self.stride, self.dilation)

    def _images(self, x: Tensor) -> Tensor:
        """(n, C, *spatial), of examples that may be several images each."""
        return x if x.ndim == self.inner + 1 else x.flatten(0, -self.inner - 1)


@form
@dataclass(frozen=True)
class TransposedConvolution(Convolution):
    """A transposed convolution as s_t = W a_t: a_t are patches of the input with stride - 1 zeros between its pixels.

    Columns of W are (input channel, kernel position), as in a convolution; torch has the channels of the weight in the
    other order.
    """

    more: tuple[int, ...] = ()
    """``output_padding``."""

    def matrix(self, operand: Tensor) -> Tensor:
        """(C_out, C k), or (groups, C_out/groups, C/groups k)."""
        matrix = operand.flatten(2).unflatten(0, (self.count, -1)).transpose(1, 2).flatten(2)
        return matrix.squeeze(0) if self.count == 1 else matrix

    def operand(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """(C, C_out/groups, *kernel)."""
        return matrix.unflatten(-1, (shape[0] // self.count, -1)).transpose(-3, -2).reshape(shape)

    def _windows(self, images: Tensor) -> Tensor:
        """Those of the images with zeros between their pixels, turned over."""
        spatial = [(L - 1) * stride + 1 for L, stride in zip(images.shape[2:], self.stride, strict=True)]
        spread = images.new_zeros(*images.shape[:2], *spatial)
        spread[tuple(slice(None, None, step) for step in (1, 1, *self.stride))] = images
        reach = zip(self.kernel, self.dilation, self.padding, self.more, strict=True)
        pads = [((k - 1) * d - before, (k - 1) * d - before + more) for k, d, (before, _), more in reach]
        ones = (1,) * len(self.kernel)
        windows = _unfolded(F.pad(spread, _sides(pads)), self.kernel, ones, self.dilation)
        return windows.flip(tuple(range(-len(self.kernel), 0)))

    def product(self, operand: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The transposed convolution."""
        padding = tuple(before for before, _ in self.padding)
        convolve: Any = _TRANSPOSED[len(self.kernel)]
        y = convolve(self._images(x), operand, bias, self.stride, padding, self.more, self.count, self.dilation)
        return y.unflatten(0, x.shape[: -self.inner])


def _together(a: Tensor, n: int) -> Tensor:
    """(*groups, n k, t, d) as (*groups, n, k t, d)."""
    return a if a.shape[-3] == n else a.reshape(*a.shape[:-3], n, -1, a.shape[-1])


def _sides(padding: list[tuple[int, int]] | tuple[tuple[int, int], ...]) -> list[int]:
    """As ``F.pad`` has them: the last dimension first."""
    return [side for pair in reversed(padding) for side in pair]


def grid(sizes: Sequence[int], stride: int, turn: int) -> tuple[slice, ...]:
    """Of images (n, C, *sizes, ...) about one position in ``stride``: every other, or fourth, ... along each dimension.

    ``turn`` counts the places where the grid may begin.
    """
    steps = [1] * len(sizes)
    if len(sizes) == 1:
        steps = [min(stride, sizes[0])]
    while True:
        room = [size // (2 * step) for size, step in zip(sizes, steps, strict=True)]
        if 2 * math.prod(steps) > stride or max(room) < 1:
            break
        steps[room.index(max(room))] *= 2
    starts = []
    for step in steps:
        starts.append(turn % step)
        turn //= step
    return (slice(None), slice(None), *(slice(a, None, b) for a, b in zip(starts, steps, strict=True)))


def _unfolded(x: Tensor, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]) -> Tensor:
    """(n, C, *positions, *kernel) of an input that is padded already."""
    for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), start=2):
        x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return x


def _patches(windows: Tensor, spatial: int) -> Tensor:
    """(n, t, C k) of windows (n, C, *positions, *kernel)."""
    a = windows.flatten(2 + spatial).flatten(2, 1 + spatial).movedim(1, 2)  # (n, t, C, k)
    return a.flatten(2)
