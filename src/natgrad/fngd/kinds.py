"""Which layers FNGD steps, and why it leaves others to AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from natgrad.layers import Coverage, Inventory, Layer
from natgrad.record import Record

SHARED = "FNGD has no rule for operations whose examples are not told apart"


def fit(model: nn.Module, found: Coverage, apart: Mapping[str, str] | None = None) -> Coverage:
    """The layers of ``found`` that FNGD steps: those on anything but tokens whose block is all of their parameters.

    ``apart`` has reasons for layers that are left out otherwise.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    reasons = {name: (apart or {}).get(name) or _reason(layer) for name, layer in found.layers.items()}
    layers = {name: layer for name, layer in found.layers.items() if not reasons[name]}
    kept = {id(p) for layer in layers.values() for p in layer.parameters}
    left = {
        names[id(p)]: f"{', '.join(layer.operations)}; {reasons[name]}"
        for name, layer in found.layers.items()
        for p in layer.parameters
        if id(p) not in kept
    }
    return Coverage(layers, {**found.uncovered, **left}, found.expected)


def turned(inventory: Inventory) -> dict[str, str]:
    """The layers whose weight is used both ways round."""
    known = (inventory.layer(fact.weight, fact.form) for fact in inventory.facts)
    both = {layer.name for layer, swapped in filter(None, known) if swapped}
    return dict.fromkeys(both, "FNGD has no rule for weights that are used both ways round")


def shared(records: Iterable[Record]) -> dict[str, str]:
    """The layers that saw something else than the examples of a pass: positions that the examples share, or some of
    them alone."""
    uses = (
        (name, len(use.x) == record.examples())
        for record in records
        for name, each in record.calls.items()
        for use in each
    )
    return {name: SHARED for name, same in uses if not same}


def _reason(layer: Layer) -> str:
    if layer.form.tokens or layer.mixed:
        return "FNGD has no rule for tokens"
    return "" if layer.whole else "FNGD has no rule for a part of a parameter"
