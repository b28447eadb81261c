"""The reproductions: what a study leaves, what its report says, what the command line refuses, on a tiny study."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from natgrad.race import data
from natgrad.race.bench import Cost
from natgrad.race.cli import main
from natgrad.race.entries import ENTRIES, Entry, Settings
from natgrad.race.reproduce import STUDIES, claims, command, report
from natgrad.race.reproduce.claims import Claim, Outcome, Results, final, over
from natgrad.race.reproduce.fisher_error import Errors
from natgrad.race.reproduce.study import ErrorPlan, Experiment, Published, Row, Size, Study
from natgrad.race.tasks import TASKS, Task
from race.studies import RUNS, a_run

Start = Callable[..., tuple[int, Path]]


STUDY = Study(
    name="tiny",
    title="A tiny paper",
    paper="Nobody (2026).",
    experiments=(
        Experiment(
            "tiny",
            rows=(
                Row("sgd", "sgd", first={"lr": 0.1}),
                Row("kfac (every step)", "kfac", settings={"observe_every": 1, "refresh_every": 1}),
                Row("kfac", "kfac", tuned=False),
            ),
            sizes={"cpu": Size(examples=64, epochs=2, trials=2, seeds=(0, 1)), "paper": Size()},
            reference="sgd",
            published=Published("table 7", {"sgd": {"loss": 0.5}, "adam": {"loss": "lost"}}),
            errors=ErrorPlan("kfac", ("KFAC", "EKFAC"), points=2, examples=16),
            timed=("sgd", "kfac"),
        ),
    ),
    claims=(
        Claim("KFAC trains", "final loss", {"tiny": final("tiny", "kfac")}, at_most=1e9),
        Claim(
            "EKFAC is nearer",
            "ratio of errors",
            {"tiny": over(*(claims.fisher_error("tiny", n) for n in ("EKFAC", "KFAC")))},
            at_most=1,
        ),
        Claim("KFAC costs more", "step over SGD's", {"tiny": claims.step("tiny", "kfac")}, at_least=0),
        Claim("Elsewhere", "final loss", {"far": final("far", "kfac")}, at_most=1),
    ),
    differs=("The paper does not exist.",),
)


@pytest.fixture
def start(tiny: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setitem(STUDIES, "tiny", STUDY)

    def start(*words: str) -> tuple[int, Path]:
        out = tmp_path / "out"
        return main(["reproduce", "tiny", "--out", str(out), *words]), out

    return start


def test_a_study_leaves_a_report_with_both_tables_and_the_verdicts(start: Start) -> None:
    status, out = start()
    assert status == 0
    text = (out / "report.md").read_text()
    assert "**Verdict: reproduced** (claims: 3 reproduced, 1 not run)." in text
    assert "`natgrad reproduce tiny --out" in text and "The paper does not exist." in text and '"cpu":' in text
    assert (
        "64 examples of blobs (32 to test on), 82 weights, batch 16, 2 epochs of 4 steps, 2 trials for every tuned row"
        in text
    )
    assert "| entry | published: loss | step ms |" in text and "Published: table 7." in text
    (adam,) = [line for line in text.splitlines() if line.startswith("| adam |")]
    assert adam.startswith("| adam | lost | - |"), "a published row without ours has a line"
    (sgd,) = [line for line in text.splitlines() if line.startswith("| sgd | 0.5 |")]
    assert sgd.endswith("| 1.00 |")
    assert "| approximation | step 0 | step 4 | step 8 |" in text
    assert "| Elsewhere | final loss at most 1 | far: not run | not run |" in text
    for name in ("loss-vs-steps", "loss-vs-seconds", "fisher-error"):
        assert f"![{name}](tiny/{name}.png)" in text and (out / "tiny" / f"{name}.png").is_file()


def test_tuned_rows_get_their_trials_from_where_they_start_and_keep_their_settings(start: Start) -> None:
    _, out = start()
    trials = json.loads((out / "tiny" / "trials.json").read_text())["tiny"]
    assert trials.keys() == {"sgd", "kfac (every step)"} and {len(tried) for tried in trials.values()} == {2}
    assert trials["sgd"][0]["settings"]["lr"] == 0.1
    assert all(trial["settings"]["refresh_every"] == 1 for trial in trials["kfac (every step)"])
    results = json.loads((out / "tiny" / "results.json").read_text())
    assert [(run["name"], run["seed"]) for run in results["runs"]] == [
        (name, seed) for seed in (0, 1) for name in ("sgd", "kfac (every step)", "kfac")
    ]
    assert results["runs"][1]["configuration"]["observe_every"] == 1
    assert [cost["name"] for cost in results["costs"]] == ["sgd", "kfac"] and len(results["errors"]) == 3


def test_options_choose_entries_and_sizes(start: Start) -> None:
    words = [
        "--entries",
        "sgd",
        "--tasks",
        "tiny",
        "--trials",
        "0",
        "--seeds",
        "3",
        "--epochs",
        "1",
        "--examples",
        "32",
    ]
    _, out = start(*words)
    results = json.loads((out / "tiny" / "results.json").read_text())
    assert [(run["name"], run["seed"], run["steps"]) for run in results["runs"]] == [("sgd", 3, 2)]
    assert not (out / "tiny" / "trials.json").exists()


def test_a_resumed_study_keeps_what_it_has(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    start("--trials", "0", "--entries", "sgd")
    _, out = start("--trials", "0", "--resume")
    before = json.loads((out / "tiny" / "results.json").read_text())
    monkeypatch.setattr("natgrad.race.race.run", None)
    monkeypatch.setattr("natgrad.race.reproduce.perform.along", None)
    assert start("--trials", "0", "--resume")[0] == 0
    assert json.loads((out / "tiny" / "results.json").read_text()) == before


def test_results_of_another_size_are_not_taken_over(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    start("--trials", "0", "--entries", "sgd")
    assert start("--trials", "0", "--epochs", "3", "--resume")[0] == 2
    assert "is of another size" in capsys.readouterr().err


def test_ctrl_c_leaves_a_report_of_what_was_done(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(model: nn.Module, task: Task, settings: Settings) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(ENTRIES, "kfac", Entry("kfac", interrupt, lambda trial: {}))
    status, out = start("--trials", "0")
    assert status == command.INTERRUPTED
    runs = json.loads((out / "tiny" / "results.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["sgd"]
    assert "KFAC trains | final loss at most 1e+09 | tiny: not run | not run" in (out / "report.md").read_text()


def test_a_task_without_data_is_left_out_and_the_report_says_why(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(folder: Path | None) -> data.Dataset:
        raise data.MissingData("put it there")

    monkeypatch.setitem(TASKS, "tiny", replace(TASKS["tiny"], data=missing))
    status, out = start()
    assert status == 0 and "tiny was not run: put it there" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "huge"], "no size 'huge' in this study: there are cpu, paper"),
        (["--tasks", "mnist"], "no task 'mnist' in this study: there are tiny"),
        (["--entries", "sgd,adan"], "no entry 'adan' in this study: there are sgd, kfac (every step), kfac"),
        (["--examples", "8"], "8 examples: a batch of tiny takes 16"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    start: Start, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    status, out = start(*words)
    assert status == 2 and capsys.readouterr().err == f"natgrad: {message}\n" and not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "nowhere"}, "no task 'nowhere'"),
        ({"rows": (Row("x", "nobody"),)}, "no entry 'nobody'"),
        ({"errors": ErrorPlan("kfac", ("KFAC", "Nope"))}, "no approximation Nope in natgrad"),
    ],
)
def test_names_that_nothing_has_stop_a_study_before_it_starts(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    message: str,
) -> None:
    (experiment,) = STUDY.experiments
    changed = replace(experiment, **change)  # type: ignore[arg-type]
    monkeypatch.setitem(STUDIES, "tiny", replace(STUDY, experiments=(experiment, changed)))
    status, out = start("--trials", "0")
    assert status == 2 and message in capsys.readouterr().err and not (out / "tiny" / "results.json").exists()


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES.keys())
def test_the_claims_and_tables_of_every_study_name_rows_and_tasks_that_it_has(study: Study) -> None:
    for experiment in study.experiments:
        rows = [row.name for row in experiment.rows]
        assert len(set(rows)) == len(rows) and experiment.sizes.keys() <= {"cpu", "paper"}
        assert {experiment.reference, *experiment.timed} <= set(rows)
        assert experiment.errors is None or experiment.errors.row in rows
        for row in experiment.rows:
            row.resolve()
        for size in experiment.sizes.values():
            assert experiment.resolve(size).name == experiment.name
    everything = Results({e.name: _complete(e) for e in study.experiments})
    for claim in study.claims:
        assert None not in claim.judge(everything).values.values(), f"{claim.text} measures what the study does not run"


def _complete(experiment: Experiment) -> Outcome:
    """An outcome with a run of every row and all measurements that the experiment plans."""
    runs = [a_run(row.name, 1.0, 0.5, 0.2) for row in experiment.rows]
    planned = experiment.errors.resolve() if experiment.errors else {}
    errors = [Errors(0, {name: {"0": 0.5} for name in planned})]
    return Outcome(runs, [Cost(name, 1, 1, 1, None, 1) for name in experiment.timed], errors)


def test_error_tables_show_five_steps_of_the_run() -> None:
    found = [Errors(step, {"KFAC": {"0": 0.2, "1": 0.4}}) for step in range(0, 90, 10)]
    table = report.error_table(found)
    assert table.headers == ["approximation", "step 0", "step 20", "step 40", "step 60", "step 80"]
    assert table.rows == [["KFAC", *["0.300"] * 5]]


def test_the_epochs_of_a_row_are_compared_with_the_reference() -> None:
    assert report.relative_seconds(RUNS, "sgd")["kfac"] == "4.00"
    assert report.relative_seconds(RUNS, "nobody") == {}
