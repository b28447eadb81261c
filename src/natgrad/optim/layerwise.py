"""A per-layer approximation on a whole network: one :class:`LayerCurvature` per layer, updated on its cadence.

This is the only kind of curvature that the optimizer sees: a method that couples layers offers the same verbs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.engine import Record, Sharing
from natgrad.fishers import Approximation
from natgrad.layers import Layer
from natgrad.optim.cadence import Cadence
from natgrad.optim.curvature import LayerCurvature
from natgrad.optim.precision import fast_dtype

State = dict[str, LayerCurvature]


@dataclass(frozen=True)
class Layerwise:
    """``approximation`` on every one of ``layers``. Its verbs are pure: state in, state out."""

    approximation: Approximation
    layers: Mapping[str, Layer]
    cadence: Cadence
    decay: float
    sharing: Sharing
    precision: torch.dtype | str

    def empty(self) -> State:
        """Placeholders for all layers."""
        return {name: LayerCurvature.empty(self.approximation, layer) for name, layer in self.layers.items()}

    def advance(self, state: State, records: Sequence[Record], step: int, damping: float) -> State:
        """The state after the observation and the refresh that are due at this step."""
        observes = bool(records) and self.cadence.observes(step)
        advanced = {}
        for number, name in enumerate(self.layers):
            seen = self._seen(name, records) if observes else []
            refreshes = self.cadence.refreshes(step, number, len(self.layers))
            advanced[name] = self._advance(name, state[name], seen, refreshes, damping)
        return advanced

    def size(self, before: State, after: State) -> Tensor | None:
        """The largest entry of what was observed: a number that is finite if all the statistics are."""
        changed = [c for name, c in after.items() if name not in before or c.observations > before[name].observations]
        tensors = [mean.total for c in changed for mean in c.stats.values()]
        if self.approximation.corrects:
            tensors += [tensor for c in changed if c.matrix is not None for tensor in c.matrix.tensors().values()]
        return largest(tensors)

    def precondition(self, state: State, M: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """D = inverse @ M, layer by layer."""
        return {name: state[name].precondition(gradient) for name, gradient in M.items()}

    def fast(self, name: str) -> torch.dtype | None:
        """The lower precision that suits a layer, if any."""
        return fast_dtype(self.precision, self.layers[name].parameters[0])

    def _seen(self, name: str, records: Sequence[Record]) -> list[Capture]:
        layer, fraction = self.layers[name], self.cadence.fraction
        return [capture for record in records for capture in record.captures(layer, self.sharing, fraction)]

    def _advance(
        self, name: str, curvature: LayerCurvature, seen: list[Capture], refreshes: bool, damping: float
    ) -> LayerCurvature:
        dtype = self.fast(name)
        if seen:
            curvature = curvature.observe(self.approximation, seen, self.decay)
        if curvature.ready and (refreshes or not curvature.refreshed):
            curvature = curvature.refresh(self.approximation, damping, name)
        if seen and curvature.refreshed and self.approximation.corrects:
            quick = seen if dtype is None else [capture.to(dtype) for capture in seen]
            curvature = curvature.correct(self.approximation, quick, self.decay, damping)
        return curvature.prepared(dtype)


def largest(tensors: list[Tensor]) -> Tensor | None:
    """The sum of the largest entries: finite, without overflow, if all tensors are; ``None`` of none."""
    return torch.stack(torch._foreach_norm(tensors, float("inf"))).sum() if tensors else None


def blocks(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The gradients of the layers, as blocks; a layer whose bias alone has no gradient gets zeros there."""
    return {
        name: layer.pack([torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters])
        for name, layer in layers.items()
    }
