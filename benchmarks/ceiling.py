"""What is left to gain: the exact Fisher, of a layer and of all, beside its approximations under one policy.

``python benchmarks/ceiling.py --out benchmarks/ceiling.md``: some minutes on one core.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from long_run import processor
from sklearn.datasets import load_digits
from torch import Tensor, nn

from natgrad import (
    EKFAC,
    KFAC,
    KPSVD,
    TEKFAC,
    Bernoulli,
    Categorical,
    ExactFisher,
    JointFisher,
    LayerLength,
    NaturalGradient,
    QuadraticModel,
)

BUDGETS = (200, 800, 2000)
RATES = (1e-2, 3e-2, 1e-1, 3e-1)
CAP = 100  # steps of a natural gradient, ten times as many of one as it comes


@dataclass(frozen=True)
class Task:
    """A model, its data, the loss of a batch, and batches; the estimator that can be paid for."""

    name: str
    sizes: tuple[int, ...]
    x: Tensor
    y: Tensor
    batch: int
    likelihood: Any
    estimator: Literal["sampled", "exact"]

    def model(self, seed: int) -> nn.Sequential:
        """A perceptron of tanh."""
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for width, out in zip(self.sizes, self.sizes[1:], strict=False):
            layers += [nn.Linear(width, out), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def loss(self, model: nn.Module, rows: Tensor | slice = slice(None)) -> Tensor:
        """A sum over outputs, the mean over examples."""
        outputs, y = model(self.x[rows]), self.y[rows]
        if y.dtype == torch.long:
            return F.cross_entropy(outputs, y)
        return F.binary_cross_entropy_with_logits(outputs, y, reduction="sum") / len(outputs)

    def batches(self, seed: int) -> Iterator[Tensor | slice]:
        """Rows, drawn anew for every batch."""
        generator = torch.Generator().manual_seed(100 + seed)
        while True:
            whole = self.batch == len(self.x)
            yield slice(None) if whole else torch.randperm(len(self.x), generator=generator)[: self.batch]


def tasks() -> list[Task]:
    """Both, on the 8 x 8 digits."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    images = x[:500]
    return [
        Task("auto-encoder", (64, 24, 6, 24, 64), images, images, 500, Bernoulli(), "sampled"),
        Task("classifier", (64, 20, 10), x[:1400], y[:1400], 500, Categorical(), "exact"),
    ]


def natural(approximation: Callable[[], Any], **settings: Any) -> Callable[[nn.Module, Task], NaturalGradient]:
    """Curvature of every step, under the quadratic model."""
    chosen = {"step_size": QuadraticModel(), "observe_every": 1, "refresh_every": 1, "overhead": None, **settings}

    def make(model: nn.Module, task: Task) -> NaturalGradient:
        return NaturalGradient(model, approximation(), likelihood=task.likelihood, estimator=task.estimator, **chosen)

    return make


def default(**settings: Any) -> Callable[[nn.Module, Task], NaturalGradient]:
    """KFAC as it comes."""
    return lambda model, task: NaturalGradient(model, KFAC(), likelihood=task.likelihood, **settings)


CHEAP = ("KFAC, `Automatic()`, as it comes", "KFAC, `LayerLength()`, as it comes")
METHODS = {
    "KFAC": natural(KFAC),
    "EKFAC": natural(EKFAC),
    "TEKFAC": natural(TEKFAC),
    "KPSVD": natural(KPSVD),
    CHEAP[0]: default(),
    CHEAP[1]: default(step_size=LayerLength()),
    "ExactFisher": natural(ExactFisher),
    "JointFisher": natural(JointFisher),
}


def methods(task: Task) -> dict[str, Callable[[nn.Module, Task], NaturalGradient]]:
    """All of them; KFAC and the ceilings also from fresh statistics where those are exact, and else from more draws."""
    name, settings = ("decay 0", {"decay": 0.0}) if task.estimator == "exact" else ("4 draws", {"draws": 4})
    more = {"KFAC": KFAC, "ExactFisher": ExactFisher, "JointFisher": JointFisher}
    return METHODS | {f"{key}, {name}": natural(approximation, **settings) for key, approximation in more.items()}


def ceilings(task: Task) -> tuple[str, str]:
    """What the others are measured by."""
    return (
        ("ExactFisher", "JointFisher")
        if task.estimator == "exact"
        else ("ExactFisher, 4 draws", "JointFisher, 4 draws")
    )


def train(
    task: Task, seed: int, optimizer: Any, model: nn.Module, steps: int, until: float, schedule: Any = None
) -> list[float]:
    """The loss on all data before every step and after the last; it ends below ``until``."""
    losses = []
    for _, rows in zip(range(steps), task.batches(seed), strict=False):
        optimizer.zero_grad()
        loss = task.loss(model, rows)
        losses.append(loss.item() if isinstance(rows, slice) else whole(task, model))
        if losses[-1] <= until or not math.isfinite(losses[-1]):
            return losses
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return [*losses, whole(task, model)]


@torch.no_grad()
def whole(task: Task, model: nn.Module) -> float:
    """The loss on all data."""
    return task.loss(model).item()


def adamw(task: Task, seed: int, steps: int, lr: float) -> float:
    """Its loss after that many steps, on a cosine."""
    model = task.model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    return train(task, seed, optimizer, model, steps, -math.inf, schedule)[-1]


def reached(losses: list[float], mark: float) -> int | None:
    """The steps to a loss."""
    return next((step for step, loss in enumerate(losses) if loss <= mark), None)


