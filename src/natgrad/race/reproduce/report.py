"""The report of a study: verdicts first, then the paper's numbers beside ours, task by task."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from natgrad.race import bench
from natgrad.race.plots import plot, save
from natgrad.race.reproduce.claims import Claim, Judgement, Outcome, Results, epoch_seconds, overall
from natgrad.race.reproduce.fisher_error import Errors
from natgrad.race.reproduce.study import Experiment, Study
from natgrad.race.results import plain
from natgrad.race.run import Run
from natgrad.race.summary import Table, by_entry, summarise

NOTHING = "-"


def write_report(folder: Path, study: Study, results: Results, about: Mapping[str, Any]) -> Path:
    """Write `report.md` and the plots into `folder`; `about` holds size, command and machine."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.md"
    path.write_text("\n\n".join(_parts(folder, study, results, about)) + "\n")
    return path


def _parts(folder: Path, study: Study, results: Results, about: Mapping[str, Any]) -> list[str]:
    judged = [(claim, claim.judge(results)) for claim in study.claims]
    parts = [f"# {study.title}", study.paper, f"`{about['command']}`", headline(judged), claims(judged).markdown()]
    parts += [f"## What differs from the paper\n\n{_differences(study, results, str(about['size']))}"]
    for experiment in study.experiments:
        outcome = results.of(experiment.name)
        if outcome.missing or outcome.runs:
            parts += _section(folder / experiment.name, experiment, outcome)
    return [*parts, "## Machine", f"```\n{json.dumps(about['machine'], indent=1)}\n```"]


def headline(judged: Sequence[tuple[Claim, Judgement]]) -> str:
    """The verdict on the paper, and how many of its claims came to what."""
    verdicts = [judgement.verdict for _, judgement in judged]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    return f"**Verdict: {overall([judgement for _, judgement in judged])}** (claims: {counted})."


def claims(judged: Sequence[tuple[Claim, Judgement]]) -> Table:
    """Every claim with its criterion, what was measured and the verdict; what failed its criterion is bold."""
    rows = [[claim.text, claim.criterion, values(found), found.verdict] for claim, found in judged]
    return Table(["claim", "criterion", "measured", "verdict"], rows)


def values(found: Judgement) -> str:
    """The values a verdict rests on."""
    return "; ".join(f"{label}: {_value(found, label)}" for label in found.values)


def _value(found: Judgement, label: str) -> str:
    value = found.values[label]
    if value is None:
        return "not run"
    return f"{value:.3g}" if found.held[label] else f"**{value:.3g}**"


def _differences(study: Study, results: Results, size: str) -> str:
    lines = [f"Size `{size}`:", ""]
    for experiment in study.experiments:
        outcome = results.of(experiment.name)
        if outcome.missing:
            lines.append(f"* {experiment.name} was not run: {outcome.missing}")
        elif outcome.about:
            lines.append(f"* {experiment.name}: {_size(outcome.about)}.")
        elif size in experiment.sizes:
            lines.append(f"* {experiment.name} was not run.")
        else:
            lines.append(f"* {experiment.name} is left to size {', '.join(experiment.sizes)}.")
    return "\n".join([*lines, *(f"* {text}" for text in study.differs)])


def _size(about: Mapping[str, Any]) -> str:
    text = (
        f"{about['examples']:,} examples of {about['data']} ({about['test examples'] or 'none'} to test on), "
        f"{about['weights']:,} weights, batch {about['batch']}, {about['epochs']} epochs of {about['steps per epoch']} "
        f"steps, {about['trials']} trials for every tuned row"
    )
    return text + (f", at most {about['budget']:g} s of training per run" if about["budget"] else "")


def _section(folder: Path, experiment: Experiment, outcome: Outcome) -> list[str]:
    if outcome.missing:
        return [f"## {experiment.name}", f"Not run: {outcome.missing}"]
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"## {experiment.name}", side_by_side(experiment, outcome.runs).markdown(), _legend(experiment, outcome)]
    if outcome.costs:
        parts += ["Steps timed in turn, over a whole refresh period:", bench.table(outcome.costs).markdown()]
    images = plot(outcome.runs, experiment.name, folder)
    if outcome.errors:
        parts += ["Relative Frobenius error of the Fisher, mean over layers:", error_table(outcome.errors).markdown()]
        images = [*images, save(draw_errors(outcome.errors, experiment.name), folder / "fisher-error.png")]
    parts += [f"![{path.stem}]({folder.name}/{path.name})" for path in images]
    settings = {run.name: plain(dict(run.configuration)) for run in outcome.runs}
    lines = [f"{name}: {json.dumps(chosen)}" for name, chosen in settings.items()]
    return [*parts, "Settings:", "```\n" + "\n".join(lines) + "\n```"]


def side_by_side(experiment: Experiment, runs: Sequence[Run]) -> Table:
    """Our table with the published columns in front; rows of either have a line."""
    ours, published = summarise(runs), experiment.published
    columns = published.columns if published else []
    theirs = published.rows if published else {}
    found = {row[0]: row[1:] for row in ours.rows}
    ratios = relative_seconds(runs, experiment.reference)
    ordered = [row.name for row in experiment.rows if row.name in found] + list(theirs)
    rows = []
    for name in dict.fromkeys(ordered):
        said = [_cell(theirs.get(name, {}).get(column)) for column in columns]
        measured = found.get(name, [NOTHING] * (len(ours.headers) - 1))
        rows.append([name, *said, *measured, ratios.get(name, NOTHING)])
    headers = ["entry", *(f"published: {name}" for name in columns), *ours.headers[1:]]
    return Table([*headers, f"epoch / {experiment.reference}'s"], rows)


def relative_seconds(runs: Sequence[Run], reference: str) -> dict[str, str]:
    """Seconds per epoch of every row over those of the reference, where it was run."""
    means = {name: mean(epoch_seconds(run) for run in group if run.curve) for name, group in by_entry(runs).items()}
    unit = means.get(reference, math.nan)
    return {name: f"{value / unit:.2f}" for name, value in means.items() if value / unit == value / unit}


def _cell(value: float | str | None) -> str:
    return NOTHING if value is None else value if isinstance(value, str) else f"{value:g}"


def _legend(experiment: Experiment, outcome: Outcome) -> str:
    seeds = sorted({run.seed for run in outcome.runs})
    source = (
        f"Published: {experiment.published.source}. " if experiment.published else "The paper's table is not known. "
    )
    return (
        f"{source}Ours: training loss over the whole set at the end of an epoch, mean over seeds {seeds} ± their "
        "standard deviation; seconds count training steps alone, per epoch those after the first."
    )


def error_table(errors: Sequence[Errors]) -> Table:
    """The errors of every approximation at a few steps of the run."""
    chosen = [errors[i] for i in sorted({round(k * (len(errors) - 1) / 4) for k in range(5)})]
    headers = ["approximation", *(f"step {at.step}" for at in chosen)]
    return Table(headers, [[name, *(f"{at.over_layers(name):.3f}" for at in chosen)] for name in errors[0].relative])


def draw_errors(errors: Sequence[Errors], title: str) -> Any:
    """Draw the error of every approximation over the steps: the mean over layers, in a band from least to largest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [at.step for at in errors]
    for name in errors[0].relative:
        values = [list(at.relative[name].values()) for at in errors]
        (line,) = axes.plot(steps, list(map(mean, values)), label=name)
        low, high = list(map(min, values)), list(map(max, values))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.1, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set(title=title, xlabel="steps", ylabel="|F - F~| / |F|, mean over layers")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
