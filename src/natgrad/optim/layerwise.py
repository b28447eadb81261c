"""An approximation on a whole network: one :class:`LayerCurvature` per layer, updated on its cadence.

A method that couples layers adds one map over all of them, made anew whenever one of them changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.fishers import Approximation, Coupled, Part, Stats, for_layer, pool
from natgrad.layers import Layer
from natgrad.matrix import FactorisationError, NetworkMap
from natgrad.matrix.kronecker_sum import KroneckerSumInverse
from natgrad.optim.cadence import Due
from natgrad.optim.curvature import LayerCurvature
from natgrad.optim.damping import Damping, TraceDamping
from natgrad.optim.finiteness import finiteness
from natgrad.optim.geometry import INVERSE, Frobenius, Geometry, SpectralDescent
from natgrad.optim.precision import Precision
from natgrad.record import Record, Share, Sharing


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
    decay: float
    sharing: Sharing
    precision: Precision
    damping: Damping
    geometry: Geometry = Frobenius()

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
        own = {name: torch.promote_types(layer.weight.dtype, torch.float32) for name, layer in self.layers.items()}
        dtypes = {name: torch.float64 if c.wide else own[name] for name, c in state.items()}
        if all(c.dtype == dtypes[name] for name, c in state.items()):
            return state
        layers = {n: c.cast(dtypes[n]).prepared(self._fast(n, c)) for n, c in state.items()}
        return State(layers, self._couple(layers))

    def restored(self, states: Mapping[str, dict[str, Any]]) -> State:
        """The state that a checkpoint holds, layer by layer."""
        return self.filled(State(), lambda layer: states.get(layer.name, {}))

    def _begun(self, name: str, kept: Mapping[str, Any]) -> LayerCurvature:
        layer, geometry = self.layers[name], self.geometry
        if kept.get("kind", INVERSE) != INVERSE and not isinstance(geometry, SpectralDescent):
            geometry = SpectralDescent()
        elif kept.get("kind") == INVERSE:
            geometry = Frobenius()
        curvature = LayerCurvature.empty(self.of(name), layer, geometry)
        if "turn" in kept and curvature.turn is None:  # of a run that has roots at other times
            curvature = replace(curvature, turn=kept["turn"])
        if "observations" not in kept or kept.get("momentum", curvature.inverse).shape != layer.shape:
            return curvature.prepared(self.fast(name))
        curvature = curvature.with_state(kept, name, self.approximation.together)
        return curvature.prepared(self._fast(name, curvature))

    def advance(self, state: State, records: Sequence[Record], due: Due, damping: float) -> State:
        """The state after the observations and the refreshes that are due."""
        merged = self._merged(state, records, due.observe if records else {})
        dampings: Mapping[str, float] = {}
        if isinstance(self.damping, TraceDamping) and ((due.observe and records) or due.refresh):
            merged = list(merged)
            dampings = self._spread(self.damping, {name: curvature for name, curvature, _ in merged}, damping)
        layers = {}
        n = _examples(records)
        for name, curvature, seen in merged:
            layers[name] = self._renew(name, curvature, seen, due, dampings.get(name, damping), n)
        if self.approximation.together and any(c.wide for name, c in layers.items() if self._couples(name)):
            layers = {name: c.widened().prepared(None) if self._couples(name) else c for name, c in layers.items()}
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

    def directions(
        self, state: State, M: Mapping[str, Tensor], serves: Mapping[str, int], step: int
    ) -> tuple[dict[str, Tensor], State]:
        """D, inverse @ M or the steepest with a root; the state with what roots were turned by, which ``serves`` so
        many steps, until their number divides ``step``."""
        coupled = {name: gradient for name, gradient in M.items() if state.joint is not None and self._couples(name)}
        known = state.joint @ coupled if state.joint is not None and coupled else {}
        D, layers = {}, dict(state.layers)
        for name, gradient in M.items():
            if name in known:
                D[name] = known[name].to(gradient.dtype)
            else:
                now = layers[name]
                D[name], layers[name] = now.direction(gradient, self.geometry.iterations, serves[name], step)
        same = all(layers[name] is state[name] for name in layers)
        return D, state if same else replace(state, layers=layers)

    def fast(self, name: str) -> torch.dtype | None:
        """The lower precision that suits the products of a layer, if any."""
        return self.precision.fast(self.layers[name])

    def _fast(self, name: str, curvature: LayerCurvature) -> torch.dtype | None:
        """The same; none where float64 is needed."""
        return None if curvature.wide else self.fast(name)

    def _merged(
        self, state: State, records: Sequence[Record], shares: Mapping[str, Share]
    ) -> Iterable[tuple[str, LayerCurvature, Sequence[Capture]]]:
        """Every layer with its statistics merged, and what it saw; lazily, to hold the captures of one at a time."""
        n = _examples(records)
        together: Mapping[str, Stats] = {}
        captures: dict[str, list[Capture]] = {}
        if self.approximation.together:
            captures = {
                name: self._seen(name, state, records, shares[name]) if name in shares else []
                for name in self.layers
                if self._couples(name)
            }
            together = self.approximation.observe_together(captures)
        for name in self.layers:
            approximation = self.of(name)
            if name in captures:
                seen, new = captures[name], together.get(name, {})
            else:
                seen = self._seen(name, state, records, shares[name]) if name in shares else []
                new = pool(approximation.observe(capture) for capture in seen)
            yield name, state[name].merge(approximation, new, self.decay, n, seen) if new else state[name], seen

    def _couples(self, name: str) -> bool:
        """Whether a layer has the approximation itself, and not another one."""
        return self.of(name) == self.approximation

    def _seen(self, name: str, state: State, records: Sequence[Record], share: Share) -> list[Capture]:
        """What a layer saw of the passes of a step, if any reached it: gradients of zero of those that did not."""
        layer = self.layers[name]
        seen = [list(record.captures(layer, self.sharing, share)) for record in records]
        if not any(seen):
            return []
        passes = zip(records, seen, strict=True)
        captures = [capture for record, own in passes for capture in own or [record.absent(layer, share)]]
        return [capture.to(torch.float64) for capture in captures] if state[name].wide else captures

    def _renew(
        self,
        name: str,
        curvature: LayerCurvature,
        seen: Sequence[Capture],
        due: Due,
        damping: float,
        n: int,
    ) -> LayerCurvature:
        approximation, first = self.of(name), not (curvature.refreshed or curvature.failures)
        other = curvature.refreshed and not self.geometry.made(curvature.kind)
        if curvature.ready and (name in due.refresh or (first and name in due.at_once) or other):
            curvature = curvature.refresh(approximation, damping, due.step, due.patience, self.geometry)
        dtype = self._fast(name, curvature)
        if seen and curvature.ready and curvature.refreshed and approximation.corrects:
            quick = seen if dtype is None else [capture.to(dtype) for capture in seen]
            curvature = curvature.correct(approximation, quick, self.decay, damping, n, self.geometry)
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
        if any(c.aside for name, c in layers.items() if self._couples(name)):
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
