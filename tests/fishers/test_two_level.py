"""Two-level methods: laws 2, 20, 21, 22, 26 and 30 on small networks, against dense matrices in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from coupled import (
    NETWORKS,
    Tensors,
    convolutions,
    dense_joint_fisher,
    dense_map,
    flat,
    gradients,
    like,
    map_of,
    parts_of,
    perceptron,
    seen_by,
    sequences,
)
from natgrad import (
    EKFAC,
    KFAC,
    TEKFAC,
    TKFAC,
    Approximation,
    BlockTridiagonal,
    Categorical,
    Diagonal,
    ExactFisher,
    KrylovNicolaides,
    KrylovResidual,
    Nicolaides,
    ResidualSpace,
    SpectralSpace,
    Tselepidis,
    TwoLevel,
)
from natgrad.capture import Capture
from natgrad.fishers import CoarseSpace, Part, as_capture
from natgrad.fishers.coarse.galerkin import TwoLevelMap
from natgrad.fishers.coarse.observed import ObservedFisher, companions
from natgrad.fishers.coarse.tselepidis import ConstantsMap
from natgrad.matrix import Kronecker, LinearMap, Matrix, Tikhonov
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


@dataclass(frozen=True)
class Everything(CoarseSpace):
    """All weights of a layer."""

    def vectors(self, inverse: LinearMap, r: Tensor) -> Tensor:
        return torch.eye(r.numel()).view(-1, *r.shape)


def two_batches(network: Callable[[], tuple[nn.Module, Tensor]]) -> dict[str, list[Capture]]:
    model, x = network()
    return seen_by(model, x[:12], x[12:])


def dense_operator(seen: Any, damping: float = DAMPING) -> Tensor:
    """B = F + damping I."""
    F = dense_joint_fisher(seen)
    return F + damping * torch.eye(len(F))


def rows_of(space: CoarseSpace, parts: dict[str, Part], r: Tensors) -> Tensor:
    """R0 (m, weights) of the raw, not orthonormalised, vectors."""
    rows = []
    for name, part in parts.items():
        for v in space.vectors(part.inverse, r[name]):
            rows.append(flat({key: v if key == name else torch.zeros_like(block) for key, block in r.items()}))
    return torch.stack(rows)


def fine_step(parts: dict[str, Part], M: Tensors) -> Tensor:
    return flat({name: parts[name].inverse @ M[name] for name in M})


# The Fisher of the observed examples.


@every_network
def test_law_30_products_equal_those_of_the_loop_over_examples(network: Any) -> None:
    seen = two_batches(network)
    F, V = dense_joint_fisher(seen), gradients(seen)
    joint = ObservedFisher.of({name: part.stats for name, part in parts_of(TwoLevel(), seen, 1.0).items()})
    assert_equal(flat(joint @ V), F @ flat(V))


@every_network
def test_law_20_the_gram_matrix_equals_the_dense_one(network: Any) -> None:
    """F_c - damping R0 R0^T = R0 F R0^T, the off-diagonals within a layer included."""
    seen = two_batches(network)
    parts, F = parts_of(TwoLevel(), seen, 1.0), dense_joint_fisher(seen)
    joint = ObservedFisher.of({name: part.stats for name, part in parts.items()})
    rows = {name: torch.randn(number + 1, *block.shape) for number, (name, block) in enumerate(gradients(seen).items())}
    R0 = torch.zeros(sum(map(len, rows.values())), len(F))
    row = column = 0
    for block in rows.values():
        R0[row : row + len(block), column : column + block[0].numel()] = block.flatten(1)
        row, column = row + len(block), column + block[0].numel()
    assert_equal(joint.gram(rows), R0 @ F @ R0.mT)


def test_layers_that_saw_other_examples_are_not_joined() -> None:
    model, x = perceptron()
    old, new = (seen_by(model, part) for part in (x[:15], x[15:]))
    stale, fresh = (parts_of(TwoLevel(), seen, DAMPING) for seen in (old, new))
    mixed = {**fresh, "2": stale["2"]}  # as many examples, but others
    M = gradients(new)
    F = torch.block_diag(dense_joint_fisher({"2": old["2"]}), torch.zeros(0, 0))
    rest = {name: captures for name, captures in new.items() if name != "2"}
    joint = ObservedFisher.of({name: part.stats for name, part in mixed.items()})
    product = joint @ M
    assert_equal(product["2"].flatten(), F @ M["2"].flatten())
    others = {name: M[name] for name in rest}
    assert_equal(flat({name: product[name] for name in rest}), dense_joint_fisher(rest) @ flat(others))


def test_companions_are_the_layers_with_all_forward_passes_and_the_commonest_sizes() -> None:
    one, two = random_capture(0, n=4), random_capture(1, n=6)
    seen: dict[str, Sequence[Capture]] = {"a": [one, two], "b": [two], "c": [one, two], "d": [], "e": [one, one]}
    assert companions(seen) == [["a", "c"], ["b"], ["e"]]
    assert companions({"a": []}) == []


# The residual form.


@every_network
@every_base
def test_law_20_with_all_weights_the_residual_form_is_the_dense_solve(network: Any, base: Any) -> None:
    seen = two_batches(network)
    M, B = gradients(seen), dense_operator(seen)
    exact = torch.linalg.solve(B, flat(M))
    assert_equal(flat(map_of(TwoLevel(base(), Everything()), seen, DAMPING) @ M), exact)
    assert_equal(flat(map_of(TwoLevel(base(), Everything(), "balanced"), seen, DAMPING) @ M), exact)
    additive = map_of(TwoLevel(base(), Everything(), "additive"), seen, DAMPING)
    assert error(flat(additive @ M), exact) > 0.1


def test_law_20_over_a_diagonal_and_over_dense_blocks() -> None:
    seen = two_batches(perceptron)
    M, B = gradients(seen), dense_operator(seen)
    for base in (Diagonal(), ExactFisher()):
        found = map_of(TwoLevel(base, Everything()), seen, DAMPING)
        assert_equal(flat(found @ M), torch.linalg.solve(B, flat(M)))


@every_network
@every_space
@every_base
def test_law_20_the_error_falls_by_the_norm_of_the_coarse_step(network: Any, space: CoarseSpace, base: Any) -> None:
    """|z - z*|_B^2 falls by omega (2 - omega) b^T F_c b, b = F_c^-1 R0 r, F_c = R0 B R0^T with the raw vectors."""
    seen = two_batches(network)
    M, B = gradients(seen), dense_operator(seen)
    parts, exact = parts_of(TwoLevel(base(), space), seen, DAMPING), torch.linalg.solve(B, flat(M))
    z = fine_step(parts, M)
    r = flat(M) - B @ z
    R0 = rows_of(space, parts, like(r, M))
    F_c = R0 @ B @ R0.mT
    drop = (R0 @ r) @ torch.linalg.solve(F_c, R0 @ r)
    assert drop > 0
    for omega in (1.0, 0.3, 1.8):
        step = flat(TwoLevel(base(), space, omega=omega).couple(parts) @ M)
        before, after = ((x - exact) @ B @ (x - exact) for x in (z, step))
        assert_equal(before - after, omega * (2 - omega) * drop, 1e-8)


@every_network
@every_space
def test_every_form_equals_its_formula(network: Any, space: CoarseSpace) -> None:
    seen = two_batches(network)
    M, B = gradients(seen), dense_operator(seen)
    parts = parts_of(TwoLevel(KFAC(), space), seen, DAMPING)
    m, z = flat(M), fine_step(parts, M)
    R0 = rows_of(space, parts, like(m - B @ z, M))
    C = R0.mT @ torch.linalg.solve(R0 @ B @ R0.mT, R0)
    y = C @ m
    w = fine_step(parts, like(m - B @ y, M))
    found = {
        name: flat(TwoLevel(KFAC(), space, name, 0.7 if name == "additive" else 1.0).couple(parts) @ M)
        for name in ("residual", "additive", "balanced")
    }
    assert_equal(found["residual"], z + C @ (m - B @ z), 1e-9)
    assert_equal(found["additive"], z + 0.7 * y, 1e-9)
    assert_equal(found["balanced"], w - C @ B @ w + y, 1e-9)


@every_space
def test_the_rows_are_orthonormal_and_span_the_vectors(space: CoarseSpace) -> None:
    seen = two_batches(convolutions)
    parts = parts_of(TwoLevel(), seen, DAMPING)
    for name, r in gradients(seen).items():
        raw, rows = (make(parts[name].inverse, r).flatten(1) for make in (space.vectors, space.basis))
        assert_equal(rows @ rows.mT, torch.eye(len(raw)))
        assert_equal(raw @ rows.mT @ rows, raw)


@pytest.mark.parametrize("base", [KFAC, lambda: KFAC(Tikhonov()), TKFAC])
def test_the_spectral_vector_belongs_to_the_smallest_eigenvalues_of_both_factors(base: Any) -> None:
    """qG qA^T as (out, in), not transposed and reshaped; group by group."""
    for shape in ("unshared", "grouped"):
        seen = {"0": [random_capture(3, shape)]}
        part = parts_of(TwoLevel(base(), SpectralSpace()), seen, DAMPING)["0"]
        matrix = base().assemble(base().observe(seen["0"][0]))
        assert isinstance(matrix, Kronecker)
        R = SpectralSpace().vectors(part.inverse, torch.zeros(part.inverse.shape))[0]
        q_G, q_A = (torch.linalg.eigh(factor).eigenvectors[..., :1] for factor in (matrix.left, matrix.right))
        assert_equal((R * (q_G @ q_A.mT)).sum((-2, -1)).abs(), torch.ones(R.shape[:-2]))


def test_krylov_vectors_are_powers_of_the_fine_inverse() -> None:
    seen = two_batches(perceptron)
    inverse, r = parts_of(TwoLevel(), seen, DAMPING)["0"].inverse, gradients(seen)["0"]
    F_inverse, ones = inverse.dense(), torch.ones(r.numel())
    nicolaides, residual = (space.vectors(inverse, r).flatten(1) for space in (KrylovNicolaides(), KrylovResidual()))
    assert_equal(nicolaides, torch.stack([ones, F_inverse @ ones]))
    assert_equal(residual, torch.stack([F_inverse @ r.flatten(), F_inverse @ F_inverse @ r.flatten()]))


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
    T = dense_map(map_of(TwoLevel(), seen, DAMPING), gradients(seen))
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
    approximation = TwoLevel(Overlong(), Nicolaides())
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
    M, parts = gradients(seen), parts_of(TwoLevel(), seen, DAMPING)
    undamped = {name: replace(part, damping=0.0) for name, part in parts.items()}
    found = flat(TwoLevel().couple(undamped) @ M)
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
    joint = map_of(TwoLevel(), two_batches(perceptron), DAMPING)
    assert isinstance(joint, TwoLevelMap)
    assert joint._fixed is joint._fixed


@every_space
def test_float32_is_close_to_float64_and_blocks_keep_their_dtype(space: CoarseSpace) -> None:
    seen = two_batches(convolutions)
    M = gradients(seen)
    single = {name: [c.to(torch.float32) for c in captures] for name, captures in seen.items()}
    expected = flat(map_of(TwoLevel(KFAC(), space), seen, 1.0) @ M)
    joint = map_of(TwoLevel(KFAC(), space), single, 1.0)
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
    expected = flat(map_of(TwoLevel(KFAC(), space), whole, DAMPING) @ M)
    for split in (parts, padded):
        assert_equal(flat(map_of(TwoLevel(KFAC(), space), split, DAMPING) @ M), expected)


def test_examples_are_replaced_and_the_base_averages_its_own() -> None:
    approximation = TwoLevel(EKFAC())
    first, second = random_capture(1), random_capture(2)
    old = approximation.merge(None, approximation.observe(first), 0.0)
    merged = approximation.merge(old, approximation.observe(second), 0.9)
    assert torch.equal(as_capture(merged).a, second.a)
    expected = 0.9 * KFAC().observe(first)["A"].value + 0.1 * KFAC().observe(second)["A"].value
    assert_equal(merged["fine.A"].value, expected)


# Tselepidis.


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


# What it refuses.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": BlockTridiagonal()}, "base must be an approximation that works layer by layer, got BlockTrid"),
        ({"base": KFAC}, "base must be an approximation that works layer by layer"),
        ({"space": "nicolaides"}, "space must be a coarse space, for example Nicolaides"),
        ({"form": "sum"}, "form must be one of 'residual', 'additive', 'balanced', got 'sum'"),
        ({"space": Tselepidis()}, "Tselepidis has the form 'additive' only, got 'residual'"),
        ({"omega": 0.0}, "omega must be a finite number > 0, got 0.0"),
        ({"omega": float("nan")}, "omega must be a finite number > 0, got nan"),
        ({"form": "balanced", "omega": 0.5}, "the balanced form has no omega, got 0.5"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoLevel(**settings)


def test_what_the_base_cannot_do_is_refused() -> None:
    joint = map_of(TwoLevel(Diagonal(), SpectralSpace()), two_batches(perceptron), DAMPING)
    with pytest.raises(ValueError, match="SpectralSpace needs a base whose inverse has an eigenbasis, not Diagonal"):
        joint @ gradients(two_batches(perceptron))
    model = nn.Sequential(nn.Linear(4, 5))
    with pytest.raises(ValueError, match="above limit=20"):
        natgrad.NaturalGradient(model, TwoLevel(ExactFisher(limit=20)))
    with pytest.raises(ValueError, match="TwoLevel joins layers in its inverse and has no matrix per layer"):
        natgrad.fisher(model, TwoLevel(), Categorical(), [(torch.randn(3, 4), None)])


def test_cadence_and_corrections_are_those_of_the_base() -> None:
    for base in (KFAC(), EKFAC()):
        both = TwoLevel(base)
        assert (both.refresh_every, both.corrects, both.keeps) == (base.refresh_every, base.corrects, base.keeps)
