"""The metric of a reconstructed layer: what it was told to be, what it is, and the statistics of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture import Capture
from natgrad.engine import Engine
from natgrad.fisher import call, evaluating, passes
from natgrad.fishers import SNGD, Approximation, Coupled, Stats, pool
from natgrad.labels import Estimator, Labels, check_estimator
from natgrad.layers import Layer
from natgrad.likelihoods import Objective
from natgrad.matrix import FactorisationError, LinearMap, Root, inverse_roots
from natgrad.matrix.base import check_damping
from natgrad.operations import Call, Watch, whole
from natgrad.rows import Arrangement

Batches = Iterable[tuple[Any, Any]]
Activations = Mapping[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Settings:
    """What :func:`reconstruct` was told, and a refresh needs again."""

    approximation: Approximation
    likelihood: Objective | None
    activations: Activations | None
    estimator: Estimator
    damping: float
    root: Root
    seed: int

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        approximation = self.approximation
        if not isinstance(approximation, Approximation):
            raise TypeError(f"approximation must be an approximation such as SNGD() (an object), got {approximation!r}")
        if isinstance(approximation, Coupled) or approximation.corrects:
            raise ValueError(f"{approximation!r} is more than a matrix per layer, and cannot be reconstructed")
        if self.likelihood is not None and not isinstance(self.likelihood, Objective):
            raise TypeError(
                f"likelihood must be a likelihood such as Categorical() (an object), got {self.likelihood!r}"
            )
        if self.likelihood is not None and self.activations is not None:
            raise ValueError("give a likelihood or activations, not both")
        if self.likelihood is None and self.activations is None and not isinstance(approximation, SNGD):
            raise ValueError(f"{approximation!r} reads output gradients: give a likelihood, or activations")
        if not callable(self.root):
            raise TypeError(f"root must be a function such as eigh_root, got {self.root!r}")
        check_estimator(self.estimator)
        check_damping(self.damping)

    def check_names(self, layers: Mapping[str, Layer]) -> None:
        """Refuse activations of no layer."""
        unknown = set(self.activations or ()) - set(layers)
        if unknown:
            raise ValueError(f"activations name no covered layer: {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class Metric:
    """S, its inverse, and the statistics that they come from."""

    S: LinearMap
    inverse: LinearMap
    stats: Stats

    @classmethod
    def of(cls, name: str, stats: Stats, settings: Settings) -> Metric:
        """The metric of the layer ``name``; ``FactorisationError`` if its matrix has no root."""
        matrix = settings.approximation.assemble(stats)
        try:
            return cls(*inverse_roots(matrix, settings.damping, settings.root), stats)
        except FactorisationError as error:
            raise FactorisationError(f"layer {name!r}: {error}") from error

    def merged(self, name: str, new: Stats, decay: float, settings: Settings) -> Metric:
        """The metric of the statistics with one more observation."""
        old = {key: statistic.restored(statistic.value.to(new[key].value)) for key, statistic in self.stats.items()}
        return Metric.of(name, settings.approximation.merge(old, new, decay), settings)


@torch.no_grad()
def gather(
    model: nn.Module, batches: Batches, layers: Mapping[str, Layer], settings: Settings, seed: int
) -> dict[str, Stats]:
    """The statistics of every layer that the data reach; ``ValueError`` if there is none."""
    stats: dict[str, Stats] = {}
    with evaluating(model):
        for layer, seen in _seen(model, batches, dict(layers), settings, seed):
            here = pool(settings.approximation.observe(capture) for capture in seen)
            stats[layer.name] = pool([stats[layer.name], here]) if layer.name in stats else here
    if not stats:
        raise ValueError("the batches are empty, or reach no covered layer")
    return stats


def _seen(
    model: nn.Module, batches: Batches, layers: dict[str, Layer], settings: Settings, seed: int
) -> Iterator[tuple[Layer, list[Capture]]]:
    if settings.likelihood is None:
        yield from _local(model, batches, layers, settings.activations or {})
        return
    labels, by_weight = Labels(settings.likelihood, settings.estimator), {id(x.weight): x for x in layers.values()}
    with closing(Engine(model, labels, only_training=False)) as engine:
        for layer, seen in passes(engine, model, batches, "expand", seed):
            if id(layer.weight) in by_weight:
                yield by_weight[id(layer.weight)], seen


def _local(
    model: nn.Module, batches: Batches, layers: dict[str, Layer], activations: Activations
) -> Iterator[tuple[Layer, list[Capture]]]:
    """Inputs, and the slopes of the layers' own activations in the place of output gradients: nothing is sent back."""
    by_weight = {id(layer.weight): layer for layer in layers.values()}
    weights = [layer.weight for layer in layers.values()]
    for inputs, _ in batches:
        seen: list[tuple[Layer, list[Capture]]] = []

        def note(here: Call, y: Tensor, seen: list[tuple[Layer, list[Capture]]] = seen) -> None:
            layer = by_weight[id(here.weight.parameter)]
            first, form = Arrangement(here.sizes), here.form
            a = form.inputs(first(here.x), layer.biased)
            g = form.outputs(first(here.read(_slope(activations.get(layer.name), y))))
            seen.append((layer, [_by_position(a, g)]))

        with torch.enable_grad(), Watch(whole(weights), note):
            call(model, inputs)
        yield from seen


def _slope(activation: Callable[[Tensor], Tensor] | None, s: Tensor) -> Tensor:
    if activation is None:
        return torch.ones_like(s)
    with torch.enable_grad():
        s = s.detach().requires_grad_()
        return torch.autograd.grad(activation(s).sum(), s)[0]


def _by_position(a: Tensor, g: Tensor) -> Capture:
    """Every position as an example of its own."""
    a, g = (x.flatten(-3, -2).unsqueeze(-2).to(torch.promote_types(x.dtype, torch.float32)) for x in (a, g))
    rows = float(a.shape[-3])
    return Capture(a, g, rows, rows)
