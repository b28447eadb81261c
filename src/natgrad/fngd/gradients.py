"""Gradients of an operation in which every example has a weight, without the gradient of any example."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.layers import Form
from natgrad.layers.convolution import Convolution, TransposedConvolution
from natgrad.layers.product import Product


def weighted_operand(form: Form, x: Tensor, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of sum_n w_n <s_n, g_n> in the operand, of this shape; x and g have their examples first."""
    if type(form) is Product and not form.groups:
        return _of_product(form, x, g, w, shape)
    if isinstance(form, Convolution):
        return _of_convolution(form, x, g, w, shape)
    return by_autograd(form, x, g, w, shape)


def weighted_bias(form: Form, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
    """The same in the bias, of this shape: w^T g, summed over positions."""
    total = (w @ g.flatten(1)).view(1, *g.shape[1:])
    features = form.features(total)
    return features.reshape(-1, features.shape[-1]).sum(0).view(shape)


def by_autograd(form: Form, x: Tensor, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
    """That in the operand for any form, at the price of a forward pass; its values are of no account."""
    with torch.enable_grad():
        operand = g.new_zeros(shape, requires_grad=True)
        y = form.product(operand, None, x.detach())
        return torch.autograd.grad(y, operand, g * _along(w, g))[0]


def _of_product(form: Product, x: Tensor, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
    """g^T diag(w) x."""
    y, h = _weighed(x, g, w)
    return form.operand(h.flatten(0, -2).mT @ y.flatten(0, -2), shape)


def _of_convolution(form: Convolution, x: Tensor, g: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
    """The backward pass of the convolution in its weight."""
    y, h = (z.flatten(0, -form.inner - 1) for z in _weighed(x, g, w))
    padding = [before for before, _ in form.padding]
    if any(before != after for before, after in form.padding):
        y, padding = F.pad(y, [side for pair in reversed(form.padding) for side in pair]), [0] * len(padding)
    transposed = isinstance(form, TransposedConvolution)
    more = form.more if isinstance(form, TransposedConvolution) else (0,) * len(padding)
    return torch.ops.aten.convolution_backward(
        h, y, g.new_empty(shape), None, form.stride, padding, form.dilation, transposed, more, form.count,
        [False, True, False],
    )[1]  # fmt: skip


def _weighed(x: Tensor, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x and g (n, ...), the smaller of which is multiplied by w (n,)."""
    return (x * _along(w, x), g) if x.numel() < g.numel() else (x, g * _along(w, g))


def _along(w: Tensor, x: Tensor) -> Tensor:
    """w (n,) as a factor of x (n, ...)."""
    return w.view(-1, *(1,) * (x.ndim - 1))
