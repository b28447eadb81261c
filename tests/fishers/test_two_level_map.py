"""The map of a two-level method: laws 2, 22 and 26, the guard, parts of a network, precisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from coupled import (
    NETWORKS,
    convolutions,
    dense_map,
    dense_operator,
    fine_step,
    flat,
    gradients,
    like,
    map_of,
    parts_of,
    perceptron,
    rows_of,
    seen_by,
    sequences,
    two_batches,
)
from natgrad import (
    EKFAC,
    KFAC,
    TEKFAC,
    TKFAC,
    Approximation,
    KrylovNicolaides,
    KrylovResidual,
    Nicolaides,
    ResidualSpace,
    SpectralSpace,
    TwoLevel,
)
from natgrad.capture import Capture
from natgrad.fishers import CoarseSpace, as_capture
from natgrad.fishers.coarse.galerkin import TwoLevelMap
from natgrad.matrix import Kronecker, Matrix, Tikhonov
from oracles import assert_equal, error, random_capture

DAMPING = 0.1
SPACES: list[CoarseSpace] = [Nicolaides(), SpectralSpace(), KrylovNicolaides(), ResidualSpace(), KrylovResidual()]
FIXED = [space for space in SPACES if not space.moves]
BASES: dict[str, Callable[[], Approximation]] = {
    "KFAC": KFAC,
    "KFAC-Tikhonov": lambda: KFAC(Tikhonov()),
    "EKFAC": EKFAC,
    "TKFAC": TKFAC,
    "TEKFAC": TEKFAC,
}
every_network = pytest.mark.parametrize("network", NETWORKS)
every_space = pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
every_fixed_space = pytest.mark.parametrize("space", FIXED, ids=lambda space: type(space).__name__)
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


# Symmetry, positivity, limits.


@every_network
@every_fixed_space
def test_law_02_additive_and_balanced_maps_are_symmetric_positive_definite(network: Any, space: CoarseSpace) -> None:
    seen = two_batches(network)
    M = gradients(seen)
    for form in ("additive", "balanced"):
        T = dense_map(map_of(TwoLevel(KFAC(), space, form), seen, DAMPING), M)
        assert_equal(T, T.mT)
        assert torch.linalg.eigvalsh(T).min() > 0


@every_network
def test_law_02_the_residual_map_is_not_symmetric(network: Any) -> None:
    seen = two_batches(network)
    T = dense_map(map_of(TwoLevel(form="residual"), seen, DAMPING), gradients(seen))
    assert error(T, T.mT) > 1e-3


@dataclass(frozen=True)
class Overlong(KFAC):
    """A thousandth of KFAC's matrix: fine steps far too long."""

    def assemble(self, stats: Any, previous: Matrix | None = None) -> Kronecker:
        matrix = super().assemble(stats)
        return Kronecker(matrix.left / 1000, matrix.right, matrix.rule)


def test_a_step_that_would_not_descend_is_replaced_by_the_fine_one() -> None:
    """Along the lowest eigenvector of the symmetric part of the residual map, which is not positive."""
    seen = two_batches(perceptron)
    approximation = TwoLevel(Overlong(), Nicolaides(), "residual")
    parts, M, B = parts_of(approximation, seen, 1e-3), gradients(seen), dense_operator(seen, 1e-3)
    fine = torch.block_diag(*(part.inverse.dense() for part in parts.values()))
    R0 = rows_of(Nicolaides(), parts, M)
    C = R0.mT @ torch.linalg.solve(R0 @ B @ R0.mT, R0)
    T = fine + C @ (torch.eye(len(B)) - B @ fine)
    values, vectors = torch.linalg.eigh((T + T.mT) / 2)
    assert values[0] < 0 < values[-1]
    joint = approximation.couple(parts)
    assert_equal(flat(joint @ like(vectors[:, 0], M)), fine @ vectors[:, 0])
    assert_equal(flat(joint @ like(vectors[:, -1], M)), T @ vectors[:, -1])


def test_a_coarse_matrix_that_is_singular_leaves_the_fine_step() -> None:
    seen = {name: [Capture(c.a, 0 * c.g, c.count, c.rows) for c in cs] for name, cs in two_batches(perceptron).items()}
    M, parts = gradients(seen), parts_of(TwoLevel(form="residual"), seen, DAMPING)
    undamped = {name: replace(part, damping=0.0) for name, part in parts.items()}
    found = flat(TwoLevel(form="residual").couple(undamped) @ M)
    assert torch.isfinite(found).all()
    assert_equal(found, fine_step(parts, M))


