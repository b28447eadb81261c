"""When the layers of a network are due: by a cadence, or by what they were seen to cost and a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from natgrad.fishers import Approximation, for_layer
from natgrad.layers import Layer
from natgrad.optim.budget import PERIODS, Account, Budget, Load, Plan
from natgrad.optim.cadence import Cadence, Due
from natgrad.optim.cost import work
from natgrad.optim.geometry import Frobenius, Geometry
from natgrad.optim.layerwise import State
from natgrad.record import Record


@dataclass
class Schedule:
    """What is due at a step, for a ``cadence`` or a ``budget``; plans are kept as long as what they follow from.

    ``samples``: whether an observation takes a backward pass of its own; ``geometry``: what a refresh prepares.
    """

    approximation: Approximation
    cadence: Cadence
    budget: Budget | None = None
    samples: bool = False
    geometry: Geometry = Frobenius()

    def __post_init__(self) -> None:
        """Nothing is known."""
        self._plan: tuple[Any, Plan | None] = ((), None)
        self._account: tuple[Any, Account] = ({}, Account())
        self._due: tuple[Any, Due] = ((), Due(0, {}, ()))

    def account(self, saved: Mapping[str, Any]) -> Account:
        """The account that the clock holds."""
        if self._account[0] is not saved:
            self._account = saved, Account.of(saved)
        return self._account[1]

    def saved(self, account: Account) -> dict[str, Any]:
        """What the clock is to hold."""
        self._account = account.values(), account
        return self._account[0]

    def counted(self, account: Account, layers: Mapping[str, Layer], records: Sequence[Record]) -> Account:
        """The account with the sizes of layers that are new to it."""
        if self.budget is None or not records or layers.keys() <= account.seen.keys():
            return account
        new = {name: _sizes(layer, records) for name, layer in layers.items() if name not in account.seen}
        return account.counted({name: sizes for name, sizes in new.items() if sizes[0]})

    def plan(self, account: Account, layers: Mapping[str, Layer], free: bool) -> Plan | None:
        """The plan for layers whose sizes are known.

        ``None`` where passes are observed anyway (``free``): a model that samples every step needs young curvature, and
        its own price is many times that of the cadence.
        """
        if self.budget is None or free:
            return None
        key = (account.seen, layers, free, self.geometry)
        if self._plan[1] is None or any(old is not new for old, new in zip(self._plan[0], key, strict=True)):
            loads = self._loads(account, layers, free or not self.samples)
            self._plan = key, self.budget.plan(loads)
        return self._plan[1]

    def due(self, account: Account, layers: Mapping[str, Layer], step: int, free: bool) -> Due:
        """What is due at a step."""
        plan = self.plan(account, layers, free)
        if plan is None or plan.budget.given >= PERIODS:
            return self.cadence.due(step, layers)
        known = self._due[0]
        if not known or known[0] is not account or known[1] is not plan or known[2] != step:
            self._due = (account, plan, step), plan.due(account, step, [*layers])
        return self._due[1]

    def serves(self, account: Account, layers: Mapping[str, Layer], free: bool) -> dict[str, int]:
        """How many steps what turns a root serves: one without a budget, the longest where costs are not known."""
        plan, longest = self.plan(account, layers, free), 1 if self.budget is None else self.geometry.every
        turns = {} if plan is None else plan.turns
        return {name: turns[name].serves if name in turns else longest for name in layers}

    def watches(self, account: Account, layers: Mapping[str, Layer], step: int, free: bool) -> bool:
        """Whether a step observes any layer, or would if it were known which there are."""
        if not layers:
            return self.cadence.observes(step)
        return bool(self.due(account, layers, step, free).observe)

    def charged(
        self,
        account: Account,
        layers: Mapping[str, Layer],
        step: int,
        free: bool,
        passed: bool,
        before: State,
        after: State,
    ) -> Account:
        """The account after a step that led from one state to another, and had a pass or not."""
        plan = self.plan(account, layers, free)
        if plan is None or before is after or plan.budget.given >= PERIODS:
            return account
        due = self.due(account, layers, step, free)
        pairs = [(name, before.layers.get(name), c) for name, c in after.items()]
        observed = [n for n, old, new in pairs if new.observations > (old.observations if old else 0)]
        tried = [
            n
            for n, old, new in pairs
            if (new.refreshes, new.retries) != ((old.refreshes, old.retries) if old else (0, 0))
        ]
        return plan.charged(account, step, due.observe if passed else (), observed, tried)

    def _loads(self, account: Account, layers: Mapping[str, Layer], free: bool) -> dict[str, Load]:
        loads: dict[str, Load] = {}
        known: dict[object, Load | None] = {}
        for name, layer in layers.items():
            if name not in account.seen:
                continue
            key = (layer.shape, layer.weight.dtype, layer.kind, layer.diagonal, layer.form.tokens, account.seen[name])
            if key not in known:
                known[key] = self._load(layer, *account.seen[name])
            load = known[key]
            if load is not None:
                loads[name] = replace(load, see=0.0) if free else load
        return loads

    def _load(self, layer: Layer, examples: int, positions: int, seeds: int) -> Load | None:
        approximation = for_layer(self.approximation, layer.kind)
        one = work(approximation, layer, examples, positions, self.geometry) if approximation.reads != "all" else None
        if one is None:
            return None
        sides = [size for size, diagonal in zip(layer.shape[-2:], layer.diagonal, strict=True) if not diagonal]
        return Load(
            one.plain,
            one.see * seeds,
            one.observe * seeds,
            one.refresh,
            one.fixed,
            examples,
            positions,
            max(sides, default=1),
            "all" if layer.form.tokens else approximation.reads,
            one.turn,
            self.geometry.every,
        )


def _sizes(layer: Layer, records: Sequence[Record]) -> tuple[int, int, int]:
    """The examples of a step, the positions of each, and the seeds sent back."""
    all_sizes = [record.positions(layer) for record in records]
    examples = sum(n for n, _ in all_sizes)
    positions = max((t for _, t in all_sizes), default=1)
    seeds = [len(use.call.gradients) for record in records for use in record.calls.get(layer.name, ())]
    return examples, positions, max(seeds, default=1)
