import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from natgrad.race import cli, data
from natgrad.race.cli import main
from natgrad.race.entries import ENTRIES, Entry, Settings
from natgrad.race.tasks import TASKS, Task

Start = Callable[..., tuple[int, Path]]

FILES = ["report.html", "report.md", "results.json"]
PLOTS = [f"loss-vs-{axis}.{kind}" for axis in ("seconds", "steps") for kind in ("png", "svg")]


@pytest.fixture
def race(tiny: Task, tmp_path: Path) -> Start:
    def start(*words: str, entries: str = "sgd,adamw") -> tuple[int, Path]:
        out = tmp_path / "out"
        status = main(["race", "--task", "tiny", "--entries", entries, "--out", str(out), *words])
        return status, out

    return start


def test_a_race_leaves_results_report_and_plots(race: Start, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = race("--seeds", "0,1", "--set", "sgd.lr=0.05")
    assert status == 0
    assert sorted(file.name for file in out.iterdir()) == sorted(FILES + PLOTS)
    results = json.loads((out / "results.json").read_text())
    assert results["task"] == "tiny" and results["command"].startswith("natgrad race --task tiny")
    assert {"cpu", "cores", "threads", "versions"} <= results["machine"].keys()
    assert [(r["name"], r["seed"]) for r in results["runs"]] == [
        ("sgd", 0),
        ("adamw", 0),
        ("sgd", 1),
        ("adamw", 1),
    ]
    run = results["runs"][0]
    fields = {"name", "seed", "configuration", "steps", "seconds", "loss", "test_loss", "diverged", "curve"}
    assert fields <= run.keys()
    assert run["configuration"] == {"lr": 0.05, "momentum": 0.9}
    assert [(p["epoch"], p["step"]) for p in run["curve"]] == [(0, 0), (1, 6), (2, 12)]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "src='loss" not in page
    assert "to adamw's" in (out / "report.md").read_text()
    assert "report:" in capsys.readouterr().out


def test_tuning_gives_each_entry_its_trials_and_its_best_settings(race: Start) -> None:
    status, out = race("--tune", "2", "--epochs", "1")
    assert status == 0
    settings = json.loads((out / "settings.json").read_text())["tiny"]
    trials = json.loads((out / "trials.json").read_text())["tiny"]
    assert settings.keys() == trials.keys() == {"sgd", "adamw"}
    for name, tried in trials.items():
        assert len(tried) == 2 and tried[0]["settings"] == ENTRIES[name].defaults
        assert settings[name] == min(tried, key=lambda trial: trial["loss"])["settings"]
    raced = json.loads((out / "results.json").read_text())["runs"]
    assert all(run["configuration"] == settings[run["name"]] for run in raced)


def test_a_resumed_tuning_leaves_the_entries_it_has(race: Start) -> None:
    _, out = race("--tune", "2", "--epochs", "1", "--tune-only", entries="sgd")
    before = json.loads((out / "trials.json").read_text())["tiny"]["sgd"]
    race("--tune", "3", "--epochs", "1", "--tune-only", "--resume")
    after = json.loads((out / "trials.json").read_text())["tiny"]
    assert after["sgd"] == before and len(after["adamw"]) == 3
    assert not (out / "results.json").exists()


def test_a_settings_file_is_used_and_the_command_line_overrides_it(race: Start, tmp_path: Path) -> None:
    book = tmp_path / "book.json"
    book.write_text(json.dumps({"tiny": {"sgd": {"lr": 0.5, "momentum": 0.5}}}))
    _, out = race("--settings", str(book), "--set", "sgd.lr=0.02", entries="sgd")
    (run,) = json.loads((out / "results.json").read_text())["runs"]
    assert run["configuration"] == {"lr": 0.02, "momentum": 0.5}


def test_ctrl_c_leaves_a_report_of_what_was_done(race: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: nn.Module, task: Task, settings: Settings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(ENTRIES, "stop", Entry("stop", interrupt, lambda trial: {}))
    status, out = race(entries="sgd,stop,adamw")
    assert status == cli.INTERRUPTED
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [(run["name"], run["stopped"]) for run in runs] == [("sgd", ""), ("stop", "interrupted")]
    assert (out / "report.html").exists()


def test_ctrl_c_while_tuning_keeps_the_trials(race: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: nn.Module, task: Task, settings: Settings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(ENTRIES, "stop", Entry("stop", interrupt, lambda trial: {}))
    status, out = race("--tune", "2", entries="sgd,stop")
    assert status == cli.INTERRUPTED
    assert json.loads((out / "settings.json").read_text())["tiny"].keys() == {"sgd"}
    assert json.loads((out / "results.json").read_text())["runs"] == []


def test_a_diverged_entry_is_reported_and_the_race_goes_on(race: Start) -> None:
    status, out = race("--set", "sgd.lr=1e9")
    assert status == 0
    first, second = json.loads((out / "results.json").read_text())["runs"]
    assert first["diverged"] and not second["diverged"]
    assert "diverged" in (out / "report.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_files_are_written_on_request(race: Start) -> None:
    pytest.importorskip("tensorboard")
    _, out = race("--tensorboard", entries="sgd")
    assert list((out / "tensorboard" / "sgd-0").iterdir())


def test_missing_data_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(folder: Path | None) -> data.Dataset:
        raise data.MissingData("put it there")

    monkeypatch.setitem(TASKS, "lost", replace(TASKS["digits"], data=missing))
    assert main(["race", "--task", "lost"]) == 2
    assert capsys.readouterr().err == "natgrad: put it there\n"


@pytest.mark.parametrize(
    "words", [["--entries", "adan"], ["--set", "kfac.lr"], ["--entries", "sgd", "--set", "adamw.lr=1"]]
)
def test_a_mistake_on_the_command_line_is_one_line(
    tiny: Task, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["race", "--task", "tiny", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_options_beat_the_preset() -> None:
    arguments = cli.parse(["race", "--preset", "demo", "--epochs", "3"])
    assert arguments.epochs == 3 and str(arguments.out) == "runs/demo"


def test_the_data_command_lists_every_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11


def test_the_bench_writes_ratios_to_sgd(tiny: Task, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    words = ["--task", "tiny", "--entries", "sgd,adamw", "--steps", "3", "--json", str(file)]
    assert main(["bench", *words]) == 0
    sgd, adamw = json.loads(file.read_text())
    assert sgd["name"] == "sgd" and sgd["step_ratio"] == sgd["mean_ratio"] == 1
    assert adamw["step_ms"] > 0 and adamw["refresh_ms"] is None and adamw["floor_ratio"] is None
    weights = 8 * 6 + 6 + 6 * 4 + 4
    assert adamw["peak_memory_mb"] * 2**20 == pytest.approx(8 * weights, rel=0.1)


def test_the_bench_times_refreshes_of_natural_entries_under_several_policies(tiny: Task, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    words = [
        "--task",
        "tiny",
        "--entries",
        "sgd,kfac",
        "--policy",
        "default,kl",
        "--steps",
        "3",
        "--set",
        "kfac.overhead=null",
        "--set",
        "kfac[kl].overhead=null",
    ]
    assert main(["bench", *words, "--json", str(file)]) == 0
    costs = json.loads(file.read_text())
    assert [cost["name"] for cost in costs] == ["sgd", "kfac", "kfac[kl]"]
    for cost in costs[1:]:
        assert cost["refresh_ms"] is not None and cost["floor_ratio"] > 1 and cost["peak_memory_mb"] > 0
