"""A run that is saved and resumed is, bit for bit, the run that was never broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from training import Batch, batch, copy_of, network, noise, optimizer_of, same, through_a_file, train, values

from cases import CASES, Case
from natgrad import (
    EKFAC,
    KFAC,
    KPSVD,
    AdaptiveKLLimit,
    Automatic,
    Constant,
    ExactQuadraticModel,
    KLLimit,
    LevenbergMarquardt,
    NaturalGradient,
    QuadraticModel,
)

STEPS = 16
BREAKS = (1, 4, 11)

SETTINGS: dict[str, dict[str, Any]] = {
    "automatic": {"step_size": Automatic()},
    "kl limit": {"step_size": KLLimit()},
    "constant": {"step_size": Constant(), "damping": 0.1},
    "adaptive kl limit": {"step_size": AdaptiveKLLimit()},
    "quadratic model": {"step_size": QuadraticModel()},
    "exact quadratic model": {"step_size": ExactQuadraticModel()},
    "levenberg-marquardt at every step": {"damping": LevenbergMarquardt(every=1, decay=0.5)},
    "nesterov, weight decay": {"step_size": KLLimit(), "nesterov": True, "weight_decay": 0.1},
    "no momentum": {"momentum": 0.0},
    "staggered": {"staggered": True, "refresh_every": 4},
    "three draws": {"draws": 3, "seed": 5},
    "empirical": {"likelihood": None},
}

Copy = Callable[[nn.Module, NaturalGradient, nn.Module, NaturalGradient], None]


def by_state_dict(model: nn.Module, optimizer: NaturalGradient, fresh: nn.Module, renewed: NaturalGradient) -> None:
    fresh.load_state_dict(through_a_file(model.state_dict()))
    renewed.load_state_dict(through_a_file(optimizer.state_dict()))


def by_distributed_checkpoint(
    model: nn.Module, optimizer: NaturalGradient, fresh: nn.Module, renewed: NaturalGradient
) -> None:
    saved = through_a_file(get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(fresh, renewed, saved)
    fresh.load_state_dict(through_a_file(model.state_dict()))


def run(
    batches: list[Batch],
    breaks: tuple[int, ...] = (),
    copy: Copy = by_state_dict,
    approximation: Any = None,
    **settings: Any,
) -> tuple[list[Tensor], Any]:
    """The parameters and the optimizer's state after the batches, broken before some of them."""
    model = network()
    optimizer = optimizer_of(model, approximation, **settings)
    for number, data in enumerate(batches):
        if number in breaks:
            fresh = network(seed=9)
            renewed = optimizer_of(fresh, approximation, **settings)
            copy(model, optimizer, fresh, renewed)
            model, optimizer = fresh, renewed
        train(model, optimizer, [data])
    return values(model), copy_of(optimizer)


