"""What is special to one kind of layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from test_capture import N, assert_per_example_gradients, captured, half_square, randomised, recorded
from test_kinds import KINDS, data, training, vectors
from torch import Tensor, nn

import natgrad
from natgrad import FNGD, KFAC, BlockTridiagonal, Categorical, NaturalGradient, Woodbury
from natgrad.look import look
from natgrad.record import Share
from oracles import assert_equal, dense_fisher

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap on bilinear layers

# Norms.


def same_buffers(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(model.buffers(), other.buffers(), strict=True))


def test_batch_norm_in_training_is_read_with_the_statistics_of_the_whole_batch_and_does_not_move_its_own() -> None:
    model, x = nn.Sequential(randomised(nn.BatchNorm1d(3)), nn.Tanh()), torch.randn(N, 3)
    twin = copy.deepcopy(model)
    y = torch.randn(N, 3)
    record, layers = recorded(model, x, y)
    twin(x)
    assert same_buffers(model, twin)  # moved once, by the forward pass
    layer, output = layers["0"], twin(x)
    for n in range(N):  # the loss of one example, in the forward pass of all
        loss = half_square(output[n], y[n])
        expected = torch.stack(torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True), -1)
        assert_equal(next(captured(record, layer).weight_gradients())[:, n, 0], expected)
    (part,) = record.captures(layer, share=Share(0.4))
    assert torch.equal(part.a, captured(record, layer).a[:, :2])


@pytest.mark.parametrize("track", [False, True])
def test_batch_norm_without_running_statistics_uses_those_of_the_batch(track: bool) -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=track)).eval(), 3 + torch.randn(N, 3)
    record, layers = recorded(model, x)
    a = captured(record, layers["0"]).a
    assert_equal(a[..., 0].squeeze(-1).mT, model(x).detach())


def test_a_norm_that_is_called_twice_adds_up_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = randomised(nn.LayerNorm(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.tanh(self.norm(x)).cumsum(-1))

    model, x = Twice(), torch.randn(N, 3, 4)
    assert_per_example_gradients(model, x, torch.randn(N, 3, 4), "norm")
    record, layers = recorded(model, x)
    assert captured(record, layers["norm"]).a.shape == (4, N, 6, 2)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_norms_of_torchs_transformer_know_which_dimension_the_examples_are(batch_first: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            encoder = nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=batch_first)
            decoder = nn.TransformerDecoderLayer(4, 2, 5, 0.0, batch_first=batch_first)
            self.enc = nn.TransformerEncoder(encoder, 1, nn.LayerNorm(4), enable_nested_tensor=False)
            self.dec = nn.TransformerDecoder(decoder, 1, nn.LayerNorm(4))

        def forward(self, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            y = self.dec(x, self.enc(x))
            return (y if batch_first else y.transpose(0, 1)).flatten(1)

    model, x, y = Model(), torch.randn(N, 3, 4), torch.randn(N, 12)
    record, layers = recorded(model, x, y)
    norms = {name: layer for name, layer in layers.items() if "norm" in name}
    assert len(norms) == 3 + 4
    for n in range(N):
        loss = half_square(model(x[n : n + 1]), y[n : n + 1])
        for layer in norms.values():
            expected = torch.stack(torch.autograd.grad(loss, layer.parameters, retain_graph=True), -1)
            assert_equal(next(captured(record, layer).weight_gradients())[:, n, 0], expected)


def test_norms_without_weights_are_no_layers_and_those_with_a_frozen_one_keep_the_other() -> None:
    model = nn.Sequential(
        nn.LayerNorm(4, elementwise_affine=False), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.LayerNorm(4)
    )
    model[1].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    x, y = torch.randn(N, 4), torch.randn(N, 4)
    record, layers = recorded(model.eval(), x, y)
    assert {name: layer.shape for name, layer in layers.items()} == {"1.bias": (4, 1), "2": (4, 1, 1), "3": (4, 1, 2)}
    for n in range(N):
        loss = half_square(model(x[n : n + 1]), y[n : n + 1])
        for layer in layers.values():
            gradients = torch.autograd.grad(loss, layer.parameters, retain_graph=True)
            DW = torch.cat(list(captured(record, layer).weight_gradients()), -3).select(-3, n)
            assert_equal(DW, layer.pack(list(gradients)))


def test_kfac_of_a_norm_is_the_covariances_of_its_features() -> None:
    model, (x, _) = KINDS["LayerNorm of images"](), data()
    z = F.layer_norm(x, (4, 4)).flatten(2)  # (n, 2, 16)
    record, layers = recorded(model, x, torch.zeros(len(x), 3))
    seen = captured(record, layers["0"])
    found = KFAC().assemble(KFAC().observe(seen))
    for j in range(16):
        a = torch.stack([z[..., j].flatten(), torch.ones(2 * len(x))], -1)
        assert_equal(found.right[j], a.mT @ a / (2 * len(x)))
        assert_equal(found.left[j, 0, 0], seen.g[j].square().sum() / len(x))


def test_woodbury_of_small_blocks_keeps_no_more_examples_than_weights() -> None:
    model, (x, _) = KINDS["BatchNorm2d"](), data(50)
    record, layers = recorded(model, x, torch.zeros(len(x), 3))
    seen = captured(record, layers["0"])
    matrix = Woodbury().assemble(Woodbury().observe(seen))
    assert matrix.a.shape == (2, 2, 1, 2)
    assert_equal(matrix.dense(), dense_fisher(seen))


def test_layers_around_a_norm_stay_neighbours() -> None:
    model = vectors(nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = NaturalGradient(model, BlockTridiagonal(), likelihood=Categorical())
    training(model, optimizer)
    assert optimizer._now["1"].inverse.following == (3, 5)  # type: ignore[attr-defined]
    M = {name: torch.randn(layer.shape) for name, layer in optimizer.layers.items()}
    joint = optimizer._now.joint
    assert joint is not None
    alone = joint @ {**M, "1": torch.zeros(4, 33)}
    changed = joint @ M
    assert not torch.allclose(alone["4"], changed["4"]) and torch.equal(alone["2"], changed["2"])


# Transposed convolutions.


@pytest.mark.parametrize("padding", [0, 1])
def test_an_output_size_is_read_whatever_the_module_says(padding: int) -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=padding)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[10]).tanh().flatten(1)

    assert_per_example_gradients(Up(), torch.randn(N, 2, 5), torch.randn(N, 30), "up")


# Layers with more than one input, and inputs by name.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=["vectors", "sequences"])
def test_bilinear_layers_give_the_gradients_of_each_example(shape: tuple[int, ...], bias: bool) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Bilinear(4, 3, 2, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.pair(input1=x, input2=torch.tanh(x[..., 1:])))

    model, x = Pair(), torch.randn(N, *shape)
    assert_per_example_gradients(model, x, torch.randn_like(model(x)), "pair")
    record, layers = recorded(model, x)
    layer = layers["pair"]
    V = [torch.randn_like(p) for p in layer.parameters]
    u = record.directional(layer, V)
    assert u is not None
    assert_equal(u[0], captured(record, layer).along(layer.pack(V)))


def test_a_wide_bilinear_layer_is_left_to_adamw_with_the_reason() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Bilinear(100, 60, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x, x[:, :60])

    found = look(Pair(), (torch.randn(N, 100),)).coverage()
    reason = "used by bilinear of 100 x 60 = 6000 inputs, more than 4096: no rule"
    assert not found.layers and found.uncovered == {"pair.weight": reason, "pair.bias": reason}


def test_an_input_may_be_given_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 3), nn.LayerNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=torch.tanh(self.linear(input=x)))

    model, x = Named(), torch.randn(N, 4)
    for name in ("linear", "norm"):
        assert_per_example_gradients(model, x, torch.randn(N, 3), name)
    optimizer = FNGD(model, 1, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    natgrad.reconstruct(model, [(x, None)])


def test_conv1d_of_transformers_itself() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model, x = nn.Sequential(pytorch_utils.Conv1D(3, 4).double()), torch.randn(N, 5, 4)
    record, layers = recorded(model, x)
    assert list(layers) == ["0"] and layers["0"].shape == (3, 5)  # by addmm, which adds the bias itself
    capture = captured(record, layers["0"])
    total = layers["0"].unpack(sum(DW.sum(0) for DW in capture.weight_gradients()) + torch.zeros(3, 5))
    for found, p in zip(total, layers["0"].parameters, strict=True):
        assert p.grad is not None
        assert_equal(found, p.grad)
