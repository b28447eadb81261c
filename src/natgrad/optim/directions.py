"""The directions of one step, and their inner products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.labels import Labels
from natgrad.layers import Layer
from natgrad.optim.averages import Averages, mean_squares
from natgrad.optim.curvature import LayerCurvature
from natgrad.optim.precision import Precision
from natgrad.record import Record


@dataclass(frozen=True)
class Directions:
    """Gradients M, natural gradients D and previous directions P of the covered layers, as blocks (*groups, out, in).

    ``records`` are the forward passes of the step, whose samples give the curvature; ``precision`` that of products by
    activations; ``X`` are what D is the direction for, M or what the ``averages`` make of it; ``joint`` says that D
    comes from a map that joins the layers, so that they have one length.
    """

    layers: Mapping[str, Layer]
    M: Mapping[str, Tensor]
    D: Mapping[str, Tensor]
    P: Mapping[str, Tensor]
    records: Sequence[Record]
    precision: Precision = Precision()
    model: nn.Module | None = None
    labels: Labels | None = None
    joint: bool = False
    curvature: Mapping[str, LayerCurvature] = field(default_factory=dict)
    X: Mapping[str, Tensor] = field(default_factory=dict)
    averages: Averages | None = None

    @property
    def _device(self) -> torch.device:
        return next(iter(self.D.values())).device

    def slope(self) -> Tensor:
        """<D, M>."""
        return _inner(self.D, self.M).sum()

    def drift(self) -> Tensor:
        """<P, M>."""
        return _inner(self.P, self.M).sum()

    def gram(self) -> Tensor:
        """<D, D>, <D, P>, <P, P>."""
        return torch.stack([_inner(X, Y).sum() for X, Y in ((self.D, self.D), (self.D, self.P), (self.P, self.P))])

    def sizes(self) -> dict[str, Tensor]:
        """<D, D>, <D, P> and <P, P>, as means over all entries."""
        count = sum(D.numel() for D in self.D.values())
        return dict(zip(("DID", "DIP", "PIP"), (self.gram() / count).unbind(), strict=True))

    def agreement(self) -> dict[str, Tensor]:
        """<M, V>, <M, M> and <V, V> in the metric of F^-1, V = P: two products with the preconditioner a layer."""
        metrics = [c.metric(self.M[name], self.P[name]) for name, c in self.curvature.items() if name in self.M]
        return dict(zip(("MV", "MM", "VV"), torch.stack(metrics).sum(0).unbind(), strict=True))

    @cached_property
    def steadiness(self) -> Tensor:
        """One number a layer: the root mean square of X over that of the gradients M of the last hundred steps or so.

        Near 1 while gradients agree, some .17 at beta = .95 where they are noise, less where they have
        become small.
        """
        assert self.averages is not None
        past = torch.stack([self.averages.squares[name][0] for name in self.X])
        return (mean_squares(self.X) / torch.where(past > 0, past, 1.0)).sqrt()

    def inputs(self) -> Tensor:
        """One number a layer: the root mean square of |a|, an input larger than 1 counted as 1; 0 if not known."""
        known = [self.curvature[name].inputs if name in self.curvature else None for name in self.D]
        none = torch.zeros((), dtype=torch.float32, device=self._device)
        return torch.stack([none if value is None else value for value in known]).sqrt()

    @cached_property
    def along(self) -> Tensor:
        """<X, D>, layer by layer, for the D that was first there: finite if all gradients and directions are."""
        return _inner(self.X, self.D)

    def reach(self, share: float) -> Tensor:
        """One number a layer: the c of c D at the minimum along D of the model that the layer's own matrix makes; or
        where its KL is a ``share`` of the loss's capacity, if that is further.

        <X, D> / D^T F D and (2 share capacity / D^T F D)^(1/2). D^T F D is <X, D> for a natural gradient, all layers
        together where a map joins them, and the number of singular values for a polar factor. Infinite for a matrix
        that is no Fisher but a metric of inputs or outputs alone.
        """
        along, nats = self.along, 0.0
        if self.labels is not None:
            nats = share * self.labels.factor * self.labels.capacity
        if self.joint or not self.curvature:
            along = bends = along.sum().expand(len(along))
        else:
            pairs = zip(self.D.items(), along, strict=True)
            bends = torch.stack([self.curvature[name].bend(D, one) for (name, D), one in pairs])
        return torch.where(bends > 0, torch.maximum(along / bends, (2 * nats / bends).sqrt()), math.inf)

    def sampled_curvature(self) -> Tensor:
        """D^T F D, D^T F P, P^T F P from the captured seeds of every record: 4 n out in flops a layer.

        Layers that saw another number of examples than the rest, such as an embedding of positions that all examples
        share, are summed apart: as if they did not act together.
        """
        totals = [total for u in self._responses for total in _totals(u)]
        if not totals:
            return torch.zeros(3, device=self._device)
        return torch.stack([_pairs(u) for u in totals]).sum(0) / self._count

    def lengths(self, damping: float) -> Tensor:
        """One number a layer: the length c of c D that minimises the quadratic model along that layer's D alone.

        c = <D, M> / (D^T F D + damping <D, D>), D^T F D at its least, and 0 where D is 0.
        """
        slopes, squares = _inner(self.D, self.M), _inner(self.D, self.D)
        curvature = torch.zeros_like(slopes)
        for u in self._responses:
            own = [u[name][0].square().sum() if name in u else curvature.new_zeros(()) for name in self.D]
            curvature = curvature + torch.stack(own) / self._count
        total = torch.maximum(curvature, self.least_curvature(slopes)) + damping * squares
        return torch.where(total > 0, slopes / total, torch.zeros_like(total))

    def least_curvature(self, slope: Tensor) -> Tensor:
        """<D, M>^2 / capacity for a loss that saturates, else 0: what the gradient tells of the curvature along D.

        The empirical Fisher of the loss terms is at least M M^T, and no term can lose more than its capacity for long.
        Samples of a model that is sure of a wrong answer agree with it, and show no curvature at all.
        """
        if self.labels is None or not self.labels.likelihood.saturates:
            return torch.zeros_like(slope)
        return slope.square() / (self.labels.factor * self.labels.capacity)

    def scaled(self, factors: Sequence[float] | Tensor) -> Directions:
        """The same with the D of every layer multiplied by a factor of its own."""
        kept: dict[str, Any] = {name: self.__dict__[name] for name in ("along", "steadiness") if name in self.__dict__}
        result = replace(self, D={name: D * factor for (name, D), factor in zip(self.D.items(), factors, strict=True)})
        result.__dict__.update(kept)
        if "_responses" in self.__dict__:
            by_name = dict(zip(self.D, factors, strict=True))
            result.__dict__["_responses"] = [
                {name: torch.stack([u[0] * by_name[name], u[1]]) for name, u in responses.items()}
                for responses in self._responses
            ]
        return result

    def exact_curvature(self) -> Tensor:
        """As :meth:`sampled_curvature`, from Jacobian products: two forward-mode passes a record."""
        assert self.model is not None and self.labels is not None
        total, count = torch.zeros(3, device=self._device), 0.0
        for record in self.records:
            assert record.inputs is not None
            (output, JD), (_, JP) = (self._jacobian_product(record, V) for V in (self.D, self.P))
            HD, HP = (self.labels.likelihood.hessian_product(output, J, record.targets) for J in (JD, JP))
            total = total + torch.stack([_dot(JD, HD), _dot(JD, HP), _dot(JP, HP)])
            count = count + float(record.count())
        return total * (self.labels.factor / count)

    @cached_property
    def _responses(self) -> list[dict[str, Tensor]]:
        """For every record u (2, seeds, n) of every layer: directional derivatives of the examples along D and P."""
        return [
            {name: u for name, layer in self.layers.items() if (u := self._response(record, name, layer)) is not None}
            for record in self.records
        ]

    def _response(self, record: Record, name: str, layer: Layer) -> Tensor | None:
        dtype = self.precision.fast(layer) or self.D[name].dtype
        D, P = (record.directional(layer, layer.unpack(V[name].to(dtype))) for V in (self.D, self.P))
        return None if D is None or P is None else torch.stack([D, P])

    @property
    def _count(self) -> float | Tensor:
        return sum(record.count() for record in self.records)

    def _jacobian_product(self, record: Record, V: Mapping[str, Tensor]) -> tuple[Any, Any]:
        assert self.model is not None and self.labels is not None and record.inputs is not None
        args, kwargs = record.inputs
        names = {id(p): name for name, p in self.model.named_parameters()}
        primal: dict[str, Tensor] = {}
        tangent: dict[str, Tensor] = {}
        for key, layer in self.layers.items():
            own = [names[id(parameter)] for parameter in layer.parameters]
            for name, parameter in zip(own, layer.parameters, strict=True):
                primal[name] = parameter.detach()
                tangent.setdefault(name, torch.zeros_like(parameter))
            parts = layer.parts([tangent[name] for name in own])
            for part, direction in zip(parts, layer.unpack(V[key]), strict=True):
                part.copy_(direction)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        model, select = self.model, self.labels.select

        def outputs(parameters: dict[str, Tensor]) -> Any:
            return select(torch.func.functional_call(model, {**parameters, **buffers}, args, kwargs))

        device = self._device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            output, product = torch.func.jvp(outputs, (primal,), (tangent,))[:2]
        return output, product


def _inner(X: Mapping[str, Tensor], Y: Mapping[str, Tensor]) -> Tensor:
    """<X, Y>, layer by layer."""
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in ((X[name], Y[name]) for name in X)])


def _dot(x: Any, y: Any) -> Tensor:
    """The inner product of two outputs, or of two tuples of them."""
    pairs = zip(x, y, strict=True) if isinstance(x, tuple) else ((x, y),)
    return torch.stack([(a * b).sum() for a, b in pairs]).sum()


def _totals(responses: Mapping[str, Tensor]) -> list[Tensor]:
    """Sums over the layers that saw as many examples."""
    sizes: dict[int, list[Tensor]] = {}
    for u in responses.values():
        sizes.setdefault(u.shape[-1], []).append(u)
    return [torch.stack(alike).sum(0) for alike in sizes.values()]


def _pairs(u: Tensor) -> Tensor:
    """Sums over the examples and the seeds of u_D^2, u_D u_P and u_P^2."""
    return torch.stack([(u[i] * u[j]).sum() for i, j in ((0, 0), (0, 1), (1, 1))])
