"""One run: a task trained by one entry from one seed, the clock stopped while losses are measured."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.race.data import Dataset, Pair
from natgrad.race.entries import SCHEDULES, Entry, Settings
from natgrad.race.tasks import Task

GROWTH = 10  # a training loss this many times the initial one counts as diverged
WARM_UP = 0.05  # of the steps
NOISE = 10_000  # apart from the seed of the order, which starts at the seed of the run


@dataclass(frozen=True)
class Point:
    """Where a run stands at the end of an epoch; `seconds` counts training steps alone.

    `metrics` holds the task's measures beside its loss, taken once, at the end of the last epoch.
    """

    epoch: int
    step: int
    seconds: float
    loss: float
    test_loss: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Epoch:
    """A point, the loss of every batch that led there and what the optimizer says of itself."""

    point: Point
    batch_losses: list[float] = field(default_factory=list)
    statistics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What came of a run; `stopped` says why it ended early: diverged, budget, interrupted or an error."""

    name: str
    seed: int
    configuration: Settings
    epochs: list[Epoch]
    stopped: str = ""

    @property
    def curve(self) -> list[Point]:
        """The points, the first of them before any step."""
        return [epoch.point for epoch in self.epochs]

    @property
    def diverged(self) -> bool:
        """Whether the loss blew up or the optimizer gave up."""
        return self.stopped.startswith("diverged")


@dataclass(frozen=True)
class Rules:
    """What is the same for every entry: epochs, seconds of training at most, device.

    Seconds are of the clock, or those that the processor spent on this process, which others on a machine disturb less.
    """

    epochs: int
    budget: float = math.inf
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    processor: bool = False

    def now(self) -> float:
        """Seconds so far."""
        return time.process_time() if self.processor else time.perf_counter()

    def waited(self) -> float:
        """Seconds so far, once the device has done all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.now()


Watch = Callable[[Epoch], None]


def run(
    task: Task,
    data: Dataset,
    entry: Entry,
    *,
    settings: Settings,
    seed: int,
    rules: Rules,
    watch: Watch = lambda _: None,
) -> Run:
    """Train and keep what was done, also when the loss diverges, the budget ends or Ctrl-C is pressed."""
    seen: list[Epoch] = []
    stopped = ""
    try:
        for epoch in train(task, data, entry, settings=settings, seed=seed, rules=rules):
            seen.append(epoch)
            watch(epoch)
            if _blown_up(epoch.point.loss, seen[0].point.loss):
                stopped = "diverged"
                break
        else:
            stopped = "budget" if seen[-1].point.epoch < rules.epochs else ""
    except KeyboardInterrupt:
        stopped = "interrupted"
    except (RuntimeError, ArithmeticError) as error:
        stopped = f"diverged: {type(error).__name__}: {error}".splitlines()[0]
    return Run(entry.name, seed, dict(settings), seen, stopped)


def train(task: Task, data: Dataset, entry: Entry, *, settings: Settings, seed: int, rules: Rules) -> Iterator[Epoch]:
    """Yield the state before training and then after every epoch, or `task.points` times in each."""
    torch.manual_seed(seed)
    model = task.model(data).to(rules.device)
    steps = steps_per_epoch(task, data)
    optimizer = entry.start(model, task, settings, steps)
    pace = paced(optimizer, settings.get("schedule", "constant"), rules.epochs * steps)
    order, noise = draws(seed)
    within = {round(steps * part / task.points) for part in range(1, task.points)}
    step, seconds = 0, 0.0
    yield Epoch(_measure(task, data, model, 0, step, seconds))
    for number in range(1, rules.epochs + 1):
        losses = []
        start = rules.waited() - seconds
        for i, (x, y, ids) in enumerate(feed(task, data, order, noise), 1):
            pace(step)
            losses.append(train_step(task, model, optimizer, x, y, ids))
            step += 1
            if rules.now() - start > rules.budget:
                break
            if i in within:
                seconds = rules.waited() - start
                point = _measure(task, data, model, number - 1, step, seconds)
                yield Epoch(point, torch.stack(losses).tolist(), _statistics(optimizer))
                losses = []
                start = rules.waited() - seconds
        seconds = rules.waited() - start
        point = _measure(task, data, model, number, step, seconds)
        last = number == rules.epochs or seconds > rules.budget
        if last and math.isfinite(point.loss):
            point = replace(point, metrics=measures(task, model, data))
        yield Epoch(point, torch.stack(losses).tolist(), _statistics(optimizer))
        if last:
            return


def train_step(task: Task, model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
    """Take one step of the plain loop; returns the loss of the batch.

    A natural gradient is told the targets, for likelihoods that ignore some of them, and which examples these are.
    """
    optimizer.zero_grad()
    if hasattr(optimizer, "targets"):
        optimizer.targets(y)
    if hasattr(optimizer, "examples") and ids is not None:
        optimizer.examples(ids)
    loss = task.loss(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def draws(seed: int) -> tuple[torch.Generator, torch.Generator]:
    """The generators of a run: of the order of the examples, and of what `augment` draws."""
    return torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + NOISE)


def feed(
    task: Task, data: Dataset, order: torch.Generator, noise: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Deal an epoch out in batches, as they are trained on, with the numbers of their examples."""
    for x, y, ids in batches(data.train, task.batch, order, keep_last=task.keep_last):
        yield (*(task.augment(x, y, noise) if task.augment else (x, y)), ids)


