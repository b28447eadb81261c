"""Block-tridiagonal KFAC against dense matrices in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from coupled import (
    NETWORKS,
    convolutions,
    dense_joint_fisher,
    dense_map,
    flat,
    gradients,
    map_of,
    parts_of,
    perceptron,
    seen_by,
    sequences,
)
from natgrad import KFAC, BlockTridiagonal
from natgrad.capture import Capture
from natgrad.fishers import pool
from natgrad.matrix import FactorisationError, Kronecker
from oracles import assert_equal, damped, error

LAYERS = ("0", "2", "4")


def observed() -> tuple[dict[str, list[Capture]], dict[str, Tensor]]:
    model, x = perceptron()
    seen = seen_by(model, x[:12], x[12:])
    return seen, gradients(seen)


def cross_block(seen: Any, i: str, j: str) -> Tensor:
    """G_ij kron A_ij by a loop over the examples."""
    a, b, g, h = (
        torch.cat(parts)
        for parts in zip(
            *(
                (one.flat_a, other.flat_a, one.flat_g, other.flat_g)
                for one, other in zip(seen[i], seen[j], strict=True)
            ),
            strict=True,
        )
    )
    A = torch.stack([torch.outer(x, y) for x, y in zip(a, b, strict=True)]).mean(0)
    G = torch.stack([torch.outer(x, y) for x, y in zip(g, h, strict=True)]).mean(0)
    return torch.kron(G, A)


def split(T: Tensor, M: dict[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    sizes = [block.numel() for block in M.values()]
    rows = dict(zip(M, T.split(sizes), strict=True))
    return {(i, j): block for i, row in rows.items() for j, block in zip(M, row.split(sizes, -1), strict=True)}


@pytest.mark.parametrize("damping", [1e-3, 0.1, 3.0])
def test_the_three_diagonals_are_those_of_kfac_and_the_inverse_is_block_tridiagonal(damping: float) -> None:
    """The defining property: F_ii damped as in KFAC, F_ij = G_ij kron A_ij for neighbours, no (1, 3) block inverted."""
    seen, M = observed()
    T = dense_map(map_of(BlockTridiagonal(), seen, damping), M)
    assert_equal(T, T.mT)
    inverse, F = split(T, M), split(torch.linalg.inv(T), M)
    assert inverse["0", "4"].norm() < 1e-10 * T.norm()
    assert F["0", "4"].norm() > 1e-3 * F["0", "2"].norm()
    for name in LAYERS:
        block = KFAC().assemble(pool(KFAC().observe(c) for c in seen[name]))
        assert_equal(F[name, name], damped(block, damping), 1e-8)
    for i, j in pairwise(LAYERS):
        assert_equal(F[i, j], cross_block(seen, i, j), 1e-8)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("damping", [1e-4, 0.1])
def test_the_map_is_symmetric_positive_definite(network: Any, damping: float) -> None:
    model, x = network()
    seen = seen_by(model, x)
    T = dense_map(map_of(BlockTridiagonal(), seen, damping), gradients(seen))
    assert_equal(T, T.mT)
    assert torch.linalg.eigvalsh(T).min() > 0


def test_the_conditional_block_is_the_inverse_of_the_schur_complement() -> None:
    """Sigma_i = F_ii - F_ij F_jj^-1 F_ji, and Psi_i = F_ij F_jj^-1, with damped diagonal blocks."""
    seen, M = observed()
    parts = parts_of(BlockTridiagonal(), seen, 0.1)
    blocks = {name: damped(KFAC().assemble(pool(map(KFAC().observe, seen[name]))), 0.1) for name in LAYERS}
    F_ij = cross_block(seen, "0", "2")
    link: Any = parts["0"].inverse
    expected = torch.linalg.inv(blocks["0"] - F_ij @ torch.linalg.solve(blocks["2"], F_ij.mT))
    assert_equal(link.dense(), expected, 1e-9)
    assert_equal((link @ M["0"]).flatten(), expected @ M["0"].flatten(), 1e-9)
    psi = F_ij @ torch.linalg.inv(blocks["2"])
    assert_equal(link.psi(M["2"]).flatten(), psi @ M["2"].flatten(), 1e-9)
    assert_equal(link.psi_transposed(M["0"]).flatten(), psi.mT @ M["0"].flatten(), 1e-9)


def test_it_is_nearer_to_the_fisher_than_kfac_on_the_diagonals_it_adds() -> None:
    """Not a law, but true here: the blocks beside the diagonal are better than none."""
    seen, M = observed()
    F = split(dense_joint_fisher(seen), M)
    mine = split(torch.linalg.inv(dense_map(map_of(BlockTridiagonal(), seen, 1e-4), M)), M)
    for i, j in pairwise(LAYERS):
        assert error(mine[i, j], F[i, j]) < 0.9


@pytest.mark.parametrize("network", [convolutions, sequences])
def test_layers_that_are_not_joined_are_those_of_kfac(network: Any) -> None:
    """Convolutions, in groups or not, and sequences."""
    model, x = network()
    seen = seen_by(model, x)
    M = gradients(seen)
    found = map_of(BlockTridiagonal(), seen, 0.1) @ M
    for name, (capture,) in seen.items():
        assert_equal(found[name], KFAC().assemble(KFAC().observe(capture)).inverse(0.1) @ M[name])


def test_neighbours_that_saw_other_examples_are_not_joined() -> None:
    seen, M = observed()
    seen["4"] = seen["4"][:1]
    inverse = split(dense_map(map_of(BlockTridiagonal(), seen, 0.1), M), M)
    assert inverse["0", "2"].norm() > 1e-3
    assert inverse["2", "4"].norm() == 0


def test_layers_around_one_that_was_not_reached_are_not_joined() -> None:
    seen, M = observed()
    seen["2"] = []
    found = map_of(BlockTridiagonal(), seen, 0.1) @ {name: M[name] for name in ("0", "4")}
    for name, D in found.items():
        stats = pool(KFAC().observe(capture) for capture in seen[name])
        assert_equal(D, KFAC().assemble(stats).inverse(0.1) @ M[name])


def test_a_layer_that_m_lacks_counts_as_one_of_gradient_zero() -> None:
    seen, M = observed()
    joint = map_of(BlockTridiagonal(), seen, 0.1)
    for lacking in LAYERS:
        fewer = {name: block for name, block in M.items() if name != lacking}
        found, expected = joint @ fewer, joint @ {**M, lacking: torch.zeros_like(M[lacking])}
        assert list(found) == list(fewer)
        assert all(torch.equal(found[name], expected[name]) for name in fewer)
    assert joint @ {} == {}


def test_law_26_the_same_map_whole_or_in_parts() -> None:
    model, x = perceptron()
    whole, parts = seen_by(model, x), seen_by(model, x[:3], x[3:14], x[14:])
    M = gradients(whole)
    found, expected = (flat(map_of(BlockTridiagonal(), seen, 0.1) @ M) for seen in (parts, whole))
    assert_equal(found, expected)


def test_law_22_large_damping_is_plain_gradient_descent() -> None:
    seen, M = observed()
    assert_equal(1e12 * flat(map_of(BlockTridiagonal(), seen, 1e12) @ M), flat(M), 1e-4)


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_link_that_is_seen_at_some_observations_alone_stays_positive_definite(order: tuple[int, int]) -> None:
    """Its covariance then counts as zero, whichever observation came first; without damping of any weight."""
    model, x = perceptron()
    approximation = BlockTridiagonal()
    linked = seen_by(model, x[:10])
    unlinked = {**seen_by(model, x[10:]), "2": []}
    first, second = (approximation.observe_together((linked, unlinked)[number - 1])["0"] for number in order)
    merged = approximation.merge(approximation.merge(None, first, 0.0), second, 0.8)
    share = 0.8 if order == (1, 2) else 0.2
    seen_together = approximation.observe_together(linked)["0"]
    assert_equal(merged["A_cross"].value, share * seen_together["A_cross"].value)
    assert_equal(merged["A_next"].value, seen_together["A_next"].value)
    link = approximation.assemble(merged).inverse(1e-6)
    assert (link.values > 0).all()


def test_float32_is_close_to_float64() -> None:
    seen, M = observed()
    single = {name: [c.to(torch.float32) for c in captures] for name, captures in seen.items()}
    found = map_of(BlockTridiagonal(), single, 0.1) @ {name: block.float() for name, block in M.items()}
    assert all(block.dtype == torch.float32 for block in found.values())
    assert_equal(flat(found).double(), flat(map_of(BlockTridiagonal(), seen, 0.1) @ M), 1e-4)


def test_a_layer_that_the_next_one_determines_needs_damping() -> None:
    """The same layer twice: Sigma = 0."""
    seen, _ = observed()
    with pytest.raises(FactorisationError, match="singular given the next"):
        parts_of(BlockTridiagonal(), {"a": seen["2"], "b": seen["2"]}, 0.0)
    assert (parts_of(BlockTridiagonal(), {"a": seen["2"], "b": seen["2"]}, 0.1)["a"].inverse.dense()).isfinite().all()


def test_the_matrix_of_a_layer_is_that_of_kfac() -> None:
    seen, _ = observed()
    stats = BlockTridiagonal().observe_together(seen)["0"]
    matrix = BlockTridiagonal().assemble(stats)
    assert_equal(matrix.dense(), Kronecker(stats["G"].value, stats["A"].value).dense())
