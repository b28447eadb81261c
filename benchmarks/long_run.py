"""10,000 steps of a small classifier whose labels are noisy: the length of steps, the loss, and a run that is resumed.

``python benchmarks/long_run.py --out benchmarks/long_run.md``: a minute on one core.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from natgrad import Categorical, NaturalGradient

BATCH, NOISE, WINDOW, EVERY = 16, 0.2, 500, 100


def data() -> tuple[Tensor, Tensor]:
    """The 8 x 8 digits in [0, 1], one label in five replaced by another class."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(y), generator=generator) < NOISE
    other = (y + torch.randint(1, 10, y.shape, generator=generator)) % 10
    return x, torch.where(wrong, other, y)


def batches(x: Tensor, y: Tensor, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of the steps ``first`` to ``last``, epochs drawn without replacement."""
    per_epoch = len(x) // BATCH
    for step in range(first, last):
        epoch, number = divmod(step, per_epoch)
        if number == 0 or step == first:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        rows = order[number * BATCH : (number + 1) * BATCH]
        yield x[rows], y[rows]


@dataclass
class Run:
    """A model, its optimizer and schedule, and what was seen: a loss and a length of every step."""

    steps: int
    cosine: bool
    losses: list[float] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.optimizer = NaturalGradient(self.model, likelihood=Categorical())
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        self.schedule = cosine(self.optimizer, T_max=self.steps) if self.cosine else None

    def train(self, x: Tensor, y: Tensor, first: int, last: int) -> None:
        """The steps ``first`` to ``last``."""
        before, started = self.parameters(), time.process_time()
        for inputs, labels in batches(x, y, first, last):
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(inputs), labels)
            loss.backward()
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            after = self.parameters()
            self.losses.append(loss.item())
            self.lengths.append((after - before).norm().item())
            before = after
        self.seconds += time.process_time() - started

    def parameters(self) -> Tensor:
        """All of them, end to end."""
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()

    def save(self, path: Path) -> None:
        """A checkpoint, and what was seen until then."""
        parts: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        parts |= {"losses": self.losses, "lengths": self.lengths, "seconds": self.seconds}
        torch.save(parts | ({"schedule": self.schedule.state_dict()} if self.schedule is not None else {}), path)

    def load(self, path: Path) -> None:
        """Go on from there."""
        parts: dict[str, Any] = torch.load(path, weights_only=True)
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.losses, self.lengths, self.seconds = parts["losses"], parts["lengths"], parts["seconds"]
        if self.schedule is not None:
            self.schedule.load_state_dict(parts["schedule"])

    def rate(self, step: int) -> float:
        """The schedule's factor at a step."""
        return 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.cosine else 1.0


def watched(steps: int, cosine: bool, cut: int, meet: int, folder: Path) -> tuple[Run, bool]:
    """A run, and whether one that was broken at ``cut`` has its parameters at ``meet``."""
    x, y = data()
    run, start = Run(steps, cosine), 0
    paths = {stop: folder / f"{'cosine' if cosine else 'plain'}-{steps}-{stop}.pt" for stop in stops(steps, cut, meet)}
    for stop, path in paths.items():
        if path.exists():
            run.load(path)
        else:
            run.train(x, y, start, stop)
            run.save(path)
            print(
                f"{path.stem}: length {mean(run.lengths[-EVERY:]):.4f}, loss {mean(run.losses[-WINDOW:]):.4f}",
                flush=True,
            )
        start = stop
    whole, resumed = Run(steps, cosine), Run(steps, cosine)
    whole.load(paths[meet])
    resumed.load(paths[cut])
    resumed.train(x, y, cut, meet)
    return run, torch.equal(resumed.parameters(), whole.parameters())


def stops(steps: int, cut: int, meet: int) -> list[int]:
    """When a run is saved."""
    return sorted({*range(WINDOW, steps, WINDOW), cut, meet, steps})


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def windows(values: list[float], size: int) -> dict[int, float]:
    """Means over ``size`` steps, by the step at which they end."""
    return {end: mean(values[end - size : end]) for end in range(size, len(values) + 1, size)}


def exponents(lengths: dict[int, float]) -> dict[int, float]:
    """b in length ~ t^b between t and 2 t, for t = 100, 200, 400 ..."""
    starts = [t for t in (EVERY * 2**k for k in range(20)) if 2 * t in lengths]
    return {t: math.log2(lengths[2 * t] / lengths[t]) for t in starts}


def table(runs: dict[str, Run]) -> list[str]:
    """Lengths and losses of both."""
    names = list(runs)
    head = ["steps", *(f"{what}, {name}" for name in names for what in ("length", "length / lr factor", "loss"))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    total = min(run.steps for run in runs.values())
    marks = [t for t in (100, 200, 500, *range(1000, total + 1, 1000)) if t <= total]
    for t in marks:
        cells = [f"{t:,}"]
        for run in runs.values():
            length = mean(run.lengths[t - EVERY : t])
            factor = mean([run.rate(step) for step in range(t - EVERY, t)])
            loss = f"{mean(run.losses[t - WINDOW : t]):.3f}" if t >= WINDOW else ""
            cells += [f"{length:.4f}", f"{length / factor:.4f}", loss]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def verdicts(name: str, run: Run, equal: bool, cut: int, meet: int) -> list[str]:
    """What is claimed, and whether it holds."""
    rated = [length / run.rate(step) for step, length in enumerate(run.lengths)]
    found = exponents(windows(rated, EVERY))
    least = min(found.values())
    losses = list(windows(run.losses, WINDOW).values())
    rises = sum(new >= old for old, new in itertools.pairwise(losses))
    last = losses[len(losses) // 2 :]
    memory = run.optimizer.param_groups[0]["clock"]["memory"]
    per_lr = " over the factor of the schedule" if run.cosine else ""
    powers = ", ".join(f"{b:+.2f}" for b in found.values())
    return [
        f"* {name}: length{per_lr} ~ t^b with b = {powers} between t and 2 t for t = {EVERY}, {2 * EVERY}, ...: "
        f"**no faster than 1/t: {'holds' if least > -1 else 'DOES NOT HOLD'}**.",
        f"* {name}: of {len(losses) - 1} means over {WINDOW} steps {rises} are no lower than the one before; in the "
        f"second half it goes from {last[0]:.3f} to {last[-1]:.3f}, least {min(losses):.3f}: **keeps falling: "
        f"{'holds' if rises == 0 else 'holds but for those' if losses[-1] == min(losses) else 'DOES NOT HOLD'}**.",
        f"* {name}: saved after {cut:,} steps and resumed, parameters after {meet:,}: **bit for bit: "
        f"{'holds' if equal else 'DOES NOT HOLD'}**.",
        f"* {name}: the policy ended as {'`precise`' if memory.get('precise') else '`noisy`'}, mean agreement of "
        f"gradients {memory.get('agreement', math.nan):.2f}.",
    ]


def main() -> None:
    """Run both, print the report, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="a folder of checkpoints; goes on with what is there")
    parser.add_argument("--only", choices=["no schedule", "cosine"])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    steps = chosen.steps
    cut, meet = steps // 2 + 3, steps * 3 // 5
    runs, told, spent = {}, [], []
    with tempfile.TemporaryDirectory() as temporary:
        for name in [chosen.only] if chosen.only else ["no schedule", "cosine"]:
            run, equal = watched(steps, name == "cosine", cut, meet, chosen.keep or Path(temporary))
            runs[name] = run
            told += verdicts(name, run, equal, cut, meet)
            spent.append(f"{name} {run.seconds:.0f} s")
    lines = [
        "# A long run on noisy labels",
        "",
        f"`python benchmarks/long_run.py --steps {steps}`, {datetime.date.today()}, torch {torch.__version__}, "
        f"{processor()}, one thread, CPU seconds: {', '.join(spent)}.",
        "",
        f"The 1,797 digits of scikit-learn (8 x 8) with {NOISE:.0%} of their labels replaced by another class, "
        f"perceptron 64-32-10, batch {BATCH}, `NaturalGradient(model, likelihood=Categorical())`, all defaults; one "
        f"seed. `length` is the mean of |theta_(t+1) - theta_t| over the last {EVERY} steps, `loss` that of the "
        f"batches' losses over the last {WINDOW}.",
        "",
        *table(runs),
        "",
        "## What was claimed",
        "",
        *told,
    ]
    print("\n".join(lines))
    if chosen.out is not None:
        chosen.out.write_text("\n".join(lines) + "\n")


def processor() -> str:
    """Its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
