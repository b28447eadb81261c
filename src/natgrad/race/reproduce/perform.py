"""Perform a study: for each of its tasks tune, train, time and measure; what is done is on disk at any time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from natgrad.race import bench
from natgrad.race import race as racing
from natgrad.race.bench import Cost
from natgrad.race.data import Dataset, MissingData, Pair
from natgrad.race.progress import Screen
from natgrad.race.race import Race
from natgrad.race.reproduce.claims import Outcome, Results
from natgrad.race.reproduce.fisher_error import Errors, along
from natgrad.race.reproduce.study import Experiment, Size, Study
from natgrad.race.results import record, restored, write_json
from natgrad.race.run import Rules, Run, steps_per_epoch
from natgrad.race.tasks import Task


@dataclass(frozen=True)
class Plan:
    """How much of a study is performed, where and with what; `changes` are fields of every task's size."""

    out: Path
    size: str = "cpu"
    changes: Mapping[str, Any] = field(default_factory=dict)
    tasks: Sequence[str] = ()
    entries: Sequence[str] = ()
    resume: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data: Path | None = None

    def experiments(self, study: Study) -> list[Experiment]:
        """The tasks that are chosen, with the rows that are; ValueError for a name that the study does not have."""
        sizes = [size for experiment in study.experiments for size in experiment.sizes]
        _known("size", [self.size], list(dict.fromkeys(sizes)))
        there = [experiment for experiment in study.experiments if self.size in experiment.sizes]
        _known("task", self.tasks, [experiment.name for experiment in there])
        _known("entry", self.entries, study.row_names)
        chosen = [e for e in there if not self.tasks or e.name in self.tasks]
        if not self.entries:
            return chosen
        few = [replace(e, rows=tuple(row for row in e.rows if row.name in self.entries)) for e in chosen]
        return [experiment for experiment in few if experiment.rows]

    def size_of(self, experiment: Experiment) -> Size:
        """The size of one task."""
        return replace(experiment.sizes[self.size], **self.changes)


def _known(kind: str, names: Sequence[str], there: Sequence[str]) -> None:
    strangers = [name for name in names if name not in there]
    if strangers:
        raise ValueError(f"no {kind} {', '.join(map(repr, strangers))} in this study: there are {', '.join(there)}")


@dataclass
class Store:
    """`results.json` of one task, written after every step of the work; `about` says what the results are of."""

    path: Path
    about: Mapping[str, Any]
    runs: list[Run] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    errors: list[Errors] = field(default_factory=list)

    def resume(self) -> None:
        """Take what the file holds; ValueError where that is of another size or other data."""
        if not self.path.is_file():
            return
        held = json.loads(self.path.read_text())
        if held["about"] != json.loads(json.dumps(self.about)):
            raise ValueError(f"{self.path} is of another size or other data: leave out --resume, or give another --out")
        self.runs = [restored(run) for run in held["runs"]]
        self.costs = [Cost(**cost) for cost in held["costs"]]
        self.errors = [Errors(**at) for at in held["errors"]]

    def save(self) -> None:
        """Write everything."""
        held = {"costs": [asdict(cost) for cost in self.costs], "errors": [asdict(at) for at in self.errors]}
        write_json(self.path, {"about": self.about, "runs": [record(run) for run in self.runs], **held})

    def has(self, row: str, seed: int) -> bool:
        """Whether the run is there."""
        return any(run.name == row and run.seed == seed for run in self.runs)

    @property
    def outcome(self) -> Outcome:
        """What is there so far."""
        return Outcome(list(self.runs), list(self.costs), list(self.errors), self.about)


def perform(study: Study, plan: Plan, screen: Screen) -> Iterator[Results]:
    """Yield the results so far, after every run and every measurement; KeyboardInterrupt is passed on.

    A task whose data are missing is left out, with the reason in its outcome. Names are resolved before anything runs.
    """
    experiments = [(e, plan.size_of(e)) for e in plan.experiments(study)]
    for experiment, size in experiments:
        experiment.resolve(size)
        for row in experiment.rows:
            row.resolve()
        if experiment.errors:
            experiment.errors.resolve()
    outcomes: dict[str, Outcome] = {}
    for experiment, size in experiments:
        try:
            for outcome in _perform(experiment, size, plan, screen):
                outcomes[experiment.name] = outcome
                yield Results(dict(outcomes))
        except MissingData as error:
            outcomes[experiment.name] = Outcome(missing=str(error))
            yield Results(dict(outcomes))


