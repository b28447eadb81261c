import math
from dataclasses import replace

from natgrad.race.run import Epoch, Point, Run
from natgrad.race.summary import checkpoints, reach, summarise, targets


def made(name: str, losses: list[float], seed: int = 0, stopped: str = "") -> Run:
    points = [Point(i, 10 * i, 2.0 * i, loss, None) for i, loss in enumerate(losses)]
    return Run(name, seed, {}, [Epoch(point) for point in points], stopped)


def test_a_target_is_reached_at_the_first_epoch_at_or_below_it() -> None:
    curve = made("a", [9, 5, 3, 4]).curve
    assert reach(curve, 5) == curve[1] and reach(curve, 1) is None


def test_targets_are_the_mean_final_losses_of_the_references_that_finished() -> None:
    groups = {
        "adamw": [made("adamw", [9, 4]), made("adamw", [9, 2], seed=1)],
        "muon": [made("muon", [9, math.inf], stopped="diverged")],
    }
    assert targets(groups) == {"adamw": 3}


def test_the_table_gives_ratios_losses_and_times_to_the_targets() -> None:
    runs = [made("adamw", [9, 6, 4]), made("kfac", [9, 4, 1]), made("kfac", [9, 4, 3], seed=1)]
    table = summarise(runs)
    assert table.headers == [
        "entry",
        "step ms",
        "x fastest",
        "loss, epoch 1",
        "loss, epoch 2",
        "to adamw's 4",
        "note",
    ]
    assert table.rows[1] == ["kfac", "200.0", "1.00", "4 ± 0", "2 ± 1.4", "10 steps, 2.0 s", ""]
    assert table.markdown().count("\n") == 3


def test_diverged_runs_and_no_runs_make_a_table_too() -> None:
    table = summarise([made("sgd", [9, math.nan], stopped="diverged")])
    assert "diverged" in table.rows[0] and table.rows[0][-1] == "seed 0 diverged"
    assert summarise([]).rows == [] and checkpoints([]) == []


def test_metrics_have_a_column_each_over_the_seeds() -> None:
    runs = [measured("kfac", 20.0), measured("kfac", 22.0, seed=1), made("sgd", [9, 4])]
    table = summarise(runs)
    column = table.headers.index("BLEU")
    assert [row[column] for row in table.rows] == ["21 ± 1.4", "-"]


def measured(name: str, bleu: float, seed: int = 0) -> Run:
    run = made(name, [9, 4], seed)
    last = replace(run.curve[-1], metrics={"BLEU": bleu})
    return replace(run, epochs=[*run.epochs[:-1], Epoch(last)])
