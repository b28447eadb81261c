"""What a step of a race costs beside AdamW's: all optimizers in turn in one process, CPU seconds, one thread.

    python benchmarks/prices.py --tasks table,graph --entries muon,kfac --steps 60

For every task AdamW's median step in ms, and for every entry the mean of the steps after the 20th, the median and the
sum of the first ten, in that step.
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import torch

from natgrad.race.entries import find
from natgrad.race.run import draws, feed, train_step
from natgrad.race.tasks import TASKS


def costs(name: str, entries: list[str], steps: int) -> dict[str, list[float]]:
    """Seconds of every step of every entry."""
    task = TASKS[name]
    data = task.data(None)
    racers: dict[str, Any] = {}
    for entry in entries:
        torch.manual_seed(0)
        model = task.model(data)
        settings = {key: value for key, value in find(entry).defaults.items() if key != "schedule"}
        racers[entry] = model, find(entry).start(model, task, settings, steps)
    order, noise = draws(0)
    seconds: dict[str, list[float]] = {entry: [] for entry in entries}
    while True:
        for x, y, ids in feed(task, data, order, noise):
            for entry, (model, optimizer) in racers.items():
                start = time.process_time()
                train_step(task, model, optimizer, x, y, ids)
                seconds[entry].append(time.process_time() - start)
            if len(seconds[entries[0]]) == steps:
                return seconds


def main() -> None:
    """Print a line for every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="table,graph,resnet-bn,unet,vit,gpt")
    parser.add_argument("--entries", default="muon,kfac")
    parser.add_argument("--steps", type=int, default=60)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in chosen.tasks.split(","):
        seconds = costs(name, ["adamw", *chosen.entries.split(",")], chosen.steps)
        unit = statistics.median(seconds.pop("adamw"))
        told = [
            f"{entry} {statistics.mean(own[20:]) / unit:.2f} ({statistics.median(own) / unit:.2f}), "
            f"first ten {sum(own[:10]) / unit:.0f}"
            for entry, own in seconds.items()
        ]
        print(f"{name}: AdamW {1000 * unit:.3g} ms; {'; '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