@every_space
def test_law_22_large_damping_is_plain_gradient_descent(space: CoarseSpace) -> None:
    """And M + its coarse projection in the additive form, which is why that one has a scale of its own."""
    seen = two_batches(perceptron)
    M = gradients(seen)
    for damping, bound in ((1e8, 1e-2), (1e12, 1e-4)):
        for form in ("residual", "balanced"):
            approximation = TwoLevel(KFAC(), space, form)
            assert_equal(damping * flat(map_of(approximation, seen, damping) @ M), flat(M), bound)
    if not space.moves:
        parts = parts_of(TwoLevel(KFAC(), space, "additive"), seen, 1e12)
        Q = torch.linalg.qr(rows_of(space, parts, M).mT).Q
        limit = flat(M) + Q @ Q.mT @ flat(M)
        assert_equal(1e12 * flat(TwoLevel(KFAC(), space, "additive").couple(parts) @ M), limit, 1e-3)


# Parts of a network, other precisions.


@every_space
@pytest.mark.parametrize("form", ["residual", "additive", "balanced"])
def test_layers_that_m_lacks_are_as_if_the_network_had_not_had_them(space: CoarseSpace, form: Any) -> None:
    seen = two_batches(convolutions)
    approximation = TwoLevel(KFAC(), space, form)
    joint, M = map_of(approximation, seen, DAMPING), gradients(seen)
    fewer = {name: M[name] for name in ("0", "5")}
    alone = map_of(approximation, {name: seen[name] for name in fewer}, DAMPING)
    found = joint @ fewer
    assert list(found) == list(fewer)
    assert_equal(flat(found), flat(alone @ fewer))
    assert joint @ {} == {}


def test_the_fixed_coarse_matrix_is_made_once() -> None:
    joint = map_of(TwoLevel(form="residual"), two_batches(perceptron), DAMPING)
    assert isinstance(joint, TwoLevelMap)
    assert joint._fixed is joint._fixed


@every_space
def test_float32_is_close_to_float64_and_blocks_keep_their_dtype(space: CoarseSpace) -> None:
    # rounding turns an eigenvector by u |X| / gap: up to 2e4 u of the smallest in convolutions, 2e2 u in the perceptron
    seen = two_batches(perceptron if isinstance(space, SpectralSpace) else convolutions)
    M = gradients(seen)
    single = {name: [c.to(torch.float32) for c in captures] for name, captures in seen.items()}
    expected = flat(map_of(TwoLevel(KFAC(), space, "residual"), seen, 1.0) @ M)
    joint = map_of(TwoLevel(KFAC(), space, "residual"), single, 1.0)
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        found = joint @ {name: block.to(dtype) for name, block in M.items()}
        assert all(block.dtype == dtype for block in found.values())
        assert_equal(flat(found).double(), expected, bound)


@every_space
def test_law_26_the_same_map_whole_or_in_parts_and_with_padding(space: CoarseSpace) -> None:
    model, x = sequences()
    whole, parts = seen_by(model, x), seen_by(model, x[:3], x[3:14], x[14:])
    padded = {}
    for name, (seen,) in whole.items():
        a, g = (torch.cat([y, torch.zeros_like(y)], -2) for y in (seen.a, seen.g))
        padded[name] = [Capture(a, g, seen.count, seen.rows)]
    M = gradients(whole)
    expected = flat(map_of(TwoLevel(KFAC(), space, "residual"), whole, DAMPING) @ M)
    for split in (parts, padded):
        assert_equal(flat(map_of(TwoLevel(KFAC(), space, "residual"), split, DAMPING) @ M), expected)


def test_examples_are_replaced_and_the_base_averages_its_own() -> None:
    approximation = TwoLevel(EKFAC(), form="residual")
    first, second = random_capture(1), random_capture(2)
    old = approximation.merge(None, approximation.observe(first), 0.0)
    merged = approximation.merge(old, approximation.observe(second), 0.9)
    assert torch.equal(as_capture(merged).a, second.a)
    expected = 0.9 * KFAC().observe(first)["A"].value + 0.1 * KFAC().observe(second)["A"].value
    assert_equal(merged["fine.A"].value, expected)
