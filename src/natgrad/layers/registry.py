"""Which kinds of modules are understood: an adapter for each, built in or registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from natgrad.jets import JetLinear
from natgrad.layers import attention, functional, recurrent
from natgrad.layers.base import Adapter
from natgrad.layers.conv import ConvAdapter, ConvTransposeAdapter
from natgrad.layers.embedding import BagAdapter, EmbeddingAdapter
from natgrad.layers.functional import Rule
from natgrad.layers.jet import JetAdapter
from natgrad.layers.linear import BilinearAdapter, LinearAdapter, TransposedLinearAdapter
from natgrad.layers.norm import BatchNormAdapter, GroupNormAdapter, InstanceNormAdapter, LayerNormAdapter

Known = TypeVar("Known")
Parts = Callable[[nn.Module], Mapping[str, tuple[nn.Module, Adapter]]]

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
_PARTS: dict[type[nn.Module], Parts] = {
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


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of a module: of its class, or of the base class whose ``forward`` it inherits unchanged."""
    return _known(module, {**_BUILT_IN, **_REGISTERED})


def parts_of(module: nn.Module) -> Parts | None:
    """What finds the parts of a module of torch whose forward uses weights without calling a layer."""
    return _known(module, _PARTS)


def _known(module: nn.Module, table: Mapping[Any, Known]) -> Known | None:
    for kind in type(module).__mro__:
        if type(module).forward is getattr(kind, "forward", None):
            for key in (kind, f"{kind.__module__}.{kind.__qualname__}"):
                if key in table:
                    return table[key]
    return None