def share(steps: int | None, ceiling: int | None, budget: int) -> float:
    """Of the ceiling's gain in steps over AdamW: log(budget / steps) / log(budget / ceiling)."""
    return math.log(budget / steps) / math.log(budget / ceiling) if steps and ceiling else math.nan


def measured(task: Task, seed: int, cap: int, known: dict[str, Any], keep: Callable[[], None]) -> None:
    """Put into ``known`` what it lacks: AdamW's losses by steps and rate, then all losses of every curvature."""
    for steps in BUDGETS:
        for lr in RATES:
            name = f"AdamW {steps} {lr:g}"
            if name not in known:
                known[name] = adamw(task, seed, steps, lr)
    keep()
    least = min(marks(known).values())
    for name, make in methods(task).items():
        if name not in known:
            model = task.model(seed)
            started = time.process_time()
            most = 10 * cap if name in CHEAP else cap
            losses = train(task, seed, make(model, task), model, most, least)
            known[name] = {"losses": losses, "seconds": time.process_time() - started}
            told = {steps: reached(losses, mark) for steps, mark in marks(known).items()}
            print(f"{task.name}, seed {seed}, {name}: {told}, {min(losses):.4g}", flush=True)
            keep()


def marks(known: dict[str, Any]) -> dict[int, float]:
    """The loss of the best rate, by AdamW's steps."""
    return {steps: min(known[f"AdamW {steps} {lr:g}"] for lr in RATES) for steps in BUDGETS}


def rates(known: dict[str, Any]) -> str:
    """The best rates."""
    best = {steps: min(RATES, key=lambda lr, n=steps: known[f"AdamW {n} {lr:g}"]) for steps in BUDGETS}  # type: ignore[misc]
    return ", ".join(f"{lr:g} ({steps} steps)" for steps, lr in best.items())


def compared(task: Task, found: dict[str, Any]) -> list[str]:
    """Two tables: steps to AdamW's losses, seconds of a step; shares of the ceilings' gains."""
    heads = [f"to AdamW's {figures([marks(s)[steps] for s in found.values()])} ({steps} steps)" for steps in BUDGETS]
    lines = [f"| curvature | {' | '.join(heads)} | CPU ms a step | least loss |", "|---|" + "---|" * (len(heads) + 2)]
    counts: dict[str, dict[int, dict[str, int | None]]] = {}
    for name in methods(task):
        own = {seed: s[name] for seed, s in found.items() if name in s}
        if not own:
            continue
        counts[name] = {n: {k: reached(x["losses"], marks(found[k])[n]) for k, x in own.items()} for n in BUDGETS}
        made = {seed: len(x["losses"]) - 1 for seed, x in own.items()}
        cells = [" / ".join(str(n or f"> {made[k]}") for k, n in counts[name][b].items()) for b in BUDGETS]
        ms = 1e3 * sum(x["seconds"] for x in own.values()) / sum(made.values())
        lines.append(
            f"| {name} | {' | '.join(cells)} | {ms:.0f} | {figures([min(x['losses']) for x in own.values()])} |"
        )
    told = "; ".join(f"seed {seed}: {rates(s)}" for seed, s in found.items())
    return [
        *lines,
        "",
        f"AdamW's best rate of {', '.join(f'{lr:g}' for lr in RATES)}: {told}.",
        "",
        *shares(counts, ceilings(task)),
    ]


def shares(counts: dict[str, dict[int, dict[str, int | None]]], wanted: tuple[str, ...]) -> list[str]:
    """The second table: which part of each ceiling's gain is kept, the mean over the seeds that have both."""
    chosen = [name for name in wanted if name in counts]
    heads = [f"{ceiling}, {steps} steps" for ceiling in chosen for steps in BUDGETS]
    lines = [f"| kept of the gain of | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name, own in counts.items():
        cells = []
        for ceiling in chosen:
            for steps in BUDGETS:
                least = counts[ceiling][steps]
                parts = [share(n, least[k], steps) for k, n in own[steps].items() if k in least]
                cells.append("-" if not parts or any(map(math.isnan, parts)) else f"{sum(parts) / len(parts):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def figures(values: list[float]) -> str:
    """Three digits of each seed's."""
    return " / ".join(f"{value:.3g}" for value in values)


def main() -> None:
    """Run all, print the tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cap", type=int, default=CAP, help="steps of a natural gradient")
    parser.add_argument("--tasks", nargs="+", default=["classifier", "auto-encoder"])
    parser.add_argument("--records", type=Path, default=Path("ceiling.json"), help="goes on with what is there")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    records: dict[str, dict[str, dict[str, Any]]] = {}
    if chosen.records.exists():
        records = json.loads(chosen.records.read_text())
    for seed in chosen.seeds:
        for task in (task for task in tasks() if task.name in chosen.tasks):
            known = records.setdefault(task.name, {}).setdefault(str(seed), {})
            measured(task, seed, chosen.cap, known, lambda: report(records, chosen))


def report(records: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Keep the records, and write what they say."""
    chosen.records.write_text(json.dumps(records))
    lines = [
        "# A distance to the ceiling",
        "",
        f"`python benchmarks/ceiling.py --cap {chosen.cap} --seeds {' '.join(map(str, chosen.seeds))}`, "
        f"{datetime.date.today()}, torch {torch.__version__}, {processor()}, one thread.",
    ]
    for task in tasks():
        shape = "-".join(map(str, task.sizes))
        told = f"{shape}, tanh, batch {task.batch} of {len(task.x)}, estimator `{task.estimator}`"
        if task.name in records:
            lines += ["", f"## {task.name}: {told}", "", *compared(task, records[task.name])]
    if chosen.out is not None:
        chosen.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