def _perform(experiment: Experiment, size: Size, plan: Plan, screen: Screen) -> Iterator[Outcome]:
    task = experiment.resolve(size)
    data = load(task, size, plan)
    rules = Rules(task.epochs, size.budget, plan.device)
    entries = tuple(row.resolve() for row in experiment.rows)
    fixed = {row.name: row.settings for row in experiment.rows}
    race = Race(task, data, entries, size.seeds, rules, plan.out / task.name, fixed=fixed)
    store = Store(race.out / "results.json", _about(task, data, size))
    if plan.resume:
        store.resume()
    if size.trials:
        tuned = replace(
            race, entries=tuple(entry for row, entry in zip(experiment.rows, entries, strict=True) if row.tuned)
        )
        found, interrupted = racing.tune(tuned, screen, count=size.trials, resume=plan.resume)
        if interrupted:
            raise KeyboardInterrupt
        race = racing.with_settings(race, found)
    for _ in _train(race, store, screen):
        yield store.outcome
    if experiment.timed and not store.costs:
        store.costs = _time(experiment, race)
    if experiment.errors and not store.errors:
        store.errors = _measure(experiment, race)
    store.save()
    yield store.outcome


def _train(race: Race, store: Store, screen: Screen) -> Iterator[None]:
    for seed in race.seeds:
        for entry in race.entries:
            if store.has(entry.name, seed):
                continue
            (run,) = racing.runs(replace(race, entries=(entry,), seeds=(seed,)), screen)
            if run.stopped == "interrupted":
                raise KeyboardInterrupt
            store.runs.append(run)
            store.save()
            yield


def _time(experiment: Experiment, race: Race) -> list[Cost]:
    """The bench of the timed rows, over one of the longest refresh periods after one to warm up."""
    entries = [entry for entry in race.entries if entry.name in experiment.timed]
    if not entries:
        return []
    settings = {entry.name: {**entry.defaults, **race.settings.get(entry.name, {})} for entry in entries}
    return bench.bench(race.task, race.data, entries, settings, steps=1, device=race.rules.device)


def _measure(experiment: Experiment, race: Race) -> list[Errors]:
    """The Fisher errors along one run of the planned row."""
    plan = experiment.errors
    entry = next((entry for entry in race.entries if plan and entry.name == plan.row), None)
    if plan is None or entry is None:
        return []
    steps = race.rules.epochs * steps_per_epoch(race.task, race.data)
    settings = {**entry.defaults, **race.settings.get(entry.name, {})}
    settings.pop("schedule", None)
    found = along(
        race.task,
        race.data,
        entry,
        settings,
        plan.resolve(),
        every=max(1, steps // plan.points),
        steps=steps,
        examples=plan.examples,
        device=race.rules.device,
    )
    return list(found)


def load(task: Task, size: Size, plan: Plan) -> Dataset:
    """The data of a task: as many to train and to test on as the size says, drawn with seed 0."""
    data = task.data(plan.data)
    if size.examples:
        data = replace(data, train=_some(data.train, size.examples))
    if size.test and data.test is not None:
        data = replace(data, test=_some(data.test, size.test))
    if len(data.train[0]) < task.batch:
        raise ValueError(f"{len(data.train[0])} examples: a batch of {task.name} takes {task.batch}")
    return data.to(plan.device)


def _some(pair: Pair, n: int) -> Pair:
    chosen = torch.randperm(len(pair[0]), generator=torch.Generator().manual_seed(0))[:n]
    return pair[0][chosen], pair[1][chosen]


def _about(task: Task, data: Dataset, size: Size) -> dict[str, Any]:
    tested = 0 if data.test is None else len(data.test[0])
    return {
        "task": task.name,
        "data": data.name,
        "examples": len(data.train[0]),
        "test examples": tested,
        "weights": sum(p.numel() for p in task.model(data).parameters()),
        "batch": task.batch,
        "epochs": task.epochs,
        "steps per epoch": steps_per_epoch(task, data),
        "trials": size.trials,
        "budget": None if math.isinf(size.budget) else size.budget,
    }
