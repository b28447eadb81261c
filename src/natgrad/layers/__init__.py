"""Which layers are understood, and how: one adapter per kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from natgrad.capture import Capture, Kind
from natgrad.jets import JetLinear
from natgrad.layers import attention, functional, recurrent, source
from natgrad.layers.base import Adapter
from natgrad.layers.conv import ConvAdapter, ConvTransposeAdapter
from natgrad.layers.embedding import BagAdapter, EmbeddingAdapter
from natgrad.layers.functional import Exposed, Rule
from natgrad.layers.jet import JetAdapter
from natgrad.layers.linear import BilinearAdapter, LinearAdapter, TransposedLinearAdapter
from natgrad.layers.norm import BatchNormAdapter, GroupNormAdapter, InstanceNormAdapter, LayerNormAdapter
from natgrad.layers.ties import by_hand, tied, with_biases
from natgrad.sparse import Sparse, SparseCapture

WIDE = 8192
"""Sides of more inputs or outputs than this get a diagonal in place of a covariance, unless told otherwise."""

Known = TypeVar("Known")

_BUILT_IN: dict[type[nn.Module] | str, Adapter] = {
    nn.Linear: LinearAdapter(),
    JetLinear: JetAdapter(),
    "transformers.pytorch_utils.Conv1D": TransposedLinearAdapter(),  # known by name, and not imported
    nn.Bilinear: BilinearAdapter(),
    nn.Embedding: EmbeddingAdapter(),
    nn.EmbeddingBag: BagAdapter(),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvAdapter()),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ConvTransposeAdapter()),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), LayerNormAdapter()),
    nn.GroupNorm: GroupNormAdapter(),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), BatchNormAdapter()),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), InstanceNormAdapter()),
}
_REGISTERED: dict[type[nn.Module], Adapter] = {}
_PARTS: dict[type[nn.Module], Callable[[nn.Module], Mapping[str, tuple[nn.Module, Adapter]]]] = {
    nn.MultiheadAttention: attention.attention_parts,
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell), recurrent.recurrent_parts),
}
RULES: dict[Any, Rule] = {**functional.RULES, **attention.RULES, **recurrent.RULES}


def register(kind: type[nn.Module], adapter: Adapter) -> None:
    """Let ``adapter`` read the modules of class ``kind``, and of subclasses that inherit its ``forward`` unchanged.

    It takes the place of another adapter of the class. Models that an optimizer or ``reconstruct`` has been given
    before are read as they were. Raises ``TypeError`` for anything but a module class and an adapter (an object).
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"register needs a class of modules, got {kind!r}")
    if not isinstance(adapter, Adapter):
        raise TypeError(f"register needs an adapter (an object, not a class), got {adapter!r}")
    _REGISTERED[kind] = adapter


def unregister(kind: type[nn.Module]) -> None:
    """Undo :func:`register`; ``ValueError`` for a class that was not registered."""
    if kind not in _REGISTERED:
        raise ValueError(f"no adapter was registered for {kind!r}")
    del _REGISTERED[kind]


