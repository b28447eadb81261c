"""Every matrix class against its dense twin; damping rules; what happens to zero, singular, huge and broken factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from natgrad.matrix import (
    Blocks,
    Dense,
    Diagonal,
    Factored,
    FactorisationError,
    Grouped,
    Kronecker,
    KroneckerSum,
    LinearMap,
    LowRank,
    Matrix,
    OneSided,
    Relative,
    Ridge,
    Rows,
    Spectral,
    Tikhonov,
    Unit,
)
from natgrad.matrix.damping import FactoredRule, KroneckerRule
from natgrad.matrix.factorise import cholesky_inverse, eigh
from oracles import assert_equal, damped, error, kron, rounding

OUT, IN = 4, 5


def psd(*groups: int, size: int, rank: int | None = None) -> Tensor:
    X = torch.randn(*groups, size, rank or 3 * size)
    return X @ X.mT / X.shape[-1]


def orthogonal(*groups: int, size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*groups, size, size)).Q


def kronecker(*groups: int, rule: KroneckerRule | None = None) -> Kronecker:
    return Kronecker(psd(*groups, size=OUT), 7 * psd(*groups, size=IN), rule or Factored())


def kronecker_sum(*groups: int, rule: FactoredRule | None = None) -> KroneckerSum:
    S, R, Q, P = (psd(*groups, size=size) for size in (OUT, IN, OUT, IN))
    return KroneckerSum(S, R, Q, P, rule or Factored())


def spectral(*groups: int) -> Spectral:
    return Spectral(orthogonal(*groups, size=OUT), orthogonal(*groups, size=IN), torch.rand(*groups, OUT, IN) + 0.1)


def low_rank(*groups: int, n: int = 3, t: int = 1) -> LowRank:
    return LowRank(torch.randn(*groups, n, t, IN), torch.randn(*groups, n, t, OUT), torch.tensor(2.0 * n))


MATRICES: dict[str, Callable[..., Matrix]] = {
    "Dense": lambda *groups: Dense(psd(*groups, size=OUT * IN), (OUT, IN)),
    "Diagonal": lambda *groups: Diagonal(torch.rand(*groups, OUT, IN) + 0.1),
    "Kronecker": kronecker,
    "Kronecker-Unit": lambda *groups: kronecker(*groups, rule=Unit()),
    "Kronecker-Tikhonov": lambda *groups: kronecker(*groups, rule=Tikhonov()),
    "Kronecker-Relative": lambda *groups: kronecker(*groups, rule=Relative()),
    "Kronecker-Relative-Factored": lambda *groups: kronecker(*groups, rule=Relative(Factored())),
    "Spectral": spectral,
    "Spectral-Relative": lambda *groups: Spectral(
        orthogonal(*groups, size=OUT), orthogonal(*groups, size=IN), torch.rand(*groups, OUT, IN), Relative()
    ),
    "LowRank": lambda *groups: low_rank(*groups),
    "LowRank-shared": lambda *groups: low_rank(*groups, t=4),
    "OneSided-right": lambda *groups: OneSided(psd(*groups, size=IN), (OUT, IN), eps=0.1),
    "OneSided-left": lambda *groups: OneSided(psd(*groups, size=OUT), (OUT, IN), "left"),
    "Rows": lambda *groups: Rows(psd(*groups, OUT, size=IN), eps=0.1),
    "KroneckerSum": lambda *groups: kronecker_sum(*groups),
    "KroneckerSum-Unit": lambda *groups: kronecker_sum(*groups, rule=Unit()),
    "Grouped": lambda *groups: Grouped(kronecker(3)),
}
every_matrix = pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES.keys())
every_matrix_and_groups = pytest.mark.parametrize(
    ("make", "groups"),
    [
        pytest.param(make, groups, id=f"{name}-{groups}")
        for name, make in MATRICES.items()
        for groups in ((), (3,))
        if not (name == "Grouped" and groups)
    ],
)


def times(F: Tensor, M: Tensor) -> Tensor:
    return (F @ M.flatten(-2).unsqueeze(-1)).squeeze(-1).unflatten(-1, M.shape[-2:])


@every_matrix_and_groups
@pytest.mark.parametrize("lead", [(), (2,), (2, 3, 1)])
def test_law_01_product_is_that_of_the_dense_twin(
    make: Callable[..., Matrix], groups: tuple[int, ...], lead: tuple[int, ...]
) -> None:
    matrix = make(*groups)
    M = torch.randn(*lead, *matrix.shape)
    assert_equal(matrix @ M, times(matrix.dense(), M))


@every_matrix_and_groups
def test_law_01_symmetry_and_trace(make: Callable[..., Matrix], groups: tuple[int, ...]) -> None:
    matrix = make(*groups)
    F = matrix.dense()
    assert_equal(F, F.mT, 1e-14)
    assert matrix.trace().shape == matrix.shape[:-2]
    assert_equal(matrix.trace(), F.diagonal(dim1=-2, dim2=-1).sum(-1))


@every_matrix_and_groups
def test_the_norm_is_that_of_the_dense_twin(make: Callable[..., Matrix], groups: tuple[int, ...]) -> None:
    matrix = make(*groups)
    norm = matrix.norm()
    assert norm.shape == matrix.shape[:-2]
    assert_equal(norm, matrix.dense().square().sum((-2, -1)).sqrt())


@every_matrix_and_groups
@pytest.mark.parametrize("damping", [1e-4, 1e-1, 1e2])
def test_law_01_damped_inverse_is_the_dense_solve(
    make: Callable[..., Matrix], groups: tuple[int, ...], damping: float
) -> None:
    matrix = make(*groups)
    inverse, M, A = matrix.inverse(damping), torch.randn(2, *matrix.shape), damped(matrix, damping)
    expected = torch.linalg.solve(A, M.flatten(-2).unsqueeze(-1)).squeeze(-1)
    assert_equal((inverse @ M).flatten(-2), expected, rounding(A))
    assert_equal(inverse @ M, times(inverse.dense(), M), rounding(A))
    assert inverse.shape == matrix.shape


@every_matrix_and_groups
def test_law_02_positive_semi_definite(make: Callable[..., Matrix], groups: tuple[int, ...]) -> None:
    matrix = make(*groups)
    assert (torch.linalg.eigvalsh(matrix.dense()) > -1e-12).all()
    assert (torch.linalg.eigvalsh(matrix.inverse(0.1).dense()) > 0).all()


@every_matrix_and_groups
def test_law_22_large_damping(make: Callable[..., Matrix], groups: tuple[int, ...]) -> None:
    matrix = make(*groups)
    scale = torch.ones(())
    if isinstance(getattr(matrix, "rule", None), Relative):  # damping in units of the mean eigenvalue
        scale = (matrix.trace() / (OUT * IN))[..., None, None]
        scale = scale if isinstance(matrix, Spectral) else scale.mean()
    M = torch.randn(matrix.shape)
    assert_equal(1e14 * scale * (matrix.inverse(1e14) @ M), M, 1e-5)


@every_matrix
def test_products_keep_the_dtype_of_the_vector(make: Callable[..., Matrix]) -> None:
    matrix = make()
    for map_ in (matrix, matrix.inverse(0.1)):
        M = torch.randn(matrix.shape, dtype=torch.float32)
        product = map_ @ M
        assert product.dtype == torch.float32
        assert_equal(product.double(), map_ @ M.double(), 1e-6)


@every_matrix
def test_float32_matrices_invert_to_single_precision(make: Callable[..., Matrix]) -> None:
    matrix = make()
    M = torch.randn(matrix.shape)
    single = matrix.to(torch.float32)
    assert single.dense().dtype == torch.float32
    assert_equal((single.inverse(0.1) @ M.float()).double(), matrix.inverse(0.1) @ M, 1e-4)


@every_matrix_and_groups
def test_tensors_and_with_tensors_are_a_round_trip(make: Callable[..., Matrix], groups: tuple[int, ...]) -> None:
    for map_ in (make(*groups), make(*groups).inverse(0.1)):
        assert isinstance(map_, LinearMap)
        tensors = map_.tensors()
        assert tensors and all(isinstance(value, Tensor) for value in tensors.values())
        back = map_.with_tensors({name: value.clone() for name, value in tensors.items()})
        assert type(back) is type(map_)
        assert torch.equal(back.dense(), map_.dense())
        ones = map_.with_tensors({name: torch.ones_like(value) for name, value in tensors.items()})
        assert not torch.equal(ones.dense(), map_.dense())
        assert getattr(back, "rule", None) == getattr(map_, "rule", None)


@every_matrix
def test_damping_must_be_finite_and_not_negative(make: Callable[..., Matrix]) -> None:
    for damping in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="damping must be a finite number >= 0, got"):
            make().inverse(damping)


# Damping rules.


def test_the_cross_terms_of_factored_damping() -> None:
    matrix = kronecker()
    pi = float(Factored().ratio(matrix))
    G, A, root = matrix.left, matrix.right, 0.3**0.5
    cross = pi * root * kron(G, torch.eye(IN)) + root / pi * kron(torch.eye(OUT), A)
    assert_equal(matrix.inverse(0.3).dense().inverse(), kron(G, A) + cross + 0.3 * torch.eye(OUT * IN))
    assert error(matrix.inverse(0.3).dense().inverse(), kron(G, A) + 0.3 * torch.eye(OUT * IN)) > 0.1


def test_pi_minimises_the_trace_of_the_cross_terms() -> None:
    matrix = kronecker()
    best = float(Factored().ratio(matrix))

    def cross(pi: float) -> float:
        return float(pi * IN * matrix.left.trace() + OUT * matrix.right.trace() / pi)

    assert cross(best) < min(cross(best * 1.01), cross(best / 1.01))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [0.0, float("inf"), float("nan")])
def test_pi_is_1_where_a_factor_is_zero_or_not_finite(side: str, size: float) -> None:
    matrix = kronecker()
    broken = matrix.with_tensors({side: torch.full_like(getattr(matrix, side), size)})
    assert float(Factored().ratio(broken)) == 1.0


def test_pi_is_of_each_group() -> None:
    matrix = Kronecker(psd(3, size=OUT) * torch.tensor([1.0, 0.0, 4.0])[:, None, None], psd(3, size=IN))
    alone = [Factored().ratio(Kronecker(G, A)) for G, A in zip(matrix.left, matrix.right, strict=True)]
    assert torch.equal(Factored().ratio(matrix), torch.stack(alone))
    assert alone[1] == 1


def test_relative_damping_does_not_depend_on_the_scale_of_the_loss() -> None:
    for matrix in (kronecker(rule=Relative()), kronecker(rule=Relative(Factored()))):
        scaled = Kronecker(100 * matrix.left, matrix.right, matrix.rule)
        assert_equal(100 * scaled.inverse(0.1).dense(), matrix.inverse(0.1).dense())


def test_relative_damping_of_a_zero_matrix_is_its_floor() -> None:
    zero = Spectral(torch.eye(OUT), torch.eye(IN), torch.zeros(OUT, IN), Relative(floor=1e-3))
    assert_equal(zero.inverse(1.0).dense(), 1e3 * torch.eye(OUT * IN))


# Zero, singular, huge and broken.


@pytest.mark.parametrize("rule", [Factored(), Unit(), Tikhonov()], ids=lambda rule: type(rule).__name__)
def test_a_zero_kronecker_factor_leaves_plain_damping(rule: KroneckerRule) -> None:
    zero = Kronecker(torch.zeros(OUT, OUT), torch.zeros(IN, IN), rule)
    M = torch.randn(OUT, IN)
    assert_equal(zero.inverse(0.01) @ M, M / 0.01)


def test_the_ridge_of_a_zero_factor_is_its_floor() -> None:
    G, A = psd(size=OUT), torch.zeros(IN, IN)
    left, right = Ridge(floor=1e-3).shifts(Kronecker(G, A), 0.5)
    assert_equal(left, 0.5 * G.trace())
    assert_equal(right, torch.tensor(5e-4))


@pytest.mark.parametrize(
    "rule", [Factored(), Unit(), Tikhonov(), Relative(), Ridge()], ids=lambda rule: type(rule).__name__
)
def test_rank_deficient_factors_are_inverted_with_damping(rule: KroneckerRule) -> None:
    matrix = Kronecker(psd(size=OUT, rank=1), psd(size=IN, rank=2), rule)
    A = damped(matrix, 1e-3)
    assert_equal(matrix.inverse(1e-3).dense() @ A, torch.eye(OUT * IN), rounding(A))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_huge_and_tiny_factors_in_float32(size: float) -> None:
    for rule in (Factored(), Tikhonov()):
        matrix = Kronecker(psd(size=OUT) * size, psd(size=IN) / size, rule).to(torch.float32)
        M = torch.randn(OUT, IN)
        found = matrix.inverse(0.1) @ M.float()
        expected = Kronecker(matrix.left.double() / size, matrix.right.double() * size, rule).inverse(0.1) @ M
        assert_equal(found.double(), expected, 1e-3)


@pytest.mark.parametrize(
    "singular",
    [
        Dense(torch.zeros(20, 20), (OUT, IN)),
        Kronecker(torch.zeros(OUT, OUT), torch.eye(IN)),
        Kronecker(torch.zeros(OUT, OUT), torch.eye(IN), Tikhonov()),
        Kronecker(torch.eye(OUT), torch.zeros(IN, IN), Unit()),
        Diagonal(torch.zeros(OUT, IN)),
        Spectral(torch.eye(OUT), torch.eye(IN), torch.zeros(OUT, IN)),
        LowRank(torch.ones(2, 1, IN), torch.ones(2, 1, OUT), torch.tensor(2.0)),
    ],
    ids=lambda matrix: type(matrix).__name__,
)
def test_a_singular_matrix_without_damping_is_refused(singular: Matrix) -> None:
    with pytest.raises(FactorisationError, match=r"give a damping > 0|not positive definite with this damping"):
        singular.inverse(0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", [Factored(), Unit(), Tikhonov()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("side", ["left", "right"])
def test_factors_that_are_not_finite_are_refused(value: float, rule: KroneckerRule, side: str) -> None:
    matrix = kronecker(rule=rule)
    broken = getattr(matrix, side).clone()
    broken[1, 1] = value
    with pytest.raises(FactorisationError, match=r"a factor of shape \(\d, \d\) is not"):
        matrix.with_tensors({side: broken}).inverse(0.1)


def test_values_that_are_not_finite_are_refused() -> None:
    values = torch.ones(OUT, IN)
    values[0, 0] = float("nan")
    for matrix in (Diagonal(values), Spectral(torch.eye(OUT), torch.eye(IN), values)):
        with pytest.raises(FactorisationError):
            matrix.inverse(0.1)


def test_cholesky_inverse_names_the_shape_of_an_indefinite_factor() -> None:
    X = torch.diag(torch.tensor([1.0, -2.0, 3.0]))
    with pytest.raises(FactorisationError, match=r"a factor of shape \(3, 3\) is not positive definite"):
        cholesky_inverse(X, 1.0)
    assert_equal(cholesky_inverse(X, 3.0), torch.diag(1 / (X.diagonal() + 3)))


def test_cholesky_inverse_shifts_each_group_by_its_own() -> None:
    X, shift = psd(3, size=IN), torch.tensor([0.1, 1.0, 10.0])
    before = X.clone()
    expected = torch.stack([(x + s * torch.eye(IN)).inverse() for x, s in zip(X, shift, strict=True)])
    assert_equal(cholesky_inverse(X, shift), expected)
    assert torch.equal(X, before)


def test_eigh_that_gives_nan_without_an_error_is_a_failed_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    X = psd(size=IN)
    values, vectors = torch.linalg.eigh(X)
    vectors[0, 1] = float("nan")
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: (values, vectors))
    with pytest.raises(FactorisationError, match="not finite"):
        eigh(X)


def test_eigh_clamps_the_rounding_of_zero_eigenvalues() -> None:
    values, vectors = eigh(psd(size=IN, rank=1))
    assert (values >= 0).all()
    assert_equal(vectors.mT @ vectors, torch.eye(IN))


# Spectral.


def test_kronecker_and_its_spectral_form_are_the_same_operator() -> None:
    for groups in ((), (3,)):
        matrix = kronecker(*groups)
        assert_equal(matrix.spectral().dense(), matrix.dense())
    assert isinstance(spectral().spectral(), Spectral)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("groups", [(), (3,)])
def test_a_one_sided_matrix_and_its_spectral_form_are_the_same_operator(
    side: Literal["left", "right"], groups: tuple[int, ...]
) -> None:
    matrix = OneSided(psd(*groups, size=OUT if side == "left" else IN), (OUT, IN), side)
    assert_equal(matrix.spectral().dense(), matrix.dense())


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.5, 2.0])
def test_spectral_power(exponent: float) -> None:
    matrix = spectral(3)
    values, vectors = torch.linalg.eigh(matrix.dense() + 0.2 * torch.eye(OUT * IN))
    expected = vectors * values.pow(exponent).unsqueeze(-2) @ vectors.mT
    assert_equal(matrix.power(exponent, 0.2).dense(), expected)


@pytest.mark.parametrize("exponent", [-1.0, -0.5])
def test_a_negative_power_of_a_singular_matrix_is_refused(exponent: float) -> None:
    values = torch.zeros(OUT, IN)
    for matrix in (Diagonal(values), Spectral(torch.eye(OUT), torch.eye(IN), values)):
        with pytest.raises(FactorisationError, match="singular: give a damping > 0"):
            matrix.power(exponent)
        assert_equal(matrix.power(exponent, 4.0).dense(), 4.0**exponent * torch.eye(OUT * IN))


def test_diagonal_power() -> None:
    matrix = Diagonal(torch.rand(OUT, IN))
    assert_equal(matrix.power(-0.5, 0.1).values, (matrix.values + 0.1).rsqrt())


def test_spectral_logdet() -> None:
    matrix = spectral(3)
    assert_equal(matrix.logdet(0.3), torch.logdet(matrix.dense() + 0.3 * torch.eye(OUT * IN)))


def test_spectral_samples_have_the_covariance_of_the_matrix() -> None:
    """40,000 draws: the relative error of an empirical covariance is about sqrt((d + 1) / draws) at most; d = 20."""
    for matrix in (spectral(), kronecker().spectral()):
        draws = matrix.sample(40_000, torch.Generator().manual_seed(0)).flatten(1)
        assert draws.shape == (40_000, OUT * IN)
        assert_equal(draws.mT @ draws / len(draws), matrix.dense(), 0.04)
        assert draws.mean(0).norm() < 4 * (matrix.trace() / 40_000).sqrt()
    assert spectral(3).sample(2).shape == (2, 3, OUT, IN)


def test_spectral_samples_follow_the_generator() -> None:
    matrix = spectral()
    first, second = (matrix.sample(3, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def test_effective_rank_counts_equal_eigenvalues() -> None:
    values = torch.zeros(2, OUT, IN)
    values[0, 0, :3], values[1] = 5.0, 0.1
    matrix = Spectral(torch.eye(OUT).expand(2, -1, -1), torch.eye(IN).expand(2, -1, -1), values)
    assert_equal(matrix.effective_rank(), torch.tensor([3.0, 20.0]))


# Low rank, groups, layers.


@pytest.mark.parametrize("n", [1, 3, 60])
def test_woodbury_is_the_dense_solve_for_few_and_for_many_rows(n: int) -> None:
    matrix = low_rank(n=n)
    A = matrix.dense() + 0.01 * torch.eye(OUT * IN)
    assert_equal(matrix.inverse(0.01).dense(), A.inverse(), rounding(A))


def test_grouped_is_block_diagonal_over_the_groups() -> None:
    inner = kronecker(3)
    matrix = Grouped(inner)
    assert matrix.shape == (3 * OUT, IN)
    assert_equal(matrix.dense(), torch.block_diag(*inner.dense()))
    M = torch.randn(2, 3 * OUT, IN)
    assert_equal(matrix @ M, (inner @ M.unflatten(1, (3, OUT))).flatten(1, 2))


def test_blocks_is_a_mapping_and_a_block_diagonal_matrix() -> None:
    blocks = Blocks({"a": kronecker(), "b": Dense(psd(size=6), (2, 3))})
    M = {"a": torch.randn(OUT, IN), "b": torch.randn(2, 3)}
    flat = torch.cat([value.flatten() for value in M.values()])
    assert list(blocks) == ["a", "b"] and len(blocks) == 2 and "c" not in blocks
    for map_ in (blocks, blocks.inverse(0.1)):
        product = map_ @ M
        assert_equal(torch.cat([value.flatten() for value in product.values()]), map_.dense() @ flat)
    assert_equal(blocks.trace(), blocks.dense().trace())
    assert_equal(blocks.inverse(0.1)["b"].dense(), (blocks["b"].dense() + 0.1 * torch.eye(6)).inverse())
    with pytest.raises(KeyError, match="b"):
        blocks @ {"a": M["a"]}
