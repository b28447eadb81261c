"""The table of a race: the cost of a step, the loss on the way, the time to the losses of others."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

from natgrad.race.run import Point, Run

REFERENCES = ("adamw", "muon")  # their final losses are the marks the others are timed at


@dataclass(frozen=True)
class Table:
    """Headers and rows of text; whoever shows it decides how."""

    headers: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Render as a Markdown table."""
        lines = [self.headers, ["---"] * len(self.headers), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def by_entry(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by entry, in order of appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def step_ms(runs: Sequence[Run]) -> float:
    """Milliseconds per step: the median over runs; not a number where none took a step."""
    times = [1000 * r.curve[-1].seconds / r.curve[-1].step for r in runs if r.curve and r.curve[-1].step]
    return median(times) if times else math.nan


def targets(groups: dict[str, list[Run]]) -> dict[str, float]:
    """Mean final loss of each reference entry that took part and whose runs are all whole."""
    marks = {}
    for name in REFERENCES:
        runs = groups.get(name, [])
        if runs and all(run.curve and not run.diverged for run in runs):
            marks[name] = mean(run.curve[-1].loss for run in runs)
    return marks


def reach(curve: Sequence[Point], loss: float) -> Point | None:
    """First point of a curve at or below a loss."""
    return next((point for point in curve if point.loss <= loss), None)


def checkpoints(runs: Sequence[Run]) -> list[int]:
    """Epochs at which losses are listed: a quarter, half, three quarters and the end."""
    last = max((run.curve[-1].epoch for run in runs if run.curve), default=0)
    return sorted({math.ceil(last * part / 4) for part in (1, 2, 3, 4)} - {0})


def summarise(runs: Sequence[Run]) -> Table:
    """Build the table; means over seeds, with the deviation between seeds where there are several."""
    groups = by_entry(runs)
    marks, epochs = targets(groups), checkpoints(runs)
    costs = {name: step_ms(group) for name, group in groups.items()}
    finite = [cost for cost in costs.values() if math.isfinite(cost)]
    unit = costs.get("sgd", min(finite, default=math.nan))
    headers = ["entry", "step ms", "x sgd" if "sgd" in costs else "x fastest"]
    headers += [f"loss, epoch {epoch}" for epoch in epochs]
    tested = any(run.curve and run.curve[-1].test_loss is not None for run in runs)
    headers += ["test loss"] if tested else []
    metrics = list(dict.fromkeys(name for run in runs if run.curve for name in run.curve[-1].metrics))
    headers += metrics
    headers += [f"to {name}'s {loss:.4g}" for name, loss in marks.items()] + ["note"]
    rows = []
    for entry, group in groups.items():
        row = [entry, _number(costs[entry], ".1f"), _number(costs[entry] / unit, ".2f")]
        row += [_over_seeds(group, lambda run, at=epoch: _loss_at(run, at)) for epoch in epochs]  # type: ignore[misc]
        row += [_over_seeds(group, _test_loss)] if tested else []
        row += [_over_seeds(group, lambda run, of=name: _metric(run, of)) for name in metrics]  # type: ignore[misc]
        row += [_time_to(group, loss) for loss in marks.values()]
        rows.append([*row, _note(group)])
    return Table(headers, rows)


def _loss_at(run: Run, epoch: int) -> float | None:
    return next((point.loss for point in run.curve if point.epoch == epoch), None)


def _test_loss(run: Run) -> float | None:
    return run.curve[-1].test_loss if run.curve else None


def _metric(run: Run, name: str) -> float | None:
    return run.curve[-1].metrics.get(name) if run.curve else None


def _over_seeds(runs: Sequence[Run], value: Callable[[Run], float | None]) -> str:
    values = [v for run in runs if (v := value(run)) is not None]
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):
        return "diverged"
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{spread}"


def _time_to(runs: Sequence[Run], loss: float) -> str:
    points = [point for run in runs if (point := reach(run.curve, loss))]
    if not points:
        return "-"
    some = "" if len(points) == len(runs) else f" ({len(points)} of {len(runs)} seeds)"
    return f"{mean(p.step for p in points):.0f} steps, {mean(p.seconds for p in points):.1f} s{some}"


def _note(runs: Sequence[Run]) -> str:
    notes = [f"seed {run.seed} {run.stopped}" for run in runs if run.stopped]
    return "; ".join(notes)


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"
