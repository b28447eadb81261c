"""Gradients of a layer in which every example has a weight, without the gradient of any example."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from natgrad.layers import Layer
from natgrad.layers.conv import ConvAdapter
from natgrad.layers.linear import LinearAdapter


def weighted_gradients(layer: Layer, x: Tensor, g: Tensor, w: Tensor) -> list[Tensor]:
    """Gradients of sum_n w_n <forward(x)_n, g_n> in the parameters of the layer; x and g have their examples first."""
    if isinstance(layer.adapter, LinearAdapter):
        return _of_linear(layer, x, g, w)
    if isinstance(layer.adapter, ConvAdapter):
        return _of_convolution(layer, x, g, w)
    return by_autograd(layer, x, g, w)


def by_autograd(layer: Layer, x: Tensor, g: Tensor, w: Tensor) -> list[Tensor]:
    """The same for any layer, at the price of a forward pass."""
    with torch.enable_grad():
        tensors = [p.detach().requires_grad_() for p in layer.parameters]
        y = layer.adapter.forward(layer.module, tensors, x.detach())
        return list(torch.autograd.grad(y, tensors, g * _along(w, g)))


def _of_linear(layer: Layer, x: Tensor, g: Tensor, w: Tensor) -> list[Tensor]:
    """g^T diag(w) x, and g^T w."""
    y, h = _weighed(x, g, w)
    weight = layer.adapter.from_matrix(layer.module, h.flatten(0, -2).mT @ y.flatten(0, -2))
    return [weight, *((w @ g.flatten(1)).view(-1, g.shape[-1]).sum(0) for _ in layer.parameters[1:])]


def _of_convolution(layer: Layer, x: Tensor, g: Tensor, w: Tensor) -> list[Tensor]:
    """The backward pass of the convolution in its weight, and the weighted sum of g."""
    module = layer.module
    assert isinstance(module, _ConvNd)
    padding = module.padding
    if isinstance(padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode), (0,) * len(module.kernel_size)
    y, h = _weighed(x, g, w)
    weight = torch.ops.aten.convolution_backward(
        h, y, module.weight.to(g.dtype), None, module.stride, padding, module.dilation, module.transposed,
        module.output_padding, module.groups, [False, True, False],
    )[1]  # fmt: skip
    return [weight, *((w @ g.flatten(1)).view(module.out_channels, -1).sum(1) for _ in layer.parameters[1:])]


def _weighed(x: Tensor, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x and g (n, ...), the smaller of which is multiplied by w (n,)."""
    return (x * _along(w, x), g) if x.numel() < g.numel() else (x, g * _along(w, g))


def _along(w: Tensor, x: Tensor) -> Tensor:
    """w (n,) as a factor of x (n, ...)."""
    return w.view(-1, *(1,) * (x.ndim - 1))
