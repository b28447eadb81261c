"""How often curvature is observed and renewed, and on how much, for a given share of a training step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from natgrad.optim.cadence import Cadence, Due, latest
from natgrad.record import Share

ENOUGH = (16, 8)  # rows of statistics in the larger side of a layer: if all goes well, and if not
FEWEST = 256  # rows, however small the layer
EXAMPLES = 32  # whose labels are drawn, however many positions each has
CREDIT = 12.0  # plain steps, so that the first ten cost no more than some two and a half each
TURNING = 2.0  # times the overhead is what turning roots may take besides
BURST = 4.0  # plain steps that one step may cost beside itself, unless one layer alone costs more


@dataclass(frozen=True)
class Load:
    """What a layer costs, in any unit: ``plain``, its part of a training step, ``see``, of a backward pass for samples,
    ``observe`` all its positions, ``refresh``, and ``fixed``, with either.

    It has ``positions`` in each of ``examples``, and ``side`` is the larger one of its covariances; ``reads`` says what
    may be left out. ``turn`` is what a step takes that turns a root, beyond any other, which then serves ``longest``
    steps at most.
    """

    plain: float
    see: float
    observe: float
    refresh: float
    fixed: float = 0.0
    examples: int = 1
    positions: int = 1
    side: int = 1
    reads: Literal["positions", "examples", "all"] = "all"
    turn: float = 0.0
    longest: int = 1

    def share(self, enough: float) -> Share:
        """What is read for ``enough`` rows in the larger side; positions are left out before examples are."""
        wanted, rows = max(FEWEST, enough * self.side), self.examples * self.positions
        if self.reads == "all" or wanted >= rows:
            return Share()
        stride = 1
        while self.reads == "positions" and 2 * stride <= self.positions and 2 * stride * wanted <= rows:
            stride *= 2
        examples = max(math.ceil(wanted * stride / self.positions), min(EXAMPLES, self.examples))
        return Share(min(1.0, examples / self.examples), stride)


@dataclass(frozen=True)
class Turn:
    """The plan for a layer: what an observation reads, the periods, and the costs of both, in plain steps; and how many
    steps what turns its root serves."""

    share: Share
    observe_every: int
    refresh_every: int
    observe: float
    refresh: float
    serves: int = 1

    def __str__(self) -> str:
        return (
            f"{100 * self.share.fraction / self.share.stride:.3g} % observed every {self.observe_every} steps, "
            f"renewed every {self.refresh_every}" + (f", turned every {self.serves}" if self.serves > 1 else "")
        )


@dataclass(frozen=True)
class Account:
    """What has been done so far: the plain steps ``spent``, and when each layer was last observed and refreshed, -1 for
    never, and how often observed.

    ``seen`` are the examples, the positions of each and the seeds of every layer, at the first pass that had it.
    """

    spent: float = 0.0
    last: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    seen: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Account:
        """From the values of :meth:`values`."""
        last, seen = (
            {name: (int(a), int(b), int(c)) for name, (a, b, c) in saved.get(key, {}).items()}
            for key in ("last", "seen")
        )
        return cls(float(saved.get("spent", 0.0)), last, seen)

    def values(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        last, seen = ({name: list(numbers) for name, numbers in x.items()} for x in (self.last, self.seen))
        return {"spent": self.spent, "last": last, "seen": seen}

    def counted(self, seen: Mapping[str, tuple[int, int, int]]) -> Account:
        """With the layers that are new."""
        return Account(self.spent, self.last, {**seen, **self.seen}) if seen.keys() - self.seen.keys() else self


@dataclass(frozen=True)
class Budget:
    """``overhead`` is the share of a plain training step that curvature may take on average.

    ``cadence`` is the densest that is of use. What was ``given`` of it holds as it is, and is not paid for: the rest
    has what it leaves of the budget, half of it at least.
    """

    overhead: float
    cadence: Cadence
    given: frozenset[str] = frozenset()

    def plan(self, loads: Mapping[str, Load]) -> Plan:
        """The smallest periods that fit, over all layers.

        To keep the mean age of what is used low, a layer's period follows the root of what it costs per plain work; it
        is never below the densest. Observations share a backward pass, so that their periods are multiples of one.
        """
        whole = sum(load.plain for load in loads.values())
        plan = self._plan(loads, whole, ENOUGH[0], 0.0)
        if plan.rate() <= self.overhead:
            return plan
        plan = self._plan(loads, whole, ENOUGH[1], 0.0)
        spare = max(self.overhead - plan.rate(self.given), self.overhead / 2)
        low, high = 0.0, 1.0
        while self._plan(loads, whole, ENOUGH[1], high).rate(PERIODS - self.given) > spare:
            low, high = high, 2 * high
        for _ in range(20):
            middle = (low + high) / 2
            fits = self._plan(loads, whole, ENOUGH[1], middle).rate(PERIODS - self.given) <= spare
            low, high = (low, middle) if fits else (middle, high)
        return self._plan(loads, whole, ENOUGH[1], high)

    def _plan(self, loads: Mapping[str, Load], whole: float, enough: float, stretch: float) -> Plan:
        """The plan whose periods are ``stretch`` times the root, at least the densest."""
        cadence, turns, serves = self.cadence, {}, self._serves(loads, whole)
        for name, load in loads.items():
            full = Share(cadence.fraction) if self.given & {"observe", "fraction"} else load.share(enough)
            observe = (load.observe * full.fraction / full.stride + load.fixed) / whole
            refresh = (load.refresh + load.fixed) / whole
            part = load.plain / whole
            seen, renewed = (
                every if kind in self.given else max(every, math.ceil(stretch * every * (cost / part) ** 0.5))
                for kind, every, cost in (
                    ("observe", cadence.observe_every, observe + load.see / whole),
                    ("refresh", cadence.refresh_every, refresh),
                )
            )
            turns[name] = Turn(full, seen, renewed, observe, refresh, serves[name])
        base = min((turn.observe_every for turn in turns.values()), default=1)
        turns = {n: _multiple(turn, base) for n, turn in turns.items()}
        return Plan(self, turns, sum(load.see for load in loads.values()) / whole if loads else 0.0)

    def _serves(self, loads: Mapping[str, Load], whole: float) -> dict[str, int]:
        """1 where turning a root takes its share of the layer's part of a step at most, else what the rest pays for."""
        share = TURNING * self.overhead
        cheap = {name for name, load in loads.items() if load.turn <= share * load.plain}
        rest = share * whole - sum(loads[name].turn for name in cheap)
        dear = sum(load.turn for name, load in loads.items() if name not in cheap)
        steps = max(1, math.ceil(dear / rest)) if rest > 0 else math.inf
        return {name: 1 if name in cheap else int(min(load.longest, steps)) for name, load in loads.items()}


