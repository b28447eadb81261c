"""The bench: what a step costs with each optimizer, as ratios to SGD measured in the same run.

The entries take turns, one step each, so that whatever else the machine does hits all of them alike.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.race.data import Dataset
from natgrad.race.entries import Entry, Settings
from natgrad.race.floors import floor_flops
from natgrad.race.run import draws, feed, train_step
from natgrad.race.summary import Table
from natgrad.race.tasks import Task
from natgrad.race.timing import clock, held_bytes, product_rate

MEGABYTE = 2**20


@dataclass(frozen=True)
class Cost:
    """What one entry costs.

    `step_ms` is the median of the steps that neither observe nor refresh; `mean_ratio` covers whole refresh
    periods, so it holds every cost. `refresh_ms` is what a refresh step takes longer. The floors are SGD's step
    and the products of the apply at the rate of the machine, over SGD's step.
    """

    name: str
    step_ms: float
    step_ratio: float | None
    mean_ratio: float | None
    refresh_ms: float | None
    peak_memory_mb: float
    floor_ratio: float | None = None
    floor_ratio_bfloat16: float | None = None


@dataclass
class Racer:
    """One entry under way: its own model, its optimizer and the times of its steps by kind."""

    entry: Entry
    model: nn.Module
    optimizer: Any
    times: list[tuple[str, float]] = field(default_factory=list)
    transient: int = 0

    @property
    def period(self) -> int:
        """Steps from one refresh to the next; 1 for an optimizer that has none."""
        return int(getattr(self.optimizer, "refresh_every", 1))

    def kind(self) -> str:
        """Say what the next step does: "refresh", "observe" or "plain"."""
        if not hasattr(self.optimizer, "refresh_every"):
            return "plain"
        step = int(self.optimizer.steps)
        if step % self.optimizer.refresh_every == 0:
            return "refresh"
        return "observe" if step % self.optimizer.observe_every == 0 else "plain"

    def milliseconds(self, *kinds: str) -> list[float]:
        """Times of the steps of some kinds, of all steps where none is named."""
        return [1000 * seconds for kind, seconds in self.times if kind in kinds or not kinds]

    def step_ms(self) -> float:
        """Median of the plain steps; of all but the refreshes where every step observes."""
        return median(self.milliseconds("plain") or self.milliseconds("observe") or self.milliseconds())

    def mean_ms(self) -> float:
        """Mean over as many whole periods as were measured."""
        times = self.milliseconds()
        return mean(times[: len(times) // self.period * self.period] or times)

    def refresh_ms(self) -> float | None:
        """How much longer a refresh step takes than a plain one."""
        refreshes = self.milliseconds("refresh")
        return median(refreshes) - self.step_ms() if refreshes and self.period > 1 else None


def bench(
    task: Task,
    data: Dataset,
    entries: Sequence[Entry],
    settings: Mapping[str, Settings],
    *,
    steps: int,
    device: torch.device,
) -> list[Cost]:
    """Time at least `steps` steps of every entry, in whole refresh periods, after one period to warm up."""
    racers = [start(task, data, entry, settings[entry.name], device) for entry in entries]
    dealt = itertools.cycle(list(itertools.islice(feed(task, data, *draws(0)), 20)))
    longest = max(racer.period for racer in racers)
    for batch in itertools.islice(dealt, max(3, longest)):
        for racer in racers:
            train_step(task, racer.model, racer.optimizer, *batch)
    for _ in range(math.ceil(steps / longest) * longest):
        batch = next(dealt)
        for racer in racers:
            _timed_step(task, racer, batch, device)
    return costs(racers, device, task.batch)


def start(task: Task, data: Dataset, entry: Entry, settings: Settings, device: torch.device) -> Racer:
    """Build the model and the optimizer of an entry."""
    torch.manual_seed(0)
    model = task.model(data).to(device)
    return Racer(entry, model, entry.start(model, task, settings, 1))  # what is learnt in an epoch is then learnt


def _timed_step(task: Task, racer: Racer, batch: tuple[Tensor, ...], device: torch.device) -> None:
    kind, cuda = racer.kind(), device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    begin = clock(device)
    train_step(task, racer.model, racer.optimizer, *batch)
    racer.times.append((kind, clock(device) - begin))
    if cuda:
        racer.transient = max(racer.transient, torch.cuda.max_memory_allocated(device) - before)


def costs(racers: Sequence[Racer], device: torch.device, batch: int) -> list[Cost]:
    """Reduce the times to ratios; ratios to SGD are None where SGD does not take part."""
    sgd = next((racer for racer in racers if racer.entry.name == "sgd"), None)
    rates = [product_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16)]
    return [_cost(racer, sgd, rates, batch) for racer in racers]


def _cost(racer: Racer, sgd: Racer | None, rates: Sequence[float], batch: int) -> Cost:
    flops = floor_flops(racer.entry.base, racer.model, batch)
    floors = [None if flops is None or sgd is None else 1 + 1000 * flops / rate / sgd.step_ms() for rate in rates]
    return Cost(
        name=racer.entry.name,
        step_ms=racer.step_ms(),
        step_ratio=racer.step_ms() / sgd.step_ms() if sgd else None,
        mean_ratio=racer.mean_ms() / sgd.mean_ms() if sgd else None,
        refresh_ms=racer.refresh_ms(),
        peak_memory_mb=(held_bytes(racer.optimizer, racer.model) + racer.transient) / MEGABYTE,
        floor_ratio=floors[0],
        floor_ratio_bfloat16=floors[1],
    )


def table(found: Sequence[Cost]) -> Table:
    """Lay the costs out as text."""
    headers = [
        "entry",
        "step ms",
        "step / sgd",
        "mean / sgd",
        "refresh ms",
        "memory MB",
        "floor",
        "floor bf16",
    ]
    return Table(headers, [[cost.name, *map(_text, list(asdict(cost).values())[1:])] for cost in found])


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"
