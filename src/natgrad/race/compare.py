"""Several tasks: how many times better than an opponent an entry is, task by task and over all of them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, takewhile
from statistics import fmean
from typing import Any

from natgrad.race.run import Point, Run
from natgrad.race.summary import REFERENCES, Table, by_entry

NEAR = 1.1  # times the opponent's final training loss


@dataclass(frozen=True)
class Curve:
    """The mean over seeds, point by point as far as all of them are finite; `broken` where one diverged.

    `tests`, the held-out losses, are none where the task has no data for them.
    """

    step: Sequence[float]
    seconds: Sequence[float]
    loss: Sequence[float]
    tests: Sequence[float]
    broken: bool = False

    def axis(self, name: str) -> Sequence[float]:
        """The steps or the seconds."""
        return self.step if name == "step" else self.seconds

    def end(self, axis: str) -> float:
        """All steps or seconds."""
        return self.axis(axis)[-1]

    def at(self, axis: str, x: float) -> float:
        """Held-out loss after so many steps or seconds, straight between the points; after the end that of the end."""
        for (x0, y0), (x1, y1) in pairwise(zip(self.axis(axis), self.tests, strict=True)):
            if x < x1:
                return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        return self.tests[-1]

    def best(self, axis: str, x: float) -> float:
        """Least held-out loss within so many steps or seconds."""
        within = [y for at, y in zip(self.axis(axis), self.tests, strict=True) if at <= x]
        return min([*within, self.at(axis, x)])


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """Where a curve, straight between its points, is first at or below a level; None for never."""
    if y[0] <= level:
        return x[0]
    for (x0, y0), (x1, y1) in pairwise(zip(x, y, strict=True)):
        if y1 <= level:
            return x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
    return None


def averaged(runs: Sequence[Run]) -> Curve | None:
    """Average runs of one entry over seeds: steps, seconds and losses of the points of the same number."""
    points = list(takewhile(_finite, zip(*(run.curve for run in runs), strict=False)))
    if not points:
        return None
    step, seconds, loss = ([fmean(getattr(p, of) for p in few) for few in points] for of in ("step", "seconds", "loss"))
    tests = [[p.test_loss for p in few if p.test_loss is not None] for few in points]
    tested = all(len(values) == len(runs) for values in tests)
    return Curve(step, seconds, loss, [fmean(v) for v in tests] if tested else [], any(run.diverged for run in runs))


def _finite(points: Sequence[Point]) -> bool:
    return all(math.isfinite(p.loss) and math.isfinite(p.test_loss or 0) for p in points)


@dataclass(frozen=True)
class Score:
    """How many times better than the opponent, above 1 ahead of it; `bound` where it is that at the most."""

    value: float
    bound: bool = False

    @property
    def won(self) -> bool:
        """Whether it is ahead."""
        return self.value > 1 and not self.bound

    def __str__(self) -> str:
        """Three digits, after a sign for at most where it is a bound."""
        return f"{'≤ ' if self.bound else ''}{self.value:.3g}"


def to_loss(own: Curve, other: Curve, axis: str) -> Score | None:
    """The opponent's steps or seconds over one's own, to the opponent's final training loss."""
    level = other.loss[-1]
    theirs, ours = (crossing(curve.axis(axis), curve.loss, level) for curve in (other, own))
    return _sooner(theirs, ours, own, other, axis)


def to_best(own: Curve, other: Curve, axis: str) -> Score | None:
    """The same to the opponent's best held-out loss."""
    if not (own.tests and other.tests):
        return None
    level = min(other.tests)
    theirs, ours = (crossing(curve.axis(axis), curve.tests, level) for curve in (other, own))
    return _sooner(theirs, ours, own, other, axis)


def _sooner(theirs: float | None, ours: float | None, own: Curve, other: Curve, axis: str) -> Score | None:
    """None where the opponent never moved; a bound where the entry has not come there in its whole run."""
    if not theirs or ours == 0:
        return None
    if ours is None:
        return Score(theirs / max(own.end(axis), other.end(axis) if own.broken else 0), bound=True)
    return Score(theirs / ours)


def held_out(own: Curve, other: Curve, axis: str) -> Score | None:
    """The opponent's final held-out loss over one's own after as many steps or seconds."""
    return _lower(own, other, axis, Curve.at)


def best_held_out(own: Curve, other: Curve, axis: str) -> Score | None:
    """The opponent's best held-out loss over one's own best within as many steps or seconds."""
    return _lower(own, other, axis, Curve.best)


def _lower(own: Curve, other: Curve, axis: str, of: Callable[[Curve, str, float], float]) -> Score | None:
    """None where nothing was held out; a bound, by the best it ever had, where the entry diverged."""
    if not (own.tests and other.tests):
        return None
    end = other.end(axis)
    ours = own.best(axis, end) if own.broken else of(own, axis, end)
    return Score(of(other, axis, end) / ours, bound=own.broken) if ours > 0 else None


