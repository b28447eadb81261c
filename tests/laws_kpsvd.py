"""The laws of the Kronecker products nearest to the Fisher, and of sums of two; numbers are those of the law table."""

from __future__ import annotations

import torch
from torch import Tensor

from cases import TIGHT, Case
from laws import estimate, law
from natgrad import KFAC, KPSVD, TKFAC, CorrectedKFAC, TKFACExact
from natgrad.capture import Capture
from natgrad.fishers.rearrangement import Pair, Rearrangement
from natgrad.matrix import Kronecker, KroneckerSum
from oracles import assert_equal, damped, dense_fisher, error, on_symmetric, random_capture, rearranged, rounding


def terms(matrix: Kronecker | KroneckerSum) -> list[Pair]:
    """The products of a sum, as (R, S)."""
    first = [(matrix.right, matrix.left)]
    return [*first, (matrix.second_right, matrix.second_left)] if isinstance(matrix, KroneckerSum) else first


def of(case: Case, seen: Capture) -> Kronecker | KroneckerSum:
    """The matrix of a case that is one product or two."""
    matrix = estimate(case.make(), seen)
    assert isinstance(matrix, Kronecker | KroneckerSum)
    return matrix


@law(lambda case, shape: not case.definite)
def law_02_the_damped_inverse_of_an_indefinite_sum_is_definite(case: Case, shape: str) -> None:
    """Whatever the damping, and though the data of this law make some of the sums indefinite."""
    lowest = []
    for seed in range(10):
        matrix = estimate(case.make(), random_capture(300 + seed, shape, n=10))
        lowest.append(torch.linalg.eigvalsh(matrix.dense()).min())
        for damping in (1e-4, 1e-2, 1.0):
            assert (torch.linalg.eigvalsh(matrix.inverse(damping).dense()) > 0).all()
    assert min(lowest) < -1e-3


@law(lambda case, shape: not case.definite)
def law_01_unclamped_the_inverse_is_that_of_the_damped_sum(case: Case, shape: str) -> None:
    """Where no eigenvalue of I + (second product) / (damped first product) is below tau, as with much damping."""
    for damping in (1e-2, 1.0, 1e6):
        matrix = of(case, random_capture(2, shape))
        (R, S), (P, Q) = terms(matrix)
        first = damped(Kronecker(S, R), damping)
        plain = first + Kronecker(Q, P).dense()
        least = torch.linalg.eigvals(torch.linalg.solve(first, plain)).real.min()
        if least > 0.1:
            assert_equal(matrix.inverse(damping).dense() @ plain, torch.eye(48).expand_as(plain), rounding(plain))
    assert least > 0.1


@law(lambda case, shape: not case.definite and shape == "unshared")
def law_03_one_example_leaves_no_second_product(case: Case, shape: str) -> None:
    """Exactly zero, without NaN."""
    _, (P, Q) = terms(of(case, random_capture(11, shape, n=1)))
    assert torch.count_nonzero(P) == 0 and torch.count_nonzero(Q) == 0


@law(lambda case, shape: case.products is not None)
def law_09_10_error_is_that_of_the_singular_values_left_out(case: Case, shape: str) -> None:
    """|F - approximation|^2 = sum of the squares of all singular values of Z but the largest symmetric ones."""
    assert case.products
    for seed in range(10):
        seen = random_capture(320 + seed, shape, n=5 if seed % 2 else 40)
        F = dense_fisher(seen)
        Z = rearranged(F, 6, 8)
        kept = torch.linalg.svdvals(on_symmetric(Z))[..., : case.products]
        expected = (torch.linalg.svdvals(Z).square().sum(-1) - kept.square().sum(-1)).sqrt()
        assert_equal((F - estimate(case.make(), seen).dense()).norm(dim=(-2, -1)), expected, 1e-8)