@dataclass(frozen=True)
class Layer:
    """A covered layer: its name in the model, the module that has its parameters, and the adapter that reads it.

    ``owner`` is the module whose forward uses the parameters, without calling ``module``, where there is one.
    ``others`` are further uses of the same parameters, with the same block; ``diagonal`` says of which sides (out, in)
    no covariance is formed.
    """

    name: str
    module: nn.Module
    adapter: Adapter
    owner: nn.Module | None = None
    others: tuple[Layer, ...] = ()
    diagonal: tuple[bool, bool] = (False, False)

    @property
    def uses(self) -> tuple[Layer, ...]:
        """Itself and the other uses."""
        return (self, *self.others)

    @property
    def kind(self) -> Kind:
        """How it uses its weight."""
        tokens = {use.adapter.tokens for use in self.uses}
        if len(tokens) == 2:
            return "mixed"
        return "tokens" if True in tokens else "wide" if any(self.diagonal) else "plain"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the block, the weight first."""
        return self.adapter.parameters(self.module)

    @property
    def has_gradient(self) -> bool:
        """Whether a backward pass has reached the weight."""
        return self.parameters[0].grad is not None

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

    @torch.no_grad()
    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """What is kept of the arguments of a call, its examples first."""
        return self.adapter.batched(self.module, self.adapter.read(self.module, *args, **kwargs).detach())

    def pack(self, tensors: list[Tensor]) -> Tensor:
        """Tensors like the parameters as one block."""
        return self.adapter.pack(self.module, tensors)

    def unpack(self, block: Tensor) -> list[Tensor]:
        """A block as tensors like the parts of the parameters."""
        return self.adapter.unpack(self.module, block)

    def blank(self, examples: int = 1, device: torch.device | None = None) -> Capture:
        """What a few examples of zeros would give."""
        weight, (*groups, out, width), n = self.parameters[0], self.shape, float(examples)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        g = torch.zeros((*groups, examples, 1, out), dtype=dtype, device=device or weight.device)
        if self.kind in ("tokens", "mixed"):
            zero = g.new_zeros(examples, 1, 1)
            return SparseCapture(Sparse(zero.long(), zero, width), g, n, n, diagonal=self.diagonal)
        return Capture(g.new_zeros(*groups, examples, 1, width), g, n, n, diagonal=self.diagonal)


@dataclass(frozen=True)
class Coverage:
    """What of a model is covered: the layers, and the reason for every trained parameter that is not."""

    layers: dict[str, Layer]
    uncovered: dict[str, str]

    def only(self, model: nn.Module, kinds: Sequence[Kind], reason: str) -> Coverage:
        """Without layers of other kinds and without shared weights, for ``reason``."""
        kept = {key: layer for key, layer in self.layers.items() if layer.kind in kinds and not layer.others}
        lost = {id(p) for key, layer in self.layers.items() if key not in kept for p in layer.parameters}
        left = {name: reason for name, p in model.named_parameters() if id(p) in lost}
        return Coverage(kept, {**self.uncovered, **left})


def check_wide(wide: int | None) -> None:
    """Raise ``ValueError`` unless ``wide`` is a whole number of at least 1, or ``None``."""
    if wide is not None and (not isinstance(wide, int) or isinstance(wide, bool) or wide < 1):
        raise ValueError(f"wide must be a whole number of at least 1, or None for no limit, got {wide!r}")


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of a module: of its class, or of the base class whose ``forward`` it inherits unchanged."""
    return _known(module, {**_BUILT_IN, **_REGISTERED})


def _known(module: nn.Module, table: Mapping[Any, Known]) -> Known | None:
    for kind in type(module).__mro__:
        if type(module).forward is getattr(kind, "forward", None):
            for key in (kind, f"{kind.__module__}.{kind.__qualname__}"):
                if key in table:
                    return table[key]
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


def _written(model: nn.Module) -> Iterator[tuple[nn.Parameter, Layer | None]]:
    """The weights of modules that methods of other modules multiply with; ``None`` where nothing reads such a use."""
    for name, owner in model.named_modules():
        prefix = f"{name}." if name else ""
        for use in source.written_uses(owner):
            module = _inside(owner, use.path)
            weight = module._parameters.get("weight") if module else None
            if module is None or weight is None:
                continue
            known = adapter_of(module)
            adapter = by_hand(use, known, len(weight)) if known else None
            yield weight, Layer(f"{prefix}{use.path}.weight", module, adapter, owner) if adapter else None


def _inside(owner: nn.Module, path: str) -> nn.Module | None:
    try:
        return owner.get_submodule(path)
    except AttributeError:
        return None


