"""Rules of products: linear, matmul and its kin, einsum, bilinear, by the labels of their dimensions."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.layers.product import LINEAR, Product
from natgrad.layers.view import View
from natgrad.operations.call import Operand
from natgrad.operations.elementwise import apart
from natgrad.operations.registry import rule, spelled
from natgrad.operations.watch import Watch

WIDEST = 4096
"""Inputs of a bilinear map above which it is not read."""


@rule(F.linear)
def linear(watch: Watch, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b."""
    input = watch.data(input)
    if weight.ndim != 2 or watch.operand(input) is not None:
        return watch.unread(func, input, weight, bias)
    return watch.product(LINEAR, weight, bias, input, lambda w, b: func(input, w, b))


@rule(*spelled("matmul", "mm", "bmm", "mv", "__rmatmul__"))
def matmul(watch: Watch, func: Any, input: Tensor, other: Tensor) -> Tensor:
    """x @ W or W @ x: the last two dimensions are multiplied and those before broadcast."""
    input, other = apart(watch, input, other)
    y = func(input, other)
    turned = getattr(func, "__name__", "") == "__rmatmul__"
    _factors(watch, y, *((other, input) if turned else (input, other)))
    return y


@rule(*spelled("addmm", "baddbmm"))
def addmm(
    watch: Watch, func: Any, input: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """beta b + alpha x W; b is a bias if it is a vector and both numbers are 1."""
    y = func(input, left, right, beta=beta, alpha=alpha)
    joins = beta == alpha == 1 and input.ndim == 1 and watch.operand(right) is not None
    if not joins and watch.operand(input) is not None and not watch.added(input, y, "add", float(beta)):
        watch.stray(input, "addmm", y)
    _factors(watch, y, left, right, input if joins else None, float(alpha))
    return y


@rule(*spelled("einsum"))
def einsum(watch: Watch, func: Any, equation: Any, *operands: Any) -> Tensor:
    """A contraction of one parameter with data."""
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    y = func(equation, *operands)
    places = [k for k, x in enumerate(tensors) if watch.operand(x) is not None]
    labels = _labels(equation, tensors) if isinstance(equation, str) and len(tensors) == 2 else None
    if len(places) != 1 or labels is None:
        for x in tensors:
            watch.stray(x, f"einsum of {len(tensors)} operands" if len(tensors) > 2 else "einsum", y)
        return y
    weight, x = tensors[places[0]], tensors[1 - places[0]]
    known = watch.operand(weight)
    assert known is not None
    contract(watch, known, x, (labels[places[0]], labels[1 - places[0]], labels[2]), y, "einsum")
    return y


@rule(*spelled("bilinear"))
def bilinear(
    watch: Watch, func: Any, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x1^T W x2 + b: the input is the outer product of the two, up to a width of :data:`WIDEST`."""
    input1, input2 = watch.data(input1), watch.data(input2)
    width = input1.shape[-1] * input2.shape[-1]
    if watch.operand(weight) is None or width > WIDEST:
        name = f"bilinear of {input1.shape[-1]} x {input2.shape[-1]} = {width} inputs, more than {WIDEST}"
        return watch.unread(func, input1, input2, weight, bias, name=name if width > WIDEST else "bilinear")
    x = (input1.detach().unsqueeze(-1) * input2.detach().unsqueeze(-2)).flatten(-2)
    form = Product((), (0,), (1, 2))
    return watch.product(form, weight, bias, x, lambda w, b: func(input1, input2, w, b), operation="bilinear")


def contract(
    watch: Watch, weight: Operand, x: Tensor, labels: tuple[str, str, str], y: Tensor, operation: str, bias: Any = None
) -> None:
    """Read y as the contraction of a weight with x; ``labels`` are those of the dimensions of weight, x and y.

    Labels of all three are groups, of weight and y outputs, of weight and x inputs, of x and y positions.
    """
    of_w, of_x, of_y = labels
    weight, of_w, x, of_x = _broadcast(weight, of_w, x, of_x, y, of_y)
    plain = all(len(set(part)) == len(part) for part in (of_w, of_x, of_y)) and set(of_w) <= set(of_x) | set(of_y)
    plain = plain and _agree((of_w, weight.view.size), (of_x, x.shape), (of_y, y.shape))
    spots = [label for label in of_x if label in of_y and label not in of_w]
    if not plain or not spots or watch.operand(x) is not None:
        watch.stray(weight, operation, y)
        watch.stray(x, operation, y)
        return
    groups = [label for label in of_w if label in of_x and label in of_y]
    outs = [label for label in of_w if label not in of_x]
    ins = [label for label in of_w if label not in of_y]
    alone = [d for d, label in enumerate(of_x) if label not in of_w and label not in of_y]
    inputs = x.detach().sum(alone) if alone else x.detach()
    of_x = "".join(label for d, label in enumerate(of_x) if d not in alone)
    form = Product(*(tuple(of_w.index(label) for label in kind) for kind in (groups, outs, ins)))

    def flat(z: Tensor, of: str, last: list[str]) -> Tensor:
        z = z.permute([of.index(label) for label in (*spots, *groups, *last)])
        lead = z.shape[: len(spots)]
        middle = [math.prod(z.shape[len(spots) : len(spots) + len(groups)])] if groups else []
        return z.reshape(*lead, *middle, math.prod(z.shape[len(spots) + len(groups) :]))

    version = x._version
    watch.saw(form, weight, bias, flat(inputs, of_x, ins), y, lambda g: flat(g, of_y, outs), operation, version=version)


def _broadcast(
    weight: Operand, of_w: str, x: Tensor, of_x: str, y: Tensor, of_y: str
) -> tuple[Operand, str, Tensor, str]:
    """Both factors without the dimensions along which they repeat: of size 1 where others have more, or of stride 0."""
    sizes = dict(zip(of_x, x.shape, strict=True)) | dict(zip(of_y, y.shape, strict=True))
    view = weight.view
    kept = [
        d for d in range(len(of_w)) if not (sizes.get(of_w[d], 1) > 1 and (view.size[d] == 1 or not view.stride[d]))
    ]
    if len(kept) < len(of_w):
        view = View(tuple(view.size[d] for d in kept), tuple(view.stride[d] for d in kept), view.offset)
        weight, of_w = replace(weight, view=view), "".join(of_w[d] for d in kept)
    others = dict(zip(of_w, view.size, strict=True)) | dict(zip(of_y, y.shape, strict=True))
    for d in reversed(range(len(of_x))):
        if x.shape[d] == 1 and others.get(of_x[d], 1) > 1:
            x, of_x = x.squeeze(d), of_x[:d] + of_x[d + 1 :]
    return weight, of_w, x, of_x


def _agree(*parts: tuple[str, Sequence[int]]) -> bool:
    """Whether every label has one size."""
    known: dict[str, int] = {}
    return all(
        known.setdefault(label, n) == n for labels, sizes in parts for label, n in zip(labels, sizes, strict=True)
    )


def _factors(watch: Watch, y: Tensor, left: Tensor, right: Tensor, bias: Any = None, factor: float = 1.0) -> None:
    """Read y = factor left @ right, broadcast as ``torch.matmul`` does, if one of both is a parameter."""
    first, second = watch.operand(left), watch.operand(right)
    known = first or second
    if known is None:
        return
    if first is not None and second is not None:
        watch.stray(left, "a product of parameters", y)
        watch.stray(right, "a product of parameters", y)
        return
    x = right if first is not None else left
    names = string.ascii_uppercase[: max(left.ndim, right.ndim, 2) - 2]
    of_left, of_right = (
        names[len(names) - (z.ndim - 2) :] + core if z.ndim > 1 else "z" for z, core in ((left, "rz"), (right, "zc"))
    )
    of_y = names + ("r" if left.ndim > 1 else "") + ("c" if right.ndim > 1 else "")
    of_w, of_x = (of_left, of_right) if first is not None else (of_right, of_left)
    view = known.view
    kept = [d for d in range(len(of_w)) if of_w[d].islower() or (view.stride[d] and view.size[d] > 1)]
    view = View(tuple(view.size[d] for d in kept), tuple(view.stride[d] for d in kept), view.offset)
    of_w = "".join(of_w[d] for d in kept)
    operand = replace(known, view=view, factor=known.factor * factor)
    contract(watch, operand, x, (of_w, of_x, of_y), y, "matmul", bias)


def _labels(equation: str, tensors: Any) -> tuple[str, str, str] | None:
    """The labels of two operands and the result, an ellipsis written out in capitals that are free."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    parts = given.split(",")
    if len(parts) != 2:
        return None
    free = [letter for letter in string.ascii_uppercase if letter not in equation]
    counts = [x.ndim - len(part.replace("...", "")) for part, x in zip(parts, tensors, strict=True)]
    dots = "".join(free[: max([*(n for n, part in zip(counts, parts, strict=True) if "..." in part), 0])])
    written = [part.replace("...", dots[len(dots) - n :] if n else "") for part, n in zip(parts, counts, strict=True)]
    if not arrow:
        letters = sorted(set(given.replace("...", "").replace(",", "")))
        result = "..." * ("..." in given) + "".join(c for c in letters if given.count(c) == 1)
    return written[0], written[1], result.replace("...", dots)


@rule(*[f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f is not None])
def grouped(watch: Watch, func: Any, input: Tensor, other: Tensor, offs: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Rows of x, group after group up to ``offs``, each times a matrix of its own: those of experts."""
    y, known = func(input, other, offs=offs, **kwargs), watch.operand(other)
    if known is None or offs is None or len(known.view.size) != 3 or watch.operand(input) is not None:
        watch.other(func, (input, other), y)
        return y
    start, form = 0, Product(outs=(1,), ins=(0,))
    for number, end in enumerate(offs.tolist()):
        view = View(known.view.size[1:], known.view.stride[1:], known.view.offset + number * known.view.stride[0])
        rows, start = slice(start, end), end
        if rows.stop > rows.start:
            operand = replace(known, view=view)
            watch.saw(form, operand, None, input[rows], y, partial(_rows, rows), "grouped_mm")
    return y


def _rows(rows: slice, g: Tensor) -> Tensor:
    return g[rows]
