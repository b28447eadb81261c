"""Rules of convolutions."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from natgrad.layers.convolution import Convolution, TransposedConvolution
from natgrad.operations.registry import rule
from natgrad.operations.watch import Watch


@rule(F.conv1d, F.conv2d, F.conv3d)
def convolve(
    watch: Watch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """The convolution of patches; whatever padding stands before it is an operation of its own."""
    input = watch.data(input)
    if watch.operand(input) is not None:
        return watch.unread(func, input, weight, bias, stride, padding, dilation, groups)
    kernel = tuple(weight.shape[2:])
    wide, far = _each(stride, kernel), _each(dilation, kernel)
    form = Convolution(kernel, wide, _padding(padding, kernel, far), far, groups)

    def compute(w: Tensor, b: Tensor | None) -> Tensor:
        return func(input, w, b, stride, padding, dilation, groups)

    x, read = _images(input, form)
    return watch.product(form, weight, bias, x, compute, read, operation=func.__name__)


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def convolve_transposed(
    watch: Watch,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """The transposed convolution."""
    input = watch.data(input)
    if watch.operand(input) is not None:
        return watch.unread(func, input, weight, bias, stride, padding, output_padding, groups, dilation)
    kernel = tuple(weight.shape[2:])
    far, more = _each(dilation, kernel), _each(output_padding, kernel)
    form = TransposedConvolution(kernel, _each(stride, kernel), _padding(padding, kernel, far), far, groups, more)

    def compute(w: Tensor, b: Tensor | None) -> Tensor:
        return func(input, w, b, stride, padding, output_padding, groups, dilation)

    x, read = _images(input, form)
    return watch.product(form, weight, bias, x, compute, read, operation=func.__name__)


def _images(x: Tensor, form: Convolution) -> tuple[Tensor, Any]:
    """(n, C, *spatial), and what brings an output into such a form."""
    if x.ndim > form.inner:
        return x, None
    return x.unsqueeze(0), lambda y: y.unsqueeze(0)


def _each(value: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A number for every dimension, where one may stand for all."""
    numbers = tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else (int(value),)
    return numbers * len(kernel) if len(numbers) == 1 else numbers


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The zeros before and after, in every dimension."""
    if value == "valid":
        return ((0, 0),) * len(kernel)
    if value == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _each(value, kernel))
