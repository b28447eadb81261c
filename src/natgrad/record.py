"""What one forward pass leaves behind: the calls of every layer, made into captures when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from natgrad.capture import Capture, Examples
from natgrad.layers import Layer
from natgrad.sparse import Sparse, SparseCapture, Together, joined, masked, summed

Sharing = Literal["expand", "reduce"]


@dataclass
class Call:
    """One call of one layer: what was read of it, where its output stands in the graph, and the gradients of the seeds.

    ``read`` brings a gradient into the form (n, ...) that x has. ``use`` is the layer, or of a weight that several
    modules share the use that this is. ``output`` refers to the output while it lives.
    """

    x: Tensor
    edge: GradientEdge | None
    read: Callable[[Tensor], Tensor]
    use: Layer
    output: Callable[[], Tensor | None]
    gradients: list[Tensor | None] = field(default_factory=list)

    @property
    def positions(self) -> int:
        """The number of positions of all examples."""
        return self.x.numel() if self.use.adapter.tokens else self.x.shape[:-1].numel()

    def of(self, n: int) -> Call:
        """The same call as one of n examples, where positions had become examples: (n t, d) as (n, t, d)."""
        if len(self.x) == n or self.x.ndim > 2 or len(self.x) % n:
            return self
        return replace(self, x=self.x.unflatten(0, (n, -1)), read=lambda y: self.read(y).unflatten(0, (n, -1)))


@dataclass
class Record:
    """One forward pass: the calls of every layer, and its loss terms.

    ``terms``: weights (n, terms) of the loss terms, or the number of terms of one example. ``live``: whether the user's
    backward pass has reached this forward pass. ``scale``: what the recorded gradients must be multiplied by.
    ``which``: the examples. ``size``: how many the output has, if that is known.
    """

    calls: dict[str, list[Call]] = field(default_factory=dict)
    terms: Tensor | float = 1.0
    live: bool = False
    scale: float = 1.0
    which: Examples = Examples()
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    targets: Any = None
    size: int | None = None

    def captures(self, layer: Layer, sharing: Sharing = "expand", fraction: float = 1.0) -> Iterator[Capture]:
        """What ``layer`` saw of the first ``fraction`` of the examples: one :class:`Capture` per seed.

        The seeds share the count, as gradients share their sum of squares, so that passes with different numbers of
        seeds pool as their examples do.
        """
        calls = self._reached(layer)
        if not calls:
            return
        n = max(1, round(fraction * len(calls[0].x)))
        roles = [[call for call in calls if call.use.adapter.swapped == swapped] for swapped in (False, True)]
        roles = [role for role in roles if role]
        inputs = [_inputs(role, n) for role in roles]
        kept = [self._kept(role, a, n) for role, a in zip(roles, inputs, strict=True)]
        for seed in range(len(calls[0].gradients)):
            parts = [self._capture(layer, *part, seed, n, sharing) for part in zip(roles, inputs, kept, strict=True)]
            yield parts[0] if len(parts) == 1 else Together(parts)

    def directional(self, layer: Layer, tensors: list[Tensor]) -> Tensor | None:
        """u (seeds, n): sum_t g_nt^T V a_nt along weights V = ``tensors``; products run in the dtype of V."""
        total = None
        for call in self._reached(layer):
            use = call.use
            y = use.adapter.forward(use.module, tensors, use.adapter.cast(call.x, tensors[0].dtype)).flatten(1)
            gradients = [_gradient(call, seed).flatten(1).to(y.dtype) for seed in range(len(call.gradients))]
            u = torch.stack([(y * g).sum(-1, dtype=torch.promote_types(y.dtype, torch.float32)) for g in gradients])
            total = u if total is None else total + u
        return total if total is None else total * self.scale

    def examples(self) -> int:
        """The number of examples, of the output or by the first layer that recorded any."""
        if self.size is not None:
            return self.size
        return next((call.x.shape[0] for calls in self.calls.values() for call in calls), 0)

    def count(self, n: int | None = None) -> float | Tensor:
        """The number of loss terms, of the first n examples."""
        return self.terms[:n].sum() if isinstance(self.terms, Tensor) else self.terms * (n or self.examples())

    def _counted(self, n: int, of: int) -> float | Tensor:
        """The number of loss terms behind n examples of a layer that saw ``of`` of them."""
        return self.count(n) if of == self.examples() else self.count() * (n / of)

    def _reached(self, layer: Layer) -> list[Call]:
        calls = [call for call in self.calls.get(layer.name, ()) if any(g is not None for g in call.gradients)]
        if len({call.positions for call in calls}) == 1:
            calls = [call.of(min(len(call.x) for call in calls)) for call in calls]
        if len({len(call.x) for call in calls}) > 1:
            raise ValueError(
                f"layer {layer.name!r} was called with batches of different sizes in one forward pass; its examples "
                "cannot be matched: call it once on all of them, make one forward pass for each batch, or exclude it"
            )
        return calls

    def _capture(
        self,
        layer: Layer,
        calls: list[Call],
        a: Tensor | Sparse,
        kept: Tensor | None,
        seed: int,
        n: int,
        sharing: Sharing,
    ) -> Capture:
        """What these calls, all in one role, saw at the positions (n, t) that are kept, or at all."""
        g = _outputs(calls, seed, n)
        dtype = torch.promote_types(a.dtype, torch.float32)
        a, g = a.to(dtype), g.to(dtype) if self.scale == 1.0 else g.to(dtype) * self.scale
        t, swapped, of = g.shape[-2], calls[0].use.adapter.swapped, len(calls[0].x)
        rows: float | Tensor = float(n * t)
        used: float | Tensor = float(t)  # positions of each example
        examples: float | Tensor = float(n)
        if kept is not None:
            kept = kept.to(g.dtype)
            a, g = masked(a, g, kept)
            rows, examples, used = kept.sum(), kept.amax(1).sum(), kept.sum(1).clamp(min=1).view(n, 1, 1)
        if sharing == "reduce" and t > 1:
            a, g, rows = summed(a), g.sum(-2, keepdim=True) / used, examples
        count = self._counted(n, of) / len(calls[0].gradients)
        diagonal = layer.diagonal[::-1] if swapped else layer.diagonal
        if isinstance(a, Sparse):
            return SparseCapture(a, g, count, rows, self.which, diagonal)
        seen = Capture(a, g, count, rows, self.which, diagonal)
        return seen.swapped() if swapped else seen

    def _kept(self, calls: list[Call], a: Tensor | Sparse, n: int) -> Tensor | None:
        """The positions (n, t) that count; ``None`` for all: those with an input that act on a loss term."""
        kept = a.used if isinstance(a, Sparse) else None
        if isinstance(self.terms, Tensor):
            seeds = ((_outputs(calls, seed, n) != 0).any(-1) for seed in range(len(calls[0].gradients)))
            acts = reduce(torch.logical_or, seeds)
            acts = acts.reshape(-1, *acts.shape[-2:]).any(0)
            if len(calls[0].x) == self.examples():
                acts = _counting(acts, self.terms[:n] > 0)
            kept = acts if kept is None else acts & kept
        return kept


def _inputs(calls: list[Call], n: int) -> Tensor | Sparse:
    """The inputs of the first n examples of all these calls, as positions of one layer."""
    chosen = ((call.use.adapter, call.use.module, call.x[:n]) for call in calls)
    return joined([adapter.sparse(module, x) or adapter.inputs(module, x) for adapter, module, x in chosen])


def _outputs(calls: list[Call], seed: int, n: int) -> Tensor:
    """The output gradients of the first n examples of all these calls."""
    return torch.cat([call.use.adapter.outputs(call.use.module, _gradient(call, seed)[:n]) for call in calls], -2)


def _counting(acts: Tensor, term: Tensor) -> Tensor:
    """The positions (n, t) that count: those that act on a loss term, and those that have no gradient by chance.

    The latter come before one that acts (beyond the last there is padding), and are loss terms themselves where the
    layer has as many positions as there are terms. If no term is ignored, all positions count.
    """
    before = acts.flip(1).cumsum(1).flip(1) > 0
    theirs = term if term.shape == acts.shape else term.any(1, keepdim=True)
    return acts | (theirs & (before | ~acts.any(1, keepdim=True))) | term.all()


def _gradient(call: Call, seed: int) -> Tensor:
    gradient = call.gradients[seed]
    if gradient is None:  # this seed does not reach the layer, another one does
        gradient = torch.zeros_like(next(g for g in call.gradients if g is not None))
    return call.read(gradient)
