"""What layers of every kind have seen: per-example gradients, on which every approximation is what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from test_attention import Attend
from test_embedding import Tokens
from test_kinds import KINDS, vectors
from test_own_weights import ByLinear, FromTheRight
from test_recurrent import Read, Steps
from test_ties import ByMatmul, Flattened, Language, Tower, WrittenWithBias
from torch import Tensor, nn

from cases import CASES, Case
from laws import estimate
from natgrad import Gaussian
from natgrad.capture import Capture
from natgrad.engine import Engine
from natgrad.fishers import for_layer
from natgrad.jets import JetLinear
from natgrad.labels import Labels
from natgrad.layers import Layer
from oracles import assert_equal, damped, dense_fisher, error, position_fisher

N = 6


@dataclass(frozen=True)
class Kind:
    """A network with layers of a kind, its input, and the limit above which sides are diagonal."""

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    wide: int | None = None


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(N, *shape)


def tokens(below: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(below, (N, *shape))


def flat(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten())


LAYERS: dict[str, Kind] = {
    **{name: Kind(make, normal(2, 4, 4)) for name, make in KINDS.items()},
    "BatchNorm2d, eval": Kind(lambda: KINDS["BatchNorm2d"]().eval(), normal(2, 4, 4)),
    "Conv2d of groups": Kind(lambda: flat(nn.Conv2d(2, 4, 2, groups=2)), normal(2, 3, 3)),
    "ConvTranspose1d": Kind(lambda: flat(nn.ConvTranspose1d(2, 3, 3, stride=2)), normal(2, 3)),
    "ConvTranspose3d": Kind(lambda: flat(nn.ConvTranspose3d(2, 1, 2)), normal(2, 2, 2, 2)),
    "JetLinear": Kind(lambda: flat(JetLinear(3, 2)), normal(3, 3)),
    "Embedding": Kind(lambda: Tokens(nn.Embedding(7, 3, padding_idx=2)), tokens(7, 3)),
    "EmbeddingBag of sums": Kind(lambda: Tokens(nn.EmbeddingBag(7, 3, mode="sum")), tokens(7, 3)),
    "EmbeddingBag of means": Kind(lambda: Tokens(nn.EmbeddingBag(7, 3, mode="mean")), tokens(7, 3)),
    "MultiheadAttention": Kind(Attend, normal(3, 6)),
    "MultiheadAttention of other widths": Kind(lambda: Attend("three", kdim=3, vdim=4), normal(3, 6)),
    "RNN": Kind(lambda: Read(nn.RNN(3, 2, batch_first=True)), normal(3, 3)),
    "LSTM": Kind(lambda: Read(nn.LSTM(3, 2, 2, batch_first=True, bidirectional=True)), normal(3, 3)),
    "GRU": Kind(lambda: Read(nn.GRU(3, 2, 2, batch_first=True, bidirectional=True)), normal(3, 3)),
    "RNN of two directions": Kind(lambda: Read(nn.RNN(3, 2, batch_first=True, bidirectional=True)), normal(3, 3)),
    "RNNCell": Kind(lambda: Steps(nn.RNNCell(3, 2)), normal(3, 3)),
    "GRUCell": Kind(lambda: Steps(nn.GRUCell(3, 2)), normal(3, 3)),
    "LSTMCell": Kind(lambda: Steps(nn.LSTMCell(3, 2)), normal(3, 3)),
    "a weight of two layers": Kind(Tower, normal(3, 4)),
    "an embedding that is the head": Kind(Language, tokens(7, 3)),
    "an embedding that is the head by hand": Kind(ByMatmul, tokens(7, 3)),
    "an embedding that is the head of flat states": Kind(Flattened, tokens(7, 3)),
    "a layer that is also multiplied with": Kind(WrittenWithBias, normal(3, 4)),
    "a weight of one's own": Kind(ByLinear, normal(2, 3)),
    "a weight of one's own, transposed": Kind(FromTheRight, normal(3)),
    "a wide head": Kind(lambda: vectors(nn.Tanh(), nn.Linear(4, 9)), normal(2, 4, 4), wide=8),
}


MIXED = ("BatchNorm1d", "1")
"""In front of a batch normalisation in training the loss of one example depends on all: only the sum is defined."""


@cache
def seen(name: str) -> tuple[list[tuple[Layer, Capture]], list[Tensor]]:
    """What the layers of a network have seen, of half the square to random targets, and every example's loss."""
    torch.manual_seed(0)
    kind = LAYERS[name]
    model, x = kind.make(), kind.x()
    y = torch.randn_like(model(x))
    engine = Engine(model, Labels(Gaussian(), "empirical", targets=y), only_training=False, wide=kind.wide)
    engine.armed = True
    output = model(x)
    (record,) = engine.everything()
    engine.close()
    losses = [0.5 * each.square().sum() for each in output - y]
    return [(layer, capture) for layer in engine.layers.values() for capture in record.captures(layer)], losses


@pytest.mark.parametrize("name", LAYERS)
def test_captured_gradients_are_those_of_every_example(name: str) -> None:
    found, losses = seen(name)
    assert found
    for layer, capture in found:
        gradients = [torch.autograd.grad(loss, layer.parameters, retain_graph=True) for loss in losses]
        expected = torch.stack([layer.pack(list(each)) for each in gradients], -3)
        (DW,) = capture.weight_gradients()
        if (name, layer.name) == MIXED:
            DW, expected = DW.sum(-3), expected.sum(-3)
        scale = expected.norm().clamp(min=1e-3)  # a key's bias has gradients of rounding alone
        assert DW.shape == expected.shape and float((DW - expected).norm() / scale) < 1e-10, layer.name


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_laws_on_what_layers_have_seen(case: Case, name: str) -> None:
    small = [pair for pair in seen(name)[0] if pair[0].shape[-2:].numel() <= 64]
    unlike = {(type(layer.form), layer.shape, layer.operations): (layer, capture) for layer, capture in small}
    assert unlike
    for layer, capture in unlike.values():
        if for_layer(case.make(), layer.kind) == case.make():  # else another row stands in
            assert_laws(case, capture)


def assert_laws(case: Case, capture: Capture) -> None:
    """Symmetry, the dense twin and its inverse; positivity, exactness, trace and error as the facts of the case say."""
    matrix = estimate(case.make(), capture)
    F, exact = matrix.dense(), dense_fisher(capture)
    assert_equal(F.mT, F)
    assert_equal(matrix.trace(), F.diagonal(dim1=-2, dim2=-1).sum(-1))
    M = torch.randn(2, *matrix.shape)
    assert_equal((matrix @ M).flatten(-2), (F @ M.flatten(-2).unsqueeze(-1)).squeeze(-1))
    damping = 0.1 * float(F.diagonal(dim1=-2, dim2=-1).mean())
    expected = torch.linalg.solve(damped(matrix, damping), M.flatten(-2).unsqueeze(-1)).squeeze(-1)
    assert_equal((matrix.inverse(damping) @ M).flatten(-2), expected, 1e-8)
    if case.definite:
        eigenvalues = torch.linalg.eigvalsh(F)
        assert (eigenvalues >= -1e-12 * eigenvalues.amax(-1, keepdim=True)).all()
    if case.exact:
        assert_equal(F, exact)
    if case.trace:
        whose = exact if case.trace == "fisher" else position_fisher(capture)
        assert_equal(matrix.trace(), whose.diagonal(dim1=-2, dim2=-1).sum(-1))
    if case.below:
        assert error(F, exact) <= error(estimate(case.below(), capture).dense(), exact) * (1 + 1e-12) + 1e-10
