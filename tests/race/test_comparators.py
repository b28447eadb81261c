"""Law 28: what the optimizers do that natgrad races against, as far as one step shows it."""

from collections.abc import Callable
from typing import Any

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


def built(name: str, model: nn.Module, task: Task, **settings: object) -> Any:
    return ENTRIES[name].build(model, task, {**ENTRIES[name].defaults, **settings})


def walk(make: Callable[[nn.Module], Any], gradients: list[Tensor]) -> Tensor:
    """What is subtracted from a matrix of zeros that meets these gradients."""
    model = nn.Linear(gradients[0].shape[1], gradients[0].shape[0])
    nn.init.zeros_(model.weight)
    optimizer = make(model)
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        optimizer.step()
    return -model.weight.detach()


def first_step(name: str, M: Tensor, task: Task, **settings: object) -> Tensor:
    """What the entry subtracts from a matrix of zeros whose gradient is M."""
    return walk(lambda model: built(name, model, task, **settings), [M])


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


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_steps_a_kernel_as_it_does_the_flattened_matrix(tiny: Task, adjust: str) -> None:
    random = torch.Generator().manual_seed(0)
    kernel, matrix = nn.Conv2d(6, 10, 3, bias=False), nn.Linear(54, 10, bias=False)
    with torch.no_grad():
        matrix.weight.copy_(kernel.weight.flatten(1))
    racers = [(m, built("muon", m, tiny, adjust_lr_fn=adjust, weight_decay=0.1)) for m in (kernel, matrix)]
    before = kernel.weight.detach().clone()
    for _ in range(3):
        gradient = torch.randn(10, 54, generator=random)
        for module, optimizer in racers:
            optimizer.zero_grad()
            module.weight.grad = gradient.reshape(module.weight.shape)
            optimizer.step()
    assert torch.equal(kernel.weight.flatten(1), matrix.weight) and not torch.equal(kernel.weight, before)
    racers[0][1].zero_grad()
    assert kernel.weight.grad is None


def test_muon_takes_the_kernels_and_leaves_tables_positions_and_ends_to_adamw(tiny: Task) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3)
            self.place, self.table = nn.Parameter(torch.zeros(1, 5, 4)), nn.Embedding(9, 4)
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    model = Network()
    by_muon, by_adam = built("muon", model, tiny).optimizers
    assert [id(p) for p in by_muon.kernels] == [id(model.second.weight), id(model.inner.weight)]
    held = {id(p) for p in by_adam.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters()} - {id(p) for p in by_muon.kernels}


def test_law_28_soap_in_the_basis_of_the_entries_is_adam(tiny: Task) -> None:
    random = torch.Generator().manual_seed(0)
    scales = torch.tensor([5.0, 3.0, -2.0, 1.0, -0.5, 0.25])
    # L and R are then diagonal, and their eigenvectors the axes, in some order and sign that Adam does not see.
    diagonal = [torch.diag(scales * (1 + 0.2 * torch.randn(6, generator=random))) for _ in range(12)]
    dense = [torch.randn(6, 6, generator=random) for _ in range(12)]
    lr, betas = 1e-2, (0.95, 0.95)
    for gradients, same in ((diagonal, True), (dense, False)):
        soap = walk(lambda model: built("soap", model, tiny, lr=lr, precondition_frequency=3), gradients)
        # Its first gradient only starts the basis.
        adam = walk(lambda model: torch.optim.Adam(model.parameters(), lr=lr, betas=betas), gradients[1:])
        assert torch.allclose(soap, adam, atol=1e-6) == same
