"""The Fisher errors of a reproduction, which never form F, against dense matrices."""

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import Categorical
from natgrad.capture import Capture
from natgrad.matrix import Grouped
from natgrad.race.entries import ENTRIES
from natgrad.race.reproduce.fisher_error import along, captured, errors, estimate, inner
from natgrad.race.tasks import Task
from oracles import SHAPES, assert_equal, dense_fisher, error, random_capture

APPROXIMATIONS = {
    name: getattr(natgrad, name)()
    for name in ("ExactFisher", "Diagonal", "KFAC", "EKFAC", "TKFAC", "TEKFAC", "KPSVD", "Deflated", "Lanczos")
}


@pytest.fixture(autouse=True)
def single_precision() -> None:
    """In place of the races' own: these tests compute in float64."""
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_the_inner_product_with_the_fisher_is_that_of_dense_matrices(name: str, shape: str) -> None:
    seen = random_capture(0, shape)
    matrix = estimate(APPROXIMATIONS[name], seen)
    assert_equal(inner(matrix, seen), (matrix.dense() * dense_fisher(seen)).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_of_the_fisher_is_that_of_the_gram_matrix(shape: str) -> None:
    seen = random_capture(0, shape)
    assert_equal(seen.gram().square().sum((-2, -1)).sqrt() / seen.count, torch.linalg.matrix_norm(dense_fisher(seen)))


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    dense = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 3))
    conv = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    return {"dense": (dense, torch.randn(12, 5)), "grouped convolution": (conv, torch.randn(12, 2, 3, 3))}


@pytest.mark.parametrize("network", ["dense", "grouped convolution"])
def test_errors_are_those_of_dense_matrices_on_the_same_labels(network: str) -> None:
    model, x = networks()[network]
    pair = (x, torch.randint(3, (12,)))
    found = errors(model, APPROXIMATIONS, Categorical(), pair, seed=3)
    for layer, seen in captured(model, Categorical(), pair, seed=3).items():
        F = whole(seen, dense_fisher(seen))
        for name, approximation in APPROXIMATIONS.items():
            expected = error(dense_of(approximation, seen), F)
            assert found[name][layer] == pytest.approx(expected, abs=1e-7)
        assert found["KFAC"][layer] > 0.05 and found["ExactFisher"][layer] < 1e-7


def whole(seen: Capture, F: Tensor) -> Tensor:
    return torch.block_diag(*F) if seen.a.ndim == 4 else F


def dense_of(approximation: natgrad.Approximation, seen: Capture) -> Tensor:
    matrix = estimate(approximation, seen)
    return (Grouped(matrix) if len(matrix.shape) == 3 else matrix).dense()


def test_the_labels_are_those_of_the_seed_and_the_model_is_left_as_it_was() -> None:
    model, x = networks()["dense"]
    pair = (x, torch.randint(3, (12,)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again, other = (errors(model, {"KFAC": natgrad.KFAC()}, Categorical(), pair, seed=s) for s in (0, 0, 1))
    assert first == again and first != other
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_errors_along_a_run_are_measured_at_equal_distances(tiny: Task) -> None:
    torch.set_default_dtype(torch.float32)
    entry, data = ENTRIES["kfac"], tiny.data(None)
    cpu = torch.device("cpu")
    found = list(along(tiny, data, entry, {}, {"KFAC": natgrad.KFAC()}, every=4, steps=8, examples=10, device=cpu))
    assert [at.step for at in found] == [0, 4, 8]
    assert len({at.over_layers("KFAC") for at in found}) == 3, "the network has moved"
