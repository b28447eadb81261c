"""Weights of examples inside the user's own backward pass: a layer's ``.grad`` becomes a weighted sum of gradients.

The layer runs with its parameters held fixed, so that its own graph knows the gradient of its input alone. A function
on top of it hands the output gradient on unchanged, and gives the parameters the gradient of the weighted one: one
product for the weight, as always, no per-example gradient, and what earlier layers receive is not altered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from natgrad.capture import Examples, Weights
from natgrad.layers import Layer


class Weighting:
    """``weights`` on one layer, while ``active`` returns which examples are on their way, and not ``None``."""

    def __init__(self, layer: Layer, weights: Weights, active: Callable[[Tensor], Examples | None]) -> None:
        self._layer, self._weights, self._active = layer, weights, active
        self._held: list[nn.Parameter] = []
        self._x: Tensor | None = None
        self._handles = [
            layer.module.register_forward_pre_hook(self._hold, with_kwargs=True),
            layer.module.register_forward_hook(self._weigh, prepend=True, always_call=True),
        ]

    def close(self) -> None:
        """Take the hooks off the layer."""
        for handle in self._handles:
            handle.remove()

    def _hold(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._held = []
        weight = getattr(module, self._layer.adapter.names[0])  # no parameter inside torch.func.functional_call
        if torch.is_grad_enabled() and isinstance(weight, nn.Parameter) and weight.requires_grad:
            self._x = self._layer.read(args, kwargs)
            self._examples = self._active(self._x)
            if self._examples is not None:
                self._held = self._layer.parameters
        for parameter in self._held:
            parameter.requires_grad_(False)

    def _weigh(self, module: nn.Module, args: tuple[Any, ...], output: Tensor | None) -> Tensor | None:
        held, x, self._held, self._x = self._held, self._x, [], None
        for parameter in held:
            parameter.requires_grad_(True)
        if output is None or not held:  # output is None where the layer has raised
            return None
        return _Weighted.apply(output, x, self._layer, self._weights, self._examples, *held)


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, layer: Layer, weights: Weights, examples: Examples, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.weights, ctx.examples = layer, weights, examples
        return output.detach()  # an alias, which may be changed in place, as an input handed back may not

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        layer, module = ctx.layer, ctx.layer.module
        (x,), seen = ctx.saved_tensors, layer.adapter.batched(module, g)
        w = ctx.weights(ctx.examples, seen)
        gradients = layer.adapter.gradient(module, x.to(g.dtype), seen, w.to(g.dtype))
        return (g, None, None, None, None, *gradients)