_NEVER = (-1, -1, 0)
PERIODS = frozenset({"observe", "refresh"})


@dataclass(frozen=True)
class Plan:
    """The plan for every layer, and what an observation costs all of them together, ``seeing``, in plain steps."""

    budget: Budget
    turns: Mapping[str, Turn]
    seeing: float = 0.0

    def __str__(self) -> str:
        return f"curvature takes {100 * self.rate():.3g} % of a training step, by counted flops" if self.turns else ""

    def rate(self, kinds: frozenset[str] = PERIODS) -> float:
        """What observing and refreshing cost on average, in plain steps a step."""
        seen = min((turn.observe_every for turn in self.turns.values()), default=1)
        observing = self.seeing / seen + sum(turn.observe / turn.observe_every for turn in self.turns.values())
        refreshing = sum(turn.refresh / turn.refresh_every for turn in self.turns.values())
        return observing * ("observe" in kinds) + refreshing * ("refresh" in kinds)

    def due(self, account: Account, step: int, layers: Sequence[str]) -> Due:
        """What is due of ``layers`` and can be paid, the urgent first; those without a plan as the cadence says."""
        budget = self.budget
        plainly = budget.cadence.due(step, layers)
        observe = {n: s for n, s in plainly.observe.items() if n not in self.turns or "observe" in budget.given}
        refresh = [n for n in plainly.refresh if n not in self.turns or "refresh" in budget.given]
        purse = _Purse(self._left(account, step), max(BURST, budget.overhead))
        for name in self._urgent(account, step, layers):
            turn, (seen, renewed, count) = self.turns[name], account.last.get(name, _NEVER)
            due = "observe" not in budget.given and self._observed(turn, step) > seen
            if due and purse.pays(turn.observe + (0.0 if observe else self.seeing)):
                observe[name] = replace(turn.share, turn=count)
            known = "refresh" not in budget.given and (seen >= 0 or name in observe)
            if known and self._renewed(turn, step, name, layers) > renewed and purse.pays(turn.refresh):
                refresh.append(name)
        patience = 2 * max((turn.refresh_every for turn in self.turns.values()), default=budget.cadence.refresh_every)
        at_once = [n for n in layers if n not in self.turns or "refresh" in budget.given]
        return Due(step, observe, refresh, at_once, patience)

    def charged(
        self, account: Account, step: int, asked: Collection[str], observed: Sequence[str], refreshed: Sequence[str]
    ) -> Account:
        """The account after a step that wanted to observe those ``asked``, and did these."""
        given, last = self.budget.given, {**account.last}
        for name in self.turns:
            seen, renewed, count = last.get(name, _NEVER)
            wanted = name in asked
            last[name] = step if wanted else seen, step if name in refreshed else renewed, count + wanted
        turns = self.turns
        paid = 0.0
        if "observe" not in given and observed:
            paid += self.seeing + sum(turns[name].observe for name in observed if name in turns)
        if "refresh" not in given:
            paid += sum(turns[name].refresh for name in refreshed if name in turns)
        return Account(account.spent + paid, last, account.seen)

    def _left(self, account: Account, step: int) -> float:
        return CREDIT + self.budget.overhead * (step + 1) - account.spent

    def _urgent(self, account: Account, step: int, layers: Sequence[str]) -> Iterator[str]:
        """Layers without an inverse, the cheapest first, then by how many periods ago they were renewed."""

        def key(name: str) -> tuple[bool, float]:
            turn, renewed = self.turns[name], account.last.get(name, _NEVER)[1]
            if renewed < 0:
                return False, turn.observe + turn.refresh
            return True, (renewed - step) / turn.refresh_every

        return iter(sorted((name for name in layers if name in self.turns), key=key))

    def _observed(self, turn: Turn, step: int) -> int:
        return latest(step, turn.observe_every, turn.refresh_every)

    def _renewed(self, turn: Turn, step: int, name: str, layers: Sequence[str]) -> int:
        every, staggered = turn.refresh_every, self.budget.cadence.staggered
        return latest(step, every, every, layers.index(name) * every // len(layers) if staggered else 0)


@dataclass
class _Purse:
    """What may be spent in a step: of ``left`` no more than ``most``, but for one thing that alone is more."""

    left: float
    most: float
    spent: float = 0.0

    def pays(self, cost: float) -> bool:
        """Whether there is enough, which is then spent."""
        if self.spent + cost > (self.left if self.spent == 0 else min(self.left, self.most)):
            return False
        self.spent += cost
        return True


def _multiple(turn: Turn, base: int) -> Turn:
    every = -(-turn.observe_every // base) * base
    return replace(turn, observe_every=every)
