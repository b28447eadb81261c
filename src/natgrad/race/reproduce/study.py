"""What a study is: the tasks and entries of a paper, its published numbers, the sizes it is run at, its claims."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import natgrad
from natgrad.race.entries import Entry, Settings, find, natural
from natgrad.race.reproduce.claims import Claim
from natgrad.race.tasks import TASKS, Task

if TYPE_CHECKING:
    from optuna import Trial

Space = Callable[["Trial"], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """An entrant of a study: the entry of the races called `entry` under a name and with settings of its own.

    `settings` hold in every trial, `first` is where tuning starts, over `space` or else the entry's own. Rows that are
    not `tuned` run as they are. `approximation` takes the place of the entry's, for variants that no entry has.
    """

    name: str
    entry: str
    settings: Settings = field(default_factory=dict)
    first: Settings = field(default_factory=dict)
    space: Space | None = None
    approximation: Callable[[], natgrad.Approximation] | None = None
    tuned: bool = True

    def resolve(self) -> Entry:
        """The entry of the races that this row is; ValueError where there is none of that name."""
        entry = find(self.entry)
        build = natural(self.approximation) if self.approximation else entry.build
        defaults = {**entry.defaults, **self.first, **self.settings}
        return replace(entry, name=self.name, build=build, space=self.space or entry.space, defaults=defaults)


@dataclass(frozen=True)
class Size:
    """How much is run: None leaves what the task has. `budget` is in seconds of training per run.

    `changes` are fields of the task, such as a smaller batch or network, for this size alone.
    """

    examples: int | None = None
    test: int | None = None
    epochs: int | None = None
    trials: int = 0
    seeds: tuple[int, ...] = (0,)
    budget: float = math.inf
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """Numbers of a paper, by name of our row and then by column; `source` says where they stand."""

    source: str
    rows: Mapping[str, Mapping[str, float | str]]

    @property
    def columns(self) -> list[str]:
        """All columns, in order of appearance."""
        return list(dict.fromkeys(column for row in self.rows.values() for column in row))


@dataclass(frozen=True)
class ErrorPlan:
    """Fisher errors along a run of `row`: of the natgrad classes named, at so many points, on so many examples."""

    row: str
    approximations: tuple[str, ...]
    points: int = 10
    examples: int = 128

    def resolve(self) -> dict[str, natgrad.Approximation]:
        """The approximations by name; ValueError where natgrad has none of that name."""
        missing = [name for name in self.approximations if not hasattr(natgrad, name)]
        if missing:
            raise ValueError(f"no approximation {', '.join(missing)} in natgrad")
        return {name: getattr(natgrad, name)() for name in self.approximations}


@dataclass(frozen=True)
class Experiment:
    """One task of a study. `changes` are fields of the task that the study sets itself.

    It takes part at the `sizes` that it has. `reference` is the row whose epoch the seconds of the others are divided
    by; the steps of `timed` rows are also timed in turn, by the bench, over whole refresh periods.
    """

    task: str
    rows: tuple[Row, ...]
    sizes: Mapping[str, Size]
    reference: str
    published: Published | None = None
    errors: ErrorPlan | None = None
    timed: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the task."""
        return str(self.changes.get("name", self.task))

    def resolve(self, size: Size) -> Task:
        """The task at a size; ValueError where there is none of that name."""
        if self.task not in TASKS:
            raise ValueError(f"no task {self.task!r}: there are {', '.join(TASKS)}")
        task = replace(TASKS[self.task], **{**self.changes, **size.changes})
        return replace(task, epochs=size.epochs or task.epochs)


@dataclass(frozen=True)
class Study:
    """The reproduction of one paper. `differs` says what is not as in the paper, whatever the size."""

    name: str
    title: str
    paper: str
    experiments: tuple[Experiment, ...]
    claims: tuple[Claim, ...]
    differs: tuple[str, ...] = ()

    @cached_property
    def row_names(self) -> list[str]:
        """The names of all rows of all experiments."""
        return list(dict.fromkeys(row.name for experiment in self.experiments for row in experiment.rows))
