"""Whitening and the polar factor: roots against dense powers, directions against the problem that they solve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from natgrad import KFAC
from natgrad.matrix import Dense, Diagonal, Kronecker, Matrix, OneSided, Rows
from natgrad.matrix.whitening import halves, steepest, turned, whitened
from natgrad.optim.geometry import INVERSE, NO_ROOT, ROOT, Frobenius, SpectralDescent
from oracles import assert_equal

DAMPING = 0.1
GROUPS, OUT, IN = 2, 3, 5


def psd(d: int, seed: int) -> Tensor:
    X = torch.randn(GROUPS, d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return X @ X.mT / d


def mean(X: Tensor) -> Tensor:
    return X.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def shifted(X: Tensor) -> Tensor:
    return X + DAMPING * mean(X) * torch.eye(X.shape[-1], dtype=X.dtype)


def kron(G: Tensor, A: Tensor) -> Tensor:
    return torch.stack([torch.kron(g, a) for g, a in zip(G, A, strict=True)])


def polar(M: Tensor, iterations: int | None = 3) -> Tensor:
    """Spectral descent where F is the identity."""
    return steepest(Diagonal(torch.ones_like(M)), M, iterations)[0]


def cases() -> dict[str, tuple[Matrix, Tensor]]:
    """Matrices, and what they are when damped, written out."""
    G, A, rows = psd(OUT, 1), psd(IN, 2), torch.stack([psd(IN, 3 + k) for k in range(OUT)], 1)
    eye = torch.eye(OUT, dtype=G.dtype).expand(GROUPS, -1, -1)
    column = A.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    values = torch.rand(GROUPS, OUT, IN, dtype=torch.float64)
    least = values.mean((-2, -1))[:, None] * DAMPING
    blocks = torch.stack([torch.block_diag(*shifted(rows[k])) for k in range(GROUPS)])
    kronecker = Kronecker(G, A)
    return {
        "kronecker": (kronecker, kron(shifted(G), shifted(A))),
        "diagonal side": (Kronecker(G, column), kron(shifted(G), shifted(torch.diag_embed(column.squeeze(-1))))),
        "spectral": (kronecker.spectral(), kron(shifted(G), shifted(A))),
        "one-sided": (OneSided(A, (OUT, IN)), kron(eye, shifted(A))),
        "left side": (
            OneSided(G, (OUT, IN), "left"),
            kron(shifted(G), torch.eye(IN, dtype=G.dtype).expand(GROUPS, -1, -1)),
        ),
        "rows": (Rows(rows), blocks),
        "diagonal": (Diagonal(values), torch.diag_embed(values.flatten(1) + least)),
    }


@pytest.mark.parametrize("name", cases())
def test_the_metric_is_that_of_the_damped_inverse(name: str) -> None:
    matrix, damped = cases()[name]
    X, Y = torch.randn(2, GROUPS, OUT, IN, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    S = whitened(matrix, DAMPING)
    assert S is not None
    expected = (X.flatten(1) * torch.linalg.solve(damped, Y.flatten(1))).sum()
    assert_equal((halves(S, X)[0] * halves(S, Y)[1]).sum(), expected, 1e-9)


@pytest.mark.parametrize("name", cases())
def test_spectral_descent_is_steepest_in_the_spectral_norm_of_whitened_coordinates(name: str) -> None:
    matrix, damped = cases()[name]
    M = torch.randn(GROUPS, OUT, IN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    geometry = SpectralDescent(DAMPING, iterations=None)
    S, kind = geometry.prepare(KFAC(), matrix, 1.0)
    assert kind == ROOT
    D, T = steepest(S, M, geometry.iterations)
    assert_equal(turned(S, T, M), D, 1e-12)
    for group in range(GROUPS):
        values, Q = torch.linalg.eigh(damped[group])
        root = (Q * values.sqrt()) @ Q.T

        def length(X: Tensor, root: Tensor = root) -> Tensor:
            return torch.linalg.matrix_norm((root @ X.flatten()).view(OUT, IN), ord=2)

        whitened = torch.linalg.solve(root, M[group].flatten()).view(OUT, IN)
        best = torch.linalg.matrix_norm(whitened, ord="nuc")  # the dual norm: no feasible step has more
        assert_equal(length(D[group]), torch.ones(()).double(), 1e-9)
        assert_equal((M[group] * D[group]).sum(), best, 1e-9)
        generator = torch.Generator().manual_seed(group)
        for _ in range(50):
            other = torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
            assert (M[group] * other).sum() / length(other) <= best


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 8), (2, 8, 9)])
def test_three_iterations_bring_singular_values_above_a_fortieth_near_one(shape: tuple[int, ...]) -> None:
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, values, V = torch.linalg.svd(M, full_matrices=False)
    M = U @ torch.diag_embed(torch.logspace(0, -1.6, 8).expand_as(values)) @ V
    found = U.mT @ polar(M) @ V.mT  # diagonal: the singular vectors are those of M
    values = found.diagonal(dim1=-2, dim2=-1)
    assert_equal(torch.diag_embed(values), found, 1e-9)
    assert ((values > 0.65) & (values < 1.25)).all()
    assert_equal(polar(M, None), U @ V, 1e-10)
    assert (U.mT @ polar(M, 2) @ V.mT).diagonal(dim1=-2, dim2=-1).min() < 0.5


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (3, 1, 4)])
def test_the_polar_factor_of_a_vector_is_its_direction(shape: tuple[int, ...]) -> None:
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_equal(polar(M), polar(M, None), 1e-12)


def test_the_polar_factor_of_zero_is_zero() -> None:
    assert not polar(torch.zeros(3, 4)).any()


def test_a_matrix_without_a_root_keeps_its_inverse_under_either_geometry() -> None:
    X = psd(OUT * IN, 4)
    matrix = Dense(X, (OUT, IN))
    assert whitened(matrix, DAMPING) is None
    S, kind = SpectralDescent().prepare(KFAC(), matrix, 1.0)
    inverse, natural = Frobenius().prepare(KFAC(), matrix, 1.0)
    assert (kind, natural) == (NO_ROOT, INVERSE)
    assert_equal(S.dense(), inverse.dense(), 0.0)
    assert SpectralDescent().made(kind) and not Frobenius().made(kind)


def test_the_unit_of_a_matrix_changes_its_direction_by_a_number_alone() -> None:
    matrix, M = Kronecker(psd(OUT, 1), psd(IN, 2)), torch.randn(GROUPS, OUT, IN, dtype=torch.float64)
    larger = Kronecker(1e6 * matrix.left, 1e-3 * matrix.right)
    S, T = whitened(matrix, DAMPING), whitened(larger, DAMPING)
    assert S is not None and T is not None
    assert_equal(steepest(T, 1e4 * M)[0] * 1e3**0.5, steepest(S, M)[0], 1e-10)


@pytest.mark.parametrize("wrong", [{"damping": 0.0}, {"damping": float("inf")}, {"iterations": 0}, {"every": 0}])
def test_settings_outside_their_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SpectralDescent(**wrong)  # type: ignore[arg-type]