def cover(model: nn.Module, exclude: Iterable[str] = (), functional: bool = True, wide: int | None = WIDE) -> Coverage:
    """Find the layers of ``model`` that have an adapter, and say why the other parameters have none.

    Modules that share a weight are one layer, by the name of the first. ``exclude`` names modules that are left out
    with all they contain; ``ValueError`` for a name that is none. Without ``functional``, layers that are not called as
    modules are left out. Sides above ``wide`` are kept diagonal.
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
    usable = [
        layer
        for layer in sorted(found.values(), key=lambda layer: place[layer.module])
        if (functional or layer.owner is None) and not _within(layer.name, excluded)
        if layer.adapter.trained(layer.module) and layer.adapter.refuses(layer.module) is None
    ]
    users = {p: [model.get_submodule(name.rpartition(".")[0]) for name in names] for p, names in uses.items()}
    sharing: dict[tuple[nn.Parameter, str], list[Layer]] = {}
    for layer in usable:
        sharing.setdefault((layer.parameters[0], layer.name if layer.owner else ""), []).append(layer)
    hands: dict[nn.Parameter, list[Layer | None]] = {}
    for weight, use in _written(model):
        hands.setdefault(weight, []).append(use)
    joined = (_joined(alike, users, hands.get(alike[0].parameters[0], ())) for alike in sharing.values())
    layers = {layer.name: replace(layer, diagonal=_diagonal(layer, wide)) for layer in joined if layer}
    covered = {id(p) for layer in layers.values() for p in layer.parameters}
    left = {names[0]: p for p, names in uses.items() if p.requires_grad and id(p) not in covered}
    owners = {id(p): layer.owner for layer in found.values() if layer.owner for p in layer.parameters}
    reasons = {}
    for name, p in left.items():
        owner = owners.get(id(p))
        reasons[name] = _reason(model, name, uses[p], excluded, owner, functional, covered)
        if None in hands.get(p, ()) and not _within(name, excluded):
            reasons[name] = "used by a module, and by hand in a way that has no common block"
    return Coverage(layers, reasons)


def _joined(
    alike: Sequence[Layer], users: Mapping[nn.Parameter, Sequence[nn.Module]], hands: Sequence[Layer | None]
) -> Layer | None:
    """The layer of all these uses of a weight, and of those by hand; ``None`` where something else uses it too."""
    first = alike[0]
    written = [use for use in hands if use]
    if len(written) < len(hands):
        return None
    if first.owner:
        return first if not hands and all(len(users[p]) == 1 for p in first.parameters) else None
    if set(users[first.parameters[0]]) != {layer.module for layer in alike}:
        return None
    alike = [*alike, *written]
    modules = [layer.module for layer in alike]
    adapters = tied(modules, [layer.adapter for layer in alike])
    if adapters is None:
        return None
    adapters = with_biases(modules, adapters, users)
    first, *others = (replace(use, adapter=adapter) for use, adapter in zip(alike, adapters, strict=True))
    return replace(first, others=tuple(others))


def _diagonal(layer: Layer, wide: int | None) -> tuple[bool, bool]:
    """Which sides (out, in) are diagonal: wide ones, and that of tokens."""
    out, width = (wide is not None and size > wide for size in layer.shape[-2:])
    return out, width or layer.kind in ("tokens", "mixed")


def _within(name: str, excluded: set[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in excluded)


def _reason(
    model: nn.Module,
    name: str,
    names: list[str],
    excluded: set[str],
    owner: nn.Module | None,
    functional: bool,
    covered: set[int],
) -> str:
    if _within(name, excluded):
        return "excluded"
    module = model.get_submodule(name.rpartition(".")[0])
    if adapter_of(module) and name.endswith("bias") and id(module._parameters.get("weight")) in covered:
        return "a bias that does not go with all uses of its layer's weight"
    if len(names) > 1:
        return f"one parameter in several places: {', '.join(names)}"
    if owner and not functional:
        return f"used inside {type(owner).__name__}, not called as a module"
    adapter = adapter_of(module)
    refusal = adapter.refuses(module) if adapter else None
    if refusal:
        return refusal
    if owner or adapter:
        return "the layer's weight is frozen or not a plain parameter"
    if _known(module, _PARTS):
        return f"not a weight matrix of {type(module).__name__}"
    return f"no adapter for {type(module).__name__}"


__all__ = [
    "RULES",
    "WIDE",
    "Adapter",
    "Coverage",
    "Exposed",
    "Layer",
    "adapter_of",
    "check_wide",
    "cover",
    "register",
    "unregister",
]
