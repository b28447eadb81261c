"""Tuning under equal terms: every entry gets the same number of full trials on its own small space."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from natgrad.race.data import Dataset
from natgrad.race.entries import Entry
from natgrad.race.results import plain
from natgrad.race.run import Rules, Run, Watch, run
from natgrad.race.tasks import Task

SEED = 100  # of the trials; races use small seeds, so nothing is tuned on the seed it is raced on


@dataclass(frozen=True)
class Trial:
    """One set of settings and the training loss it ended with; infinite where it diverged."""

    number: int
    settings: Mapping[str, Any]
    loss: float
    seconds: float
    stopped: str


def trials(
    task: Task,
    data: Dataset,
    entry: Entry,
    *,
    count: int,
    rules: Rules,
    fixed: Mapping[str, Any],
    show: Callable[[str], Watch],
    held: Sequence[Trial] = (),
) -> Iterator[Trial]:
    """Yield `count` trials: the entry's defaults, then those of a seeded TPE (Bergstra et al. 2011).

    Those `held` from an earlier call are told to the TPE in place of being run, as long as it asks for the same.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task = replace(task, metrics={})  # trials are judged by their loss
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=max(4, count // 4)))
    for number in range(count):
        asked = study.ask() if number else None
        settings = {**entry.defaults, **(entry.space(asked) if asked else {}), **fixed}
        if number < len(held) and held[number].settings == plain(settings):
            trial = replace(held[number], settings=settings)
        else:
            held = held[:number]
            watch = show(f"{entry.name} trial {number + 1}/{count}")
            done = run(task, data, entry, settings=settings, seed=SEED, rules=rules, watch=watch)
            trial = Trial(number, settings, _value(done), done.curve[-1].seconds if done.curve else 0.0, done.stopped)
        if asked:
            study.tell(asked, trial.loss)
        yield trial
        if trial.stopped == "interrupted":
            return


def best(tried: list[Trial]) -> Trial | None:
    """Choose the trial of least loss; None where all diverged or were interrupted."""
    finite = [trial for trial in tried if math.isfinite(trial.loss)]
    return min(finite, key=lambda trial: trial.loss, default=None)


def _value(done: Run) -> float:
    usable = done.curve and not done.diverged and done.stopped != "interrupted"
    return done.curve[-1].loss if usable else math.inf
