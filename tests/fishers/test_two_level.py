"""Two-level methods: laws 20 and 30 on small networks, against dense matrices in float64."""

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
    convolutions,
    dense_joint_fisher,
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
    two_batches,
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
from natgrad.fishers import CoarseSpace
from natgrad.fishers.coarse.observed import ObservedFisher, companions
from natgrad.matrix import Kronecker, LinearMap, Tikhonov
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


# The Fisher of the observed examples.


@every_network
def test_law_30_products_equal_those_of_the_loop_over_examples(network: Any) -> None:
    seen = two_batches(network)
    F, V = dense_joint_fisher(seen), gradients(seen)
    joint = ObservedFisher.of(
        {name: part.stats for name, part in parts_of(TwoLevel(form="residual"), seen, 1.0).items()}
    )
    assert_equal(flat(joint @ V), F @ flat(V))


@every_network
def test_law_20_the_gram_matrix_equals_the_dense_one(network: Any) -> None:
    """F_c - damping R0 R0^T = R0 F R0^T, the off-diagonals within a layer included."""
    seen = two_batches(network)
    parts, F = parts_of(TwoLevel(form="residual"), seen, 1.0), dense_joint_fisher(seen)
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
    stale, fresh = (parts_of(TwoLevel(form="residual"), seen, DAMPING) for seen in (old, new))
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
    M, B = gradients(seen), dense_operator(seen, DAMPING)
    exact = torch.linalg.solve(B, flat(M))
    assert_equal(flat(map_of(TwoLevel(base(), Everything(), "residual"), seen, DAMPING) @ M), exact)
    assert_equal(flat(map_of(TwoLevel(base(), Everything(), "balanced"), seen, DAMPING) @ M), exact)
    additive = map_of(TwoLevel(base(), Everything(), "additive"), seen, DAMPING)
    assert error(flat(additive @ M), exact) > 0.1


def test_law_20_over_a_diagonal_and_over_dense_blocks() -> None:
    seen = two_batches(perceptron)
    M, B = gradients(seen), dense_operator(seen, DAMPING)
    for base in (Diagonal(), ExactFisher()):
        found = map_of(TwoLevel(base, Everything(), "residual"), seen, DAMPING)
        assert_equal(flat(found @ M), torch.linalg.solve(B, flat(M)))


@every_network
@every_space
@every_base
def test_law_20_the_error_falls_by_the_norm_of_the_coarse_step(network: Any, space: CoarseSpace, base: Any) -> None:
    """|z - z*|_B^2 falls by omega (2 - omega) b^T F_c b, b = F_c^-1 R0 r, F_c = R0 B R0^T with the raw vectors."""
    seen = two_batches(network)
    M, B = gradients(seen), dense_operator(seen, DAMPING)
    parts, exact = parts_of(TwoLevel(base(), space, "residual"), seen, DAMPING), torch.linalg.solve(B, flat(M))
    z = fine_step(parts, M)
    r = flat(M) - B @ z
    R0 = rows_of(space, parts, like(r, M))
    F_c = R0 @ B @ R0.mT
    drop = (R0 @ r) @ torch.linalg.solve(F_c, R0 @ r)
    assert drop > 0
    for omega in (1.0, 0.3, 1.8):
        step = flat(TwoLevel(base(), space, "residual", omega).couple(parts) @ M)
        before, after = ((x - exact) @ B @ (x - exact) for x in (z, step))
        assert_equal(before - after, omega * (2 - omega) * drop, 1e-8)


@every_network
@every_space
def test_every_form_equals_its_formula(network: Any, space: CoarseSpace) -> None:
    seen = two_batches(network)
    M, B = gradients(seen), dense_operator(seen, DAMPING)
    parts = parts_of(TwoLevel(KFAC(), space, "residual"), seen, DAMPING)
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
    parts = parts_of(TwoLevel(form="residual"), seen, DAMPING)
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


def test_the_spectral_vector_of_a_layer_with_groups_does_not_hang_on_the_signs_that_eigh_chose() -> None:
    """It is a sum over the groups, whose eigenvectors may come with either sign."""
    seen = {"0": [random_capture(3, "grouped")]}
    spectrum: Any = parts_of(TwoLevel(EKFAC(), SpectralSpace()), seen, DAMPING)["0"].inverse
    turned = replace(spectrum, left=spectrum.left * torch.tensor([1.0, -1.0, 1.0])[:, None, None])
    vectors = [SpectralSpace().vectors(inverse, torch.zeros(inverse.shape)) for inverse in (spectrum, turned)]
    assert torch.equal(*vectors)


def test_krylov_vectors_are_powers_of_the_fine_inverse() -> None:
    seen = two_batches(perceptron)
    inverse, r = parts_of(TwoLevel(form="residual"), seen, DAMPING)["0"].inverse, gradients(seen)["0"]
    F_inverse, ones = inverse.dense(), torch.ones(r.numel())
    nicolaides, residual = (space.vectors(inverse, r).flatten(1) for space in (KrylovNicolaides(), KrylovResidual()))
    assert_equal(nicolaides, torch.stack([ones, F_inverse @ ones]))
    assert_equal(residual, torch.stack([F_inverse @ r.flatten(), F_inverse @ F_inverse @ r.flatten()]))


# What it refuses.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": BlockTridiagonal()}, "base must be an approximation that works layer by layer, got BlockTrid"),
        ({"base": KFAC}, "base must be an approximation that works layer by layer"),
        ({"space": "nicolaides"}, "space must be a coarse space, for example Nicolaides"),
        ({"form": "sum"}, "form must be one of 'residual', 'additive', 'balanced', got 'sum'"),
        ({"space": Tselepidis(), "form": "residual"}, "Tselepidis has the form 'additive' only, got 'residual'"),
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
        natgrad.fisher(model, TwoLevel(form="residual"), Categorical(), [(torch.randn(3, 4), None)])


def test_cadence_and_corrections_are_those_of_the_base() -> None:
    for base in (KFAC(), EKFAC()):
        both = TwoLevel(base)
        assert (both.refresh_every, both.corrects, both.keeps) == (base.refresh_every, base.corrects, base.keeps)
