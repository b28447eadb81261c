"""A race: tune the entries if asked, train each from each seed, and say what came of it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from natgrad.race.data import Dataset
from natgrad.race.entries import Entry, Settings
from natgrad.race.progress import Screen, tensorboard
from natgrad.race.results import plain, write_json
from natgrad.race.run import Epoch, Rules, Run, Watch, run
from natgrad.race.settings import read_book
from natgrad.race.tasks import Task
from natgrad.race.tune import Trial, best, trials


@dataclass(frozen=True)
class Race:
    """Who races whom on what; `settings` and `fixed` are by name of the entry."""

    task: Task
    data: Dataset
    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    rules: Rules
    out: Path
    settings: Mapping[str, Settings] = field(default_factory=dict)
    fixed: Mapping[str, Settings] = field(default_factory=dict)
    log: bool = False

    def settings_of(self, entry: Entry) -> dict[str, Any]:
        """What an entry races with."""
        return {**entry.defaults, **self.settings.get(entry.name, {})}


def runs(race: Race, screen: Screen, has: Callable[[str, int], bool] = lambda name, seed: False) -> Iterator[Run]:
    """Yield the runs, seed by seed, but those that it `has`; ends after one that was interrupted."""
    for seed in race.seeds:
        for entry in race.entries:
            if has(entry.name, seed):
                continue
            yield (done := _one(race, entry, seed, screen))
            if done.stopped == "interrupted":
                return


def _one(race: Race, entry: Entry, seed: int, screen: Screen) -> Run:
    folder = race.out / "tensorboard" / f"{entry.name}-{seed}" if race.log else None
    show = screen.follow(f"{entry.name} seed {seed}", race.rules.epochs)
    with tensorboard(folder) as write:
        watch = _both(show, write)
        settings = race.settings_of(entry)
        return run(race.task, race.data, entry, settings=settings, seed=seed, rules=race.rules, watch=watch)


def _both(first: Watch, second: Watch) -> Watch:
    def watch(epoch: Epoch) -> None:
        first(epoch)
        second(epoch)

    return watch


def tune(race: Race, screen: Screen, *, count: int, resume: bool) -> tuple[dict[str, Settings], bool]:
    """Tune every entry with `count` trials; returns the settings by entry, and whether it was interrupted.

    The best settings go to `settings.json` in the folder of the race and the trials to `trials.json`, as they
    come; with `resume`, entries that have settings there already are left as they are, and of the others the trials
    that are there are not run again.
    """
    book = Book(race, resume)
    for entry in race.entries:
        if entry.name in book.settings:
            continue
        tried: list[Trial] = []
        for trial in trials(
            race.task,
            race.data,
            entry,
            count=count,
            rules=race.rules,
            fixed=race.fixed.get(entry.name, {}),
            show=lambda title: screen.follow(title, race.rules.epochs),
            held=book.held(entry.name),
        ):
            tried.append(trial)
            book.note(entry.name, tried, finished=len(tried) == count)
        if tried[-1].stopped == "interrupted":
            return book.settings, True
    return book.settings, False


class Book:
    """The two files of a tuning: `settings.json` with what was chosen, `trials.json` with what was tried."""

    def __init__(self, race: Race, resume: bool) -> None:
        self.task, self.out = race.task.name, race.out
        self.chosen = self._read("settings.json") if resume else {}
        self.tried = self._read("trials.json") if resume else {}
        self.settings: dict[str, Settings] = dict(self.chosen.get(self.task, {}))

    def held(self, name: str) -> list[Trial]:
        """The trials of an entry that were there, up to one that was interrupted."""
        found = [Trial(**held) for held in self.tried.get(self.task, {}).get(name, [])]
        whole = takewhile(lambda trial: trial.stopped != "interrupted", found)
        return [replace(trial, loss=math.inf) if trial.loss is None else trial for trial in whole]

    def note(self, name: str, tried: list[Trial], *, finished: bool) -> None:
        """Store the trials of an entry so far and, once they are all done, the best of them."""
        self.tried.setdefault(self.task, {})[name] = [asdict(trial) for trial in tried]
        write_json(self.out / "trials.json", self.tried)
        winner = best(tried)
        if finished and winner:
            self.settings[name] = dict(winner.settings)
            self.chosen.setdefault(self.task, {})[name] = plain(dict(winner.settings))
        write_json(self.out / "settings.json", self.chosen)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.out / name
        return read_book(path) if path.is_file() else {}


def with_settings(race: Race, found: Mapping[str, Settings]) -> Race:
    """The same race with the settings that a tuning found, under what the command line fixed."""
    names = {entry.name for entry in race.entries} & found.keys()
    tuned = {name: {**found[name], **race.fixed.get(name, {})} for name in names}
    return replace(race, settings={**race.settings, **tuned})
