"""The laws of the approximations, as functions of a case and a shape of data; numbers are those of the law table.

All are run undamped and un-averaged (decay 0) in float64 unless they say otherwise, and compare operators, never
eigenvectors. A law takes a row of ``cases.py`` and one of ``oracles.SHAPES`` and raises ``AssertionError``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cases import Case
from natgrad import EKFAC, TEKFAC, Approximation, EigenCorrected
from natgrad.capture import Capture
from natgrad.fishers import Mean, Stats, pool
from natgrad.matrix import Matrix, Spectral
from oracles import (
    assert_equal,
    damped,
    dense_fisher,
    error,
    examples,
    partial_traces,
    position_fisher,
    random_capture,
    rounding,
)


@dataclass(frozen=True)
class Law:
    """A law and the cases for which it holds."""

    check: Callable[[Case, str], None]
    when: Callable[[Case, str], bool]

    def __str__(self) -> str:
        return self.check.__name__


LAWS: list[Law] = []


def law(
    when: Callable[[Case, str], bool] = lambda case, shape: True,
) -> Callable[[Callable[[Case, str], None]], Callable[[Case, str], None]]:
    """Add a function to ``LAWS``, for the cases and shapes that ``when`` says."""

    def add(check: Callable[[Case, str], None]) -> Callable[[Case, str], None]:
        LAWS.append(Law(check, when))
        return check

    return add


def estimate(approximation: Approximation, *seen: Capture) -> Matrix:
    """The approximation of the Fisher over all of ``seen``."""
    stats = approximation.merge(None, pool(approximation.observe(capture) for capture in seen), 0.0)
    matrix = approximation.assemble(stats)
    return approximation.correct(matrix, seen, 0.0)


def gradient(seen: Capture) -> Tensor:
    """The gradient of the mean loss: (*groups, out, in)."""
    return sum(DW.sum(-3) for DW in seen.weight_gradients()) / torch.as_tensor(seen.count)


# Every approximation is a matrix.


@law()
def law_01_product_symmetry_and_dense_twin(case: Case, shape: str) -> None:
    """F M is dense() times vec(M), for any leading dimensions of M; dense() is symmetric; trace() is its trace."""
    matrix = estimate(case.make(), random_capture(1, shape))
    F = matrix.dense()
    assert_equal(F.mT, F)
    assert_equal(matrix.trace(), F.diagonal(dim1=-2, dim2=-1).sum(-1))
    for lead in ((), (5,), (2, 3)):
        M = torch.randn(*lead, *matrix.shape)
        assert_equal((matrix @ M).flatten(-2), (F @ M.flatten(-2).unsqueeze(-1)).squeeze(-1))


@law()
def law_01_damped_inverse_is_the_dense_solve(case: Case, shape: str) -> None:
    """F.inverse(damping) @ M solves the dense system that its damping rule stands for, up to rounding."""
    matrix = estimate(case.make(), random_capture(2, shape))
    for damping in (1e-3, 0.3, 20.0):
        inverse, M, A = matrix.inverse(damping), torch.randn(2, *matrix.shape), damped(matrix, damping)
        expected = torch.linalg.solve(A, M.flatten(-2).unsqueeze(-1)).squeeze(-1)
        assert_equal((inverse @ M).flatten(-2), expected, rounding(A))
        assert_equal(inverse.dense() @ A, torch.eye(48).expand_as(A), rounding(A))


@law(lambda case, shape: case.definite)
def law_02_positive_semi_definite(case: Case, shape: str) -> None:
    """No eigenvalue is negative beyond rounding, and the damped inverse is positive definite."""
    for n in (3, 40):
        matrix = estimate(case.make(), random_capture(3, shape, n=n))
        eigenvalues = torch.linalg.eigvalsh(matrix.dense())
        assert (eigenvalues >= -1e-12 * eigenvalues.amax(-1, keepdim=True)).all()
        assert (torch.linalg.eigvalsh(matrix.inverse(0.1).dense()) > 0).all()


@law(lambda case, shape: case.absolute)
def law_22_large_damping_is_plain_gradient_descent(case: Case, shape: str) -> None:
    """lambda D -> M as lambda -> infinity; at worst like 1/sqrt(lambda), the cross terms of factored damping."""
    seen = random_capture(4, shape)
    matrix, M = estimate(case.make(), seen), gradient(seen)
    size = float(torch.linalg.eigvalsh(matrix.dense()).max())
    for factor, bound in ((1e4, 1e-1), (1e8, 1e-3), (1e12, 1e-5)):
        damping = factor * size
        assert_equal(damping * (matrix.inverse(damping) @ M), M, bound)


@law(lambda case, shape: shape == "grouped")
def law_groups_are_layers_of_their_own(case: Case, shape: str) -> None:
    """The matrix of a grouped layer is, group by group, the matrix of that group alone."""
    seen = random_capture(5, shape)
    together = estimate(case.make(), seen).dense()
    for group, a, g in zip(together, seen.a, seen.g, strict=True):
        assert_equal(group, estimate(case.make(), Capture(a, g, seen.count, seen.rows)).dense())


# How it scales and adds up.


@law(lambda case, shape: case.reads_gradients)
def law_scale_gradients_by_c_and_the_matrix_by_c_squared(case: Case, shape: str) -> None:
    """F is quadratic in g."""
    seen = random_capture(6, shape)
    scaled = Capture(seen.a, 3 * seen.g, seen.count, seen.rows)
    assert_equal(estimate(case.make(), scaled).dense(), 9 * estimate(case.make(), seen).dense())


@law()
def law_26_the_same_matrix_whole_or_in_parts(case: Case, shape: str) -> None:
    """Parts of any size, in any order, give the matrix of the whole batch."""
    seen = random_capture(7, shape)
    parts = [examples(seen, chosen) for chosen in (slice(25, 40), slice(0, 22), slice(22, 25))]
    assert_equal(estimate(case.make(), *parts).dense(), estimate(case.make(), seen).dense())


@law()
def law_26_padding_of_any_length_changes_nothing(case: Case, shape: str) -> None:
    """Positions with a = g = 0 that neither ``rows`` nor ``count`` counts leave the matrix as it is."""
    seen = random_capture(8, shape)
    padded = [torch.cat([x, torch.zeros_like(x)], -2) for x in (seen.a, seen.g)]
    longer = Capture(padded[0], padded[1], seen.count, seen.rows)
    assert_equal(estimate(case.make(), longer).dense(), estimate(case.make(), seen).dense())


@law()
def law_float32_is_close_to_float64(case: Case, shape: str) -> None:
    """Single precision changes the operator by a few of its units."""
    seen = random_capture(9, shape)
    single = estimate(case.make(), seen.to(torch.float32)).dense()
    assert single.dtype == torch.float32
    assert_equal(single.double(), estimate(case.make(), seen).dense(), 1e-4)


# How near it is to the Fisher.


@law(lambda case, shape: case.exact)
def law_exact(case: Case, shape: str) -> None:
    """It is the dense Fisher of the per-example gradients."""
    seen = random_capture(10, shape)
    assert_equal(estimate(case.make(), seen).dense(), dense_fisher(seen))


@law(lambda case, shape: case.one_example and shape == "unshared")
def law_03_one_example_is_exact(case: Case, shape: str) -> None:
    """One example, no sharing: vec(g a^T) vec(g a^T)^T is a Kronecker product."""
    seen = random_capture(11, shape, n=1)
    assert_equal(estimate(case.make(), seen).dense(), dense_fisher(seen))


@law(lambda case, shape: case.trace is not None)
def law_04_trace(case: Case, shape: str) -> None:
    """tr of the approximation = tr F."""
    seen = random_capture(12, shape)
    F = dense_fisher(seen) if case.trace == "fisher" else position_fisher(seen)
    assert_equal(estimate(case.make(), seen).trace(), F.diagonal(dim1=-2, dim2=-1).sum(-1))


@law(lambda case, shape: case.partial_traces is not None)
def law_05_partial_traces(case: Case, shape: str) -> None:
    """Both partial traces of the approximation = those of F."""
    seen = random_capture(13, shape)
    F = dense_fisher(seen) if case.partial_traces == "fisher" else position_fisher(seen)
    out, width = seen.g.shape[-1], seen.a.shape[-1]
    found = partial_traces(estimate(case.make(), seen).dense(), out, width)
    for mine, theirs in zip(found, partial_traces(F, out, width), strict=True):
        assert_equal(mine, theirs)


@law(lambda case, shape: "P" in case.make().observe(random_capture(0)))
def law_05_traces_of_both_factors_are_d_after_any_average(case: Case, shape: str) -> None:
    """tr P = tr S = d at every step of a moving average with any decay."""
    approximation = case.make()
    stats: Stats = {}
    for step, decay in enumerate((0.0, 0.5, 0.95, 0.3)):
        new = approximation.observe(random_capture(100 + step, shape))
        stats = approximation.merge(stats or None, new, decay)
        d = stats["d"].value
        for name in ("P", "S"):
            assert_equal(stats[name].value.diagonal(dim1=-2, dim2=-1).sum(-1), d)


@law(lambda case, shape: case.below is not None)
def law_08_error_never_above_that_of_the_base(case: Case, shape: str) -> None:
    """|F - corrected| <= |F - base| for 50 seeds, with few and with many examples."""
    assert case.below is not None
    for seed in range(50):
        seen = random_capture(200 + seed, shape, n=5 if seed % 2 else 40)
        F = dense_fisher(seen)
        mine, base = (estimate(make(), seen).dense() for make in (case.make, case.below))
        assert error(mine, F) <= error(base, F) * (1 + 1e-12)


@law(lambda case, shape: case.equivariant and shape != "grouped")
def law_23_undamped_step_is_equivariant(case: Case, shape: str) -> None:
    """Inputs in coordinates P^-1 a and outputs in Q^-1 s give the step Q^-1 D P: the same step."""
    seen = random_capture(14, shape, n=200)
    P, Q = (
        torch.eye(d) + 0.1 * torch.randn(d, d) for d in (8, 6)
    )  # near I: the condition of F grows by the square of theirs
    moved = Capture(seen.a @ P.inverse().mT, seen.g @ Q, seen.count, seen.rows)
    F, moved_F = (estimate(case.make(), here) for here in (seen, moved))
    step, moved_step = F.inverse(0.0) @ gradient(seen), moved_F.inverse(0.0) @ gradient(moved)
    turned = float(torch.linalg.cond(P) * torch.linalg.cond(Q))  # what a relative error may gain from P and Q
    assert_equal(Q @ moved_step, step @ P, turned * (rounding(F.dense()) + rounding(moved_F.dense())))


# Eigenvalue-corrected ones.


@law(lambda case, shape: isinstance(case.make(), EigenCorrected))
def law_eigenvalues_are_the_diagonal_of_the_fisher(case: Case, shape: str) -> None:
    """s = diag(Q^T F Q)."""
    seen = random_capture(15, shape)
    matrix = estimate(case.make(), seen)
    assert isinstance(matrix, Spectral)
    Q = torch.einsum("...op,...ij->...oipj", matrix.left, matrix.right).flatten(-2).flatten(-3, -2)
    expected = (Q.mT @ dense_fisher(seen) @ Q).diagonal(dim1=-2, dim2=-1)
    assert_equal(matrix.values.flatten(-2), expected)


@law(lambda case, shape: isinstance(case.make(), EigenCorrected))
def law_15_what_a_refresh_carries_over(case: Case, shape: str) -> None:
    """rotate: the diagonal of the old operator in the new basis; reseed: the base's matrix; keep: the same values.

    Rotating keeps the trace, and in an unchanged basis it changes nothing.
    """
    approximation = case.make()
    assert isinstance(approximation, EigenCorrected)
    old = estimate(approximation, random_capture(16, shape))
    assert isinstance(old, Spectral)
    stats = approximation.merge(None, approximation.observe(random_capture(17, shape)), 0.0)
    new = approximation.assemble(stats, old)
    if approximation.carry == "reseed":
        assert_equal(new.dense(), approximation.base.assemble(stats).dense())
    elif approximation.carry == "keep":
        assert_equal(new.values, old.values)
        assert error(new.dense(), old.dense()) > 0.1
    else:
        Q = torch.einsum("...op,...ij->...oipj", new.left, new.right).flatten(-2).flatten(-3, -2)
        rotated = (Q.mT @ old.dense() @ Q).diagonal(dim1=-2, dim2=-1)
        assert_equal(new.values.flatten(-2), rotated)
        assert_equal(new.trace(), old.trace())
        again = approximation.merge(None, approximation.observe(random_capture(16, shape)), 0.0)
        same = approximation.assemble(again, old)
        assert_equal(same.dense(), old.dense())


@law(lambda case, shape: isinstance(case.make(), EigenCorrected))
def law_a_correction_is_a_moving_average_in_a_fixed_basis(case: Case, shape: str) -> None:
    """correct(.., decay) moves the eigenvalues by 1 - decay of the way to those of the new batch, and nothing else."""
    old = estimate(case.make(), random_capture(18, shape))
    seen = [random_capture(19, shape)]
    full, part = (case.make().correct(old, seen, decay) for decay in (0.0, 0.8))
    assert_equal(part.dense(), 0.8 * old.dense() + 0.2 * full.dense())


def law_14_tekfac_with_the_factors_of_kfac_is_ekfac(shape: str) -> None:
    """(P, S) := (A, G) gives EKFAC's operator."""
    seen = random_capture(20, shape)
    kfac = EKFAC().observe(seen)
    swapped = {"P": kfac["A"], "S": kfac["G"], "d": Mean(torch.ones(seen.a.shape[:-3]))}
    found = TEKFAC().correct(TEKFAC().assemble(swapped), [seen], 0.0)
    assert_equal(found.dense(), estimate(EKFAC(), seen).dense())
