"""Tselepidis' coarse level: law 21, averages over time, layers that some steps do not reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import natgrad
from coupled import (
    dense_map,
    flat,
    gradients,
    map_of,
    parts_of,
    perceptron,
    seen_by,
    sequences,
    two_batches,
)
from natgrad import (
    KFAC,
    Tselepidis,
    TwoLevel,
)
from natgrad.capture import Capture
from natgrad.fishers import Part
from natgrad.fishers.coarse.tselepidis import ConstantsMap
from natgrad.matrix import Tikhonov
from oracles import assert_equal

DAMPING = 0.1


def tselepidis(omega: float = 1.0) -> TwoLevel:
    return TwoLevel(KFAC(Tikhonov()), Tselepidis(), "additive", omega)


def coarse_of(joint: Any) -> Tensor:
    assert isinstance(joint, ConstantsMap)
    return joint.coarse


@pytest.mark.parametrize("network", [perceptron, sequences])
def test_law_21_the_coarse_matrix_is_the_product_of_two_pair_sums(network: Any) -> None:
    """sum of the entries of E[a_i a_j^T] times that of E[g_i g_j^T], + damping I; positive semi-definite."""
    model, x = network()
    seen = seen_by(model, x)
    found = coarse_of(map_of(tselepidis(), seen, DAMPING))
    captures = [c for (c,) in seen.values()]
    expected = torch.zeros(len(captures), len(captures))
    for i, one in enumerate(captures):
        for j, other in enumerate(captures):
            A = one.flat_a.mT @ other.flat_a / one.rows
            expected[i, j] = A.sum() * (one.flat_g.mT @ other.flat_g / one.count).sum()
    assert_equal(found - DAMPING * torch.eye(len(found)), expected)
    assert torch.linalg.eigvalsh(expected).min() >= -1e-12 * expected.norm()


def test_law_21_in_parts_it_is_that_of_the_whole() -> None:
    model, x = sequences()
    whole, parts = (coarse_of(map_of(tselepidis(), seen_by(model, *x.split(n)), DAMPING)) for n in (20, 7))
    assert_equal(parts, whole)


def test_tselepidis_adds_a_constant_to_every_layer() -> None:
    seen = two_batches(perceptron)
    parts, M = parts_of(tselepidis(), seen, DAMPING), gradients(seen)
    joint = tselepidis(0.5).couple(parts)
    v = torch.linalg.solve(coarse_of(joint), torch.stack([block.sum() for block in M.values()]))
    expected = {name: parts[name].inverse @ M[name] + 0.5 * share for name, share in zip(M, v, strict=True)}
    assert flat(expected) @ flat(M) > 0
    assert_equal(flat(joint @ M), flat(expected))
    T = dense_map(joint, M)
    assert_equal(T, T.mT)
    fewer = {name: M[name] for name in ("0", "4")}
    alone = map_of(tselepidis(0.5), {name: seen[name] for name in fewer}, DAMPING)
    assert_equal(flat(joint @ fewer), flat(alone @ fewer))
    assert joint @ {} == {}


def test_the_larger_of_two_maps_is_averaged_down_to_the_smaller() -> None:
    """4 x 4 positions against 2 x 2: quarters of the image; and against 3, which is no square: along positions."""
    a = torch.randn(6, 16, 2)
    big = Capture(a, torch.randn(6, 16, 2), 6, 96)
    small, odd = (Capture(torch.randn(6, t, 3), torch.randn(6, t, 2), 6, 6 * t) for t in (4, 3))
    quarters = a.sum(-1).view(6, 2, 2, 2, 2).mean((2, 4)).flatten(1)
    pairs = tselepidis().observe_together({"big": [big], "small": [small], "odd": [odd]})["big"]["pairs"].value
    assert_equal(pairs[0, 1], (quarters * small.a.sum(-1)).sum() / 24)
    thirds = torch.nn.functional.adaptive_avg_pool1d(a.sum(-1).unsqueeze(1), 3).squeeze(1)
    assert_equal(pairs[0, 2], (thirds * odd.a.sum(-1)).sum() / 18)
    assert_equal(pairs[0, 0], a.sum(-1).square().sum() / 96)


def test_pair_sums_are_averaged_and_do_not_grow_however_often_they_are_used() -> None:
    model, x = perceptron()
    old, new = (tselepidis().observe_together(seen_by(model, part)) for part in (x[:10], x[10:]))
    merged = {name: tselepidis().merge(tselepidis().merge(None, old[name], 0.0), new[name], 0.7) for name in new}
    for name, stats in merged.items():
        assert_equal(stats["pairs"].value, 0.7 * old[name]["pairs"].value + 0.3 * new[name]["pairs"].value)
    eye = natgrad.matrix.Diagonal(torch.ones(2, 2))
    parts = {name: Part(stats, eye, DAMPING) for name, stats in merged.items()}
    first, *others = (coarse_of(tselepidis().couple(parts)) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


def test_pairs_that_were_not_seen_together_keep_their_old_sums() -> None:
    model, x = perceptron()
    old, new = seen_by(model, x[:10]), {**seen_by(model, x[10:]), "2": []}
    first, second = (tselepidis().observe_together(seen) for seen in (old, new))
    assert "2" not in second
    merged = tselepidis().merge(tselepidis().merge(None, first["0"], 0.0), second["0"], 0.7)["pairs"].value
    assert_equal(merged[:, 1], first["0"]["pairs"].value[:, 1])
    assert_equal(merged[:, 2], 0.7 * first["0"]["pairs"].value[:, 2] + 0.3 * second["0"]["pairs"].value[:, 2])


def test_tselepidis_takes_layers_that_were_seen_from_tables_that_hold_all() -> None:
    """A layer that was never reached has a column in the tables of the others, and no row."""
    model, x = perceptron()
    seen = {**seen_by(model, x), "2": []}
    parts = parts_of(tselepidis(), seen, DAMPING)
    present = {name: captures for name, captures in seen.items() if captures}
    found, expected = (coarse_of(tselepidis().couple(p)) for p in (parts, parts_of(tselepidis(), present, DAMPING)))
    assert_equal(found, expected)
