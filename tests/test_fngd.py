"""FNGD on random captures: its step is the dense natural gradient, and its table what the batches said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import natgrad
from natgrad import FNGD, Gaussian
from natgrad.capture import Capture, Examples
from natgrad.fishers import Stats, pool
from oracles import SHAPES, assert_equal, dense_fisher, error, examples, random_capture

RULES = ("position_mean", "sample", "iteration", "quantile", "scalar", "recompute")
every_shape = pytest.mark.parametrize("shape", SHAPES)


def of(seen: Capture, step: int = 0, ids: Tensor | None = None) -> Capture:
    """The same capture of other examples."""
    return Capture(seen.a, seen.g, seen.count, seen.rows, Examples(step, 0, ids))


def learn(method: FNGD, *batches: Capture) -> Stats:
    stats: Stats | None = None
    for seen in batches:
        stats = method.merge(stats, method.observe(seen), 0.0)
    assert stats is not None
    return stats


def whole_layer(seen: Capture) -> Tensor:
    """Per-example gradients (n, *groups out in) of a layer with all its groups."""
    n = seen.a.shape[-3]
    return torch.stack([(seen.g[..., i, :, :].mT @ seen.a[..., i, :, :]).flatten() for i in range(n)])


def damping(method: FNGD, DW: Tensor) -> float:
    n, trace = len(DW), float(DW.square().sum())
    return method.mu * {"trace/N^2": trace / n**2, "trace/N": trace / n, "absolute": 1.0}[method.unit]


def coefficients(method: FNGD, seen: Capture) -> Tensor:
    """N c, from the dense system."""
    DW = whole_layer(seen)
    n = len(DW)
    c = torch.linalg.solve(DW @ DW.mT + n * damping(method, DW) * torch.eye(n), torch.ones(n))
    return c / c.mean() if method.normalise else n * c


@every_shape
@pytest.mark.parametrize("unit", ["trace/N^2", "trace/N", "absolute"])
@pytest.mark.parametrize("mu", [1e-3, 1.0, 30.0])
def test_law_16_the_direction_is_the_dense_natural_gradient_of_the_batch(shape: str, unit: Any, mu: float) -> None:
    seen = random_capture(1, shape)
    DW = whole_layer(seen)
    n = len(DW)
    F = DW.mT @ DW / n
    method = FNGD(1, mu=mu * float(F.trace()) / n if unit == "absolute" else mu, unit=unit)
    if shape != "grouped":
        assert_equal(F, dense_fisher(seen))
    D = torch.linalg.solve(F + damping(method, DW) * torch.eye(len(F)), DW.mean(0))
    assert_equal(method.direction(learn(method, seen), [seen]).flatten(), D)


@every_shape
def test_law_26_the_same_direction_whole_or_in_micro_batches(shape: str) -> None:
    method, seen = FNGD(1), random_capture(2, shape)
    parts = [examples(seen, chosen) for chosen in (slice(0, 22), slice(22, 25), slice(25, 40))]
    stats = method.merge(None, pool(method.observe(part) for part in parts), 0.0)
    assert_equal(method.direction(stats, parts), method.direction(learn(method, seen), [seen]))


@every_shape
def test_law_18_coefficients_of_one_nth_are_plain_gradient_descent(shape: str) -> None:
    seen = random_capture(3, shape)
    DW = whole_layer(seen)
    M, largest = DW.mean(0), float(torch.linalg.eigvalsh(DW @ DW.mT / 40).max())
    for factor in (1e3, 1e6, 1e9):
        method = FNGD(1, mu=factor * largest, unit="absolute")
        stats = learn(method, seen)
        assert_equal(method.mu * stats["w"].value, torch.ones(40), 1 / factor)  # lambda c -> 1/N
        assert_equal(method.mu * method.direction(stats, [seen]).flatten(), M, 1 / factor)
    even = {"w": type(stats["w"])(torch.ones(40))}  # type: ignore[call-arg]
    assert_equal(FNGD(1).direction(even, [seen]).flatten(), M)


def test_normalised_coefficients_sum_to_one() -> None:
    seen = random_capture(4)
    w = learn(FNGD(1, normalise=True), seen)["w"].value
    assert_equal(w.mean(), torch.tensor(1.0))
    assert_equal(w, coefficients(FNGD(1, normalise=True), seen))
    assert w.std() > 0.05


def test_some_coefficients_are_negative_where_the_damping_is_small() -> None:
    assert (learn(FNGD(1, mu=1e-2), random_capture(5))["w"].value < 0).any()


def test_single_precision_is_close_to_double() -> None:
    seen = random_capture(6)
    single = seen.to(torch.float32)
    D = FNGD(1).direction(learn(FNGD(1), single), [single])
    assert D.dtype == torch.float32
    assert_equal(D.double(), FNGD(1).direction(learn(FNGD(1), seen), [seen]), 1e-4)


def test_a_hopeless_damping_in_single_precision_is_raised_to_what_it_can_resolve() -> None:
    twice = random_capture(6).to(torch.float32)
    twice = Capture(torch.cat([twice.a] * 2), torch.cat([twice.g] * 2), 80, 80)
    assert learn(FNGD(1, mu=1e-30, unit="absolute"), twice)["w"].value.isfinite().all()


# What is looked up afterwards.


def looked_up(method: FNGD, stats: Stats, which: Examples, g: Tensor) -> Tensor:
    """N c of the examples."""
    weights = method.weights(stats)
    found = torch.ones(len(g)) if weights is None else weights(which, g)
    return method.scale(stats) * found


def batches(ids: bool = False) -> list[Capture]:
    """Three batches of 40, 40 and 25 examples."""
    order = torch.randperm(105)
    parts = [order[:40], order[40:80], order[80:]]
    return [of(random_capture(50 + k, n=len(part)), k, part if ids else None) for k, part in enumerate(parts)]


def test_position_mean_is_the_mean_over_the_batches_that_had_the_position() -> None:
    method, seen = FNGD(3), batches()
    w = [coefficients(method, one) for one in seen]
    stats, g = learn(method, *seen), torch.randn(40, 6)
    expected = torch.cat([(w[0][:25] + w[1][:25] + w[2]) / 3, (w[0][25:] + w[1][25:]) / 2])
    assert_equal(looked_up(method, stats, Examples(), g), expected)
    assert_equal(looked_up(method, stats, Examples(9, 10), g[:7]), expected[10:17])  # a later micro-batch
    mean = torch.cat(w).mean()
    for start, n in ((38, 5), (40, 5), (900, 5)):  # beyond the batches of the first phase
        inside = expected[start : start + n]
        assert_equal(
            looked_up(method, stats, Examples(9, start), g[:n]), torch.cat([inside, mean.expand(n - len(inside))])
        )


def test_sample_coefficients_follow_the_ids() -> None:
    method, seen = FNGD(3, "sample"), batches(ids=True)
    w = torch.cat([coefficients(method, one) for one in seen])
    ids = torch.cat([one.examples.ids for one in seen if one.examples.ids is not None])
    stats, order = learn(method, *seen), torch.randperm(105)
    found = looked_up(method, stats, Examples(7, 0, ids[order]), torch.randn(105, 6))
    assert_equal(found, w[order])
    unseen = looked_up(method, stats, Examples(7, 0, torch.tensor([105, 4000])), torch.randn(2, 6))
    assert_equal(unseen, w.mean().expand(2))


def test_iteration_coefficients_come_back_at_the_same_step_of_the_next_epoch() -> None:
    method, seen = FNGD(3, "iteration"), batches()
    stats = learn(method, *seen)
    for step in (3, 4, 5, 10):
        n = seen[step % 3].a.shape[0]
        found = looked_up(method, stats, Examples(step), torch.randn(n, 6))
        assert_equal(found, coefficients(method, seen[step % 3]))


def test_a_skipped_step_leaves_the_rows_of_the_others_where_they_belong() -> None:
    method, seen = FNGD(3, "iteration"), batches()
    stats = learn(method, seen[0], seen[2])
    assert_equal(looked_up(method, stats, Examples(5), torch.randn(25, 6)), coefficients(method, seen[2]))
    mean = torch.cat([coefficients(method, seen[k]) for k in (0, 2)]).mean()
    assert_equal(looked_up(method, stats, Examples(4), torch.randn(40, 6)), mean.expand(40))


def test_quantile_coefficients_follow_the_rank_of_the_gradients_norm() -> None:
    method, seen = FNGD(1, "quantile"), random_capture(7, n=32)  # as many as there are bins
    w, g = coefficients(method, seen), torch.randn(32, 6)
    ranked = w[seen.g.square().sum((-1, -2)).argsort()]
    found = looked_up(method, learn(method, seen), Examples(), g)
    assert_equal(found[g.norm(dim=1).argsort()], ranked)
    half = looked_up(method, learn(method, seen), Examples(), g[:16])
    assert_equal(half[g[:16].norm(dim=1).argsort()], ranked[::2])


def test_the_scalar_is_the_mean_and_leaves_the_backward_pass_alone() -> None:
    method, seen = FNGD(3, "scalar"), batches()
    stats = learn(method, *seen)
    assert method.weights(stats) is None
    assert_equal(method.scale(stats), torch.cat([coefficients(method, one) for one in seen]).mean())
    matrix = method.assemble(stats)
    assert_equal(method.invert(matrix, 1.0) @ torch.ones(6, 8), method.scale(stats).expand(6, 8))
    assert_equal(matrix.inverse(0.0).dense(), method.invert(matrix, 1.0).dense())


def test_recompute_never_stops_learning() -> None:
    assert [FNGD(2).learns(step) for step in range(4)] == [True, True, False, False]
    assert all(FNGD(2, "recompute").learns(step) for step in (0, 5, 10**9))


def test_the_spread_of_position_mean_falls_as_one_over_the_root_of_the_batches() -> None:
    method = FNGD(256)

    def spread(number: int) -> float:
        stats = learn(method, *(random_capture(seed, n=64) for seed in range(number)))
        table = stats["total"].value / stats["seen"].value
        return float(table.std() / table.mean())

    one = spread(1)
    assert one > 0.1
    for number in (16, 64, 256):
        assert 0.8 < spread(number) * number**0.5 / one < 1.25


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_without_gradients_neither_moves_nor_counts(rule: Any) -> None:
    method, seen = FNGD(4, rule), random_capture(8)
    still = Capture(seen.a, torch.zeros_like(seen.g), seen.count, seen.rows)
    nothing = learn(method, still)
    assert_equal(method.direction(nothing, [still]), torch.zeros(6, 8))
    assert method.scale(nothing) == 1
    both = learn(method, of(still, 0), of(seen, 1))
    assert_equal(method.scale(both), coefficients(method, seen).mean())


def test_a_gradient_that_is_not_finite_makes_the_coefficients_so() -> None:
    for value in (float("nan"), float("inf")):
        seen = random_capture(9)
        seen.g[3, 0, 0] = value
        assert not learn(FNGD(1), seen)["w"].value.isfinite().all()


# Shared between layers.


def test_joint_coefficients_solve_the_system_of_the_whole_network() -> None:
    method = FNGD(1, share="joint")
    seen = {
        "one": random_capture(20),
        "two": random_capture(21, out=3, width=5),
        "groups": random_capture(22, "grouped"),
    }
    stats = method.observe_together({name: [capture] for name, capture in seen.items()})
    DW = torch.cat([whole_layer(capture) for capture in seen.values()], 1)
    F, lam = DW.mT @ DW / 40, damping(method, DW)
    D = torch.linalg.solve(F + lam * torch.eye(len(F)), DW.mean(0))
    found = [method.direction(method.merge(None, stats[name], 0.0), [seen[name]]).flatten() for name in seen]
    assert_equal(torch.cat(found), D)


def test_layers_of_one_shape_share_coefficients_and_others_do_not() -> None:
    method = FNGD(1, share="shape")
    seen = {"a": random_capture(20), "b": random_capture(21, out=3), "c": random_capture(22)}
    stats = method.observe_together({name: [capture] for name, capture in seen.items()})
    w = {name: method.merge(None, stats[name], 0.0)["w"].value for name in seen}
    assert torch.equal(w["a"], w["c"]) and error(w["a"], coefficients(FNGD(1), seen["a"])) > 0.01
    assert_equal(w["b"], coefficients(FNGD(1), seen["b"]))


# Bad input.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first_phase", 0), ("first_phase", 2.5), ("first_phase", True), ("first_phase", None),
        ("coefficients", "mean"), ("unit", "relative"), ("share", "all"),
        ("mu", 0.0), ("mu", -1.0), ("mu", float("nan")), ("mu", float("inf")), ("mu", "1"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        FNGD(**{"first_phase": 10, name: value})


def test_the_fisher_of_a_model_has_no_matrix_for_it() -> None:
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="FNGD weighs examples"):
        natgrad.fisher(model, FNGD(1), Gaussian(), [(torch.randn(4, 3), torch.randn(4, 2))])
