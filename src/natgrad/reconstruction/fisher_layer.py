"""The local Fisher layer: S in W = S W', as a parametrization of the layer's weight and bias."""

from __future__ import annotations

import types
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from natgrad.layers import Layer
from natgrad.matrix import Kronecker, OneSided, Rows
from natgrad.operations import stand_for, unseen
from natgrad.reconstruction.metric import Metric, Settings


class FisherLayer(nn.Module):
    """The local Fisher layer: the parametrization of a layer's weight as S W', S in buffers. The bias is a column."""

    observations: Tensor

    def __init__(self, layer: Layer, module: nn.Module, settings: Settings, metric: Metric) -> None:
        super().__init__()
        self.settings, self.order, self.layer = settings, tuple(module._parameters), layer
        self._module = (module,)  # a tuple, so that it is not a submodule
        self.register_buffer("observations", torch.tensor(0))
        self.metric = metric

    @property
    def metric(self) -> Metric:
        """S, S^-1 and the statistics, from the buffers."""
        S, inverse, stats = (
            {name: getattr(self, f"{part}_{name}") for name in names} for part, names in self._names.items()
        )
        shell = self._shell
        restored = {name: statistic.restored(stats[name]) for name, statistic in shell.stats.items()}
        return Metric(shell.S.with_tensors(S), shell.inverse.with_tensors(inverse), restored)

    @metric.setter
    def metric(self, metric: Metric) -> None:
        stats = {name: statistic.value for name, statistic in metric.stats.items()}
        parts = {"S": metric.S.tensors(), "inverse": metric.inverse.tensors(), "statistic": stats}
        for part, tensors in parts.items():
            for name, value in tensors.items():
                self.register_buffer(f"{part}_{name}", value)
        self._names = {part: tuple(tensors) for part, tensors in parts.items()}
        empty = {name: statistic.restored(statistic.value.to("meta")) for name, statistic in metric.stats.items()}
        self._shell = Metric(metric.S.to("meta"), metric.inverse.to("meta"), empty)
        self.observations += 1

    def chains(self) -> dict[str, parametrize.ParametrizationList]:
        """The parametrizations of the weight, and of the bias."""
        lists = self.module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        return {name: lists[name] for name in _names(self.layer)}  # type: ignore[misc]

    @property
    def module(self) -> nn.Module:
        """The module that has the weight."""
        return self._module[0]

    def forward(self, original: Tensor) -> Tensor:
        """The weight."""
        weight = self.layer.unpack(self._columns(slice(None, -1) if self.layer.biased else slice(None)))[0]
        return stand_for(weight, self.layer.parameters[0])

    def bias(self) -> Tensor:
        """The bias."""
        bias = self.layer.parameters[1]
        return stand_for(self._columns(slice(-1, None)).reshape(bias.shape), bias)

    def extra_repr(self) -> str:
        """The approximation."""
        return repr(self.settings.approximation)

    def _columns(self, chosen: slice) -> Tensor:
        """Some columns of S W', and of most maps no more than these."""
        with unseen():
            block = self.layer.pack([chain.original for chain in self.chains().values()])
        S = self.metric.S
        with torch.autocast(block.device.type, enabled=False), unseen():
            if isinstance(S, Kronecker):
                return (S.left @ block.to(S.left.dtype) @ S.right[..., chosen]).to(block.dtype)
            if isinstance(S, OneSided) and S.side == "right":
                return (block.to(S.factor.dtype) @ S.factor[..., chosen]).to(block.dtype)
            if isinstance(S, Rows):
                return replace(S, values=S.values[..., chosen]) @ block
            return (S @ block)[..., chosen]


class _Bias(nn.Module):
    """The parametrization of the bias as the last column of S W'; the Fisher layer is the weight's."""

    def __init__(self, fisher_layer: FisherLayer) -> None:
        super().__init__()
        self._owner = (fisher_layer,)  # a tuple, so that it is not a submodule here as well

    def forward(self, original: Tensor) -> Tensor:
        return self._owner[0].bias()


def fisher_layers_of(model: nn.Module) -> list[FisherLayer]:
    """The Fisher layers in a model, in its order."""
    return [module for module in model.modules() if isinstance(module, FisherLayer)]


def install(layer: Layer, module: nn.Module, settings: Settings, metric: Metric) -> None:
    """Parametrize a layer whose parameters hold W' already; unchecked by torch, as weight and bias need each other."""
    fisher_layer = FisherLayer(layer, module, settings, metric)
    weight, *bias = _names(layer)
    parametrize.register_parametrization(module, weight, fisher_layer, unsafe=True)
    for name in bias:
        parametrize.register_parametrization(module, name, _Bias(fisher_layer), unsafe=True)


def _names(layer: Layer) -> tuple[str, ...]:
    return ("weight", "bias")[: 1 + layer.biased]


def uninstall(fisher_layer: FisherLayer) -> None:
    """Take the parametrization off: the parameters stay as they are, in their old order."""
    module = fisher_layer.module
    kind = type(module)  # deep copies share it, and torch deletes its properties
    own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = types.new_class(kind.__name__, kind.__bases__, exec_body=lambda space: space.update(own))
    for name in fisher_layer.chains():
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    for name in fisher_layer.order:
        module._parameters[name] = module._parameters.pop(name)