MEASURES: dict[str, Callable[[Curve, Curve], Score | None]] = {
    "steps to its loss": lambda own, other: to_loss(own, other, "step"),
    "seconds to its loss": lambda own, other: to_loss(own, other, "seconds"),
    "steps to its best held-out": lambda own, other: to_best(own, other, "step"),
    "seconds to its best held-out": lambda own, other: to_best(own, other, "seconds"),
    "held-out, equal steps": lambda own, other: held_out(own, other, "step"),
    "held-out, equal seconds": lambda own, other: held_out(own, other, "seconds"),
    "best held-out, equal steps": lambda own, other: best_held_out(own, other, "step"),
    "best held-out, equal seconds": lambda own, other: best_held_out(own, other, "seconds"),
}


@dataclass(frozen=True)
class Duel:
    """An entry against an opponent on one task; `nearest` is its least training loss over the opponent's final one."""

    task: str
    entry: str
    opponent: str
    scores: Mapping[str, Score]
    nearest: float
    step_cost: float


def duel(task: str, entry: str, own: Curve, opponent: str, other: Curve) -> Duel:
    """Measure an entry against an opponent, which has taken steps and has a positive loss."""
    scores = {name: score for name, measure in MEASURES.items() if (score := measure(own, other))}
    cost = (
        own.end("seconds") / own.end("step") / (other.end("seconds") / other.end("step"))
        if own.end("step")
        else math.nan
    )
    return Duel(task, entry, opponent, scores, min(own.loss) / other.loss[-1], cost)


def duels(tasks: Mapping[str, Sequence[Run]]) -> list[Duel]:
    """Every entry against every reference that took part and did not diverge, on every task."""
    found = []
    for task, runs in tasks.items():
        curves = {name: curve for name, group in by_entry(runs).items() if (curve := averaged(group))}
        for opponent in REFERENCES:
            other = curves.get(opponent)
            if other and not other.broken and other.end("step") and other.loss[-1] > 0:
                found += [duel(task, e, own, opponent, other) for e, own in curves.items() if e != opponent]
    return found


@dataclass(frozen=True)
class Overall:
    """One measure over tasks: the geometric mean, how many were won, and the worst.

    A task on which the loss was never reached counts with its bound, so the mean is one too.
    """

    mean: Score
    tasks: int
    reached: int
    won: int
    worst: Score
    worst_task: str

    def __str__(self) -> str:
        """All of it in a cell of a table."""
        return f"{self.mean}; won {self.won} of {self.tasks}; worst {self.worst} ({self.worst_task})"


def overall(scores: Mapping[str, Score]) -> Overall | None:
    """Summarise the scores by task; None where there are none."""
    if not scores:
        return None
    bound = any(score.bound for score in scores.values())
    mean = Score(_geometric(score.value for score in scores.values()), bound)
    worst = min(scores, key=lambda task: (scores[task].value, not scores[task].bound))
    reached, won = (sum(flags) for flags in ([not s.bound for s in scores.values()], [s.won for s in scores.values()]))
    return Overall(mean, len(scores), reached, won, scores[worst], worst)


def _geometric(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.exp(fmean(math.log(value) for value in known)) if known else math.nan


def over_tasks(found: Iterable[Duel]) -> list[dict[str, Any]]:
    """Summarise duels by entry and opponent: `measures`, and `far`, the tasks whose loss never came near."""
    groups: dict[tuple[str, str], list[Duel]] = {}
    for one in found:
        groups.setdefault((one.opponent, one.entry), []).append(one)
    return [
        {
            "entry": entry,
            "opponent": opponent,
            "measures": {
                name: overall({d.task: d.scores[name] for d in group if name in d.scores}) for name in MEASURES
            },
            "step cost": _geometric(d.step_cost for d in group),
            "far": [d.task for d in group if d.nearest > NEAR],
        }
        for (opponent, entry), group in groups.items()
    ]


def summary_table(found: Sequence[Duel], opponent: str) -> Table:
    """A row for every entry over all tasks, against one opponent."""
    headers = ["entry", "step", *MEASURES, "never within 10 % of its loss"]
    rows = []
    for line in over_tasks(d for d in found if d.opponent == opponent):
        cells = [str(cell) if (cell := line["measures"][name]) else "-" for name in MEASURES]
        rows.append([line["entry"], f"{line['step cost']:.2f}", *cells, ", ".join(line["far"]) or "-"])
    return Table(headers, rows)


def task_table(found: Sequence[Duel], opponent: str) -> Table:
    """A row for every task and entry, against one opponent."""
    headers = ["task", "entry", "step", *MEASURES, "least loss / its loss"]
    rows = []
    for d in found:
        if d.opponent == opponent:
            cells = [str(d.scores[name]) if name in d.scores else "-" for name in MEASURES]
            rows.append([d.task, d.entry, f"{d.step_cost:.2f}", *cells, f"{d.nearest:.3g}"])
    return Table(headers, rows)


def plain_summary(found: Sequence[Duel]) -> dict[str, Any]:
    """Everything in plain numbers, for a file."""
    lines = over_tasks(found)
    for line in lines:
        line["measures"] = {name: asdict(cell) if cell else None for name, cell in line["measures"].items()}
    return {"over tasks": lines, "by task": [asdict(d) for d in found]}
