"""The adapter interface: how to read a layer's inputs, output gradients and weight as (in), (out) and (out, in)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Adapter(ABC):
    """How one kind of layer computes s = W a. Adapters hold no state; every method gets the module.

    The *block* of a layer is its weight as (*groups, out, in), with the bias as the last column if it is trained.
    """

    slot = ""
    """What the names of a block's state begin with, where several blocks are parts of one parameter."""

    def parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those entries of tensors like ``parameters(module)`` that are in the block, as views."""
        return tensors

    def trained(self, module: nn.Module) -> bool:
        """Whether the block's weight is a plain parameter, and trained."""
        return is_trained(module, "weight")

    def has_bias(self, module: nn.Module) -> bool:
        """Whether the block has a bias column."""
        bias = getattr(module, "bias", None)
        return isinstance(bias, nn.Parameter) and bias.requires_grad

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters of the block: the weight, and the bias if it is trained."""
        weight, bias = module.weight, module.bias
        return [weight, bias] if self.has_bias(module) else [weight]  # type: ignore[list-item]

    @abstractmethod
    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """An input or output x with its example dimension first, which is added where the layer was called without."""

    @abstractmethod
    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """The layer's input x as a (*groups, n, t, in), the 1 of the bias included."""

    @abstractmethod
    def outputs(self, module: nn.Module, y: Tensor) -> Tensor:
        """A tensor y like the layer's output as (*groups, n, t, out)."""

    @abstractmethod
    def pack(self, module: nn.Module, tensors: list[Tensor]) -> Tensor:
        """Tensors like ``parameters(module)`` as one block (*groups, out, in)."""

    @abstractmethod
    def unpack(self, module: nn.Module, block: Tensor) -> list[Tensor]:
        """A block as tensors like ``parts(parameters(module))``: the inverse of :meth:`pack`."""

    @abstractmethod
    def forward(self, module: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        """The layer's output at input x with other weights (and no bias where ``tensors`` has none)."""

    def gradient(self, module: nn.Module, x: Tensor, g: Tensor, w: Tensor) -> list[Tensor]:
        """Gradients of sum_n w_n <forward(x)_n, g_n> in ``parameters(module)``; x and g have their examples first.

        By default through autograd, at the price of a forward pass.
        """
        with torch.enable_grad():
            tensors = [p.detach().requires_grad_() for p in self.parameters(module)]
            y = self.forward(module, tensors, x.detach())
            return list(torch.autograd.grad(y, tensors, g * w.view(-1, *(1,) * (g.ndim - 1))))


def is_trained(module: nn.Module, name: str | None) -> bool:
    """Whether a module has a plain parameter of this name, and trains it."""
    parameter = module._parameters.get(name) if name else None
    return parameter is not None and parameter.requires_grad


def weigh(x: Tensor, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """x and g (n, ...), the smaller of which is multiplied by w (n,)."""
    wx, wg = (w.view(-1, *(1,) * (y.ndim - 1)) for y in (x, g))
    return (x * wx, g) if x.numel() < g.numel() else (x, g * wg)


def with_ones(a: Tensor, bias: bool) -> Tensor:
    """``a`` with a last column of ones, if there is a bias."""
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1) if bias else a
