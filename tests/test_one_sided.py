"""SNGD, FOOF, NG+ and the unit-wise Fisher by their own formulas, on ordinary, weight-shared and grouped layers."""

from __future__ import annotations

import pytest
import torch

from laws import estimate, gradient
from natgrad import FOOF, KFAC, SNGD, NGPlus, UnitWise
from natgrad.capture import Capture
from natgrad.matrix import OneSided, Ridge
from oracles import SHAPES, assert_equal, dense_fisher, partial_traces, random_capture

every_shape = pytest.mark.parametrize("shape", SHAPES)


def trace(A: torch.Tensor) -> torch.Tensor:
    return A.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


@every_shape
def test_the_step_of_sngd(shape: str) -> None:
    seen = random_capture(1, shape)
    A, M, eye = seen.flat_a.mT @ seen.flat_a / seen.rows, gradient(seen), torch.eye(8)
    for damping in (0.0, 0.3):
        D = estimate(SNGD(1e-3), seen).inverse(damping) @ M
        assert_equal(D @ (A + (1e-3 * trace(A) + damping) * eye), M, 1e-9)
        assert_equal((estimate(FOOF(), seen).inverse(damping) @ M) @ (A + damping * eye), M, 1e-9)


@every_shape
def test_sngd_is_kfac_with_white_output_gradients(shape: str) -> None:
    seen = random_capture(2, shape, n=36)
    g = (seen.count**0.5) * torch.linalg.qr(seen.flat_g).Q.view_as(seen.g)  # G = I
    white = Capture(seen.a, g, seen.count, seen.rows)
    assert_equal(estimate(SNGD(), white).dense(), estimate(KFAC(), white).dense())
    kfac = estimate(KFAC(rule=Ridge()), white).inverse(1e-4).dense()
    assert_equal(estimate(SNGD(1e-4), white).inverse(0.0).dense(), (1 + 6e-4) * kfac)


@every_shape
def test_sngd_does_not_read_the_gradients(shape: str) -> None:
    seen = random_capture(3, shape)
    other = Capture(seen.a, torch.randn_like(seen.g), seen.count, seen.rows)
    assert_equal(estimate(SNGD(), other).dense(), estimate(SNGD(), seen).dense(), 0.0)


@every_shape
@pytest.mark.parametrize(("out", "width"), [(4, 8), (6, 6), (8, 4)])
def test_ng_plus_is_a_partial_trace_of_the_fisher_on_the_smaller_side(shape: str, out: int, width: int) -> None:
    seen = random_capture(4, shape, out=out, width=width)
    P, L = partial_traces(dense_fisher(seen), out, width)
    matrix = estimate(NGPlus(), seen)
    assert isinstance(matrix, OneSided)
    assert matrix.side == ("left" if out <= width else "right")
    assert_equal(matrix.factor, L if out <= width else P)
    M, damped = gradient(seen), matrix.factor + 0.2 * torch.eye(min(out, width))
    D = matrix.inverse(0.2) @ M
    assert_equal(damped @ D if out <= width else D @ damped, M)


@every_shape
def test_unit_wise_is_the_diagonal_blocks_of_the_fisher(shape: str) -> None:
    seen = random_capture(5, shape)
    F = dense_fisher(seen).unflatten(-1, (6, 8)).unflatten(-3, (6, 8))
    mask = torch.eye(6)[:, None, :, None]
    assert_equal(estimate(UnitWise(), seen).dense(), (F * mask).flatten(-2).flatten(-3, -2))


def test_the_relative_ridge_grows_with_the_width() -> None:
    for width in (4, 40):
        A = torch.eye(width)
        assert_equal(OneSided(A, (1, width), eps=0.1).inverse(0.0).factor, A / (1 + 0.1 * width))


@pytest.mark.parametrize("make", [SNGD, UnitWise])
@pytest.mark.parametrize("eps", [-1e-4, float("nan"), float("inf")])
def test_eps_must_be_finite_and_not_negative(make: type[SNGD] | type[UnitWise], eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be a finite number"):
        make(eps)
