"""The calls of a pass, given to the layers that follow from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from natgrad.layers import Fact, Inventory, Layer, Place
from natgrad.operations import Call, Operand, Watch
from natgrad.record import Record


class Sorting:
    """Finds the layers of calls; those of a pass like the last one are known."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._told: list[Any] = []  # what the calls of the last pass were
        self._facts, self._sorted = inventory.facts, inventory.layers  # at that time
        self._known: list[tuple[Layer, bool] | None] = []  # the answers

    def sort(self, record: Record, watch: Watch, reached: set[int]) -> None:
        """Give every call to its layer; those of biases that are in no layer's block to the bias's own."""
        inventory, told = self._inventory, [call.told for call in watch.calls]
        same = told == self._told and inventory.facts is self._facts
        learn(inventory, watch, reached, () if same else watch.calls)
        if not same or inventory.layers is not self._sorted:
            self._told, self._facts, self._sorted = told, inventory.facts, inventory.layers
            self._known = [inventory.layer(_place(inventory, call.weight), call.form) for call in watch.calls]
        for call, known in zip(watch.calls, self._known, strict=True):
            if known is not None:
                record.add(call, *known)
            if call.bias is not None and call.bias.trained and (known is None or not known[0].biased):
                alone = call.of_bias()
                own = inventory.layer(_place(inventory, alone.weight), alone.form)
                if own is not None:
                    record.add(alone, *own)


def learn(inventory: Inventory, watch: Watch, reached: set[int], calls: Iterable[Call]) -> None:
    """Enter into the inventory some calls, and all else that a watch has seen; ``reached`` are the strays that the
    outputs depend on."""
    facts = [
        Fact(
            _place(inventory, call.weight),
            None if call.bias is None else _place(inventory, call.bias),
            call.form,
            call.operation,
            call.part,
        )
        for call in calls
    ]
    strays = [(inventory.name(p), what, k in reached) for k, (p, what, _) in enumerate(watch.strays)]
    inventory.transformed |= watch.transformed
    inventory.add(facts, strays)


def _place(inventory: Inventory, operand: Operand) -> Place:
    return Place(inventory.name(operand.parameter), operand.view)
