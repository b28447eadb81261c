"""An approximation on a whole network: one :class:`LayerCurvature` per layer, updated on its cadence.

A method that couples layers adds one map over all of them, made anew whenever one of them changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.fishers import Approximation, Coupled, Part, Stats, for_layer, pool
from natgrad.layers import Layer
from natgrad.matrix import FactorisationError, NetworkMap
from natgrad.matrix.kronecker_sum import KroneckerSumInverse
from natgrad.optim.cadence import Cadence
from natgrad.optim.curvature import LayerCurvature
from natgrad.optim.damping import Damping, TraceDamping
from natgrad.optim.finiteness import finiteness
from natgrad.optim.precision import fast_dtype
from natgrad.record import Record, Sharing


@dataclass(frozen=True)
class State(Mapping[str, LayerCurvature]):
    """The curvature of every layer, and the map that joins them where the approximation has one.

    Without a ``joint`` map, for want of one or because it could not be made, the layers are preconditioned one by one.
    """

    layers: Mapping[str, LayerCurvature] = field(default_factory=dict)
    joint: NetworkMap | None = None

    def __getitem__(self, name: str) -> LayerCurvature:
        """The curvature of one layer."""
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def numbers(self) -> dict[str, float]:
        """What the inverses say of themselves: ``guarded``, the share of directions in which a sum is not trusted."""
        sums = [c.inverse for c in self.values() if isinstance(c.inverse, KroneckerSumInverse)]
        return {"guarded": sum(float(inverse.guarded.mean()) for inverse in sums) / len(sums)} if sums else {}


@dataclass(frozen=True)
class Layerwise:
    """``approximation`` on every one of ``layers``, or what stands in for it on layers of a kind that is not plain.

    Its verbs are pure: state in, state out.
    """

    approximation: Approximation
    layers: Mapping[str, Layer]
    cadence: Cadence
    decay: float
    sharing: Sharing
    precision: torch.dtype | str
    damping: Damping

    def of(self, name: str) -> Approximation:
        """The approximation of one layer."""
        return for_layer(self.approximation, self.layers[name].kind)

    def filled(self, state: State, kept: Callable[[Layer], Mapping[str, Any]] | None = None) -> State:
        """The state with placeholders for layers that it lacks, or whose bias was frozen or unfrozen since.

        It has the precision of the layers, which may have changed. What is ``kept`` of a layer, under the names of a
        checkpoint, takes their place where it has the layer's shape.
        """
        if state.layers.keys() == self.layers.keys() and all(_fits(c, self.layers[n]) for n, c in state.items()):
            return self._cast(state)
        joined = self.approximation.together and state.layers  # statistics span the layers, and start anew
        known = {n: c for n, c in state.items() if not joined and n in self.layers and _fits(c, self.layers[n])}
        saved = kept if kept is not None and not joined else (lambda layer: {})
        layers = {n: known.get(n) or self._begun(n, saved(layer)) for n, layer in self.layers.items()}
        return self._cast(State(layers, self._couple(layers)))

    def _cast(self, state: State) -> State:
        """The state in the precision of the layers."""
        dtypes = {name: torch.promote_types(layer.weight.dtype, torch.float32) for name, layer in self.layers.items()}
        if all(c.dtype == dtypes[name] for name, c in state.items()):
            return state
        layers = {n: c.cast(dtypes[n]).prepared(self.fast(n)) for n, c in state.items()}
        return State(layers, self._couple(layers))

    def restored(self, states: Mapping[str, dict[str, Any]]) -> State:
        """The state that a checkpoint holds, layer by layer."""
        return self.filled(State(), lambda layer: states.get(layer.name, {}))

    def _begun(self, name: str, kept: Mapping[str, Any]) -> LayerCurvature:
        layer = self.layers[name]
        curvature = LayerCurvature.empty(self.of(name), layer)
        if "observations" not in kept or kept.get("momentum", curvature.inverse).shape != layer.shape:
            return curvature.prepared(self.fast(name))
        return curvature.with_state(kept, name, self.approximation.together).prepared(self.fast(name))

    def advance(self, state: State, records: Sequence[Record], step: int, damping: float) -> State:
        """The state after the observation and the refresh that are due at this step."""
        observes = bool(records) and self.cadence.observes(step)
        due = [self.cadence.refreshes(step, number, len(self.layers)) for number in range(len(self.layers))]
        merged = self._merged(state, records if observes else [])
        dampings: Mapping[str, float] = {}
        if isinstance(self.damping, TraceDamping) and (observes or any(due)):
            merged = list(merged)
            dampings = self._spread(self.damping, {name: curvature for name, curvature, _ in merged}, damping)
        layers = {}
        for refreshes, (name, curvature, seen) in zip(due, merged, strict=True):
            layers[name] = self._renew(
                name, curvature, seen, refreshes, dampings.get(name, damping), _examples(records)
            )
        same = all(layers[name] is state[name] for name in layers)
        return state if same else State(layers, self._couple(layers))

    def size(self, before: State, after: State) -> Tensor | None:
        """A number that is finite if all that was observed is."""
        changed = {
            name: c for name, c in after.items() if name not in before or c.observations > before[name].observations
        }
        tensors = [statistic.value for c in changed.values() for statistic in c.stats.values()]
        corrected = [c.matrix for name, c in changed.items() if self.of(name).corrects]
        tensors += [tensor for matrix in corrected if matrix is not None for tensor in matrix.tensors().values()]
        return finiteness(tensors)

    def precondition(self, state: State, M: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """D = inverse @ M."""
        coupled = {name: gradient for name, gradient in M.items() if state.joint is not None and self._couples(name)}
        known = state.joint @ coupled if state.joint is not None and coupled else {}
        return {
            name: known[name].to(gradient.dtype) if name in known else state[name].precondition(gradient)
            for name, gradient in M.items()
        }

    def observes(self, step: int) -> bool:
        """Whether this step takes statistics."""
        return self.cadence.observes(step)

    def fast(self, name: str) -> torch.dtype | None:
        """The lower precision that suits the products of a layer, if any."""
        return fast_dtype(self.precision, self.layers[name].parameters[0])

    def _merged(
        self, state: State, records: Sequence[Record]
    ) -> Iterable[tuple[str, LayerCurvature, Sequence[Capture]]]:
        """Every layer with its statistics merged, and what it saw; lazily, to hold the captures of one at a time."""
        n = _examples(records)
        together: Mapping[str, Stats] = {}
        captures: dict[str, list[Capture]] = {}
        if self.approximation.together:
            captures = {name: self._seen(name, records) for name in self.layers if self._couples(name)}
            together = self.approximation.observe_together(captures)
        for name in self.layers:
            approximation = self.of(name)
            if name in captures:
                seen, new = captures[name], together.get(name, {})
            else:
                seen = self._seen(name, records)
                new = pool(approximation.observe(capture) for capture in seen)
            yield name, state[name].merge(approximation, new, self.decay, n) if new else state[name], seen

    def _couples(self, name: str) -> bool:
        """Whether a layer has the approximation itself, and not another one."""
        return self.of(name) == self.approximation

    def _seen(self, name: str, records: Sequence[Record]) -> list[Capture]:
        """What a layer saw of the passes of a step, if any reached it: gradients of zero of those that did not."""
        layer, fraction = self.layers[name], self.cadence.fraction
        seen = [list(record.captures(layer, self.sharing, fraction)) for record in records]
        if not any(seen):
            return []
        passes = zip(records, seen, strict=True)
        return [capture for record, own in passes for capture in own or [record.absent(layer, fraction)]]

    def _renew(
        self, name: str, curvature: LayerCurvature, seen: Sequence[Capture], refreshes: bool, damping: float, n: int
    ) -> LayerCurvature:
        dtype, approximation = self.fast(name), self.of(name)
        if curvature.ready and (refreshes or not curvature.refreshed):
            curvature = curvature.refresh(approximation, damping, name)
        if seen and curvature.refreshed and approximation.corrects:
            quick = seen if dtype is None else [capture.to(dtype) for capture in seen]
            curvature = curvature.correct(approximation, quick, self.decay, damping, n)
        return curvature.prepared(dtype)

    def _spread(self, policy: TraceDamping, layers: Mapping[str, LayerCurvature], damping: float) -> dict[str, float]:
        """The damping of every layer that has been observed."""
        ready = {name: c for name, c in layers.items() if c.ready}
        if not ready:
            return {}
        means = torch.stack([c.mean_eigenvalue(self.of(name)) for name, c in ready.items()]).tolist()
        convolutions = [name for name in ready if self.layers[name].parameters[0].ndim > 2]
        return policy.spread(damping, dict(zip(ready, means, strict=True)), convolutions)

    def _couple(self, layers: Mapping[str, LayerCurvature]) -> NetworkMap | None:
        if not isinstance(self.approximation, Coupled):
            return None
        parts = {
            name: Part(c.stats, c.inverse, c.damping)
            for name, c in layers.items()
            if c.refreshed and self._couples(name)
        }
        try:
            return self.approximation.couple(parts) if parts else None
        except FactorisationError:
            return None


def _examples(records: Sequence[Record]) -> int:
    """The number of examples of a step."""
    return max(1, sum(record.examples() for record in records))


def blocks(layers: Mapping[str, Layer], unit: float = 1.0) -> dict[str, Tensor]:
    """The gradients of the layers, as blocks, of the loss in a ``unit``; a layer whose bias alone has no gradient gets
    zeros there."""
    own = {
        name: layer.pack([torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters])
        for name, layer in layers.items()
    }
    return own if unit == 1.0 else {name: M / unit for name, M in own.items()}


def _fits(curvature: LayerCurvature, layer: Layer) -> bool:
    return curvature.inverse.shape == layer.shape
