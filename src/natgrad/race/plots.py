"""Loss against steps and against seconds: the mean over seeds, in a band from the best seed to the worst."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from natgrad.race.run import Run
from natgrad.race.summary import by_entry


def plot(runs: Sequence[Run], title: str, folder: Path) -> list[Path]:
    """Draw both plots as PNG and SVG into `folder`; returns the two PNG files."""
    return [save(draw(runs, title, axis), folder / f"loss-vs-{axis}.png") for axis in ("steps", "seconds")]


def save(figure: Any, path: Path) -> Path:
    """Save a figure as PNG at `path`, and as SVG beside it; returns `path`."""
    figure.savefig(path, dpi=110)
    figure.savefig(path.with_suffix(".svg"))
    return path


def draw(runs: Sequence[Run], title: str, axis: str) -> Any:
    """Draw the training losses on a log scale over "steps" or "seconds"."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, group in by_entry(runs).items():
        x, losses = curves(group, axis)
        if len(x):
            (line,) = axes.plot(x, losses.mean(0), label=name)
            axes.fill_between(x, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.set(title=title, xlabel="steps" if axis == "steps" else "seconds of training", ylabel="training loss")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend()
    return figure


def curves(runs: Sequence[Run], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions (m,) and losses (seeds, m) of one entry, up to where its shortest finite run ends.

    Seeds take slightly different times, so the seconds are the mean over seeds.
    """
    whole = [[p for p in run.curve if np.isfinite(p.loss)] for run in runs]
    length = min((len(points) for points in whole), default=0)
    positions = [[p.step if axis == "steps" else p.seconds for p in points[:length]] for points in whole]
    losses = [[p.loss for p in points[:length]] for points in whole]
    return np.array(positions).mean(0) if length else np.zeros(0), np.array(losses)
