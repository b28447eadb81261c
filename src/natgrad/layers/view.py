"""Where the operand of an operation lies in its parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import torch
from torch import Tensor

Span = tuple[tuple[int, ...], tuple[int, ...], int]
"""Sizes, strides and offset in the memory of a contiguous tensor."""


@dataclass(frozen=True)
class View:
    """A view of a parameter: sizes, strides and offset in a contiguous tensor of the parameter's shape.

    Equal views have equal entries in the same order. A dimension of stride 0 repeats.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @classmethod
    def whole(cls, parameter: Tensor) -> View:
        """All of it."""
        return _whole(tuple(parameter.shape))

    def __hash__(self) -> int:
        """That of its fields, once."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.size, self.stride, self.offset))

    def of(self, tensor: Tensor) -> Tensor:
        """This view of a tensor like the parameter: of its memory if it is contiguous or the view is all of it."""
        if self.size == tuple(tensor.shape) and self.stride == _dense(self.size):
            return tensor
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)

    def within(self, operand: Tensor, base: Tensor) -> View | None:
        """The view that ``operand`` is, a view of ``base``, which stands for this view; ``None`` if there is none."""
        start = int(operand.storage_offset()) - int(base.storage_offset())
        return _within(self, View(tuple(base.shape), base.stride()), tuple(operand.shape), operand.stride(), start)

    def rows(self, start: int, stop: int) -> View:
        """Some entries of the first dimension."""
        return _rows(self, start, stop)

    @property
    def entries(self) -> int:
        """The number of different entries."""
        return math.prod(n for n, step in zip(self.size, self.stride, strict=True) if step or n == 1)

    @cached_property
    def distinct(self) -> bool:
        """Whether every entry is another one of the parameter."""
        step = 1
        for stride, size in sorted((s, n) for n, s in zip(self.size, self.stride, strict=True) if n > 1):
            if stride < step:
                return False
            step = stride * size
        return True

    @property
    def reach(self) -> tuple[int, int]:
        """The first and the last entry in memory."""
        return self.offset, self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))


@lru_cache(4096)
def _within(whole: View, base: View, size: tuple[int, ...], stride: tuple[int, ...], rest: int) -> View | None:
    """The view of the parameter that is one of ``base``, at ``rest`` in its memory; base stands for ``whole``."""
    steps = [_step(whole, base, *pair) for pair in zip(size, stride, strict=True)]
    found = tuple(step for step in steps if step is not None)
    if len(found) < len(steps):
        return None
    offset = whole.offset
    for d in sorted(range(len(base.size)), key=lambda d: base.stride[d], reverse=True):
        if base.stride[d] and base.size[d] > 1:
            index, rest = divmod(rest, base.stride[d])
            offset += index * whole.stride[d]
    return None if rest else View(size, _normal(size, found), offset)


@lru_cache(4096)
def _rows(whole: View, start: int, stop: int) -> View:
    size = stop - start, *whole.size[1:]
    return View(size, _normal(size, whole.stride), whole.offset + start * whole.stride[0])


def _step(whole: View, base: View, size: int, step: int) -> int | None:
    """What a step in the memory of ``base``, taken ``size`` times, is in that of the parameter."""
    if size == 1 or step == 0 or _normal(base.size, base.stride) == whole.stride:
        return step
    for d in range(len(base.size)):
        times = step // base.stride[d] if base.stride[d] else 0
        if times and times * base.stride[d] == step and times * (size - 1) < base.size[d]:
            return times * whole.stride[d]
    return None


def _normal(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides with those of dimensions of size 1, which mean nothing, as a dense tensor has them."""
    return tuple(step if n > 1 else d for n, step, d in zip(size, stride, _dense(size), strict=True))


def span(matrix: Tensor) -> Span:
    """Where a view of a contiguous parameter lies."""
    stride = tuple(step if size > 1 else 0 for size, step in zip(matrix.shape, matrix.stride(), strict=True))
    return tuple(matrix.shape), stride, int(matrix.storage_offset())


def overlap(one: View, other: View) -> bool:
    """Whether two views of one parameter have an entry in common."""
    (first, last), (start, end) = one.reach, other.reach
    if last < start or end < first:
        return False
    marks = torch.zeros(max(last, end) + 1, dtype=torch.bool)
    marks.as_strided(one.size, one.stride, one.offset).fill_(True)
    return bool(marks.as_strided(other.size, other.stride, other.offset).any())


@cache
def _whole(size: tuple[int, ...]) -> View:
    return View(size, _dense(size))


@cache
def _dense(size: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for n in reversed(size):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
