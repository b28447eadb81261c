"""Matrices with a diagonal side, kept as a column, are their dense twins in everything that they do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from laws import estimate
from natgrad import (
    EKFAC,
    KFAC,
    KPSVD,
    SNGD,
    TEKFAC,
    TKFAC,
    Approximation,
    BlockTridiagonal,
    Deflated,
    Diagonal,
    EigenCorrected,
    ExactFisher,
    JointFisher,
    JointWoodbury,
    NGPlus,
    TENGraD,
    TKFACExact,
    TwoLevel,
    UnitWise,
    Woodbury,
)
from natgrad.capture import Capture
from natgrad.fishers import for_layer
from natgrad.matrix import Factored, FactorisationError, Kronecker, OneSided, Relative, Ridge, Spectral, Tikhonov, Unit
from natgrad.matrix.damping import KroneckerRule
from natgrad.matrix.factor import full
from oracles import assert_equal, damped, dense_fisher, random_capture, rounding

OUT, IN = 6, 8
SIDES = {"right": (False, True), "left": (True, False), "both": (True, True)}
every_side = pytest.mark.parametrize("diagonal", SIDES.values(), ids=SIDES.keys())
RULES = (Factored(), Unit(), Ridge(), Tikhonov(), Relative(), Relative(Factored()))


def factors(diagonal: tuple[bool, bool], groups: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = []
    for d, alone in zip((OUT, IN), diagonal, strict=True):
        X = torch.randn(*groups, d, 2 * d, generator=generator, dtype=torch.float64)
        X = X @ X.mT
        pair.append(X.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) if alone else X)
    return pair[0], pair[1]


@every_side
@pytest.mark.parametrize("groups", [(), (3,)])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_kronecker_product_with_a_diagonal_side(
    diagonal: tuple[bool, bool], groups: tuple[int, ...], rule: KroneckerRule
) -> None:
    left, right = factors(diagonal, groups)
    matrix, twin = Kronecker(left, right, rule), Kronecker(full(left), full(right), rule)
    assert matrix.shape == twin.shape == (*groups, OUT, IN)
    assert_equal(matrix.dense(), twin.dense())
    assert_equal(matrix.trace(), twin.trace())
    assert_equal(matrix.spectral().dense(), twin.dense())
    M = torch.randn(2, *matrix.shape)
    assert_equal(matrix @ M, twin @ M)
    for damping in (1e-3, 0.3, 20.0):
        inverse, expected, A = matrix.inverse(damping), twin.inverse(damping), damped(twin, damping)
        assert_equal(inverse @ M, expected @ M, rounding(A))
        assert_equal(inverse.dense(), expected.dense(), rounding(A))
        assert_equal(inverse.dense() @ A, torch.eye(OUT * IN).expand_as(A), rounding(A))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_one_sided_matrix_with_a_diagonal_factor(side: str) -> None:
    left, right = factors((True, True))
    factor = left if side == "left" else right
    matrix = OneSided(factor, (OUT, IN), side, eps=1e-2)  # type: ignore[arg-type]
    twin = OneSided(full(factor), (OUT, IN), side, eps=1e-2)  # type: ignore[arg-type]
    M = torch.randn(2, OUT, IN)
    assert_equal(matrix @ M, twin @ M)
    assert_equal(matrix.trace(), twin.trace())
    assert_equal(matrix.dense(), twin.dense())
    assert_equal(matrix.inverse(0.1).dense(), twin.inverse(0.1).dense())
    assert_equal(matrix.spectral().dense(), twin.dense())


@every_side
def test_a_spectral_matrix_with_the_identity_as_a_basis(diagonal: tuple[bool, bool]) -> None:
    spectrum = Kronecker(*factors(diagonal)).spectral()
    twin = Spectral(full(spectrum.left), full(spectrum.right), spectrum.values)
    for mine, other in ((spectrum, twin), (spectrum.power(-0.5, 0.1), twin.power(-0.5, 0.1))):
        M = torch.randn(OUT, IN)
        assert_equal(mine @ M, other @ M)
        assert_equal(mine.dense(), other.dense())
    found, expected = (x.sample(3, torch.Generator().manual_seed(1)) for x in (spectrum, twin))
    assert_equal(found, expected)


def test_a_diagonal_side_that_cannot_be_inverted_fails_loudly() -> None:
    left, right = factors((False, True))
    never = right.clone()
    never[2] = 0
    assert torch.isfinite(Kronecker(left, never).inverse(1e-3).dense()).all()
    for bad, damping in ((never, 0.0), (right * float("nan"), 1.0), (right * float("inf"), 1.0)):
        for rule in (Factored(), Tikhonov()):
            with pytest.raises(FactorisationError):
                Kronecker(left, bad, rule).inverse(damping)


# What the approximations make of a capture with a diagonal side.


def flagged(seen: Capture, diagonal: tuple[bool, bool]) -> Capture:
    return Capture(seen.a, seen.g, seen.count, seen.rows, diagonal=diagonal)


@every_side
@pytest.mark.parametrize("shape", ["unshared", "shared", "grouped"])
@pytest.mark.parametrize("make", [KFAC, TKFAC, SNGD])
def test_the_diagonal_of_a_factor_is_all_that_is_kept(make: type, shape: str, diagonal: tuple[bool, bool]) -> None:
    seen = random_capture(1, shape)
    found, whole = (estimate(for_layer(make(), "wide"), x) for x in (flagged(seen, diagonal), seen))
    if isinstance(whole, OneSided):
        factor = torch.diag_embed(whole.factor.diagonal(dim1=-2, dim2=-1)) if diagonal[1] else whole.factor
        assert_equal(found.dense(), OneSided(factor, whole.block, eps=whole.eps).dense())
        return
    assert isinstance(whole, Kronecker)
    pair = [
        torch.diag_embed(X.diagonal(dim1=-2, dim2=-1)) if alone else X
        for X, alone in zip((whole.left, whole.right), diagonal, strict=True)
    ]
    assert_equal(found.dense(), Kronecker(pair[0], pair[1]).dense())
    assert_equal(found.trace(), whole.trace())


@every_side
@pytest.mark.parametrize("shape", ["unshared", "shared", "grouped"])
@pytest.mark.parametrize("make", [EKFAC, TEKFAC])
def test_measured_eigenvalues_of_a_diagonal_side(make: type, shape: str, diagonal: tuple[bool, bool]) -> None:
    seen = flagged(random_capture(2, shape), diagonal)
    approximation = replace(make(), carry="rotate")
    matrix = estimate(approximation, seen)
    assert isinstance(matrix, Spectral)
    Q = torch.einsum("...op,...ij->...oipj", full(matrix.left), full(matrix.right)).flatten(-2).flatten(-3, -2)
    F = dense_fisher(seen)
    assert_equal(matrix.values.flatten(-2), (Q.mT @ F @ Q).diagonal(dim1=-2, dim2=-1))
    assert_equal(matrix.trace(), F.diagonal(dim1=-2, dim2=-1).sum(-1))
    other = flagged(random_capture(3, shape), diagonal)
    stats = approximation.merge(None, approximation.observe(other), 0.0)
    carried = approximation.assemble(stats, matrix)
    Q = torch.einsum("...op,...ij->...oipj", full(carried.left), full(carried.right)).flatten(-2).flatten(-3, -2)
    assert_equal(carried.values.flatten(-2), (Q.mT @ matrix.dense() @ Q).diagonal(dim1=-2, dim2=-1))


def test_what_stands_in_where_there_is_no_diagonal_side() -> None:
    everywhere: dict[Approximation, tuple[Approximation, Approximation, Approximation]] = {
        KFAC(Unit()): (KFAC(Unit()), KFAC(Unit()), TKFAC(Unit())),
        TKFAC(): (TKFAC(), TKFAC(), TKFAC()),
        TKFACExact(): (TKFAC(), TKFAC(), TKFAC()),
        EKFAC(): (EKFAC(), EKFAC(), EigenCorrected(TKFAC(Factored()))),
        EigenCorrected(KPSVD()): (EKFAC(), EKFAC(), EigenCorrected(TKFAC(Factored()))),
        SNGD(): (SNGD(), SNGD(), TKFAC(Factored())),
        Diagonal(): (Diagonal(), Diagonal(), Diagonal()),
        ExactFisher(): (ExactFisher(), ExactFisher(), ExactFisher()),
        JointFisher(): (JointFisher(), JointFisher(), JointFisher()),
        UnitWise(): (Diagonal(), Diagonal(), Diagonal()),
        Woodbury(): (Woodbury(), KFAC(), TKFAC(Factored())),
        JointWoodbury(): (JointWoodbury(), KFAC(), TKFAC(Factored())),
        TENGraD(): (TENGraD(), KFAC(), TKFAC(Factored())),
        NGPlus(): (NGPlus(), KFAC(), TKFAC(Factored())),
        KPSVD(Unit()): (KFAC(Unit()), KFAC(Unit()), TKFAC(Unit())),
        Deflated(): (KFAC(), KFAC(), TKFAC(Factored())),
        BlockTridiagonal(): (KFAC(), KFAC(), TKFAC(Factored())),
        TwoLevel(base=EKFAC()): (EKFAC(), EKFAC(), EigenCorrected(TKFAC(Factored()))),
    }
    for approximation, expected in everywhere.items():
        assert for_layer(approximation, "plain") is approximation
        assert for_layer(approximation, "wide") == expected[0]
        assert for_layer(approximation, "tokens") == expected[1]
        assert for_layer(approximation, "mixed") == expected[2]
