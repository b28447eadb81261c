"""Draw, for the page of every method, its Fisher error and its race: `make docs`, or `python docs/races.py`.

The errors are measured here, on the layer of `pictures.py`. The races are read from the newest `family-*` results under
`benchmarks/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from pictures import HERE, INK, PAIR, PALE, error

from natgrad import (
    EKFAC,
    FOOF,
    KFAC,
    KPSVD,
    SNGD,
    TEKFAC,
    TKFAC,
    Approximation,
    CorrectedKFAC,
    Deflated,
    Diagonal,
    Lanczos,
    TENGraD,
    Woodbury,
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ERRORS: dict[str, Approximation] = {
    "diagonal": Diagonal(),
    "sngd": SNGD(),
    "foof": FOOF(),
    "kfac": KFAC(),
    "ekfac": EKFAC(),
    "tkfac": TKFAC(),
    "tekfac": TEKFAC(),
    "kpsvd": KPSVD(),
    "kfac-corrected": CorrectedKFAC(),
    "deflated": Deflated(),
    "lanczos": Lanczos(),
    "tengrad": TENGraD(),
    "woodbury": Woodbury(),
}
PAGES: dict[str, Sequence[str]] = {
    "diagonal": ("diagonal",),
    "kfac": ("kfac",),
    "ekfac": ("ekfac",),
    "tkfac": ("tkfac",),
    "tekfac": ("tekfac",),
    "kpsvd": ("kpsvd",),
    "rank-two": ("deflated", "lanczos", "kfac-corrected"),
    "woodbury": ("woodbury", "woodbury-joint"),
    "tengrad": ("tengrad",),
    "fngd": ("fngd",),
    "sngd": ("sngd", "foof", "ngplus"),
    "two-level": ("two-level", "two-level-nicolaides"),
    "block-tridiagonal": ("kfac-tridiagonal",),
}
BESIDE = {"adamw": "#999999", "muon": "#666666", "kfac": "#c0c0c0"}
OWN = (INK, PALE, "#3b8b5a")
TASKS = {"mnist-ae": "MNIST auto-encoder", "digits": "digits classifier"}

Run = Mapping[str, Any]


@cache
def races(task: str) -> dict[str, Run]:
    """The newest run of every entry of `task`, by name."""
    found = sorted(BENCHMARKS.glob(f"*/family-{task}/results.json"))
    return {run["name"]: run for run in json.loads(found[-1].read_text())["runs"]} if found else {}


def draw_errors(axes: Axes, own: Sequence[str]) -> None:
    """|F - F~| / |F| of every approximation that has a matrix; the page's own in colour."""
    sizes = {name: error(approximation) for name, approximation in ERRORS.items()}
    colours = [OWN[own.index(name)] if name in own else "#d0d0d0" for name in sizes]
    axes.barh(list(sizes), list(sizes.values()), color=colours)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set(title="Fisher error, one layer", xlim=(0, 1))


def draw_race(axes: Axes, task: str, own: Sequence[str]) -> None:
    """Training loss against steps, with AdamW, Muon and KFAC beside."""
    runs = races(task)
    beside = {name: colour for name, colour in BESIDE.items() if name not in own}
    lines = {**beside, **dict(zip(own, OWN, strict=False))}
    for name, colour in lines.items():
        if name in runs:
            curve = runs[name]["curve"]
            axes.semilogy([p["step"] for p in curve], [p["loss"] for p in curve], color=colour, label=name)
    axes.set(title=TASKS[task], xlabel="steps")
    axes.legend(fontsize=6)


def main() -> None:
    """Write the pictures of all pages."""
    torch.set_num_threads(1)
    (HERE / "races").mkdir(exist_ok=True)
    for page, own in PAGES.items():
        figure, axes = plt.subplots(1, 3, figsize=(PAIR * 3, PAIR), layout="constrained")
        draw_errors(axes[0], own)
        for here, task in zip(axes[1:], TASKS, strict=True):
            draw_race(here, task, own)
        figure.savefig(HERE / "races" / f"{page}.png", dpi=68, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
