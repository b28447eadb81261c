"""Races that are killed and resumed, and races over several tasks."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from natgrad.race import data
from natgrad.race.cli import main
from natgrad.race.entries import ENTRIES, Entry, Settings
from natgrad.race.tasks import TASKS, WIDE, Task

Start = Callable[..., tuple[int, Path]]


@pytest.fixture
def race(tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Runs a race without its pictures, which take longest."""
    monkeypatch.setattr("natgrad.race.report.plot", lambda runs, title, folder: [])
    monkeypatch.setitem(TASKS, "other", replace(tiny, name="other", batch=20, keep_last=True))

    def start(*words: str, entries: str = "sgd,adamw", task: str = "tiny") -> tuple[int, Path]:
        out = tmp_path / "out"
        return main(["race", "--task", task, "--entries", entries, "--out", str(out), *words]), out

    return start


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """An entry "counted" is there, and every run of it leaves its settings here."""
    built: list[Settings] = []

    def build(model: nn.Module, task: Task, settings: Settings) -> Any:
        built.append(settings)
        return torch.optim.SGD(model.parameters(), lr=settings["lr"])

    monkeypatch.setitem(ENTRIES, "counted", Entry("counted", build, lambda trial: {}, {"lr": 0.1}))
    return built


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "results.json").read_text())["runs"]


def test_a_resumed_race_keeps_its_runs_and_adds_those_that_lack(race: Start, counted: list[Settings]) -> None:
    race("--seeds", "0,1", entries="counted")
    _, out = race("--seeds", "0,1,2", "--resume", entries="counted,sgd")
    assert len(counted) == 3
    assert [(run["name"], run["seed"]) for run in results(out)] == [
        ("counted", 0), ("counted", 1), ("sgd", 0), ("sgd", 1), ("counted", 2), ("sgd", 2),
    ]  # fmt: skip
    _, out = race("--resume", entries="sgd")
    assert len(results(out)) == 6, "runs of entries that do not race now are kept"


def test_a_run_by_other_settings_is_raced_again(race: Start, counted: list[Settings]) -> None:
    race(entries="counted")
    _, out = race("--resume", "--set", "counted.lr=0.2", entries="counted")
    assert [run["configuration"]["lr"] for run in results(out)] == [0.2] and len(counted) == 2


