"""FNGD on random captures: its step is the dense natural gradient, and its table what the batches said."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from natgrad import capture
from natgrad.capture import Capture
from natgrad.fngd import Coefficients, Examples, Iteration, PositionMean, Quantile, Recompute, Sample, Scalar
from natgrad.fngd.first_phase import FirstPhase, Learnt, Share
from natgrad.fngd.system import System
from natgrad.fngd.table import Table
from oracles import SHAPES, assert_equal, dense_fisher, examples, random_capture

RULES: list[Coefficients] = [PositionMean(), Sample(), Iteration(), Quantile(), Scalar(), Recompute()]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
BY_POSITION = PositionMean()
every_shape = pytest.mark.parametrize("shape", SHAPES)
EMPTY = torch.zeros(0, dtype=torch.float64)


@dataclass
class Batch:
    """What a layer saw at a step of the epoch, and which examples."""

    seen: Capture
    step: int = 0
    ids: Tensor | None = None


def learnt(*batches: Batch | Capture, rule: Coefficients = BY_POSITION, **settings: Any) -> Learnt:
    """The direction of the last batch, and the table of all of them."""
    phase, table, found = FirstPhase(System(**settings), rule), Table.empty(EMPTY), None
    for batch in batches:
        here = batch if isinstance(batch, Batch) else Batch(batch)
        ids = {} if here.ids is None else {0: here.ids}
        found = phase.learn_from({"layer": [here.seen]}, {"layer": table}, here.step, ids)["layer"]
        table = found.table
    assert found is not None
    return found


def solved(seen: Capture, **settings: Any) -> Tensor:
    """N c by the library."""
    return System(**settings).solve(seen.joint_gram())[0]


def whole_layer(seen: Capture) -> Tensor:
    """Per-example gradients (n, *groups out in) of a layer with all its groups."""
    n = seen.a.shape[-3]
    return torch.stack([(seen.g[..., i, :, :].mT @ seen.a[..., i, :, :]).flatten() for i in range(n)])


def damping(DW: Tensor, mu: float = 1.0, unit: str = "trace/N^2", **others: Any) -> float:
    n, trace = len(DW), float(DW.square().sum())
    return mu * {"trace/N^2": trace / n**2, "trace/N": trace / n, "absolute": 1.0}[unit]


def coefficients(seen: Capture, normalise: bool = False, **settings: Any) -> Tensor:
    """N c, from the dense system."""
    DW = whole_layer(seen)
    n = len(DW)
    c = torch.linalg.solve(DW @ DW.mT + n * damping(DW, **settings) * torch.eye(n), torch.ones(n))
    return c / c.mean() if normalise else n * c


@every_shape
@pytest.mark.parametrize("unit", ["trace/N^2", "trace/N", "absolute"])
@pytest.mark.parametrize("mu", [1e-3, 1.0, 30.0])
def test_law_16_the_direction_is_the_dense_natural_gradient_of_the_batch(shape: str, unit: Any, mu: float) -> None:
    seen = random_capture(1, shape)
    DW = whole_layer(seen)
    n = len(DW)
    F = DW.mT @ DW / n
    settings = {"mu": mu * float(F.trace()) / n if unit == "absolute" else mu, "unit": unit}
    if shape != "grouped":
        assert_equal(F, dense_fisher(seen))
    D = torch.linalg.solve(F + damping(DW, **settings) * torch.eye(len(F)), DW.mean(0))
    assert_equal(learnt(seen, **settings).D.flatten(), D)


@every_shape
def test_law_26_the_same_whole_or_in_micro_batches(shape: str) -> None:
    seen, ids = random_capture(2, shape), torch.randperm(40)
    slices = (slice(0, 22), slice(22, 25), slice(25, 40))
    parts = [replace(examples(seen, at), examples=capture.Examples(start=at.start)) for at in slices]
    for rule in RULES:
        phase = FirstPhase(System(), rule)
        told = {at.start: ids[at] for at in slices}
        split = phase.learn_from({"layer": parts}, {"layer": Table.empty(EMPTY)}, 0, told)["layer"]
        whole = learnt(Batch(seen, 0, ids), rule=rule)
        assert_equal(split.D, whole.D)
        assert_equal(split.table.total, whole.table.total)
        assert torch.equal(split.table.seen, whole.table.seen)


@every_shape
def test_law_18_coefficients_of_one_nth_are_plain_gradient_descent(shape: str) -> None:
    seen = random_capture(3, shape)
    DW = whole_layer(seen)
    M, largest = DW.mean(0), float(torch.linalg.eigvalsh(DW @ DW.mT / 40).max())
    for factor in (1e3, 1e6, 1e9):
        settings: dict[str, Any] = {"mu": factor * largest, "unit": "absolute"}
        assert_equal(settings["mu"] * solved(seen, **settings), torch.ones(40), 1 / factor)  # lambda c -> 1/N
        assert_equal(settings["mu"] * learnt(seen, **settings).D.flatten(), M, 1 / factor)
    even = learnt(seen, mu=1e14, normalise=True)
    assert_equal(even.D.flatten(), M)


def test_normalised_coefficients_sum_to_one() -> None:
    seen = random_capture(4)
    w = solved(seen, normalise=True)
    assert_equal(w.mean(), torch.tensor(1.0))
    assert_equal(w, coefficients(seen, normalise=True))
    assert w.std() > 0.05


def test_some_coefficients_are_negative_where_the_damping_is_small() -> None:
    assert (solved(random_capture(5), mu=1e-2) < 0).any()


def test_single_precision_is_close_to_double() -> None:
    seen = random_capture(6)
    D = learnt(seen.to(torch.float32)).D
    assert D.dtype == torch.float32
    assert_equal(D.double(), learnt(seen).D, 1e-4)


def test_a_hopeless_damping_in_single_precision_is_raised_to_what_it_can_resolve() -> None:
    twice = random_capture(6).to(torch.float32)
    twice = Capture(torch.cat([twice.a] * 2), torch.cat([twice.g] * 2), 80, 80)
    assert solved(twice, mu=1e-30, unit="absolute").isfinite().all()


# What is looked up afterwards.


def looked_up(table: Table, which: Examples, g: Tensor, rule: Coefficients = BY_POSITION) -> Tensor:
    """N c of the examples."""
    weights = table.weights(rule)
    found = torch.ones(len(g)) if weights is None else weights(which, g)
    return table.scale * found


def batches(ids: bool = False) -> list[Batch]:
    """Three batches of 40, 40 and 25 examples."""
    order = torch.randperm(105)
    parts = [order[:40], order[40:80], order[80:]]
    return [Batch(random_capture(50 + k, n=len(part)), k, part if ids else None) for k, part in enumerate(parts)]


def test_position_mean_is_the_mean_over_the_batches_that_had_the_position() -> None:
    w = [coefficients(one.seen) for one in batches()]
    table, g = learnt(*batches()).table, torch.randn(40, 6)
    expected = torch.cat([(w[0][:25] + w[1][:25] + w[2]) / 3, (w[0][25:] + w[1][25:]) / 2])
    assert_equal(looked_up(table, Examples(), g), expected)
    assert_equal(looked_up(table, Examples(9, 10), g[:7]), expected[10:17])  # a later micro-batch
    mean = torch.cat(w).mean()
    for start, n in ((38, 5), (40, 5), (900, 5)):  # beyond the batches of the first phase
        inside = expected[start : start + n]
        assert_equal(looked_up(table, Examples(9, start), g[:n]), torch.cat([inside, mean.expand(n - len(inside))]))


def test_sample_coefficients_follow_the_ids() -> None:
    rule, seen = Sample(), batches(ids=True)
    w = torch.cat([coefficients(one.seen) for one in seen])
    ids = torch.cat([one.ids for one in seen if one.ids is not None])
    table, order = learnt(*seen, rule=rule).table, torch.randperm(105)
    found = looked_up(table, Examples(7, 0, ids[order]), torch.randn(105, 6), rule)
    assert_equal(found, w[order])
    unseen = looked_up(table, Examples(7, 0, torch.tensor([105, 4000])), torch.randn(2, 6), rule)
    assert_equal(unseen, w.mean().expand(2))


def test_iteration_coefficients_come_back_at_the_same_step_of_the_next_epoch() -> None:
    rule, seen = Iteration(), batches()
    table = learnt(*seen, rule=rule).table
    for step, one in enumerate(seen):
        found = looked_up(table, Examples(step), torch.randn(one.seen.size, 6), rule)
        assert_equal(found, coefficients(one.seen))


def test_a_skipped_step_leaves_the_rows_of_the_others_where_they_belong() -> None:
    rule, seen = Iteration(), batches()
    for kept, skipped in (((0, 2), 1), ((0, 1), 2)):
        table = learnt(*(seen[k] for k in kept), rule=rule).table
        last = seen[kept[1]]
        found = looked_up(table, Examples(last.step), torch.randn(last.seen.size, 6), rule)
        assert_equal(found, coefficients(last.seen))
        mean = torch.cat([coefficients(seen[k].seen) for k in kept]).mean()
        assert_equal(looked_up(table, Examples(skipped), torch.randn(40, 6), rule), mean.expand(40))


def test_quantile_coefficients_follow_the_rank_of_the_gradients_norm() -> None:
    rule, seen = Quantile(), random_capture(7, n=32)  # as many as there are bins
    w, g = coefficients(seen), torch.randn(32, 6)
    ranked = w[seen.g.square().sum((-1, -2)).argsort()]
    table = learnt(seen, rule=rule).table
    assert_equal(looked_up(table, Examples(), g, rule)[g.norm(dim=1).argsort()], ranked)
    half = looked_up(table, Examples(), g[:16], rule)
    assert_equal(half[g[:16].norm(dim=1).argsort()], ranked[::2])


def test_the_scalar_is_the_mean_and_leaves_the_backward_pass_alone() -> None:
    rule, seen = Scalar(), batches()
    table = learnt(*seen, rule=rule).table
    assert table.weights(rule) is None and table.total.numel() == 1
    assert_equal(table.scale, torch.cat([coefficients(one.seen) for one in seen]).mean())


def test_recompute_never_stops_learning() -> None:
    assert [PositionMean().learns(step, 2) for step in range(4)] == [True, True, False, False]
    assert all(Recompute().learns(step, 2) for step in (0, 5, 10**9))


def test_the_spread_of_position_mean_falls_as_one_over_the_root_of_the_batches() -> None:
    def spread(number: int) -> float:
        table = learnt(*(random_capture(seed, n=64) for seed in range(number))).table
        mean = table.total / table.seen
        return float(mean.std() / mean.mean())

    one = spread(1)
    assert one > 0.1
    for number in (16, 64, 256):
        assert 0.8 < spread(number) * number**0.5 / one < 1.25


@every_rule
def test_a_layer_without_gradients_neither_moves_nor_counts(rule: Coefficients) -> None:
    seen, ids = random_capture(8), torch.arange(40)
    still = Capture(seen.a, torch.zeros_like(seen.g), seen.count, seen.rows)
    nothing = learnt(Batch(still, 0, ids), rule=rule)
    assert_equal(nothing.D, torch.zeros(6, 8))
    assert nothing.table.scale == 1
    both = learnt(Batch(still, 0, ids), Batch(seen, 1, ids), rule=rule).table
    assert_equal(both.scale, coefficients(seen).mean())


def test_a_gradient_that_is_not_finite_makes_the_coefficients_so() -> None:
    for value in (float("nan"), float("inf")):
        seen = random_capture(9)
        seen.g[3, 0, 0] = value
        assert not solved(seen).isfinite().all()
        assert not learnt(seen).D.isfinite().all()


# Shared between layers.


def of_all(seen: dict[str, Capture]) -> dict[str, Learnt]:
    empty = dict.fromkeys(seen, Table.empty(EMPTY))
    return FirstPhase(System(), PositionMean()).learn_from({n: [one] for n, one in seen.items()}, empty, 0, {})


def test_joint_coefficients_solve_the_system_of_the_whole_network() -> None:
    seen = {
        "one": random_capture(20),
        "two": random_capture(21, out=3, width=5),
        "groups": random_capture(22, "grouped"),
    }
    DW = torch.cat([whole_layer(one) for one in seen.values()], 1)
    F, lam = DW.mT @ DW / 40, damping(DW)
    D = torch.linalg.solve(F + lam * torch.eye(len(F)), DW.mean(0))
    found = of_all(seen)
    assert_equal(torch.cat([found[name].D.flatten() for name in seen]), D)


def test_a_layer_that_was_not_reached_has_no_part_in_what_others_share() -> None:
    one = random_capture(20)
    tables = {"one": Table.empty(EMPTY), "other": Table.empty(EMPTY)}
    found = FirstPhase(System(), PositionMean()).learn_from({"one": [one], "other": []}, tables, 0, {})
    assert list(found) == ["one"]
    assert torch.equal(found["one"].D, learnt(one).D)


# Bad input.


@pytest.mark.parametrize(
    ("name", "value"),
    [("unit", "relative"), ("mu", 0.0), ("mu", -1.0), ("mu", float("nan")), ("mu", float("inf")), ("mu", "1")],
)
def test_a_setting_out_of_range_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        System(**{name: value})


def test_a_share_that_is_none_is_refused() -> None:
    wrong: Share = "all"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="share must be one of"):
        FirstPhase(System(), PositionMean(), wrong)
