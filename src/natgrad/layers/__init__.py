"""Which layers are understood, and how: one adapter per kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from natgrad.jets import JetLinear
from natgrad.layers import attention, functional, recurrent, source
from natgrad.layers.base import Adapter
from natgrad.layers.conv import ConvAdapter
from natgrad.layers.functional import Exposed, Rule
from natgrad.layers.jet import JetAdapter
from natgrad.layers.linear import LinearAdapter

Known = TypeVar("Known")

_ADAPTERS: dict[type[nn.Module], Adapter] = {
    nn.Linear: LinearAdapter(),
    JetLinear: JetAdapter(),
    nn.Conv1d: ConvAdapter(),
    nn.Conv2d: ConvAdapter(),
    nn.Conv3d: ConvAdapter(),
}

_PARTS: dict[type[nn.Module], Callable[[nn.Module], Mapping[str, tuple[nn.Module, Adapter]]]] = {
    nn.MultiheadAttention: attention.attention_parts,
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell), recurrent.recurrent_parts),
}
RULES: dict[Any, Rule] = {**functional.RULES, **attention.RULES, **recurrent.RULES}


@dataclass(frozen=True)
class Layer:
    """A covered layer: its name in the model, the module that has its parameters, and the adapter that reads it.

    ``owner`` is the module whose forward uses the parameters, without calling ``module``, where there is one.
    """

    name: str
    module: nn.Module
    adapter: Adapter
    owner: nn.Module | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the block, the weight first."""
        return self.adapter.parameters(self.module)

    @property
    def slot(self) -> str:
        """What the names of the block's state begin with."""
        return self.adapter.slot

    def parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those entries of tensors like the parameters that are in the block, as views."""
        return self.adapter.parts(tensors)

    @property
    def shape(self) -> torch.Size:
        """The shape of the block (*groups, out, in)."""
        return self.pack([p.detach() for p in self.parameters]).shape

    def pack(self, tensors: list[Tensor]) -> Tensor:
        """Tensors like the parameters as one block."""
        return self.adapter.pack(self.module, tensors)

    def unpack(self, block: Tensor) -> list[Tensor]:
        """A block as tensors like the parts of the parameters."""
        return self.adapter.unpack(self.module, block)


@dataclass(frozen=True)
class Coverage:
    """What of a model is covered: the layers, and the reason for every trained parameter that is not."""

    layers: dict[str, Layer]
    uncovered: dict[str, str]


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of a module: of its class, or of the base class whose ``forward`` it inherits unchanged."""
    return _known(module, _ADAPTERS)


def _known(module: nn.Module, table: Mapping[type[nn.Module], Known]) -> Known | None:
    for kind in type(module).__mro__:
        if kind in table and type(module).forward is getattr(kind, "forward", None):
            return table[kind]
    return None


def _layers_of(name: str, module: nn.Module) -> Iterator[Layer]:
    """The layers of a module, trained or not: itself, or what its forward uses."""
    adapter = adapter_of(module)
    if adapter:
        yield Layer(name, module, adapter)
        return
    prefix = f"{name}." if name else ""
    for part, (holder, dense) in attention.sequence_parts(module).items():
        yield Layer(prefix + part, holder, dense)
    parts = _known(module, _PARTS) or source.written_parts
    for part, (holder, reader) in parts(module).items():
        yield Layer(prefix + part, holder, reader, module)


def cover(model: nn.Module, exclude: Iterable[str] = (), functional: bool = True) -> Coverage:
    """Find the layers of ``model`` that have an adapter, and say why the other parameters have none.

    ``exclude`` names modules that are left out with all they contain; ``ValueError`` for a name that is none. Without
    ``functional``, layers that are not called as modules are left out.
    """
    excluded = set(exclude)
    unknown = excluded - {name for name, _ in model.named_modules()}
    if unknown:
        raise ValueError(f"exclude names no module of the model: {', '.join(sorted(unknown))}")
    uses: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(parameter, []).append(name)
    found: dict[str, Layer] = {}
    for name, module in model.named_modules():
        for layer in _layers_of(name, module):
            found.setdefault(layer.name, layer)  # an owner comes before the modules that it does not call
    place = {module: number for number, module in enumerate(model.modules())}
    layers = {
        layer.name: layer
        for layer in sorted(found.values(), key=lambda layer: place[layer.module])
        if (functional or layer.owner is None) and not _within(layer.name, excluded)
        if layer.adapter.trained(layer.module) and all(len(uses[p]) == 1 for p in layer.parameters)
    }
    covered = {id(p) for layer in layers.values() for p in layer.parameters}
    left = {names[0]: p for p, names in uses.items() if p.requires_grad and id(p) not in covered}
    owners = {id(p): layer.owner for layer in found.values() if layer.owner for p in layer.parameters}
    reasons = {}
    for name, p in left.items():
        owner = owners.get(id(p))
        reasons[name] = _reason(model, name, uses[p], excluded, owner, functional)
    return Coverage(layers, reasons)


def _within(name: str, excluded: set[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in excluded)


def _reason(
    model: nn.Module, name: str, names: list[str], excluded: set[str], owner: nn.Module | None, functional: bool
) -> str:
    if _within(name, excluded):
        return "excluded"
    if len(names) > 1:
        return f"one parameter in several places: {', '.join(names)}"
    module = model.get_submodule(name.rpartition(".")[0])
    if owner and not functional:
        return f"used inside {type(owner).__name__}, not called as a module"
    if owner or adapter_of(module):
        return "the layer's weight is frozen or not a plain parameter"
    if _known(module, _PARTS):
        return f"not a weight matrix of {type(module).__name__}"
    return f"no adapter for {type(module).__name__}"


__all__ = ["RULES", "Adapter", "Coverage", "Exposed", "Layer", "adapter_of", "cover"]
