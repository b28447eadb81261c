"""Kronecker products nearest to the Fisher: over time, on real layers, at the edges, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laws_kpsvd
import natgrad
from cases import TIGHT, Case
from laws import estimate
from natgrad import KFAC, KPSVD, TKFAC, Approximation, Categorical, CorrectedKFAC, Deflated, ExactFisher, Lanczos
from natgrad.capture import Capture
from natgrad.fishers import Stats, rearrangement
from natgrad.fishers.rearrangement import Rearrangement, norm, unit
from natgrad.fishers.triples import identity, lanczos, stream
from natgrad.matrix import FirstOnly, Kronecker, KroneckerSum, Magnitude, Tikhonov, Unit
from oracles import SHAPES, assert_equal, dense_fisher, error, random_capture, rearranged


class Unguarded:
    def guarded(self, second: Tensor) -> Tensor:
        return 1 + second


FAMILY = [KPSVD, Deflated, Lanczos, CorrectedKFAC]
Make = Callable[..., Approximation]


@pytest.mark.parametrize("shape", SHAPES)
def test_law_12_tkfac_is_one_half_step_from_the_identity(shape: str) -> None:
    laws_kpsvd.law_12_tkfac_is_one_half_step_from_the_identity(shape)


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("t", [1, 2, 30])
@pytest.mark.parametrize("groups", [(), (3,)])
@pytest.mark.parametrize("chunk", [1, 1 << 25])
def test_law_13_by_pairs_of_positions_by_gradients_and_in_chunks(
    n: int, t: int, groups: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rearrangement, "_CHUNK", chunk)
    seen = Capture(torch.randn(*groups, n, t, 5), torch.randn(*groups, n, t, 4), n + 0.5, n * t)
    laws_kpsvd.law_13_products_with_z_are_those_of_the_dense_rearrangement(seen)


def test_an_unshared_layer_needs_no_per_example_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(rearrangement, "_by_gradients", never)
    monkeypatch.setattr(rearrangement, "_by_pairs", never)
    Rearrangement(random_capture(0)) @ torch.eye(6)
    Rearrangement(random_capture(0, "shared"), location=True) @ torch.eye(6)


def test_location_takes_every_position_as_an_example() -> None:
    seen = random_capture(1, "shared")
    alone = Capture(seen.flat_a.unsqueeze(-2), seen.flat_g.unsqueeze(-2), seen.count, seen.rows)
    found = estimate(KPSVD(location=True), seen).dense()
    assert_equal(found, estimate(KPSVD(), alone).dense())
    assert error(found, estimate(KPSVD(), seen).dense()) > 0.05


# The order of the errors.


def check_order(errors: dict[str, float]) -> None:
    slack = 1 + 1e-10
    assert errors["Deflated"] == pytest.approx(errors["Lanczos"], rel=1e-8)
    assert errors["Deflated"] <= slack * min(errors["CorrectedKFAC"], errors["KPSVD"])
    assert errors["KPSVD"] <= slack * min(errors["KFAC"], errors["TKFAC"])
    assert errors["CorrectedKFAC"] <= slack * errors["KFAC"]


COMPARED: dict[str, Approximation] = {
    "KFAC": KFAC(),
    "TKFAC": TKFAC(),
    "KPSVD": KPSVD(),
    "CorrectedKFAC": CorrectedKFAC(),
    "Deflated": Deflated(**TIGHT),
    "Lanczos": Lanczos(tolerance=1e-13),
}


@pytest.mark.parametrize("n", [4, 12, 40, 200])
def test_laws_09_and_10_the_order_of_the_errors_on_random_layers(n: int) -> None:
    for seed in range(60):
        seen = random_capture(1000 * n + seed, n=n)
        F = dense_fisher(seen)
        check_order({name: error(estimate(each, seen).dense(), F) for name, each in COMPARED.items()})


def test_laws_09_and_10_the_order_of_the_errors_on_a_classifier_of_digits() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = sklearn.load_digits()
    x, y = torch.tensor(digits.images[:300]).unsqueeze(1) / 16, torch.tensor(digits.target[:300])
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    found = {each: natgrad.fisher(model, each, Categorical(), [(x, y)]) for each in (*COMPARED.values(), ExactFisher())}
    for layer, F in found[ExactFisher()].items():
        check_order({name: error(found[each][layer].dense(), F.dense()) for name, each in COMPARED.items()})


def test_two_steps_of_lanczos_as_released_miss_the_second_product() -> None:
    seen = random_capture(2)
    F = dense_fisher(seen)
    released, single, full = (
        error(estimate(each, seen).dense(), F) for each in (Lanczos(size=2, restarts=1), KPSVD(), Lanczos())
    )
    assert full < 0.95 * released < released < single


@pytest.mark.parametrize("size", [2, 3, 5, 8, 30])
def test_the_two_sided_residual_of_lanczos_is_below_the_tolerance(size: int) -> None:
    Z = Rearrangement(random_capture(3, "grouped"))
    (s1, residual) = 0 * norm(identity(Z)), 0 * norm(identity(Z))
    for R, S in lanczos(Z, identity(Z), size, 1000 if size == 3 else 20, 1e-9):
        u, v, s = unit(R), unit(S), norm(R) * norm(S)
        s1 = torch.maximum(s, s1)
        residual = residual + norm(Z @ v - s * u) + norm(Z.adjoint(u) - s * v)
    assert bool((residual <= 1e-8 * s1).all()) is (size > 2)  # with 2 the residual stays, and is seen


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (lambda: Lanczos(size=2, restarts=1), laws_kpsvd.law_09_10_error_is_that_of_the_singular_values_left_out),
        (lambda: Lanczos(size=2, restarts=1), laws_kpsvd.law_13_the_products_are_the_leading_singular_triples),
        (lambda: Deflated(guard=Unguarded()), laws_kpsvd.law_02_the_damped_inverse_of_an_indefinite_sum_is_definite),
        (CorrectedKFAC, laws_kpsvd.law_09_10_no_other_method_of_as_many_products_is_nearer),
    ],
)
def test_laws_of_two_products_bite(broken: Make, check: Callable[[Case, str], None]) -> None:
    with pytest.raises(AssertionError):
        check(Case("broken", broken, definite=False, products=2), "unshared")


# Over time.


def over_time(make: Approximation, batches: list[Capture], decay: float) -> tuple[Stats, Tensor]:
    """Statistics over the batches, and the dense Fisher averaged with the same weights."""
    stats, F = make.merge(None, make.observe(batches[0]), 0.0), dense_fisher(batches[0])
    for k, seen in enumerate(batches[1:], 2):
        weight = min(1 - 1 / k, decay)
        stats, F = make.merge(stats, make.observe(seen), weight), torch.lerp(dense_fisher(seen), F, weight)
    return stats, F


def batches(number: int, n: int = 16) -> list[Capture]:
    """Batches of a mixture of two kinds of examples: its Fisher is a sum of two Kronecker products."""
    mixers = [(torch.randn(8, 8), torch.randn(6, 6)) for _ in range(2)]
    seen = []
    for _ in range(number):
        kind, a, g = torch.rand(n, 1, 1) < 0.5, torch.randn(n, 1, 8), torch.randn(n, 1, 6)
        a, g = (torch.where(kind, x @ one, x @ two) for x, one, two in zip((a, g), *mixers, strict=True))
        seen.append(Capture(a, g, n, n))
    return seen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", FAMILY)
def test_repeated_observations_of_one_batch_give_its_own_matrix(make: Make, shape: str) -> None:
    seen = random_capture(6, shape)
    settings = {"tolerance": 1e-13} if make is Lanczos else TIGHT
    stats, _ = over_time(make(**settings), [seen] * 6, 0.8)
    assert_equal(make().assemble(stats).dense(), estimate(make(**settings), seen).dense(), 1e-8)


def test_streaming_is_the_recurrence_of_the_definition() -> None:
    """X <- ema(X, Z v), Y <- ema(Y, Z^T u) with the old directions; F ~ Y kron X / sqrt(|X| |Y|)."""
    seen = batches(6)
    stats, _ = over_time(KPSVD(**TIGHT), seen, 0.7)
    U, s, V = torch.linalg.svd(rearranged(dense_fisher(seen[0]), 6, 8))
    X, Y = s[0] * U[:, 0], s[0] * V[0]
    for k, batch in enumerate(seen[1:], 2):
        Z, decay = rearranged(dense_fisher(batch), 6, 8), min(1 - 1 / k, 0.7)
        X, Y = torch.lerp(Z @ Y / Y.norm(), X, decay), torch.lerp(Z.mT @ X / X.norm(), Y, decay)
    expected = Kronecker(Y.reshape(6, 6), X.reshape(8, 8) / (X.norm() * Y.norm()).sqrt())
    assert_equal(KPSVD().assemble(stats).dense(), expected.dense())


def test_published_averages_the_factors_of_each_batch() -> None:
    seen = batches(5)
    make = KPSVD(averaging="published", **TIGHT)
    stats, _ = over_time(make, seen, 1.0)  # all batches weigh equally
    each = [make.merge(None, make.observe(batch), 0.0) for batch in seen]
    for name in ("R", "S"):
        assert_equal(stats[name].value, torch.stack([stats[name].value for stats in each]).mean(0))


@pytest.mark.parametrize("make", [KPSVD, Deflated, CorrectedKFAC])
def test_streaming_ends_nearer_to_the_averaged_fisher_than_averaged_triples(make: Make) -> None:
    seen = batches(120)
    errors = []
    for averaging in ("streaming", "published"):
        stats, F = over_time(make(averaging=averaging), seen, 0.95)
        errors.append(error(make().assemble(stats).dense(), F))
    assert errors[0] < (0.97 if make is KPSVD else 0.8) * errors[1]


def test_streaming_kpsvd_ends_within_two_percent_of_the_best_product() -> None:
    stats, F = over_time(KPSVD(), batches(120), 0.95)
    left_out = torch.linalg.svdvals(rearranged(F, 6, 8))[1:].norm() / F.norm()
    assert left_out <= error(KPSVD().assemble(stats).dense(), F) <= 1.02 * left_out


def test_a_streamed_average_converges_at_one_application_an_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, counted = batches(2), 0
    make = KPSVD()
    stats = make.merge(None, make.observe(seen[0]), 0.0)
    product = Rearrangement._mean

    def counting(*args: Any) -> Tensor:
        nonlocal counted
        counted += 1
        return product(*args)

    monkeypatch.setattr(Rearrangement, "_mean", counting)
    for inner in (1, 3):
        KPSVD(inner=inner).merge(stats, make.observe(seen[1]), 0.5)
    assert counted == 2 * 1 + 2 * 3


@pytest.mark.parametrize(
    "make",
    [
        Deflated(),
        Deflated(averaging="published"),
        Lanczos(),
        CorrectedKFAC(),
        CorrectedKFAC(averaging="published"),
    ],
)
def test_signs_of_the_second_product_do_not_flip_between_batches(make: Approximation) -> None:
    """It is still there after 40 batches: averaged with random signs it would be gone."""
    stats, F = over_time(make, batches(40, 64), 0.95)
    matrix = make.assemble(stats)
    assert isinstance(matrix, KroneckerSum)
    assert error(matrix.dense(), F) < 0.7 * error(Kronecker(matrix.left, matrix.right).dense(), F)


def test_the_second_streamed_product_is_safe_from_outliers_along_the_first() -> None:
    """Batches of few, heavy-tailed examples: what they deviate by along (R, S) must not end up in (P, Q)."""
    whole = random_capture(5, n=120 * 12)
    seen = [Capture(a, g, 12, 12) for a, g in zip(whole.a.split(12), whole.g.split(12), strict=True)]
    second, first = (over_time(make, seen, 0.95) for make in (Deflated(), KPSVD()))
    assert error(Deflated().assemble(second[0]).dense(), second[1]) < error(
        KPSVD().assemble(first[0]).dense(), first[1]
    )


@pytest.mark.parametrize("make", FAMILY)
def test_a_layer_that_was_dead_at_first_comes_to_life(make: Make) -> None:
    seen = random_capture(7, "grouped")
    dead = Capture(seen.a, seen.g * torch.tensor([0.0, 1.0, 0.0])[:, None, None, None], seen.count, seen.rows)
    none = Capture(seen.a, 0 * seen.g, seen.count, seen.rows)
    stats, _ = over_time(make(), [none, dead, *[seen] * 200], 0.8)
    settings = {"tolerance": 1e-13} if make is Lanczos else TIGHT
    assert_equal(make().assemble(stats).dense(), estimate(make(**settings), seen).dense(), 1e-4)


def test_inner_iterations_start_from_the_same_old_triple() -> None:
    """With a weight of 0 on the old value they are power iterations on the batch."""
    Z = Rearrangement(random_capture(8))
    U, s, V = torch.linalg.svd(rearranged(dense_fisher(Z.seen), 6, 8))
    R, S = stream(Z, (torch.eye(8), torch.eye(6)), torch.eye(6), 0.0, 200)
    assert_equal(norm(R) * norm(S), s[0].reshape(1, 1))
    assert_equal(Kronecker(S, R).dense(), s[0] * Kronecker(V[0].reshape(6, 6), U[:, 0].reshape(8, 8)).dense())


# At the edges.


@pytest.mark.parametrize("make", FAMILY)
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 1)])
def test_tiny_layers(make: Make, size: tuple[int, int]) -> None:
    out, width = size
    seen = Capture(torch.randn(9, 2, width), torch.randn(9, 2, out), 9, 18)
    matrix = estimate(make(), seen)
    if make in (Deflated, Lanczos):  # a rank of at most min(1, 3) symmetric pairs
        assert_equal(matrix.dense(), dense_fisher(seen), 1e-9)
    assert torch.isfinite(matrix.inverse(0.1).dense()).all()


@pytest.mark.parametrize("make", FAMILY)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_statistics(make: Make, value: float) -> None:
    seen = random_capture(9)
    seen.g[3, 0, 2] = value
    for old in (None, make().merge(None, make().observe(random_capture(9)), 0.0)):
        stats = make().merge(old, make().observe(seen), 0.5)
        assert not torch.isfinite(torch.stack([stat.value.sum() for stat in stats.values()])).all()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_float32_reaches_the_tolerance_at_any_scale(scale: float) -> None:
    seen = random_capture(10)
    single = Capture(seen.a.float(), (scale * seen.g).float(), seen.count, seen.rows)
    found = estimate(Deflated(), single).dense().double() / scale**2
    assert_equal(found, estimate(Deflated(**TIGHT), seen).dense(), 1e-3)


# Options and refusals.


def test_the_guards_of_an_indefinite_sum() -> None:
    seen = random_capture(11, n=6)
    plain = estimate(Deflated(), seen)
    assert isinstance(plain, KroneckerSum)
    clamped, positive, first = (
        estimate(Deflated(guard=guard), seen).inverse(1e-2) for guard in (plain.guard, Magnitude(), FirstOnly())
    )
    assert float(clamped.tensors()["guarded"]) > 0 and float(first.tensors()["guarded"]) > 0.9
    for inverse in (clamped, positive, first):
        assert (torch.linalg.eigvalsh(inverse.dense()) > 0).all()
    assert_equal(first.dense(), Kronecker(plain.left, plain.right).inverse(1e-2).dense(), 1e-8)
    assert error(positive.dense(), clamped.dense()) > 1e-3
    large = [estimate(Deflated(guard=guard), seen).inverse(1e9) for guard in (plain.guard, FirstOnly())]
    assert all(float(inverse.tensors()["guarded"]) == 0 for inverse in large)


@pytest.mark.parametrize("make", FAMILY)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0.0}, "tolerance must be in"),
        ({"averaging": "never"}, "averaging must be"),
        ({"inner": 0}, "inner must be a whole number of at least 1"),
        ({"iterations": 2.5}, "iterations must be a whole number"),
        ({"size": 1}, "size must be a whole number of at least 2"),
        ({"restarts": 0}, "restarts must be"),
        ({"rule": Tikhonov()}, r"must damp its factors"),
    ],
)
def test_settings_that_cannot_be_meant(make: Make, settings: dict[str, Any], message: str) -> None:
    assert is_dataclass(make)
    names = {field.name for field in fields(make)}
    if set(settings) <= names and not (make is KPSVD and "rule" in settings):
        with pytest.raises(ValueError, match=message):
            make(**settings)


@pytest.mark.parametrize("tau", [0.0, -1.0, 1.5])
def test_a_tau_that_guards_nothing_is_refused(tau: float) -> None:
    for guard in (natgrad.matrix.Clamp, FirstOnly):
        with pytest.raises(ValueError, match="tau must be in"):
            guard(tau)


def test_the_released_damping_is_unit_at_its_square() -> None:
    matrix = estimate(Deflated(rule=Unit()), random_capture(12))
    assert isinstance(matrix, KroneckerSum)
    S, R = (X + 1e5 * torch.eye(len(X)) for X in (matrix.left, matrix.right))
    expected = KroneckerSum(S, R, matrix.second_left, matrix.second_right).dense().inverse()
    assert_equal(matrix.inverse(1e10).dense(), expected)
