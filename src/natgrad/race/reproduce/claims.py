"""Claims of a paper, judged by stated criteria on what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, Literal

from natgrad.race.bench import Cost
from natgrad.race.reproduce.fisher_error import Errors
from natgrad.race.run import Run
from natgrad.race.summary import reach

Verdict = Literal["reproduced", "partly", "not reproduced", "not run"]


class NotRun(LookupError):  # noqa: N818
    """What a measure needs was not run."""


@dataclass(frozen=True)
class Outcome:
    """What came of one experiment; `about` says at what size it ran, `missing` why it could not."""

    runs: Sequence[Run] = ()
    costs: Sequence[Cost] = ()
    errors: Sequence[Errors] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Results:
    """The outcomes of a study, by name of the task."""

    outcomes: Mapping[str, Outcome] = field(default_factory=dict)

    def of(self, task: str) -> Outcome:
        """The outcome of a task; empty where it was not run."""
        return self.outcomes.get(task, Outcome())

    def runs(self, task: str, row: str) -> list[Run]:
        """The runs of a row, one a seed, at least one."""
        found = [run for run in self.of(task).runs if run.name == row and run.curve]
        if not found:
            raise NotRun(f"{row} on {task}")
        return found


Measure = Callable[[Results], float]


def final(task: str, row: str) -> Measure:
    """The final training loss, mean over seeds; infinite where a seed diverged."""

    def measure(results: Results) -> float:
        return mean(math.inf if run.diverged else run.curve[-1].loss for run in results.runs(task, row))

    return measure


def metric(task: str, row: str, name: str) -> Measure:
    """A metric of the task after training, mean over seeds."""

    def measure(results: Results) -> float:
        return mean(run.curve[-1].metrics.get(name, math.nan) for run in results.runs(task, row))

    return measure


def loss_on_test(task: str, row: str) -> Measure:
    """The final test loss, mean over seeds."""

    def measure(results: Results) -> float:
        losses = [run.curve[-1].test_loss for run in results.runs(task, row)]
        return mean(math.nan if loss is None else loss for loss in losses)

    return measure


def seconds(task: str, row: str) -> Measure:
    """Seconds of training per epoch after the first, mean over seeds."""
    return lambda results: mean(map(epoch_seconds, results.runs(task, row)))


def epoch_seconds(run: Run) -> float:
    """Seconds of training per epoch, the first left out where there are others."""
    first, last = run.curve[min(1, len(run.curve) - 1)], run.curve[-1]
    if last.epoch > first.epoch:
        return (last.seconds - first.seconds) / (last.epoch - first.epoch)
    return last.seconds / last.epoch if last.epoch else math.nan


def until(task: str, row: str, mark: Measure) -> Measure:
    """Seconds of training to the first epoch end at or below a loss, mean over seeds; infinite where never."""

    def measure(results: Results) -> float:
        loss = mark(results)
        points = [reach(run.curve, loss) for run in results.runs(task, row)]
        return mean(point.seconds if point else math.inf for point in points)

    return measure


def step(task: str, row: str) -> Measure:
    """Mean milliseconds of a step over whole refresh periods, as ratio to SGD's in the same bench."""

    def measure(results: Results) -> float:
        for cost in results.of(task).costs:
            if cost.name == row and cost.mean_ratio is not None:
                return cost.mean_ratio
        raise NotRun(f"the bench of {row} on {task}")

    return measure


def fisher_error(task: str, approximation: str) -> Measure:
    """The relative Frobenius error, mean over layers and over the run."""

    def measure(results: Results) -> float:
        found = [at.over_layers(approximation) for at in results.of(task).errors if approximation in at.relative]
        if not found:
            raise NotRun(f"the Fisher error of {approximation} on {task}")
        return mean(found)

    return measure


def over(top: Measure, bottom: Measure) -> Measure:
    """The ratio; not a number where the divisor is 0 or both are infinite."""

    def measure(results: Results) -> float:
        numerator, divisor = top(results), bottom(results)
        return numerator / divisor if divisor else math.nan

    return measure


def minus(first: Measure, second: Measure) -> Measure:
    """The difference."""
    return lambda results: first(results) - second(results)


def least(*measures: Measure) -> Measure:
    """The least of several; all of them must have been run."""
    return lambda results: min(measure(results) for measure in measures)


@dataclass(frozen=True)
class Judgement:
    """A verdict and the values it rests on; a value is None where it was not run."""

    verdict: Verdict
    values: Mapping[str, float | None]
    held: Mapping[str, bool]


@dataclass(frozen=True)
class Claim:
    """A statement, the `quantity` that decides it, and the range this must lie in, everywhere it is measured.

    Reproduced where all measures lie in [`at_least`, `at_most`], partly where some do, not reproduced where none
    does; measures that were not run are left out, and a claim of which nothing was run is "not run".
    """

    text: str
    quantity: str
    measures: Mapping[str, Measure]
    at_least: float = -math.inf
    at_most: float = math.inf

    def __post_init__(self) -> None:
        """Refuse a claim that nothing could refute."""
        bounded = math.isfinite(self.at_least) or math.isfinite(self.at_most)
        if not (self.measures and bounded and self.at_least <= self.at_most):
            raise ValueError(f"claim {self.text!r} needs a measure and a range")

    @property
    def criterion(self) -> str:
        """The quantity and its range in words."""
        low, high = f"{self.at_least:g}", f"{self.at_most:g}"
        if math.isinf(self.at_least):
            return f"{self.quantity} at most {high}"
        return f"{self.quantity} " + (f"at least {low}" if math.isinf(self.at_most) else f"between {low} and {high}")

    def judge(self, results: Results) -> Judgement:
        """Measure and decide; a value that is not a number is outside every range."""
        values: dict[str, float | None] = {}
        for label, measure in self.measures.items():
            try:
                values[label] = measure(results)
            except NotRun:
                values[label] = None
        held = {k: self.at_least <= value <= self.at_most for k, value in values.items() if value is not None}
        return Judgement(verdict(held.values()), values, held)


def verdict(held: Iterable[bool]) -> Verdict:
    """What follows from which parts held."""
    parts = list(held)
    if not parts:
        return "not run"
    return "reproduced" if all(parts) else "partly" if any(parts) else "not reproduced"


def overall(judgements: Sequence[Judgement]) -> Verdict:
    """The verdict on a paper: reproduced where all claims that were run are, not reproduced where none is."""
    verdicts = [judgement.verdict for judgement in judgements if judgement.verdict != "not run"]
    return verdicts[0] if len(set(verdicts)) == 1 else "partly" if verdicts else "not run"
