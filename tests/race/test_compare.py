import json
import math
from pathlib import Path

import pytest

from natgrad.race.compare import MEASURES, Score, averaged, crossing, duels, over_tasks, overall, summary_table
from natgrad.race.run import Epoch, Point, Run
from natgrad.race.several import write_summary

TIMES = [0.0, 1.0, 2.0]


def made(
    name: str,
    losses: list[float],
    tests: list[float] | None = None,
    seconds: list[float] = TIMES,
    *,
    seed: int = 0,
    stopped: str = "",
) -> Run:
    points = [Point(i, 10 * i, seconds[i], loss, tests[i] if tests else None) for i, loss in enumerate(losses)]
    return Run(name, seed, {}, [Epoch(point) for point in points], stopped)


# Their mean: losses 8, 5, 2, held-out losses 9, 4, 6 after 0, 2, 3 seconds.
ADAMW = [
    made("adamw", [8, 4, 2], [9, 5, 6], [0, 1, 2]),
    made("adamw", [8, 6, 2], [9, 3, 6], [0, 3, 4], seed=1),
]
KFAC = [made("kfac", [8, 1, 0.5], [9, 3, 2], [0, 4, 8])]


def test_curves_are_averaged_over_seeds_point_by_point_as_far_as_all_go() -> None:
    curve = averaged(ADAMW)
    assert curve is not None and not curve.broken
    assert (curve.step, curve.seconds, curve.loss, curve.tests) == ([0, 10, 20], [0, 2, 3], [8, 5, 2], [9, 4, 6])
    short = averaged([made("a", [8, 4], [9, 5]), made("a", [8, 6, 2], [9, 3, 6], seed=1)])
    assert short is not None and short.loss == [8, 5]
    torn = averaged([made("a", [8, 4, math.inf], [9, 5, 5], stopped="diverged"), made("a", [8, 6, 2], [9, 3, 6])])
    assert torn is not None and torn.broken and torn.loss == [8, 5]
    assert averaged([made("a", [])]) is None


def test_a_crossing_lies_on_the_straight_line_between_two_points() -> None:
    assert crossing([0, 10, 20], [8, 4, 2], 3) == 15
    assert crossing([0, 10, 20], [8, 4, 2], 4) == 10
    assert crossing([0, 10, 20], [8, 4, 2], 9) == 0
    assert crossing([0, 10, 20], [8, 4, 2], 1) is None


def test_every_measure_is_what_it_is_by_hand() -> None:
    (duel,) = duels({"t": [*ADAMW, *KFAC]})
    assert (duel.task, duel.entry, duel.opponent) == ("t", "kfac", "adamw")
    by_hand = {
        # AdamW's last loss, 2, after 20 steps and 3 s: 6/7 of the way from 8 to 1, of 10 steps and 4 s.
        "steps to its loss": 20 / (60 / 7),
        "seconds to its loss": 3 / (24 / 7),
        # Its best held-out loss, 4, after 10 steps and 2 s: 5/6 of the way from 9 to 3.
        "steps to its best held-out": 10 / (50 / 6),
        "seconds to its best held-out": 2 / (20 / 6),
        "held-out, equal steps": 6 / 2,
        "held-out, equal seconds": 6 / 4.5,
        "best held-out, equal steps": 4 / 2,
        "best held-out, equal seconds": 4 / 4.5,
    }
    assert by_hand.keys() == MEASURES.keys()
    assert {name: score.value for name, score in duel.scores.items()} == pytest.approx(by_hand)
    assert not any(score.bound for score in duel.scores.values())
    assert duel.nearest == 0.25 and duel.step_cost == pytest.approx(8 / 3)


def test_an_early_best_counts_for_the_best_but_not_for_the_end() -> None:
    (duel,) = duels({"t": [*ADAMW, made("kfac", [8, 1, 0.5], [9, 2, 12], [0, 1, 2])]})
    assert duel.scores["held-out, equal seconds"].value == 0.5, "it had ended, and counts with its end"
    assert duel.scores["best held-out, equal seconds"].value == 2


