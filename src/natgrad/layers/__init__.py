"""Which layers are understood, and how: one adapter per kind of layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad.layers.base import Adapter
from natgrad.layers.conv import ConvAdapter
from natgrad.layers.linear import LinearAdapter

_ADAPTERS: dict[type[nn.Module], Adapter] = {
    nn.Linear: LinearAdapter(),
    nn.Conv1d: ConvAdapter(),
    nn.Conv2d: ConvAdapter(),
    nn.Conv3d: ConvAdapter(),
}


@dataclass(frozen=True)
class Layer:
    """A covered layer: its name in the model, its module, and the adapter that reads it."""

    name: str
    module: nn.Module
    adapter: Adapter

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the block, the weight first."""
        return self.adapter.parameters(self.module)

    @property
    def shape(self) -> torch.Size:
        """The shape of the block (*groups, out, in)."""
        return self.pack([p.detach() for p in self.parameters]).shape

    def pack(self, tensors: list[Tensor]) -> Tensor:
        """Tensors like the parameters as one block."""
        return self.adapter.pack(self.module, tensors)

    def unpack(self, block: Tensor) -> list[Tensor]:
        """A block as tensors like the parameters."""
        return self.adapter.unpack(self.module, block)


@dataclass(frozen=True)
class Coverage:
    """What of a model is covered: the layers, and the reason for every trained parameter that is not."""

    layers: dict[str, Layer]
    uncovered: dict[str, str]


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of a module: of its class, or of the base class whose ``forward`` it inherits unchanged."""
    for kind in type(module).__mro__:
        if kind in _ADAPTERS and type(module).forward is kind.forward:
            return _ADAPTERS[kind]
    return None


def cover(model: nn.Module, exclude: Iterable[str] = ()) -> Coverage:
    """Find the layers of ``model`` that have an adapter, and say why the other parameters have none.

    ``exclude`` names modules that are left out with all they contain; ``ValueError`` for a name that is none.
    """
    excluded = set(exclude)
    unknown = excluded - {name for name, _ in model.named_modules()}
    if unknown:
        raise ValueError(f"exclude names no module of the model: {', '.join(sorted(unknown))}")
    uses: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(parameter, []).append(name)
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        adapter = None if _within(name, excluded) else adapter_of(module)
        weight = module._parameters.get("weight")
        if adapter and isinstance(weight, nn.Parameter) and weight.requires_grad:
            layer = Layer(name, module, adapter)
            if all(len(uses[p]) == 1 for p in layer.parameters):
                layers[name] = layer
    covered = {id(p) for layer in layers.values() for p in layer.parameters}
    left = {names[0]: p for p, names in uses.items() if p.requires_grad and id(p) not in covered}
    return Coverage(layers, {name: _reason(model, name, uses[p], excluded) for name, p in left.items()})


def _within(name: str, excluded: set[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in excluded)


def _reason(model: nn.Module, name: str, names: list[str], excluded: set[str]) -> str:
    if _within(name, excluded):
        return "excluded"
    if len(names) > 1:
        return f"one parameter in several places: {', '.join(names)}"
    module = model.get_submodule(name.rpartition(".")[0])
    if adapter_of(module):
        return "the layer's weight is frozen or not a plain parameter"
    return f"no adapter for {type(module).__name__}"


__all__ = ["Adapter", "Coverage", "Layer", "adapter_of", "cover"]
