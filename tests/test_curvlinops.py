"""KFAC and EKFAC against another library: curvlinops (Dangel et al. 2025), which shares no code with this one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad import EKFAC, KFAC, Approximation, Bernoulli, Categorical, Gaussian
from natgrad.layers import expected
from natgrad.likelihoods import Likelihood
from oracles import assert_equal, error

curvlinops = pytest.importorskip("curvlinops")

OPERATORS = {KFAC: curvlinops.KFACLinearOperator, EKFAC: curvlinops.EKFACLinearOperator}
FISHERS = {"exact": "type-2", "empirical": "empirical", "sampled": "mc"}
DRAWS = 400


def dense(model: nn.Module, operator: Any) -> dict[str, Tensor]:
    """The blocks of a curvlinops operator, whose coordinates are parameter after parameter, in our order."""
    size = sum(p.numel() for p in model.parameters())
    matrix = operator @ torch.eye(size)
    starts: dict[int, int] = {}
    end = 0
    for p in model.parameters():
        starts[id(p)], end = end, end + p.numel()
    blocks = {}
    for name, layer in expected(model).layers.items():
        coordinates = [
            torch.arange(starts[id(p)], starts[id(p)] + p.numel()).view(p.shape).double() for p in layer.parameters
        ]
        order = layer.pack(coordinates).flatten().long()
        blocks[name] = matrix[order][:, order]
    return blocks


def theirs(
    make: Callable[[], Approximation],
    model: nn.Module,
    loss: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    estimator: str,
    sharing: str,
) -> dict[str, Tensor]:
    operator = OPERATORS[make](
        model,
        loss,
        list(model.parameters()),
        batches,
        fisher_type=FISHERS[estimator],
        mc_samples=DRAWS if estimator == "sampled" else 1,
        kfac_approx=sharing,
        separate_weight_and_bias=False,  # one block per layer, as here
        check_deterministic=False,
    )
    return dense(model, operator)


def linear(bias: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4, bias), nn.Tanh(), nn.Linear(4, 3, bias))


def convolutional(bias: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(3, 4, 2, bias=bias),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3, bias),
    )


NETWORKS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "linear": (linear, (5,)),
    "convolutional": (convolutional, (2, 6, 6)),
}
LOSSES: dict[str, tuple[Likelihood, nn.Module]] = {
    "CrossEntropyLoss": (Categorical(), nn.CrossEntropyLoss()),
    "MSELoss": (Gaussian(reduction="mean"), nn.MSELoss()),
    "BCEWithLogitsLoss": (Bernoulli(reduction="mean"), nn.BCEWithLogitsLoss()),
}
both = pytest.mark.parametrize("make", [KFAC, EKFAC])
every_network = pytest.mark.parametrize("network", NETWORKS)


def batches(shape: tuple[int, ...], loss: str) -> list[tuple[Tensor, Tensor]]:
    """Enough examples for factors of full rank: in a null space eigenvectors, and with them EKFAC, are arbitrary."""
    x = torch.randn(30, *shape)
    y = torch.randint(3, (30,)) if loss == "CrossEntropyLoss" else torch.randint(2, (30, 3)).double()
    return [(x[:12], y[:12]), (x[12:], y[12:])]


@both
@every_network
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("loss", LOSSES)
def test_exact_fisher_is_that_of_curvlinops(
    make: Callable[[], Approximation], network: str, bias: bool, sharing: Any, loss: str
) -> None:
    build, shape = NETWORKS[network]
    model, data, (likelihood, torch_loss) = build(bias), batches(shape, loss), LOSSES[loss]
    expected = theirs(make, model, torch_loss, data, "exact", sharing)
    found = natgrad.fisher(model, make(), likelihood, data, weight_sharing=sharing)
    for name, block in expected.items():
        assert_equal(found[name].dense(), block)


@both
@every_network
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("loss", LOSSES)
def test_empirical_fisher_is_that_of_curvlinops(
    make: Callable[[], Approximation], network: str, sharing: Any, loss: str
) -> None:
    """(f - y)^2 is twice the NLL of an output: its Fisher is doubled here, its gradients, squared, in curvlinops."""
    build, shape = NETWORKS[network]
    model, data, (likelihood, torch_loss) = build(True), batches(shape, loss), LOSSES[loss]
    expected = theirs(make, model, torch_loss, data, "empirical", sharing)
    found = natgrad.fisher(model, make(), likelihood, data, estimator="empirical", weight_sharing=sharing)
    for name, block in expected.items():
        assert_equal((2 if loss == "MSELoss" else 1) * found[name].dense(), block)


@both
@every_network
@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "MSELoss"])
def test_sampled_fisher_is_that_of_curvlinops_up_to_the_noise_of_the_labels(
    make: Callable[[], Approximation], network: str, loss: str
) -> None:
    """Labels differ, so two estimates of 400 draws are compared, to .15: they are apart by about .05."""
    build, shape = NETWORKS[network]
    model, data, (likelihood, torch_loss) = build(True), batches(shape, loss), LOSSES[loss]
    expected = theirs(make, model, torch_loss, data, "sampled", "expand")
    found = natgrad.fisher(model, make(), likelihood, data, estimator="sampled", draws=DRAWS)
    for name, block in expected.items():
        assert error(found[name].dense(), block) < 0.15
