"""Finding the layers of a model, and the reason for every parameter that is in none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from natgrad.layers import attention, source
from natgrad.layers.layer import Coverage, Layer
from natgrad.layers.registry import adapter_of, parts_of
from natgrad.layers.ties import by_hand, tied, with_biases

WIDE = 8192
"""Sides of more inputs or outputs than this get a diagonal in place of a covariance, unless told otherwise."""


def check_wide(wide: int | None) -> None:
    """Raise ``ValueError`` unless ``wide`` is a whole number of at least 1, or ``None``."""
    if wide is not None and (not isinstance(wide, int) or isinstance(wide, bool) or wide < 1):
        raise ValueError(f"wide must be a whole number of at least 1, or None for no limit, got {wide!r}")


def _layers_of(name: str, module: nn.Module) -> Iterator[Layer]:
    """The layers of a module, trained or not: itself, or what its forward uses."""
    adapter = adapter_of(module)
    if adapter:
        yield Layer(name, module, adapter)
        return
    prefix = f"{name}." if name else ""
    for part, (holder, dense) in attention.sequence_parts(module).items():
        yield Layer(prefix + part, holder, dense)
    parts = parts_of(module) or source.written_parts
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
    apart = {id(weight) for weight, written in hands.items() if None in written}
    reasons = {
        name: _reason(model, name, uses[p], excluded, owners.get(id(p)), functional, covered, apart)
        for name, p in left.items()
    }
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
    apart: set[int],
) -> str:
    if _within(name, excluded):
        return "excluded"
    module = model.get_submodule(name.rpartition(".")[0])
    if apart & {id(model.get_parameter(name)), id(module._parameters.get("weight"))}:
        return "used by a module, and by hand in a way that has no common block"
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
    if parts_of(module):
        return f"not a weight matrix of {type(module).__name__}"
    return f"no adapter for {type(module).__name__}"
