"""Rules of what is done entry by entry: scales, shifts, norms, and numbers that multiply or add to a parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.layers.product import Product
from natgrad.layers.view import View
from natgrad.operations.registry import rule, spelled
from natgrad.operations.watch import Watch


@rule(*spelled("mul", "multiply"))
def multiply(watch: Watch, func: Any, input: Any, other: Any, **kwargs: Any) -> Tensor:
    """w x, w being repeated along some dimensions of x."""
    input, other = apart(watch, input, other)
    y = func(input, other, **kwargs)
    _multiplied(watch, func, input, other, None, y)
    return y


@rule(*spelled("mul_", "multiply_"))
def multiply_in_place(watch: Watch, func: Any, input: Tensor, other: Any) -> Tensor:
    """The same, where x is overwritten."""
    before = input.detach().clone() if watch.operand(other) is not None else None
    y = func(input, other)
    _multiplied(watch, func, input, other, before, y)
    return y


@rule(*spelled("add", "add_", "sub", "sub_", "subtract", "__rsub__"))
def add(watch: Watch, func: Any, input: Any, other: Any, *, alpha: float = 1, **kwargs: Any) -> Tensor:
    """x + w, w being repeated along some dimensions of x."""
    input, other = apart(watch, input, other)
    operands = watch.operand(input), watch.operand(other)
    y = func(input, other, alpha=alpha, **kwargs) if alpha != 1 else func(input, other, **kwargs)
    name = func.__name__
    signs = (
        (1.0, -alpha) if name in ("sub", "sub_", "subtract") else (-1.0, 1.0) if name == "__rsub__" else (1.0, alpha)
    )
    for operand, x, rest, sign in zip(operands, (input, other), (other, input), signs, strict=True):
        if operand is None or y is x:
            continue
        if not isinstance(rest, Tensor) or (rest.ndim == 0 and not rest.requires_grad):
            watch.alias(y, replace(operand, factor=operand.factor * sign))
        elif operands[0] is not None and operands[1] is not None:
            watch.stray(x, "a sum of parameters", y)
        elif not watch.added(x, y, "add", sign, not watch.constant(rest)):
            watch.stray(x, name, y)
    return y


@rule(*spelled("expand", "expand_as", "broadcast_to"))
def expand(watch: Watch, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """w for every example, even if there is but one."""
    y = func(input, *args, **kwargs)
    if watch.operand(y) is not None and len(y.shape) > 1 and y.shape[0] == 1:
        watch.expanded(y)
    return y


@rule(torch.Tensor.repeat)
def repeat(watch: Watch, func: Any, input: Tensor, *sizes: Any, **kwargs: Any) -> Tensor:
    """w, repeated along dimensions of size 1."""
    y, operand = func(input, *sizes, **kwargs), watch.operand(input)
    lead = (1,) * (y.ndim - input.ndim) + tuple(input.shape)
    fits = operand is not None and all(n in (1, size) for n, size in zip(lead, y.shape, strict=True))
    if not (fits and watch.added(input, y, "repeat", data=True)):
        watch.stray(input, "repeat", y)
    return y


@rule(*spelled("cat", "concat", "concatenate"))
def cat(watch: Watch, func: Any, tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
    """w among the positions of an example: of every one if it is repeated, or of the only one."""
    if any(watch.operand(x) is None and x.requires_grad for x in tensors):
        tensors = [watch.data(x, only=x.ndim > 1 and len(x) == 1) for x in tensors]
    y = func(tensors, *args, **kwargs)
    watch.other(func, tensors, y)
    return y


@rule(*spelled("addcmul"))
def addcmul(watch: Watch, func: Any, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """b + value w x."""
    y = func(input, tensor1, tensor2, value=value)
    if watch.operand(input) is not None and not watch.added(input, y, "add"):
        watch.stray(input, "addcmul", y)
    for weight, x in ((tensor1, tensor2), (tensor2, tensor1)):
        operand = watch.operand(weight)
        if operand is not None and (
            watch.operand(x) is not None
            or not scaled(watch, replace(operand, factor=operand.factor * value), x, y, "mul")
        ):
            watch.stray(weight, "addcmul", y)
    return y


@rule(*spelled("neg", "negative"))
def negative(watch: Watch, func: Any, input: Tensor) -> Tensor:
    """-w stands for w."""
    y, operand = func(input), watch.operand(input)
    if operand is not None:
        watch.alias(y, replace(operand, factor=-operand.factor))
    return y


@rule(*spelled("div", "true_divide"))
def divide(watch: Watch, func: Any, input: Any, other: Any, **kwargs: Any) -> Tensor:
    """w over a number stands for w."""
    y, operand = func(input, other, **kwargs), watch.operand(input)
    if operand is not None and isinstance(other, (int, float)) and other and not kwargs:
        watch.alias(y, replace(operand, factor=operand.factor / other))
    else:
        watch.other(func, (input, other), y)
    return y


@rule(*spelled("prelu"))
def prelu(watch: Watch, func: Any, input: Tensor, weight: Tensor) -> Tensor:
    """max(x, 0) + w min(x, 0), w having one entry, or one for every channel, the second dimension."""
    input = watch.data(input)
    y, operand = func(input, weight), watch.operand(weight)
    watch.stray(input, "prelu", y)
    if operand is not None:
        spread = [1] * input.ndim
        if weight.numel() > 1:
            spread[1] = -1
        view = View(*_aligned(operand.view, tuple(weight.view(spread).shape)), operand.view.offset)
        scaled(watch, replace(operand, view=view), input.detach().clamp(max=0), y, "prelu")
    return y


def apart(watch: Watch, one: Any, other: Any) -> tuple[Any, Any]:
    """Two operands, of which one is data to the other if it is a parameter that is repeated."""
    if watch.operand(one) is not None and watch.operand(other) is not None:
        read = watch.data(one)
        return (read, other) if read is not one else (one, watch.data(other))
    return one, other


# Norms.


@rule(F.layer_norm)
def layer_norm(
    watch: Watch,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """gamma z + beta of the input z as normalised at every position."""
    shape, input = tuple(normalized_shape), watch.data(input)
    normalised = lambda: func(input.detach(), shape, None, None, eps)  # noqa: E731
    y = _last(watch, weight, bias, normalised, lambda w, b: func(input, shape, w, b, eps), len(shape), "layer_norm")
    watch.stray(input, "layer_norm", y)
    return y


@rule(F.rms_norm)
def rms_norm(
    watch: Watch,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """gamma z of the input z as normalised at every position."""
    shape, input = tuple(normalized_shape), watch.data(input)
    normalised = lambda: func(input.detach(), shape, None, eps)  # noqa: E731
    y = _last(watch, weight, None, normalised, lambda w, _: func(input, shape, w, eps), len(shape), "rms_norm")
    watch.stray(input, "rms_norm", y)
    return y


@rule(F.group_norm)
def group_norm(
    watch: Watch,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """gamma z + beta of the input z as normalised over groups of channels of each example."""
    input = watch.data(input)
    normalised = lambda: func(input.detach(), num_groups, None, None, eps)  # noqa: E731
    y = _channels(watch, weight, bias, normalised, lambda w, b: func(input, num_groups, w, b, eps), "group_norm")
    watch.stray(input, "group_norm", y)
    return y


@rule(F.batch_norm)
def batch_norm(
    watch: Watch,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """gamma z + beta; the statistics are those of the whole batch, and their dependence on an example is left out, as
    in every Fisher of a network with them."""
    input = watch.data(input)
    compute = lambda w, b: func(input, running_mean, running_var, w, b, training, momentum, eps)  # noqa: E731
    known = (None, None) if training else (running_mean, running_var)
    normalised = lambda: func(input.detach(), *known, None, None, training, 0.0, eps)  # noqa: E731
    y = _channels(watch, weight, bias, normalised, compute, "batch_norm")
    watch.stray(input, "batch_norm", y)
    return y


@rule(F.instance_norm)
def instance_norm(
    watch: Watch,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """gamma z + beta by the statistics of each example, or running ones."""
    input = watch.data(input)
    compute = lambda w, b: func(input, running_mean, running_var, w, b, use_input_stats, momentum, eps)  # noqa: E731
    known = (None, None) if use_input_stats else (running_mean, running_var)
    normalised = lambda: func(input.detach(), *known, None, None, use_input_stats, 0.0, eps)  # noqa: E731
    y = _channels(watch, weight, bias, normalised, compute, "instance_norm")
    watch.stray(input, "instance_norm", y)
    return y


def scaled(watch: Watch, weight: Any, x: Tensor, y: Tensor, operation: str) -> bool:
    """Read y as w x, w being repeated along at least one dimension; returns whether it is."""
    operand = watch.operand(weight)
    if operand is None:
        return False
    lead = y.ndim - len(operand.view.size)
    if lead < 0:
        return False
    sizes, strides = (1,) * lead + operand.view.size, (0,) * lead + operand.view.stride
    own = [d for d in range(y.ndim) if sizes[d] > 1 and strides[d]]
    rest = [d for d in range(y.ndim) if d not in own]
    if not rest or (sizes == tuple(y.shape) and not lead and watch.constant(x)):
        return False  # perhaps a constant
    view = View(tuple(sizes[d] for d in own), tuple(strides[d] for d in own), operand.view.offset)
    if not own:
        view = View((1,), (1,), operand.view.offset)

    def flat(z: Tensor) -> Tensor:
        return z.permute(*rest, *own).reshape(*(z.shape[d] for d in rest), -1, 1)

    form = Product(groups=tuple(range(max(1, len(own)))), outs=(), ins=())
    operand = replace(operand, view=view)
    watch.saw(form, operand, None, flat(x.detach().expand(y.shape)), y, flat, operation, version=x._version)
    return True


def _multiplied(watch: Watch, func: Any, input: Any, other: Any, before: Tensor | None, y: Tensor) -> None:
    for weight, x in ((input, other), (other, input)):
        operand = watch.operand(weight)
        if operand is None or weight is y:
            continue
        if isinstance(x, (int, float)):
            watch.alias(y, replace(operand, factor=operand.factor * float(x)))
        elif watch.operand(x) is not None:
            watch.stray(weight, "a product of parameters", y)
        elif not scaled(watch, weight, x if before is None else before, y, "mul"):
            watch.stray(weight, "mul", y)


Compute = Callable[[Any, Any], Tensor]


def _last(
    watch: Watch, weight: Any, bias: Any, normalised: Callable[[], Tensor], compute: Compute, dims: int, operation: str
) -> Tensor:
    """A norm whose features are the last ``dims`` dimensions."""

    def flat(z: Tensor) -> Tensor:
        return z.flatten(-dims).unsqueeze(-1) if z.ndim > dims else z.reshape(1, -1, 1)

    return _norm(watch, weight, bias, normalised, compute, flat, operation, dims)


def _channels(
    watch: Watch, weight: Any, bias: Any, normalised: Callable[[], Tensor], compute: Compute, operation: str
) -> Tensor:
    """A norm whose features are the second dimension."""

    def flat(z: Tensor) -> Tensor:
        return z.movedim(1, -1).unsqueeze(-1)

    return _norm(watch, weight, bias, normalised, compute, flat, operation, 1)


def _norm(
    watch: Watch,
    weight: Any,
    bias: Any,
    normalised: Callable[[], Tensor],
    compute: Compute,
    read: Callable[[Tensor], Tensor],
    operation: str,
    dims: int,
) -> Tensor:
    """Every feature is a group with the block [gamma | beta]."""
    if watch.operand(weight) is None and watch.operand(bias) is None:
        return compute(weight, bias)
    form = Product(groups=tuple(range(dims)), outs=(), ins=())
    return watch.product(form, weight, bias, read(normalised()), compute, read, operation=operation)


def _aligned(view: View, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a vector whose entries stand along the one dimension of ``shape`` that is not 1."""
    return shape, tuple((view.stride[0] if view.stride else 1) if n > 1 else 0 for n in shape)
