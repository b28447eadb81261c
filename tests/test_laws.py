"""Every law on every approximation it holds for, on ordinary, weight-shared and grouped layers; and laws must bite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import pytest
from torch import Tensor

import laws
import laws_kpsvd
from cases import CASES, Case
from laws import LAWS, Law, estimate
from natgrad import (
    EKFAC,
    KFAC,
    KPSVD,
    TEKFAC,
    TKFAC,
    Approximation,
    Diagonal,
    EigenCorrected,
    ExactFisher,
    Woodbury,
)
from natgrad import matrix as matrices
from natgrad.capture import Capture
from natgrad.fishers import Mean, Stats
from oracles import SHAPES, assert_equal, dense_fisher, error, random_capture


@pytest.mark.parametrize(
    ("law", "case", "shape"),
    [
        pytest.param(law, case, shape, id=f"{law}-{case}-{shape}")
        for law in LAWS
        for case in CASES
        for shape in SHAPES
        if law.when(case, shape)
    ],
)
def test_law(law: Law, case: Case, shape: str) -> None:
    law.check(case, shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_law_14_tekfac_with_the_factors_of_kfac_is_ekfac(shape: str) -> None:
    laws.law_14_tekfac_with_the_factors_of_kfac_is_ekfac(shape)


def test_tkfac_is_kfac_where_all_inputs_and_all_gradients_have_the_same_norm() -> None:
    seen = random_capture(30)
    a, g = (x / x.norm(dim=-1, keepdim=True) for x in (seen.a, seen.g))
    level = Capture(a, g, seen.count, seen.rows)
    assert_equal(estimate(TKFAC(), level).dense(), estimate(KFAC(), level).dense())
    only_inputs = Capture(a, seen.g, seen.count, seen.rows)  # then P still weighs inputs by |g|^2
    assert error(estimate(TKFAC(), only_inputs).dense(), estimate(KFAC(), only_inputs).dense()) > 0.1


# What is not a law: if these held, the data would be too easy for the laws to say anything.


@pytest.mark.parametrize("make", [KFAC, EKFAC, TKFAC, TEKFAC, Diagonal])
def test_no_approximation_is_exact_on_the_data_of_the_laws(make: Callable[[], Approximation]) -> None:
    seen = random_capture(31)
    assert error(estimate(make(), seen).dense(), dense_fisher(seen)) > 0.05


def test_the_trace_of_kfac_is_not_that_of_the_fisher_where_norms_correlate() -> None:
    seen = random_capture(32)
    F = dense_fisher(seen)
    assert abs(float(estimate(KFAC(), seen).trace() / F.trace()) - 1) > 0.05


def test_tkfac_without_cross_terms_does_not_have_the_trace_of_a_shared_layer() -> None:
    seen = random_capture(33)
    a, g = seen.a.expand(-1, 4, -1), seen.g.expand(-1, 4, -1)
    alike = Capture(a, g, seen.count, seen.rows * 4)  # |sum_t g a^T|^2 = 16 |g a^T|^2, position by position 4
    assert_equal(4 * estimate(TKFAC(), alike).trace(), dense_fisher(alike).trace())


def test_law_23_fails_for_tkfac_whose_step_depends_on_the_coordinates() -> None:
    with pytest.raises(AssertionError):
        laws.law_23_undamped_step_is_equivariant(Case("TKFAC", TKFAC), "unshared")


# Laws must bite: each wrong approximation is caught by the law that it breaks.


@dataclass(frozen=True)
class HalvedG(KFAC):
    def observe(self, seen: Capture) -> Stats:
        stats = dict(super().observe(seen))
        return {**stats, "G": Mean(stats["G"].value / 2)}


@dataclass(frozen=True)
class MeanOfMeans(KFAC):
    def observe(self, seen: Capture) -> Stats:
        return {name: Mean(mean.value) for name, mean in super().observe(seen).items()}


@dataclass(frozen=True)
class AveragedOverPadding(KFAC):
    def observe(self, seen: Capture) -> Stats:
        positions = float(seen.flat_a.shape[-2])
        return {**super().observe(seen), "A": Mean(seen.flat_a.mT @ seen.flat_a, positions)}


@dataclass(frozen=True)
class NormalisedGradients(KFAC):
    def observe(self, seen: Capture) -> Stats:
        return super().observe(Capture(seen.a, seen.g / seen.g.norm(), seen.count, seen.rows))


@dataclass(frozen=True)
class NotSymmetric(KFAC):
    def assemble(self, stats: Stats, previous: matrices.Matrix | None = None) -> matrices.Kronecker:
        return matrices.Kronecker(stats["G"].value.triu(), stats["A"].value)


@dataclass(frozen=True)
class Indefinite(Diagonal):
    def observe(self, seen: Capture) -> Stats:
        return {"f": Mean(sum(DW.sum(-3) for DW in seen.weight_gradients()), seen.count)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class SquaredBeforeTheSum(Diagonal):
    def observe(self, seen: Capture) -> Stats:
        return {"f": Mean(seen.flat_g.square().mT @ seen.flat_a.square(), seen.count)}


@dataclass(frozen=True)
class IndependentNorms(TKFAC):
    def observe(self, seen: Capture) -> Stats:
        n = float(seen.flat_a.shape[-2])
        d = seen.flat_a.square().sum((-2, -1)) * seen.flat_g.square().sum((-2, -1)) / n
        return {**super().observe(seen), "d": Mean(d, seen.count)}


@dataclass(frozen=True)
class NeverCorrected(EigenCorrected):
    base: Approximation = KFAC()

    def correct(self, matrix: matrices.Matrix, seen: Sequence[Capture], decay: float) -> matrices.Matrix:
        return matrix


@dataclass(frozen=True)
class CorrectedElsewhere(EigenCorrected):
    """Measures the eigenvalues in another basis than it uses."""

    base: Approximation = KFAC()

    def correct(self, matrix: matrices.Matrix, seen: Sequence[Capture], decay: float) -> matrices.Matrix:
        assert isinstance(matrix, matrices.Spectral)
        right = estimate(EKFAC(), random_capture(99))
        assert isinstance(right, matrices.Spectral)
        moved = super().correct(
            matrices.Spectral(matrix.left, right.right, matrix.values),
            seen,
            decay,
        )
        assert isinstance(moved, matrices.Spectral)
        return matrices.Spectral(matrix.left, matrix.right, moved.values)


@dataclass(frozen=True)
class GroupsMixed(ExactFisher):
    def observe(self, seen: Capture) -> Stats:
        return {name: Mean(mean.value.flip(0)) for name, mean in super().observe(seen).items()}


@dataclass(frozen=True)
class OneIteration(KPSVD):
    iterations: int = 1


@dataclass(frozen=True)
class NegativeFactors(KPSVD):
    def assemble(self, stats: Stats, previous: matrices.Matrix | None = None) -> matrices.Kronecker:
        return matrices.Kronecker(-stats["S"].value, -stats["R"].value)


@pytest.mark.parametrize(
    ("broken", "check", "shape"),
    [
        (HalvedG, laws.law_03_one_example_is_exact, "unshared"),
        (MeanOfMeans, laws.law_26_the_same_matrix_whole_or_in_parts, "unshared"),
        (AveragedOverPadding, laws.law_26_padding_of_any_length_changes_nothing, "shared"),
        (NormalisedGradients, laws.law_scale_gradients_by_c_and_the_matrix_by_c_squared, "unshared"),
        (NotSymmetric, laws.law_01_product_symmetry_and_dense_twin, "unshared"),
        (NotSymmetric, laws.law_01_damped_inverse_is_the_dense_solve, "unshared"),
        (Indefinite, laws.law_02_positive_semi_definite, "unshared"),
        (SquaredBeforeTheSum, laws.law_04_trace, "shared"),
        (IndependentNorms, laws.law_05_partial_traces, "unshared"),
        (IndependentNorms, laws.law_05_traces_of_both_factors_are_d_after_any_average, "unshared"),
        (NeverCorrected, laws.law_04_trace, "unshared"),
        (NeverCorrected, laws.law_eigenvalues_are_the_diagonal_of_the_fisher, "unshared"),
        (CorrectedElsewhere, laws.law_08_error_never_above_that_of_the_base, "unshared"),
        (OneIteration, laws_kpsvd.law_09_10_error_is_that_of_the_singular_values_left_out, "unshared"),
        (OneIteration, laws_kpsvd.law_13_the_products_are_the_leading_singular_triples, "grouped"),
        (HalvedG, laws_kpsvd.law_09_10_no_other_method_of_as_many_products_is_nearer, "shared"),
        (NegativeFactors, laws_kpsvd.law_13_the_leading_factors_are_positive, "unshared"),
        (GroupsMixed, laws.law_groups_are_layers_of_their_own, "grouped"),
        (GroupsMixed, laws.law_exact, "grouped"),
    ],
)
def test_laws_bite(broken: Callable[[], Approximation], check: Callable[[Case, str], None], shape: str) -> None:
    case = Case("broken", broken, trace="fisher", partial_traces="fisher", below=KFAC, products=1)
    with pytest.raises((AssertionError, matrices.FactorisationError)):
        check(case, shape)


# The law of the damped inverse allows for rounding and nothing else.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_law_01_fails_for_a_damping_that_is_off_by_a_millionth(
    case: Case, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(estimate(case.make(), random_capture(2, shape)))
    right = kind.inverse
    monkeypatch.setattr(kind, "inverse", lambda matrix, damping: right(matrix, damping * (1 + 1e-6)))
    with pytest.raises(AssertionError, match="relative error"):
        laws.law_01_damped_inverse_is_the_dense_solve(case, shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", ["LowRank.gram", "cholesky", "_along", "_combine"])
def test_law_01_fails_for_a_part_of_the_gram_form_in_single_precision(
    part: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Callable[..., Tensor] = attrgetter(part)(matrices.low_rank)
    monkeypatch.setattr(f"natgrad.matrix.low_rank.{part}", lambda *args: right(*args).float().double())
    with pytest.raises(AssertionError, match="relative error"):
        laws.law_01_damped_inverse_is_the_dense_solve(Case("Woodbury", Woodbury), shape)
