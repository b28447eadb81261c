"""Woodbury's identity where it is delicate: little damping, single precision, gradients in the span of the examples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.matrix import FactorisationError, LowRank, low_rank
from natgrad.matrix.low_rank import JointInverse
from oracles import SHAPES, assert_equal, dense_fisher, error, random_capture, rounding


def matrix_of(seen: Capture) -> LowRank:
    return LowRank(seen.a, seen.g, torch.as_tensor(seen.count, dtype=seen.a.dtype))


def plus(F: Tensor, damping: Tensor | float) -> Tensor:
    """F + damping I, with a damping of shape (*groups)."""
    return F + torch.as_tensor(damping)[..., None, None] * torch.eye(F.shape[-1])


def solved(matrix: LowRank, damping: Tensor, M: Tensor) -> Tensor:
    """(F + damping I)^-1 M in float64."""
    A = plus(matrix.to(torch.float64).dense(), damping)
    return torch.linalg.solve(A, M.double().flatten(-2)).unflatten(-1, M.shape[-2:])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [1e-1, 1e-2, 1e-12])
@pytest.mark.parametrize("spanned", [True, False], ids=["mean gradient", "any gradient"])
def test_single_precision_loses_no_digit_whatever_the_damping(shape: str, damping: float, spanned: bool) -> None:
    seen = random_capture(0, shape).to(torch.float32)
    matrix = matrix_of(seen)
    M = seen.combine(torch.ones(seen.a.shape[:-2])) / 40 if spanned else torch.randn(matrix.shape).float()
    inverse = matrix.inverse(damping)
    D = inverse @ M
    assert D.dtype == torch.float32
    assert_equal(D.double(), solved(matrix, inverse.damping, M), 2e-7)


def test_the_same_in_single_precision_throughout_is_wrong_in_the_second_digit() -> None:
    seen = random_capture(0).to(torch.float32)
    matrix, U = matrix_of(seen), torch.cat(list(seen.weight_gradients())).flatten(-2)
    M = U.mean(0)
    inverse = matrix.inverse(1e-12)
    damping = float(inverse.damping)
    c = torch.linalg.solve(U @ U.mT + 40 * damping * torch.eye(40, dtype=U.dtype), U @ M)
    naive = (M - U.mT @ c) / damping
    truth = solved(matrix, inverse.damping, M.view(6, 8)).flatten()
    assert error(naive.double(), truth) > 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_law_16_both_forms_agree_on_the_mean_gradient(shape: str) -> None:
    """(M - U^T (K + N damping I)^-1 U M) / damping = U^T (K + N damping I)^-1 1 for M = U^T 1 / N."""
    seen = random_capture(1, shape)
    for damping in (1e-4, 1.0):
        c = torch.linalg.solve(plus(seen.gram(), 40 * damping), torch.ones(*seen.a.shape[:-2]))
        M, A = seen.combine(torch.ones(seen.a.shape[:-2])) / 40, plus(dense_fisher(seen), damping)
        assert_equal(matrix_of(seen).inverse(damping) @ M, seen.combine(c), rounding(A))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 8 * 2**-23), (torch.float64, 1600 * 2**-52)])
def test_damping_below_what_can_be_resolved_is_raised_and_no_other(dtype: torch.dtype, rounding: float) -> None:
    seen = random_capture(2, "grouped").to(dtype)
    matrix = matrix_of(seen)
    mean = matrix.gram().diagonal(dim1=-2, dim2=-1).mean(-1) / 40
    floor = rounding * mean
    assert_equal(matrix.inverse(1e-300).damping, floor, 1e-6)
    enough = 2 * float(floor.max())
    assert torch.equal(matrix.inverse(enough).damping, torch.full((3,), enough))


def test_examples_in_chunks_give_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, M = matrix_of(random_capture(3, "grouped")), torch.randn(2, 3, 6, 8)
    expected = matrix.inverse(0.1) @ M
    monkeypatch.setattr(low_rank, "_CHUNK", 300)
    assert_equal(matrix.inverse(0.1) @ M, expected, 1e-13)


def test_law_23_the_step_is_equivariant_where_examples_outnumber_weights() -> None:
    """Inputs P^-1 a and outputs Q^-1 s give the step Q^-1 D P, up to an error that vanishes like the damping."""
    seen = Capture(torch.randn(200, 1, 8), torch.randn(200, 1, 6), 200.0, 200.0)
    P, Q = (torch.eye(d) + 0.3 * torch.randn(d, d) for d in (8, 6))
    moved = Capture(seen.a @ P.inverse().mT, seen.g @ Q, seen.count, seen.rows)
    M, moved_M = (x.combine(torch.ones(200)) / 200 for x in (seen, moved))
    apart = []
    for damping in (1e-3, 1e-6):
        step, moved_step = matrix_of(seen).inverse(damping) @ M, matrix_of(moved).inverse(damping) @ moved_M
        apart.append(error(Q @ moved_step, step @ P))
    assert apart[0] > 1e-3 and apart[1] < 2e-3 * apart[0], apart


@pytest.mark.parametrize("shape", SHAPES)
def test_many_examples_of_low_rank_can_be_inverted_with_next_to_no_damping(shape: str) -> None:
    for dtype in (torch.float32, torch.float64):
        matrix = matrix_of(random_capture(15, shape, n=500).to(dtype))
        assert torch.isfinite(matrix.inverse(1e-300) @ torch.randn(matrix.shape)).all()


def test_casting_the_inverse_moves_it_and_keeps_its_digits() -> None:
    inverse = matrix_of(random_capture(4)).inverse(0.1)
    cast = inverse.to(torch.bfloat16)
    assert all(torch.equal(value, inverse.tensors()[name]) for name, value in cast.tensors().items())
    assert inverse.to("meta").a.device.type == "meta"


def test_law_17_the_joint_inverse_is_that_of_the_whole_matrix_groups_included() -> None:
    seen = {shape: random_capture(5, shape, n=9) for shape in SHAPES}
    U = torch.cat([_examples_first(capture) for capture in seen.values()], -1)
    A = plus(U.mT @ U / 9, 0.1)
    joint = JointInverse.of({name: matrix_of(capture) for name, capture in seen.items()}, 0.1)
    M = {name: torch.randn(matrix_of(capture).shape) for name, capture in seen.items()}
    D = torch.cat([block.flatten() for block in (joint @ M).values()])
    expected = torch.linalg.solve(A, torch.cat([block.flatten() for block in M.values()]))
    assert_equal(D, expected, rounding(A))


def test_a_joint_inverse_of_one_layer_with_groups_joins_the_groups() -> None:
    seen = random_capture(6, "grouped", n=9)
    U, M = _examples_first(seen), torch.randn(3, 6, 8)
    found, A = JointInverse.of({"0": matrix_of(seen)}, 0.1) @ {"0": M}, plus(U.mT @ U / 9, 0.1)
    assert_equal(found["0"].flatten(), torch.linalg.solve(A, M.flatten()), rounding(A))


def _examples_first(seen: Capture) -> Tensor:
    return torch.cat(list(seen.weight_gradients()), -3).movedim(-3, 0).flatten(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_examples_that_are_not_finite_are_refused(value: float) -> None:
    seen = random_capture(7)
    seen.g[3, 0, 0] = value
    for make in (lambda: matrix_of(seen).inverse(0.1), lambda: JointInverse.of({"0": matrix_of(seen)}, 0.1)):
        with pytest.raises(FactorisationError, match=r"a factor of shape \(40, 40\) is not positive definite"):
            make()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_matrix_is_the_fisher_of_the_examples(shape: str) -> None:
    seen = random_capture(8, shape)
    assert_equal(matrix_of(seen).dense(), dense_fisher(seen))