def batches_of() -> list[Batch]:
    return [batch(step) for step in range(STEPS)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(settings: dict[str, Any]) -> None:
    batches = batches_of()
    assert same(run(batches, BREAKS, **settings), run(batches, **settings))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_approximation_resumes_bit_for_bit_across_refreshes(case: Case) -> None:
    batches = batches_of()
    parameters, state = run(batches, approximation=case.make())
    assert all(entry["refreshes"] > 4 for entry in state["state"].values() if "refreshes" in entry)
    assert same(run(batches, BREAKS, approximation=case.make()), (parameters, state))


def test_a_resumed_run_remembers_which_policy_the_automatic_one_uses() -> None:
    batches = [batch(0, n=64) for step in range(16)] + [noise(step) for step in range(30)]
    parameters, state = run(batches[:18])
    assert state["param_groups"][0]["clock"]["memory"]["precise"] == 1.0
    parameters, state = run(batches)
    assert "precise" not in state["param_groups"][0]["clock"]["memory"]
    assert same(run(batches, (5, 14, 25, 45)), (parameters, state))


@pytest.mark.parametrize("step_size", [Automatic(), KLLimit()], ids=["automatic", "kl limit"])
def test_distributed_checkpoint_resumes_bit_for_bit(step_size: Any) -> None:
    batches = batches_of()
    expected = run(batches, step_size=step_size)
    assert same(run(batches, BREAKS, by_distributed_checkpoint, step_size=step_size), expected)


def from_flat(model: nn.Module, optimizer: NaturalGradient, fresh: nn.Module, renewed: NaturalGradient) -> None:
    """What a new optimizer has a name for in its state is all that torch takes from a flat checkpoint."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = through_a_file(get_optimizer_state_dict(model, optimizer, options=flat))
    set_optimizer_state_dict(fresh, renewed, saved, options=flat)
    fresh.load_state_dict(model.state_dict())


def from_flat_after_a_pass(
    model: nn.Module, optimizer: NaturalGradient, fresh: nn.Module, renewed: NaturalGradient
) -> None:
    fresh(batch()[0])
    from_flat(model, optimizer, fresh, renewed)


@pytest.mark.parametrize(
    ("settings", "copy"),
    [({}, from_flat_after_a_pass), ({"exclude": ["2"]}, from_flat), ({"exclude": ["2"]}, from_flat_after_a_pass)],
    ids=["layers that a pass shows", "layers that are expected", "layers that are both"],
)
def test_distributed_checkpoint_resumes_from_a_flat_state_dict(settings: dict[str, Any], copy: Copy) -> None:
    batches = batches_of()
    assert same(run(batches, (11,), copy, **settings), run(batches, **settings))


def test_a_new_optimizer_names_in_its_distributed_state_what_it_will_hold() -> None:
    fresh, model = network(), network()
    renewed, optimizer = optimizer_of(fresh), optimizer_of(model)
    fresh(batch()[0])
    train(model, optimizer, batches_of()[:1])
    asked, held = (names_of(get_optimizer_state_dict(*each)) for each in ((fresh, renewed), (model, optimizer)))
    assert asked == held


def names_of(state_dict: Any) -> dict[str, set[str]]:
    return {parameter: set(own) for parameter, own in state_dict["state"].items()}


def test_asking_a_new_optimizer_for_its_distributed_state_moves_no_parameter() -> None:
    model = network()
    before = values(model)
    get_optimizer_state_dict(model, optimizer_of(model, adamw={"weight_decay": 0.5}))
    assert same(values(model), before)


def test_a_bfloat16_model_resumes_with_statistics_in_full_precision() -> None:
    def few(breaks: tuple[int, ...]) -> Any:
        model = network().bfloat16()
        optimizer = optimizer_of(model)
        for step in range(6):
            if step in breaks:
                saved = copy_of(optimizer)
                optimizer = optimizer_of(model)
                optimizer.load_state_dict(saved)
            x, y = batch(step)
            train(model, optimizer, [(x.bfloat16(), y)])
        return values(model), copy_of(optimizer)

    assert same(few((3,)), few(()))


def test_loading_the_state_of_a_new_optimizer_forgets_the_old_curvature() -> None:
    batches = batches_of()[:3]
    model = network()
    optimizer = optimizer_of(model)
    new = copy_of(optimizer)
    train(model, optimizer, batches)
    optimizer.load_state_dict(new)
    model.load_state_dict(network().state_dict())
    train(model, optimizer, batches)
    assert same((values(model), copy_of(optimizer)), run(batches))


def test_a_state_dict_kept_in_memory_does_not_share_its_clock_with_a_loaded_copy() -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, batches_of()[:2])
    other = optimizer_of(network())
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches_of()[2:4])
    assert (optimizer.steps, other.steps) == (4, 2)


def test_a_resumed_run_prints_the_same_table_and_counters() -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, batches_of()[:7])
    other = optimizer_of(model)
    other.load_state_dict(copy_of(optimizer))
    assert repr(other) == repr(optimizer)
    assert other.steps == 7
    assert torch.equal(torch.tensor(other.statistics()["damping"]), torch.tensor(optimizer.statistics()["damping"]))


def stripped(saved: dict[str, Any]) -> dict[str, Any]:
    state = {p: {k: v for k, v in own.items() if k != "corrections"} for p, own in saved["state"].items()}
    return {**saved, "state": state}


@pytest.mark.parametrize(
    ("here", "there", "change", "what"),
    [
        (EKFAC(), KFAC(), dict, "matrix.values"),
        (KFAC(), EKFAC(), dict, "matrix.values"),
        (KPSVD(), KFAC(), dict, "stats.R"),
        (EKFAC(), EKFAC(), stripped, "corrections"),
    ],
)
def test_a_checkpoint_of_another_approximation_is_refused_and_changes_nothing(
    here: Any, there: Any, change: Callable[[dict[str, Any]], dict[str, Any]], what: str
) -> None:
    first, model, reference = network(), network(), network()
    other, optimizer, alone = optimizer_of(first, there), optimizer_of(model, here), optimizer_of(reference, here)
    train(first, other, batches_of()[:5])
    train(model, optimizer, batches_of()[:2])
    before = copy_of(optimizer)
    with pytest.raises(ValueError, match=f"layer '0': the checkpoint is of another .* {what}"):
        optimizer.load_state_dict(change(copy_of(other)))
    assert same(copy_of(optimizer), before)
    train(model, optimizer, batches_of()[2:6])
    train(reference, alone, batches_of()[:6])
    assert same((values(model), copy_of(optimizer)), (values(reference), copy_of(alone)))
