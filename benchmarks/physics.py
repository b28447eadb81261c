"""The error of a physics-informed network along training: Adam, tuned, against the natural gradient of the page.

`python benchmarks/physics.py > benchmarks/2026-11-21/pinn.json`, half an hour on one core, most of it Adam's. Task and
data are those of `natgrad race --task pinn`. Adam is tuned in 12 trials of 2,000 steps, ten times those of the natural
gradient, by the training loss of seed 100. Seconds are those of the process, without the measurements.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import natgrad
from natgrad.race.physics import relative_error
from natgrad.race.run import batches, mean_loss, schedule, train_step
from natgrad.race.tasks import TASKS

TASK = TASKS["pinn"]
DATA = TASK.data(None)
TRIALS, TRIAL_STEPS = 12, 2000
Make = Callable[[nn.Module], Any]


def adam(settings: dict[str, Any]) -> Make:
    """Adam with these settings; the schedule is the loop's."""
    own = {"lr": settings["lr"], "betas": tuple(settings["betas"])}
    return lambda model: torch.optim.Adam(model.parameters(), **own)


def natural(approximation: natgrad.Approximation, damping: float | None) -> Make:
    """The natural gradient of the residuals, all else at its default."""
    return lambda model: natgrad.NaturalGradient(
        model, approximation, likelihood=natgrad.Gaussian(), estimator="exact", damping=damping
    )


def forever(seed: int) -> Iterator[Any]:
    """Batches of one epoch after the other."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from batches(DATA.train, TASK.batch, order)


def curve(make: Make, steps: int, every: int, seed: int, decay: str = "constant") -> list[dict[str, float]]:
    """Steps, seconds, training loss and relative error, every so many steps."""
    torch.manual_seed(seed)
    model = TASK.model(DATA)
    optimizer = make(model)
    rates, factor = [group["lr"] for group in optimizer.param_groups], schedule(decay, steps)
    points, seconds, data = [], 0.0, forever(seed)
    for step in range(steps + 1):
        if step % every == 0:
            loss, error = mean_loss(TASK, model, DATA.train), relative_error(model, DATA)
            points.append({"step": step, "seconds": seconds, "loss": loss, "error": error})
        x, y, ids = next(data)
        started = time.process_time()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step)
        train_step(TASK, model, optimizer, x, y, ids)
        seconds += time.process_time() - started
    return points


def trials() -> list[dict[str, Any]]:
    """Adam's random search: settings and final losses."""
    draw, found = random.Random(0), []
    for _ in range(TRIALS):
        settings: dict[str, Any] = {
            "lr": 10 ** draw.uniform(-3, -1),
            "betas": [draw.choice([0.9, 0.95]), draw.choice([0.95, 0.99, 0.999])],
            "schedule": draw.choice(["constant", "cosine"]),
        }
        end = curve(adam(settings), TRIAL_STEPS, TRIAL_STEPS, 100, settings["schedule"])[-1]
        found.append({**settings, "loss": end["loss"], "error": end["error"]})
        print(found[-1], file=sys.stderr)
    return found


def main() -> None:
    """Tune Adam, then three seeds of everyone."""
    torch.set_num_threads(1)
    tried = trials()
    best = min(tried, key=lambda trial: trial["loss"])
    runs: dict[str, tuple[Make, int, int, str]] = {
        "Adam, tuned": (adam(best), 10_000, 100, best["schedule"]),
        "KFAC": (natural(natgrad.KFAC(), 1e-4), 1000, 10, "constant"),
        "JointWoodbury": (natural(natgrad.JointWoodbury(), 1e-6), 200, 4, "constant"),
    }
    curves: dict[str, list[Any]] = {}
    for name, (make, steps, every, decay) in runs.items():
        curves[name] = [curve(make, steps, every, seed, decay) for seed in range(3)]
        print(name, [points[-1] for points in curves[name]], file=sys.stderr)
    print(json.dumps({"trials": tried, "curves": curves}))


if __name__ == "__main__":
    main()
