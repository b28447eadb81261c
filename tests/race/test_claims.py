"""What a claim of a reproduction comes to."""

import json
import math
from dataclasses import replace

import pytest

from natgrad.race.reproduce import claims
from natgrad.race.reproduce.claims import Claim, Outcome, Results, final, least, minus, over, overall, seconds, until
from natgrad.race.results import record, restored
from race.studies import RUNS, a_run

RESULTS = Results({"here": Outcome(RUNS)})


def test_measures_are_means_over_seeds() -> None:
    assert final("here", "kfac")(RESULTS) == pytest.approx(0.3)
    assert over(final("here", "kfac"), final("here", "sgd"))(RESULTS) == pytest.approx(0.5)
    assert minus(final("here", "sgd"), final("here", "kfac"))(RESULTS) == pytest.approx(0.3)
    assert least(final("here", "sgd"), final("here", "kfac"))(RESULTS) == pytest.approx(0.3)


def test_a_diverged_run_has_an_infinite_loss() -> None:
    assert final("here", "wild")(RESULTS) == math.inf


def test_seconds_leave_out_the_first_epoch() -> None:
    assert seconds("here", "kfac")(RESULTS) == pytest.approx(2.0)
    assert claims.epoch_seconds(a_run("short", 1.0, 0.5)) == pytest.approx(3.0)


def test_the_time_to_a_loss_is_infinite_where_a_seed_never_gets_there() -> None:
    assert until("here", "sgd", final("here", "sgd"))(RESULTS) == pytest.approx(2.0)
    assert until("here", "kfac", final("here", "kfac"))(RESULTS) == math.inf


@pytest.mark.parametrize(
    ("labels", "verdict"),
    [
        (["sgd"], "reproduced"),
        (["sgd", "kfac"], "partly"),
        (["kfac"], "not reproduced"),
        (["wild"], "not reproduced"),
        (["adamw"], "not run"),
        (["sgd", "adamw"], "reproduced"),
    ],
)
def test_a_claim_is_reproduced_partly_or_not_by_its_range(labels: list[str], verdict: str) -> None:
    claim = Claim("t", "final loss", {name: final("here", name) for name in labels}, at_least=0.5, at_most=1)
    assert claim.judge(RESULTS).verdict == verdict


def test_a_value_that_is_not_a_number_is_outside_every_range() -> None:
    wild = over(final("here", "wild"), final("here", "wild"))
    assert Claim("t", "ratio", {"wild": wild}, at_least=-1e300).judge(RESULTS).verdict == "not reproduced"


@pytest.mark.parametrize("range_", [{}, {"at_least": 2.0, "at_most": 1.0}])
def test_a_claim_that_nothing_could_decide_is_refused(range_: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs a measure and a range"):
        Claim("t", "q", {"x": final("here", "sgd")}, **range_)
    with pytest.raises(ValueError, match="needs a measure and a range"):
        Claim("t", "q", {}, at_most=1)


def test_the_criterion_is_said_in_words() -> None:
    measures = {"x": final("here", "sgd")}
    assert Claim("t", "loss", measures, at_most=1.05).criterion == "loss at most 1.05"
    assert Claim("t", "loss", measures, at_least=2).criterion == "loss at least 2"
    assert Claim("t", "loss", measures, at_least=1, at_most=2).criterion == "loss between 1 and 2"


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        (["reproduced", "not run"], "reproduced"),
        (["reproduced", "not reproduced"], "partly"),
        (["partly", "partly"], "partly"),
        (["not reproduced"], "not reproduced"),
        (["not run"], "not run"),
    ],
)
def test_the_verdict_on_a_paper(verdicts: list[claims.Verdict], whole: str) -> None:
    assert overall([claims.Judgement(verdict, {}, {}) for verdict in verdicts]) == whole


def test_a_run_survives_its_record() -> None:
    run = replace(RUNS[0], epochs=[replace(RUNS[0].epochs[0], batch_losses=[0.5], statistics={"steps": 1.0})])
    assert restored(json.loads(json.dumps(record(run)))) == run
    lost = a_run("lost", 1.0, math.nan)
    assert restored(record(lost)).curve[-1].loss == math.inf
