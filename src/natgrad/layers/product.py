"""Products of data with a weight: dense layers, einsum, and, with all dimensions as groups, scales and norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.layers.form import Form, form, with_ones


@form
@dataclass(frozen=True)
class Product(Form):
    """s_go = sum_i W_goi x_gi, where every dimension of the operand counts groups, outputs or inputs.

    ``groups``, ``outs`` and ``ins`` are those dimensions, which become one each. x is (..., in) or (..., groups, in), y
    is (..., out) or (..., groups, out).
    """

    thins: ClassVar[bool] = True

    groups: tuple[int, ...] = ()
    outs: tuple[int, ...] = (0,)
    ins: tuple[int, ...] = (1,)

    @property
    def inner(self) -> int:  # type: ignore[override]
        """(in,) or (groups, in)."""
        return 2 if self.groups else 1

    @property
    def outer(self) -> int:  # type: ignore[override]
        """(out,) or (groups, out)."""
        return self.inner

    @property
    def layout(self) -> tuple[object, ...]:
        """The dimensions."""
        return (self.groups, self.outs, self.ins)

    def matrix(self, operand: Tensor) -> Tensor:
        """(*groups, out, in)."""
        if self == LINEAR:
            return operand
        kinds = (self.groups, self.outs, self.ins) if self.groups else (self.outs, self.ins)
        sizes = [math.prod(operand.shape[d] for d in kind) for kind in kinds]
        return operand.permute(*self.groups, *self.outs, *self.ins).reshape(sizes)

    def operand(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The dimensions back in their places."""
        if self == LINEAR:
            return matrix
        order = (*self.groups, *self.outs, *self.ins)
        return matrix.reshape([shape[d] for d in order]).permute([order.index(d) for d in range(len(order))])

    def inputs(self, x: Tensor, biased: bool) -> Tensor:
        """(n, t, in) or (groups, n, t, in)."""
        return with_ones(self.outputs(x), biased)

    def outputs(self, y: Tensor) -> Tensor:
        """(n, t, out) or (groups, n, t, out)."""
        if not self.groups:
            return y.reshape(y.shape[0], -1, y.shape[-1])
        return y.reshape(y.shape[0], -1, *y.shape[-2:]).movedim(-2, 0)

    def product(self, operand: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """W x + b."""
        W = self.matrix(operand)
        if not self.groups:
            return F.linear(x, W, bias)
        y = x * W.squeeze(-1) if W.shape[-1] == 1 == W.shape[-2] else None
        if y is None:
            y = (W @ x.unsqueeze(-1)).squeeze(-1)
        return y if bias is None else y + bias.view(W.shape[:-1])

    def features(self, y: Tensor) -> Tensor:
        """(..., groups out)."""
        return y.flatten(-2) if self.groups else y


@form
@dataclass(frozen=True)
class JetProduct(Product):
    """A dense layer on jets (..., t, in): the bias is added at the first position, the value, alone."""

    inner: ClassVar[int] = 2
    outer: ClassVar[int] = 2
    thins: ClassVar[bool] = False  # values and derivatives belong together

    def matrix(self, operand: Tensor) -> Tensor:
        """(out, in)."""
        return operand

    def operand(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """(out, in)."""
        return matrix

    def features(self, y: Tensor) -> Tensor:
        """The value alone."""
        return y[..., 0, :]

    def inputs(self, x: Tensor, biased: bool) -> Tensor:
        """(n, t, in), and a last entry of 1 at the first position and of 0 elsewhere."""
        a = x.reshape(x.shape[0], -1, x.shape[-1])
        if not biased:
            return a
        first = torch.zeros_like(x[..., :1])
        first[..., 0, :] = 1.0
        return torch.cat([a, first.reshape(x.shape[0], -1, 1)], -1)

    def product(self, operand: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """W x, plus b at the first position."""
        y = F.linear(x, operand)
        if bias is None:
            return y
        return torch.cat([y[..., :1, :] + bias, y[..., 1:, :]], -2)


LINEAR = Product()
ADDED = Product(outs=(0,), ins=())
"""A vector that is added: the input is 1."""