def test_a_loss_that_is_never_reached_is_a_bound_by_the_whole_run() -> None:
    (duel,) = duels({"t": [*ADAMW, made("slow", [8, 6, 4], [9, 8, 7], [0, 3, 6])]})
    assert duel.scores["steps to its loss"] == Score(1, bound=True)
    assert duel.scores["seconds to its loss"] == Score(0.5, bound=True)
    assert str(duel.scores["seconds to its loss"]) == "≤ 0.5" and not duel.scores["steps to its loss"].won
    assert duel.nearest == 2


def test_a_diverged_run_wins_nothing_and_is_no_opponent() -> None:
    wild = made("wild", [8, 1], [9, 1], [0, 1], stopped="diverged")
    (duel,) = duels({"t": [*ADAMW, wild]})
    assert duel.scores["held-out, equal steps"] == Score(6, bound=True) and not duel.scores["held-out, equal steps"].won
    lost = made("lost", [8, 7], [9, 9], [0, 1], stopped="diverged")
    assert duels({"t": [*ADAMW, lost]})[0].scores["steps to its loss"] == Score(1, bound=True), "not 2: it had stopped"
    assert duels({"t": [made("adamw", [8, 1], [9, 1], stopped="diverged"), *KFAC]}) == []


def test_a_task_without_held_out_data_has_the_measures_of_training_alone() -> None:
    (duel,) = duels({"t": [made("adamw", [8, 4, 2]), made("kfac", [8, 2, 1])]})
    assert {name: score.value for name, score in duel.scores.items()} == {
        "steps to its loss": 2,
        "seconds to its loss": 2,
    }


def test_over_tasks_the_mean_is_geometric_and_a_bound_where_one_task_is() -> None:
    found = overall({"a": Score(4), "b": Score(1)})
    assert found is not None and found.mean == Score(2) and (found.tasks, found.reached, found.won) == (2, 2, 1)
    assert (found.worst, found.worst_task) == (Score(1), "b")
    found = overall({"a": Score(2), "b": Score(0.5, bound=True), "c": Score(0.5)})
    assert found is not None and found.mean.bound and found.mean.value == pytest.approx(0.5 ** (1 / 3))
    assert str(found) == "≤ 0.794; won 1 of 3; worst ≤ 0.5 (b)" and found.reached == 2
    assert overall({}) is None


def test_tasks_whose_loss_never_comes_within_a_tenth_are_named() -> None:
    near, far = made("kfac", [8, 3, 2.19]), made("kfac", [8, 3, 2.21])
    base = made("adamw", [8, 4, 2])
    (line,) = over_tasks(duels({"near": [base, near], "far": [base, far]}))
    assert line["far"] == ["far"]
    table = summary_table(duels({"near": [base, near], "far": [base, far]}), "adamw")
    assert table.rows[0][0] == "kfac" and table.rows[0][-1] == "far" and table.rows[0][-2] == "-"


def test_the_report_has_a_table_for_every_opponent_and_the_file_all_numbers(tmp_path: Path) -> None:
    muon = made("muon", [8, 3, 1], [9, 5, 4], [0, 2, 4])
    for task in ("one", "two"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "settings.json").write_text(json.dumps({task: {"adamw": {"lr": 1}}}))
    tables = write_summary(
        tmp_path, {"one": [*ADAMW, muon, *KFAC], "two": [*ADAMW, *KFAC]}, {"three": "no data"}, {"command": "natgrad"}
    )
    assert [opponent for opponent, _ in tables] == ["adamw", "muon"]
    text = (tmp_path / "report.md").read_text()
    assert "## Against adamw" in text and "## Against muon" in text and "* three was not run: no data" in text
    assert "| kfac | 2.67 | 2.33; won 2 of 2; worst 2.33 (one) |" in text and "| one | muon |" in text
    held = json.loads((tmp_path / "summary.json").read_text())
    kfac = next(line for line in held["over tasks"] if (line["entry"], line["opponent"]) == ("kfac", "adamw"))
    assert kfac["measures"]["steps to its loss"]["won"] == 2 and kfac["far"] == []
    assert len(held["by task"]) == 5 and held["missing"] == {"three": "no data"}
    assert json.loads((tmp_path / "settings.json").read_text()).keys() == {"one", "two"}
