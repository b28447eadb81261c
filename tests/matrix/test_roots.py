"""Matrix roots: against eigh, against each other's definition, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from natgrad.matrix import (
    Dense,
    Diagonal,
    Factored,
    FactorisationError,
    Kronecker,
    Matrix,
    Nystrom,
    OneSided,
    Ridge,
    Root,
    Rows,
    Spectral,
    Tikhonov,
    Unit,
    denman_beavers,
    eigh_root,
    inverse_roots,
    newton_schulz,
)
from oracles import assert_equal, error

ITERATED = (denman_beavers, newton_schulz)
FULL_RANK = (eigh_root, *ITERATED, Nystrom(8))


def named(root: object) -> str:
    """A function by its name alone, which is the same in every process."""
    return getattr(root, "__name__", str(root))


every_root = pytest.mark.parametrize("root", FULL_RANK, ids=named)


def with_condition(condition: float, *batch: int, size: int = 8) -> Tensor:
    """Symmetric matrices with eigenvalues from 3 down to 3 / condition."""
    Q = torch.linalg.qr(torch.randn(*batch, size, size)).Q
    return (Q * (3 * condition ** -torch.linspace(0, 1, size))) @ Q.mT


def by_eigenvalues(X: Tensor, exponent: float) -> Tensor:
    values, Q = torch.linalg.eigh(X)
    return (Q * values.unsqueeze(-2) ** exponent) @ Q.mT


@every_root
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("condition", "tolerance"), [(10.0, 1e-13), (1e4, 1e-11)])
def test_both_roots_are_those_by_eigenvalues(
    root: Root, batch: tuple[int, ...], condition: float, tolerance: float
) -> None:
    X = with_condition(condition, *batch)
    if isinstance(root, Nystrom):
        tolerance = 1e-14 * condition  # its sketch resolves eigenvalues to the rounding of the largest one
    half, inverse = root(X, torch.full(batch, 1e-9))
    expected = X + 1e-9 * torch.eye(8)
    assert_equal(half, by_eigenvalues(expected, 0.5), tolerance)
    assert_equal(inverse, by_eigenvalues(expected, -0.5), tolerance)
    assert_equal(inverse @ half, torch.eye(8).expand_as(X), tolerance)


@every_root
def test_a_shift_of_its_own_for_each_matrix_of_a_batch(root: Root) -> None:
    X, shift = with_condition(1e8, 3), torch.tensor([0.1, 1.0, 10.0])
    half, _ = root(X, shift)
    assert_equal(half @ half, X + shift[:, None, None] * torch.eye(8), 1e-12)


@every_root
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_roots_scale(root: Root, size: float) -> None:
    X = with_condition(100.0)
    assert_equal(root(size * X, size * 0.1)[0], size**0.5 * root(X, 0.1)[0], 1e-12)


@every_root
def test_float32(root: Root) -> None:
    X = with_condition(100.0)
    found = root(X.float(), 0.01)[1]
    assert found.dtype == torch.float32
    assert_equal(found.double(), root(X, 0.01)[1], 1e-4)


@every_root
@pytest.mark.parametrize("broken", ["indefinite", "nan", "infinite"])
def test_what_has_no_root_is_refused(root: Root, broken: str) -> None:
    X = with_condition(10.0)
    X = X - 2 * torch.eye(8) if broken == "indefinite" else X * {"nan": float("nan"), "infinite": float("inf")}[broken]
    with pytest.raises(FactorisationError):
        root(X, 0.0)


@pytest.mark.parametrize("root", [eigh_root, Nystrom(3), Nystrom(8)], ids=named)
def test_a_singular_matrix_needs_a_shift(root: Root) -> None:
    X = torch.zeros(8, 8)
    with pytest.raises(FactorisationError):
        root(X, 0.0)
    assert_equal(root(X, 4.0)[1], torch.eye(8) / 2)


# Nystrom.


def test_nystrom_is_exact_for_matrices_of_its_rank() -> None:
    U = torch.randn(20, 4)
    X = U @ U.mT
    for mine, exact in zip(Nystrom(4)(X, 0.1), eigh_root(X, 0.1), strict=True):
        assert_equal(mine, exact, 1e-10)
    assert error(Nystrom(3)(X, 0.1)[0], eigh_root(X, 0.1)[0]) > 0.01


def test_nystrom_comes_nearer_with_the_rank_and_keeps_both_roots_inverse() -> None:
    X, eye = with_condition(1e6, size=30), torch.eye(30)
    errors = []
    for rank in (2, 5, 10, 20, 30):
        half, inverse = Nystrom(rank)(X, 1e-3)
        assert_equal(half @ inverse, eye, 1e-12)
        errors.append(error(half, eigh_root(X, 1e-3)[0]))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10 < 1e-3 < errors[0]


@pytest.mark.parametrize("rank", [0, -1, 2.0])
def test_the_rank_must_be_a_whole_number(rank: int) -> None:
    with pytest.raises(ValueError, match="rank must be"):
        Nystrom(rank)


# Roots of structured matrices.


def psd(*shape: int) -> Tensor:
    X = torch.randn(*shape, 3 * shape[-1])
    return X @ X.mT / X.shape[-1]


STRUCTURED: dict[str, Callable[..., Matrix]] = {
    "right": lambda *groups: OneSided(psd(*groups, 5), (4, 5), eps=0.1),
    "left": lambda *groups: OneSided(psd(*groups, 4), (4, 5), "left", eps=0.1),
    "rows": lambda *groups: Rows(psd(*groups, 4, 5), eps=0.1),
    "diagonal": lambda *groups: Diagonal(torch.rand(*groups, 4, 5)),
    "spectral": lambda *groups: Kronecker(psd(*groups, 4), psd(*groups, 5)).spectral(),
    "kronecker": lambda *groups: Kronecker(psd(*groups, 4), psd(*groups, 5), Factored()),
    "kronecker-unit": lambda *groups: Kronecker(psd(*groups, 4), psd(*groups, 5), Unit()),
    "kronecker-ridge": lambda *groups: Kronecker(psd(*groups, 4), psd(*groups, 5), Ridge()),
    "kronecker-tikhonov": lambda *groups: Kronecker(psd(*groups, 4), psd(*groups, 5), Tikhonov()),
}


@pytest.mark.parametrize("make", STRUCTURED.values(), ids=STRUCTURED.keys())
@pytest.mark.parametrize("groups", [(), (3,)])
@pytest.mark.parametrize("root", [eigh_root, *ITERATED], ids=named)
def test_the_root_of_a_matrix_squared_is_its_damped_inverse(
    make: Callable[..., Matrix], groups: tuple[int, ...], root: Root
) -> None:
    matrix, eye = make(*groups), torch.eye(20)
    S, inverse = inverse_roots(matrix, 0.3, root)
    dense = S.dense()
    assert_equal(dense, dense.mT)
    assert_equal(dense @ dense, matrix.inverse(0.3).dense())
    assert_equal(dense @ inverse.dense(), eye.expand_as(dense))


def test_a_matrix_without_structure_has_none() -> None:
    with pytest.raises(ValueError, match="no square root for a Dense"):
        inverse_roots(Dense(torch.eye(6), (2, 3)), 0.1)
    assert isinstance(inverse_roots(STRUCTURED["kronecker-tikhonov"](), 0.1)[0], Spectral)