@pytest.mark.parametrize("words", [["--epochs", "3"], ["--examples", "64"], ["--budget", "9"], ["--cpu-seconds"]])
def test_a_race_of_another_size_is_not_resumed(
    race: Start, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    race(entries="sgd")
    status, out = race("--resume", *words, entries="sgd")
    assert status == 2 and "is of another size" in capsys.readouterr().err and len(results(out)) == 1


def test_an_interrupted_run_is_raced_again(race: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: nn.Module, task: Task, settings: Settings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(ENTRIES, "stop", Entry("stop", interrupt, lambda trial: {}))
    race(entries="sgd,stop")
    monkeypatch.setitem(ENTRIES, "stop", Entry("stop", ENTRIES["sgd"].build, lambda trial: {}, {"lr": 0.1}))
    status, out = race("--resume", entries="sgd,stop")
    assert status == 0 and [(run["name"], run["stopped"]) for run in results(out)] == [("sgd", ""), ("stop", "")]


def test_a_resumed_tuning_runs_the_trials_that_lack_and_ends_as_one_that_was_not_stopped(
    race: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, built = ENTRIES["sgd"], list[Settings]()

    def tune(stop: int, *words: str) -> list[dict[str, Any]]:
        def build(model: nn.Module, task: Task, settings: Settings) -> Any:
            built.append(settings)
            if len(built) > stop:
                raise KeyboardInterrupt
            return whole.build(model, task, settings)

        built.clear()
        monkeypatch.setitem(ENTRIES, "sgd", replace(whole, build=build))
        _, out = race("--tune", "6", "--tune-only", *words, entries="sgd")
        tried = json.loads((out / "trials.json").read_text())["tiny"]["sgd"]
        return [{key: trial[key] for key in ("number", "settings", "loss")} for trial in tried]

    at_once = tune(6)
    assert [trial["loss"] for trial in tune(4)][:4] == [trial["loss"] for trial in at_once[:4]]
    assert tune(6, "--resume") == at_once and len(built) == 2, "the 5th was interrupted"


KILLED = """
    import os, signal, sys
    from natgrad.race.cli import main
    from natgrad.race.entries import ENTRIES, Entry
    from natgrad.race.tasks import TASKS
    from conftest import TINY

    def build(model, task, settings):
        os.kill(os.getpid(), signal.SIGKILL)

    TASKS["tiny"] = TINY
    ENTRIES["last"] = Entry("last", build, lambda trial: {})
    main(["race", "--task", "tiny", "--entries", "sgd,last", "--out", sys.argv[1]])
"""


def test_a_killed_race_has_left_its_runs_and_goes_on_where_it_was(
    race: Start, counted: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, here = tmp_path / "out", Path(__file__).parent
    source = Path(data.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(here)])}
    words = [sys.executable, "-c", textwrap.dedent(KILLED), str(out)]
    assert subprocess.run(words, env=environment, capture_output=True).returncode == -signal.SIGKILL
    (before,) = results(out)
    assert before["name"] == "sgd"
    monkeypatch.setitem(ENTRIES, "last", replace(ENTRIES["counted"], name="last"))
    race("--resume", entries="sgd,last")
    first, second = results(out)
    assert first == before and second["name"] == "last" and len(counted) == 1


def test_several_tasks_have_a_folder_each_and_a_report_over_all(race: Start) -> None:
    status, out = race("--cpu-seconds", task="tiny,other")
    assert status == 0
    assert [run["steps"] for run in results(out / "tiny")] == [12, 12]
    assert [run["steps"] for run in results(out / "other")] == [10, 10]
    held = json.loads((out / "summary.json").read_text())
    assert [(d["task"], d["entry"], d["opponent"]) for d in held["by task"]] == [
        ("tiny", "sgd", "adamw"),
        ("other", "sgd", "adamw"),
    ]
    text = (out / "report.md").read_text()
    assert text.startswith("# A race over 2 tasks") and "[tiny](tiny/report.md), seeds 0" in text
    assert (out / "other" / "report.md").is_file() and not (out / "settings.json").exists()


def test_several_tasks_are_tuned_one_by_one_into_one_file_that_can_be_given_back(race: Start) -> None:
    _, out = race("--tune", "2", "--epochs", "1", task="tiny,other", entries="adamw")
    book = json.loads((out / "settings.json").read_text())
    assert book.keys() == {"tiny", "other"}
    _, out = race("--settings", str(out / "settings.json"), "--epochs", "1", task="tiny,other", entries="adamw")
    for task in ("tiny", "other"):
        assert [run["configuration"] for run in results(out / task)] == [book[task]["adamw"]]


def test_several_tasks_may_be_tuned_alone_and_raced_after_it(race: Start, counted: list[Settings]) -> None:
    words = ("--tune", "2", "--epochs", "1", "--resume")
    status, out = race("--tune-only", *words, task="tiny,other", entries="counted")
    assert status == 0 and len(counted) == 4 and not (out / "tiny" / "results.json").exists()
    race(*words, task="tiny,other", entries="counted")
    assert len(counted) == 6 and [len(results(out / task)) for task in ("tiny", "other")] == [1, 1]


def test_a_task_without_data_is_left_out_of_several_with_the_reason(
    race: Start, tiny: Task, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(folder: Path | None) -> data.Dataset:
        raise data.MissingData("put it there")

    monkeypatch.setitem(TASKS, "lost", replace(tiny, data=missing))
    status, out = race(task="lost,tiny")
    assert status == 0 and "lost is left out: put it there" in capsys.readouterr().err
    assert "* lost was not run: put it there" in (out / "report.md").read_text()
    status, out = race("--out", str(out / "none"), task="lost,lost")
    assert status == 2


def test_an_unknown_task_is_one_line(race: Start, capsys: pytest.CaptureFixture[str]) -> None:
    assert race(task="tiny,nowhere")[0] == 2
    assert capsys.readouterr().err.startswith("natgrad: no task 'nowhere': there are ")


def test_the_wide_preset_names_tasks_that_there_are_whose_last_batches_are_kept() -> None:
    assert set(WIDE) <= TASKS.keys() and all(TASKS[name].keep_last for name in WIDE)