def batches(
    pair: Pair, size: int, order: torch.Generator, *, keep_last: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Deal the examples out, with their numbers, in shuffled batches; a last incomplete one is left out or kept."""
    x, y = pair
    deal = torch.randperm(len(x), generator=order).to(x.device)
    for chosen in deal[: len(x) if keep_last else len(x) // size * size].split(size):
        yield x[chosen], y[chosen], chosen


def steps_per_epoch(task: Task, data: Dataset) -> int:
    """Batches in an epoch."""
    whole, rest = divmod(len(data.train[0]), task.batch)
    return whole + (1 if rest and task.keep_last else 0)


def schedule(name: str, steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at each of the steps 0 to steps - 1.

    "constant"; "cosine" down to zero; or "warmup-cosine", up in a line over the first 20th of the steps and then
    down to zero as a cosine.
    """
    warm = math.ceil(WARM_UP * steps) if name == "warmup-cosine" else 0
    if name == "constant":
        return lambda step: 1.0
    if name in ("cosine", "warmup-cosine"):
        return lambda step: (step + 1) / warm if step < warm else _cosine((step - warm) / max(1, steps - warm))
    raise ValueError(f"schedule is {name!r}: it can be {', '.join(map(repr, SCHEDULES))}")


def _cosine(part: float) -> float:
    return (1 + math.cos(math.pi * part)) / 2


def paced(optimizer: Any, name: str, steps: int) -> Callable[[int], None]:
    """A function that sets the learning rate of every group of an optimizer for a step, by a schedule."""
    factor = schedule(name, steps)
    rates = [group["lr"] for group in optimizer.param_groups]

    def pace(step: int) -> None:
        if name != "constant":
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor(step)

    return pace


@torch.no_grad()
def mean_loss(task: Task, model: nn.Module, pair: Pair) -> float:
    """Mean over the loss terms of a whole set, in evaluation mode, with the same draws every time."""
    total = torch.zeros((), dtype=torch.float64, device=pair[1].device)
    terms = 0
    fixed = torch.Generator().manual_seed(NOISE)
    with evaluating(model):
        for x, y in zip(pair[0].split(task.chunk), pair[1].split(task.chunk), strict=True):
            if task.measured:
                x, y = task.measured(x, y, fixed)
            total += task.loss(model(x), y).double() * task.terms(y)
            terms += task.terms(y)
    return float(total) / terms


def measures(task: Task, model: nn.Module, data: Dataset) -> dict[str, float]:
    """The metrics of a task, in evaluation mode."""
    with evaluating(model):
        return {name: metric(model, data) for name, metric in task.metrics.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _measure(task: Task, data: Dataset, model: nn.Module, epoch: int, step: int, seconds: float) -> Point:
    test_loss = None if data.test is None else mean_loss(task, model, data.test)
    return Point(epoch, step, seconds, mean_loss(task, model, data.train), test_loss)


def _statistics(optimizer: Any) -> dict[str, float]:
    tell = getattr(optimizer, "statistics", None)
    return {} if tell is None else {key: float(value) for key, value in tell().items()}


def _blown_up(loss: float, initial: float) -> bool:
    return not math.isfinite(loss) or loss > GROWTH * initial