@law(lambda case, shape: case.products is not None)
def law_09_10_no_other_method_of_as_many_products_is_nearer(case: Case, shape: str) -> None:
    """One product: no other Kronecker product. Two: neither KFAC with a correction, nor the best single one."""
    others = (KFAC, TKFAC, TKFACExact) if case.products == 1 else (lambda: KPSVD(**TIGHT), CorrectedKFAC)
    for seed in range(10):
        seen = random_capture(340 + seed, shape, n=5 if seed % 2 else 40)
        F = dense_fisher(seen)
        mine = error(estimate(case.make(), seen).dense(), F)
        assert all(mine <= error(estimate(other(), seen).dense(), F) * (1 + 1e-12) for other in others)


@law(lambda case, shape: case.products is not None)
def law_13_the_products_are_the_leading_singular_triples(case: Case, shape: str) -> None:
    """s, |<u, u'>| and |<v, v'>| against ``linalg.svd`` of the dense rearrangement."""
    seen = random_capture(21, shape)
    U, s, V = torch.linalg.svd(on_symmetric(rearranged(dense_fisher(seen), 6, 8)))
    for i, (R, S) in enumerate(terms(of(case, seen))):
        assert_equal(R.norm(dim=(-2, -1)) * S.norm(dim=(-2, -1)), s[..., i])
        assert_equal(R.norm(dim=(-2, -1)), S.norm(dim=(-2, -1)))
        for found, expected in ((R, U[..., :, i]), (S, V[..., i, :])):
            cosine = (found.flatten(-2) * expected).sum(-1) / found.norm(dim=(-2, -1))
            assert_equal(cosine.abs(), torch.ones_like(cosine))


@law(lambda case, shape: case.products is not None)
def law_13_the_leading_factors_are_positive(case: Case, shape: str) -> None:
    """R and S are PSD with few examples and with many; those of the second product are symmetric."""
    for n in (3, 40):
        (R, S), *rest = terms(of(case, random_capture(22, shape, n=n)))
        for factor in (R, S):
            values = torch.linalg.eigvalsh(factor)
            assert (values >= -1e-12 * values.amax(-1, keepdim=True)).all()
        for factor in (factor for term in rest for factor in term):
            assert_equal(factor.mT, factor)


# Laws of Z, not of a case.


def law_13_products_with_z_are_those_of_the_dense_rearrangement(seen: Capture) -> None:
    """Z(V) and Z^T(U) for symmetric V and U, with and without a product taken off."""
    *groups, out, width = (*seen.a.shape[:-3], seen.g.shape[-1], seen.a.shape[-1])
    V, U, S, R = (_symmetric(*groups, size) for size in (out, width, out, width))
    Z = rearranged(dense_fisher(seen), out, width)
    less = Z - R.flatten(-2).unsqueeze(-1) * S.flatten(-2).unsqueeze(-2)
    mine = Rearrangement(seen)
    for found, dense in ((mine, Z), (mine.minus((R, S)), less)):
        assert_equal((found @ V).flatten(-2), (dense @ V.flatten(-2).unsqueeze(-1)).squeeze(-1))
        assert_equal(found.adjoint(U).flatten(-2), (dense.mT @ U.flatten(-2).unsqueeze(-1)).squeeze(-1))


def law_12_tkfac_is_one_half_step_from_the_identity(shape: str) -> None:
    """P = Z(I) and S = Z^T(I); with ``location`` those of TKFAC without cross terms."""
    seen = random_capture(23, shape)
    for location, tkfac in ((False, TKFACExact()), (True, TKFAC())):
        Z, stats = Rearrangement(seen, location), tkfac.observe(seen)
        assert_equal(Z @ torch.eye(6).expand(*seen.g.shape[:-3], 6, 6), stats["P"].value)
        assert_equal(Z.adjoint(torch.eye(8).expand(*seen.a.shape[:-3], 8, 8)), stats["S"].value)


def _symmetric(*shape: int) -> Tensor:
    X = torch.randn(*shape, shape[-1])
    return X + X.mT
