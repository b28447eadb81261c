"""The directions of one step, and their inner products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad.engine import Record
from natgrad.labels import Labels
from natgrad.layers import Layer
from natgrad.optim.precision import fast_dtype


@dataclass(frozen=True)
class Directions:
    """Gradients M, natural gradients D and previous directions P of the covered layers, as blocks (*groups, out, in).

    ``records`` are the forward passes of the step, whose samples give the curvature; ``precision`` that of the products
    with activations.
    """

    layers: Mapping[str, Layer]
    M: Mapping[str, Tensor]
    D: Mapping[str, Tensor]
    P: Mapping[str, Tensor]
    records: Sequence[Record]
    precision: torch.dtype | str = "auto"
    model: nn.Module | None = None
    labels: Labels | None = None

    @property
    def _device(self) -> torch.device:
        return next(iter(self.D.values())).device

    def slope(self) -> Tensor:
        """<D, M>."""
        return _inner(self.D, self.M)

    def drift(self) -> Tensor:
        """<P, M>."""
        return _inner(self.P, self.M)

    def gram(self) -> Tensor:
        """<D, D>, <D, P>, <P, P>."""
        return torch.stack([_inner(self.D, self.D), _inner(self.D, self.P), _inner(self.P, self.P)])

    def sampled_curvature(self) -> Tensor:
        """D^T F D, D^T F P, P^T F P from the captured seeds of every record: 4 n out in flops a layer."""
        totals = [(self._responses(record), record.count()) for record in self.records]
        if not totals:
            return torch.zeros(3, device=self._device)
        count = sum(count for _, count in totals)
        return torch.stack([_pairs(u) for u, _ in totals]).sum(0) / count

    def exact_curvature(self) -> Tensor:
        """The same from Jacobian products: two forward-mode passes a record."""
        assert self.model is not None and self.labels is not None
        total, count = torch.zeros(3, device=self._device), 0.0
        for record in self.records:
            assert record.inputs is not None
            (output, JD), (_, JP) = (self._jacobian_product(record, V) for V in (self.D, self.P))
            HD, HP = (self.labels.likelihood.hessian_product(output, J, record.targets) for J in (JD, JP))
            total = total + torch.stack([(JD * HD).sum(), (JD * HP).sum(), (JP * HP).sum()])
            count = count + float(record.count(len(output)))
        return total / count

    def _responses(self, record: Record) -> Tensor:
        """u (2, seeds, n): directional derivatives of the examples along D and P."""
        total = None
        for name, layer in self.layers.items():
            dtype = fast_dtype(self.precision, layer.parameters[0]) or self.D[name].dtype
            pair = [record.directional(layer, layer.unpack(V[name].to(dtype))) for V in (self.D, self.P)]
            if pair[0] is not None and pair[1] is not None:
                u = torch.stack([pair[0], pair[1]])
                total = u if total is None else total + u
        return torch.zeros(2, 1, 1, device=self._device) if total is None else total

    def _jacobian_product(self, record: Record, V: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        assert self.model is not None and self.labels is not None and record.inputs is not None
        args, kwargs = record.inputs
        names = {id(p): name for name, p in self.model.named_parameters()}
        primal, tangent = {}, {}
        for key, layer in self.layers.items():
            for parameter, direction in zip(layer.parameters, layer.unpack(V[key]), strict=True):
                name = names[id(parameter)]
                primal[name], tangent[name] = parameter.detach(), direction.contiguous()
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        model, select = self.model, self.labels.select

        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return select(torch.func.functional_call(model, {**parameters, **buffers}, args, kwargs))

        device = self._device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            output, product = torch.func.jvp(outputs, (primal,), (tangent,))[:2]
        return output, product


def _inner(X: Mapping[str, Tensor], Y: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in ((X[name], Y[name]) for name in X)]).sum()


def _pairs(u: Tensor) -> Tensor:
    """Sums over the examples of u_D^2, u_D u_P and u_P^2, in the mean over the seeds."""
    return torch.stack([(u[i] * u[j]).sum(-1).mean() for i, j in ((0, 0), (0, 1), (1, 1))])
