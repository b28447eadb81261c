"""Law 28: what the optimizers do that natgrad races against, as far as one step shows it."""

import pytest
import torch
from torch import Tensor, nn

from natgrad.race.entries import ENTRIES
from natgrad.race.tasks import Task

SHAPES = [(32, 64), (48, 48), (64, 32), (64, 256)]


def cosine(X: Tensor, Y: Tensor) -> float:
    return float((X * Y).sum() / (X.norm() * Y.norm()))


def polar(M: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U @ Vh


def first_step(name: str, M: Tensor, task: Task, **settings: object) -> Tensor:
    """What the entry subtracts from a matrix of zeros whose gradient is M."""
    model = nn.Linear(M.shape[1], M.shape[0])
    nn.init.zeros_(model.weight)
    optimizer = ENTRIES[name].build(model, task, {**ENTRIES[name].defaults, **settings})
    model.weight.grad = M.clone()
    optimizer.step()
    return -model.weight.detach()


@pytest.mark.parametrize("shape", SHAPES)
def test_law_28_the_first_step_of_muon_is_near_the_polar_factor(tiny: Task, shape: tuple[int, int]) -> None:
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    step = first_step("muon", M, tiny)
    assert cosine(step, polar(M)) > 0.97
    lengths = torch.linalg.svdvals(step)
    assert lengths[0] / lengths.mean() < 1.6  # while those of a Gaussian matrix spread more:
    assert torch.linalg.svdvals(M)[0] / torch.linalg.svdvals(M).mean() > lengths[0] / lengths.mean()


def test_law_28_fails_for_adamw_whose_first_step_is_the_sign(tiny: Task) -> None:
    M = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    step = first_step("adamw", M, tiny)
    assert cosine(step, M.sign()) > 0.999
    assert cosine(step, polar(M)) < 0.97
