"""Weights of examples inside the user's own backward pass: a layer's ``.grad`` becomes a weighted sum of gradients.

The layer runs with its parameters held fixed, so that its own graph knows the gradient of its input alone. A function
on top of it hands the output gradient on unchanged, and gives the parameters the gradient of the weighted one: one
product for the weight, as always, no per-example gradient, and what earlier layers receive is not altered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from natgrad.fngd.coefficients import Examples
from natgrad.fngd.gradients import weighted_gradients
from natgrad.hooks import Hook, as_written, out_of_graph
from natgrad.layers import Layer

Weights = Callable[[Examples, Tensor], Tensor]
"""The weights (n,) of examples at one layer, which may depend on the gradients g (n, ...) at its output."""


class Weighting:
    """Weighs examples in passes of ``model`` in training mode, and knows which they are, while it watches layers.

    With ``needs_ids`` no pass begins before it was told the ``ids`` (n,) of its examples; ``told`` are those of the
    passes since :meth:`begin`, by the position of their first example.
    """

    def __init__(self, model: nn.Module, needs_ids: bool = False) -> None:
        self.ids: Tensor | None = None
        self.told: dict[int, Tensor] = {}
        self._model, self._needs_ids = model, needs_ids
        self._watched: list[_WeightedLayer] = []
        self._which, self._passing = Examples(), 0
        self._open: ExitStack | None = None  # during a pass
        self._outside = False  # whether a pass of this step was made outside of a backward pass
        self._begin_pass, self._end_pass = out_of_graph(self._begin), out_of_graph(self._end)
        self._handles = [
            model.register_forward_pre_hook(Hook(self._enter)),
            model.register_forward_hook(Hook(self._leave), always_call=True),
        ]

    def watch(self, layers: Iterable[Layer], weights: Mapping[str, Weights]) -> None:
        """Weigh the examples of layers by their ``weights``, where they have any, from the next forward pass on."""
        for layer in self._watched:
            layer.close()
        self._watched = [_WeightedLayer(layer, weights.get(layer.name), self._reached) for layer in layers]

    def begin(self, step: int) -> None:
        """Count the examples of this step of the epoch from the next forward pass on."""
        self._which, self.told, self._outside = Examples(step), {}, False

    def close(self) -> None:
        """Take all hooks off the model."""
        self.watch((), {})
        if self._open is not None:
            self._open.close()
        for handle in self._handles:
            handle.remove()

    def close_with(self, owner: object) -> None:
        """Close as soon as nobody holds ``owner`` any more."""
        finalize(owner, _close, ref(self)).atexit = False

    @property
    def _training(self) -> bool:
        return torch.is_grad_enabled() and self._model.training

    def _enter(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if self._watched and self._training:
            self._begin_pass()

    def _begin(self) -> None:
        if self._open is not None:  # a pass that was interrupted
            self._open.close()
        self._open = None
        inside = torch._C._current_graph_task_id() != -1
        if inside and self._outside:  # an activation checkpoint computes again what has been weighed
            return
        if self._needs_ids and self.ids is None:
            raise ValueError("coefficients of examples need their ids: call optimizer.examples(ids) before model(x)")
        self._outside = not inside
        self._which, self._passing = replace(self._which, ids=self.ids), 0
        self._open = as_written()

    def _reached(self, x: Tensor) -> Examples | None:
        """The examples that reach a layer with input x; ``None`` outside of training."""
        if not self._training:
            return None
        self._passing = self._passing or len(x)
        if self.ids is not None and len(self.ids) != len(x):
            raise ValueError(f"examples(ids) told {len(self.ids)} ids, but the batch has {len(x)} examples")
        return self._which

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open is not None:
            self._end_pass(output)

    def _end(self, output: Any) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
        if output is None or not self._passing:  # output is None where the model has raised
            return
        if self.ids is not None:
            self.told[self._which.start] = self.ids
        self._which, self._passing = replace(self._which, start=self._which.start + self._passing), 0
        self.ids = None


def _close(weighting: ref[Weighting]) -> None:
    alive = weighting()
    if alive is not None:
        alive.close()


class _WeightedLayer:
    """``weights`` on one layer, while ``reached`` returns which examples are on their way, and not ``None``."""

    def __init__(self, layer: Layer, weights: Weights | None, reached: Callable[[Tensor], Examples | None]) -> None:
        self._layer, self._weights, self._reached = layer, weights, reached
        self._held: list[nn.Parameter] = []
        self._x: Tensor | None = None
        self._handles = [
            layer.module.register_forward_pre_hook(Hook(self._hold), with_kwargs=True),
            layer.module.register_forward_hook(Hook(self._weigh), prepend=True, always_call=True),
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
            self._examples = self._reached(self._x)
            if self._examples is not None and self._weights is not None:
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
        layer = ctx.layer
        (x,), seen = ctx.saved_tensors, layer.adapter.batched(layer.module, g)
        w = ctx.weights(ctx.examples, seen)
        return (g, None, None, None, None, *weighted_gradients(layer, x.to(g.dtype), seen, w.to(g.dtype)))
