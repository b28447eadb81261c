"""The layers of a model, from the uses of its parameters that were seen, and the reason for every other parameter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from natgrad.layers.form import FORMS, Form
from natgrad.layers.layer import Coverage, Layer
from natgrad.layers.product import Product
from natgrad.layers.view import Span, View, overlap, span

WIDE = 8192
"""Sides of more inputs or outputs than this get a diagonal in place of a covariance, unless told otherwise."""


def check_wide(wide: int | None) -> None:
    """Raise ``ValueError`` unless ``wide`` is a whole number of at least 1, or ``None``."""
    if wide is not None and (not isinstance(wide, int) or isinstance(wide, bool) or wide < 1):
        raise ValueError(f"wide must be a whole number of at least 1, or None for no limit, got {wide!r}")


class Place(NamedTuple):
    """A view of the parameter of a name."""

    parameter: str
    view: View


class Fact(NamedTuple):
    """A use that was seen: of which weight and bias, in which form, by which operation."""

    weight: Place
    bias: Place | None
    form: Form
    operation: str
    part: str = ""


@dataclass
class Inventory:
    """What is known of the uses of the parameters of a model; ``layers`` follows from the facts alone.

    ``exclude`` names modules that are left out with all they contain, ``ValueError`` for a name that is none. Sides
    above ``wide`` are kept diagonal.
    """

    model: nn.Module
    exclude: Sequence[str] = ()
    wide: int | None = WIDE
    facts: dict[Fact, None] = field(default_factory=dict)
    strays: dict[str, dict[str, bool]] = field(default_factory=dict)
    """Of a parameter, the operations without a rule that it was seen in, and whether a loss depends on them."""

    def __post_init__(self) -> None:
        """Refuse an ``exclude`` that is none."""
        unknown = set(self.exclude) - {name for name, _ in self.model.named_modules()}
        if unknown:
            raise ValueError(f"exclude names no module of the model: {', '.join(sorted(unknown))}")
        self.transformed = False  # whether parameters may have been used where nothing is seen
        self.layers: dict[str, Layer] = {}
        self._places: dict[tuple[Place, Form], tuple[str, bool]] = {}
        self._built: Any = None
        self._conflicts: dict[str, str] = {}
        self.names: dict[str, list[str]] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self._of: dict[int, str] = {}
        self._found: list[tuple[str, int]] = []
        self.refresh()

    def refresh(self) -> None:
        """Read the parameters of the model anew, and forget what was seen of those that are no longer there."""
        found = list(self.model.named_parameters(remove_duplicate=False))
        if [(name, id(p)) for name, p in found] == self._found:
            return
        self._found = [(name, id(p)) for name, p in found]
        before = self.parameters
        self.names, self.parameters, self._of = {}, {}, {}
        for name, p in found:
            first = self._of.setdefault(id(p), name)
            self.names.setdefault(first, []).append(name)
            self.parameters.setdefault(first, p)
        if before:
            self._forget(
                {n for n, p in before.items() if n not in self.parameters or self.parameters[n].shape != p.shape}
            )

    def _forget(self, gone: set[str]) -> None:
        """Forget the uses of some names."""
        kept = (
            f for f in self.facts if f.weight.parameter not in gone and (not f.bias or f.bias.parameter not in gone)
        )
        self.facts = dict.fromkeys(kept)
        self.strays = {name: known for name, known in self.strays.items() if name not in gone}
        self._built = None
        self.add(())

    @property
    def watched(self) -> list[nn.Parameter]:
        """The parameters whose uses are looked out for."""
        return [p for name, p in self.parameters.items() if not self.excluded(name)]

    def excluded(self, name: str) -> bool:
        """Whether a parameter is left out."""
        return any(root == "" or name.startswith(f"{root}.") for root in self.exclude)

    def name(self, parameter: nn.Parameter) -> str:
        """The name of a parameter."""
        return self._of[id(parameter)]

    def add(self, facts: Iterable[Fact], strays: Iterable[tuple[str, str, bool]] = ()) -> None:
        """Note what was seen, and make the layers anew if anything of it is new."""
        for fact in facts:
            self.facts.setdefault(fact)
        for name, operation, matters in strays:
            known = self.strays.setdefault(name, {})
            known[operation] = known.get(operation, False) or matters
        trained = tuple(p.requires_grad for p in self.parameters.values())
        state = (
            len(self.facts),
            sum(map(len, self.strays.values())),
            sum(sum(x.values()) for x in self.strays.values()),
            trained,
        )
        if state != self._built:
            self._built = state
            self._build()

    def layer(self, place: Place, form: Form) -> tuple[Layer, bool] | None:
        """The layer that a use belongs to, and whether its block is the transposed one of the use."""
        name, turned = self._places.get((place, form), ("", False))
        return (self.layers[name], turned) if name in self.layers else None

    def coverage(self) -> Coverage:
        """The layers, and the reasons for all other trained parameters."""
        covered = {id(p) for layer in self.layers.values() for p in layer.parameters}
        left = (name for name, p in self.parameters.items() if p.requires_grad and id(p) not in covered)
        return Coverage(dict(self.layers), {name: self._reason(name) for name in left})

    # From facts to layers.

    def _build(self) -> None:
        blocks = list(self._blocks(self.facts))
        joined = self._joined(blocks)
        apart = {fact.bias: fact.operation for fact in self.facts if fact.bias is not None and fact.bias not in joined}
        lone = [Fact(place, None, added(place), operation) for place, operation in apart.items()]
        blocks = list(self._blocks([*self.facts, *lone])) if lone else blocks
        for block in blocks:
            block.bias = next((fact.bias for fact in block.facts if fact.bias in joined), None)
        order = {name: number for number, name in enumerate(self.parameters)}
        blocks.sort(key=lambda block: (order[block.place.parameter], block.place.view.offset))
        self._places = {}
        layers: dict[str, Layer] = {}
        for block in blocks:
            layer = self._layer(block)
            if layer.name in layers:  # the name of a module and of a parameter may be one
                layer = self._layer(block, block.place.parameter)
            old = self.layers.get(layer.name)
            layers[layer.name] = old if old is not None and _same(old, layer) else layer
            for fact in block.facts:
                turned = self._key(fact) != block.key
                self._places[fact.weight, fact.form] = layer.name, turned
        self.layers = layers

    def _joined(self, blocks: list[_Block]) -> set[Place]:
        """The biases that are a column of a block: they go with all its uses, and have no other use."""
        own = {fact.weight.parameter for fact in self.facts}
        places = [{fact.bias for fact in block.facts} for block in blocks]
        holders = Counter(place for each in places for place in each)
        every = [place for place in holders if place is not None]
        return {
            bias
            for each in places
            if len(each) == 1 and (bias := next(iter(each))) is not None and holders[bias] == 1
            if not any(_overlap(bias, other) for other in every if other != bias)
            if bias.parameter not in own and bias.parameter not in self._conflicts and self._trains(bias)
        }

    def _trains(self, place: Place) -> bool:
        p = self.parameters.get(place.parameter)
        return p is not None and p.requires_grad and not p.is_complex()

    def _blocks(self, facts: Iterable[Fact]) -> Iterator[_Block]:
        """The uses of every weight that have one block; none of a weight whose uses have no common one."""
        self._conflicts = {
            name: f"used by {', '.join(sorted(strays))} too, which has no rule"
            for name, known in self.strays.items()
            if (strays := [operation for operation, matters in known.items() if matters])
        }
        found: dict[str, list[_Block]] = {}
        for fact in facts:
            name = fact.weight.parameter
            if name in self._conflicts or not self._trains(fact.weight):
                continue
            key, turned = self._key(fact), self._key(fact, turned=True)
            blocks = found.setdefault(name, [])
            known = next((block for block in blocks if block.key in (key, turned)), None)
            if known is not None:
                known.take(fact, key)
            elif any(overlap(block.place.view, fact.weight.view) for block in blocks):
                self._conflicts[name] = "used whole and in parts, or in two ways that have no common block"
            else:
                blocks.append(_Block(fact.weight, fact.form, [fact], key))
        for name, blocks in found.items():
            if name not in self._conflicts:
                yield from blocks

    def _key(self, fact: Fact, turned: bool = False) -> Span | tuple[Any, ...]:
        """What blocks that are the same have in common."""
        shape = self.parameters[fact.weight.parameter].shape
        whole = torch.empty(shape, device="meta")
        matrix = fact.form.matrix(fact.weight.view.of(whole))
        if matrix is whole or matrix._base is whole:
            return span(matrix.mT if turned else matrix)
        return fact.weight.view, fact.form.layout, turned

    def _layer(self, block: _Block, name: str | None = None) -> Layer:
        place, names = block.place, self.names[block.place.parameter]
        weight, view = self.parameters[place.parameter], place.view
        slot = "" if view.entries == weight.numel() else _part(block, weight)
        base = _base(place.parameter) if name is None else name
        bias = None if block.bias is None else self.parameters[block.bias.parameter]
        layer = Layer(
            f"{base}.{slot}" if slot.isalpha() else base + slot,
            weight,
            view,
            block.form,
            bias,
            None if block.bias is None else block.bias.view,
            f"{slot}." if slot else "",
            tuple(names),
            tuple(dict.fromkeys(fact.operation for fact in block.facts)),
            block.form.tokens and any(not fact.form.tokens for fact in block.facts),
        )
        out, width = (self.wide is not None and size > self.wide for size in layer.shape[-2:])
        object.__setattr__(layer, "diagonal", (out, width or layer.form.tokens))
        return layer

    def _reason(self, name: str) -> str:
        if self.excluded(name):
            return "excluded"
        if self.parameters[name].is_complex():
            return "complex"
        used = any(fact.weight.parameter == name or (fact.bias and fact.bias.parameter == name) for fact in self.facts)
        if name in self._conflicts and used:
            return self._conflicts[name]
        operations = sorted(self.strays.get(name, ()))
        if operations:
            return f"used by {', '.join(operations)}: no rule"
        seen = "not used in what was seen"
        return f"{seen}, but perhaps under a transform of torch.func" if self.transformed else seen

    # In and out of a checkpoint.

    def saved(self) -> dict[str, Any]:
        """What was seen, as plain values."""
        facts = [
            [
                _saved(fact.weight),
                _saved(fact.bias),
                type(fact.form).__name__,
                fact.form.values(),
                fact.operation,
                fact.part,
            ]
            for fact in self.facts
        ]
        return {"facts": facts, "strays": {name: dict(known) for name, known in self.strays.items()}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """What was saved, in place of what is known; ``ValueError`` for what is of another model."""
        facts = []
        for weight, bias, kind, values, operation, part in saved.get("facts", ()):
            if kind not in FORMS:
                raise ValueError(
                    f"the checkpoint has the form {kind!r}: import what registers it before load_state_dict"
                )
            form = FORMS[kind](*map(_frozen, values))
            facts.append(Fact(self._restored(weight), bias and self._restored(bias), form, operation, part))
        self._built = None
        self.facts, self.strays = {}, {name: dict(known) for name, known in saved.get("strays", {}).items()}
        self.add(facts)

    def _restored(self, saved: Any) -> Place:
        name, size, stride, offset = saved
        if name not in self.parameters:
            raise ValueError(f"the checkpoint is of another model: there is no parameter {name!r}")
        return Place(name, View(tuple(size), tuple(stride), offset))


@dataclass
class _Block:
    """Uses that have a block in common: that of ``place`` in ``form``."""

    place: Place
    form: Form
    facts: list[Fact]
    key: Any
    bias: Place | None = None

    def take(self, fact: Fact, key: Any) -> None:
        """One more; tokens decide how the block stands."""
        if fact.form.tokens and not self.form.tokens:
            self.place, self.form, self.key = fact.weight, fact.form, key
        self.facts.append(fact)


def added(place: Place) -> Product:
    """The form of a bias."""
    return Product(outs=tuple(range(len(place.view.size))), ins=())


def _same(old: Layer, new: Layer) -> bool:
    return (
        all(
            getattr(old, name) is getattr(new, name) or getattr(old, name) == getattr(new, name)
            for name in ("view", "form", "bias_view", "slot", "names", "operations", "mixed", "diagonal")
        )
        and old.weight is new.weight
        and old.bias is new.bias
    )


def _overlap(one: Place, other: Place) -> bool:
    return one.parameter == other.parameter and overlap(one.view, other.view)


def _base(name: str) -> str:
    """The name of a layer by that of its weight."""
    path, _, last = re.sub(r"parametrizations\.(\w+)\.original(\d*)$", r"\1\2", name).rpartition(".")
    last = last.removeprefix("weight_").removesuffix("_weight")
    return path if last == "weight" else f"{path}.{last}" if path else last


def _part(block: _Block, weight: nn.Parameter) -> str:
    """Which part of its weight a block is."""
    named = next((fact.part for fact in block.facts if fact.part), "")
    view, row = block.place.view, weight[0].numel() if weight.ndim else 1
    if named:
        return named
    if view.offset % row == 0 and view.entries % row == 0:
        first, count = view.offset // row, view.entries // row
        return f"[{first}]" if count == 1 else f"[{first}:{first + count}]"
    return f"@{view.offset}"


def _saved(place: Place | None) -> Any:
    if place is None:
        return None
    return [place.parameter, list(place.view.size), list(place.view.stride), place.view.offset]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
