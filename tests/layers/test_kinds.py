"""All kinds of layers are approximated, trained and reconstructed alike."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_capture import Conv1D, randomised
from torch import Tensor, nn

import natgrad
from cases import CASES, Case
from natgrad import (
    FNGD,
    KFAC,
    SNGD,
    Approximation,
    BlockTridiagonal,
    Categorical,
    ExactFisher,
    NaturalGradient,
    Tselepidis,
    TwoLevel,
)
from natgrad.look import look
from natgrad.matrix import Grouped
from oracles import assert_equal, ggn

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap on bilinear layers

# One small network for every kind: images of (2, 4, 4) in, three classes out.


class Gate(nn.Module):
    """A vector of features times itself."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.pair = nn.Bilinear(width, width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, torch.tanh(x))


class LoRA(nn.Module):
    """A frozen linear layer with a trained correction of low rank."""

    def __init__(self, width: int, out: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(width, out).requires_grad_(False)
        self.A = nn.ModuleDict({"default": nn.Linear(width, rank, bias=False)})
        self.B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.B["default"](self.A["default"](x))


def images(layer: nn.Module, channels: int = 2) -> nn.Sequential:
    return nn.Sequential(layer, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3))


def vectors(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 4), *layers)


KINDS: dict[str, Callable[[], nn.Sequential]] = {
    "ConvTranspose2d": lambda: images(nn.ConvTranspose2d(2, 4, 2, stride=2, groups=2), 4),
    "BatchNorm2d": lambda: images(randomised(nn.BatchNorm2d(2))),
    "GroupNorm": lambda: images(randomised(nn.GroupNorm(1, 2))),
    "InstanceNorm2d": lambda: images(randomised(nn.InstanceNorm2d(2, affine=True))),
    "LayerNorm": lambda: vectors(randomised(nn.LayerNorm(4)), nn.Tanh(), nn.Linear(4, 3)),
    "LayerNorm of images": lambda: images(randomised(nn.LayerNorm((4, 4)))),
    "RMSNorm": lambda: vectors(randomised(nn.RMSNorm(4)), nn.Tanh(), nn.Linear(4, 3)),
    "BatchNorm1d": lambda: vectors(randomised(nn.BatchNorm1d(4)), nn.Tanh(), nn.Linear(4, 3)),
    "Bilinear": lambda: vectors(Gate(4, 3)),
    "Conv1D": lambda: vectors(Conv1D(3, 4)),
    "LoRA": lambda: vectors(nn.Tanh(), LoRA(4, 3)),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def data(n: int = 60) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 2, 4, 4)
    return x, (x[:, 0, 0, :3] + 0.3 * torch.randn(n, 3)).argmax(1)


def training(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    x, y = data()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def without_bias(F: Tensor, width: int) -> Tensor:
    """A Fisher of (out, width) blocks without the last column of these."""
    kept = (torch.arange(len(F)) + 1) % width != 0
    return F[kept][:, kept]


@every_kind
def test_the_exact_fisher_is_the_ggn(make: Callable[[], nn.Sequential]) -> None:
    model, (x, y) = make().eval(), data()
    found = natgrad.fisher(model, ExactFisher(), Categorical(), [(x, None)])
    assert set(found) == set(look(model, (x,)).layers) and len(found) >= 2
    dense = ggn(model, x, lambda output: F.cross_entropy(output, y))
    for name, F_l in found.items():
        if name == "2.bias":  # of Conv1D, which adds it by hand: every fifth row and column of its block
            assert_equal(F_l.dense(), dense["2"][4::5, 4::5])
            continue
        block = dense[name] if "2.bias" not in found or name != "2" else without_bias(dense[name], 5)
        if isinstance(F_l, Grouped):  # one block a group, the others left out
            size = len(block) // len(F_l.inner.dense())
            block = torch.block_diag(*(block[i : i + size, i : i + size] for i in range(0, len(block), size)))
        assert_equal(F_l.dense(), block)


APPROXIMATIONS = [
    *CASES,
    Case("TwoLevel", TwoLevel),
    Case("Tselepidis", lambda: TwoLevel(space=Tselepidis(), form="additive")),
    Case("BlockTridiagonal", BlockTridiagonal),
]


@every_kind
@pytest.mark.parametrize("case", APPROXIMATIONS, ids=str)
def test_every_approximation_takes_a_step_that_lowers_the_loss(case: Case, make: Callable[[], nn.Sequential]) -> None:
    model = make()
    optimizer = NaturalGradient(model, case.make(), likelihood=Categorical())
    losses = training(model, optimizer)
    assert losses[-1] < losses[0] and not optimizer.statistics()["skipped"]
    assert not optimizer.uncovered and all(c.refreshed for c in optimizer._now.values())


@every_kind
def test_fngd_solves_and_weighs(make: Callable[[], nn.Sequential]) -> None:
    model = make()
    optimizer = FNGD(model, 2, lr=0.01)
    losses = training(model, optimizer, 6)
    assert losses[-1] < losses[0] and not optimizer.statistics()["skipped"]


@every_kind
@pytest.mark.parametrize("approximation", [SNGD(), KFAC()], ids=["SNGD", "KFAC"])
def test_reconstruction_keeps_the_function_and_is_undone(
    make: Callable[[], nn.Sequential], approximation: Approximation
) -> None:
    model, (x, y) = make().eval(), data()
    before, names = model(x).detach(), [name for name, _ in model.named_parameters()]
    plain = copy.deepcopy(model)
    natgrad.reconstruct(model, [(x, y)], approximation, likelihood=Categorical(), damping=0.1)
    assert_equal(model(x).detach(), before, 1e-9)
    layers = sum(not name.endswith(".bias") for name in look(plain, (x,)).layers)
    assert sum(name.endswith("weight.original") for name, _ in model.named_parameters()) == layers
    training(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    natgrad.refresh(model, [(x, y)])
    trained = model(x).detach()
    natgrad.restore(model)
    assert_equal(model(x).detach(), trained, 1e-9)
    assert [name for name, _ in model.named_parameters()] == names
    assert (trained - before).norm() > 1e-3
