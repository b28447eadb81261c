"""Weights that several modules use: one block, the sum of what every use does with it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import pytest
import torch
from torch import Tensor, nn

import natgrad
from laws import estimate
from natgrad import KFAC, TKFAC, ExactFisher, Gaussian
from natgrad.capture import Capture
from natgrad.engine import Engine
from natgrad.labels import Labels
from natgrad.layers import cover
from natgrad.matrix import Kronecker
from natgrad.record import Record
from natgrad.sparse import Together
from oracles import assert_equal, per_example_gradients, position_fisher

N, T, V, D = 5, 3, 7, 4


class Tower(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self, share_bias: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.read = nn.Linear(D, D, bias), nn.Linear(D, D, bias), nn.Linear(D, 2)
        self.second.weight = self.first.weight
        if share_bias:
            self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).mean(1)
        return self.read(torch.tanh(self.second(h)))


class Language(nn.Module):
    """A language model of one layer whose head is its embedding."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        return self.head(torch.tanh(self.inner(h)).cumsum(1) + h).mT  # (n, V, T)


def half_square(output: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (output - y).square().sum()


def recorded(model: nn.Module, x: Tensor, y: Tensor) -> Record:
    engine = Engine(model, cover(model).layers.values(), Labels(Gaussian(), "empirical", targets=y))
    engine.armed = True
    model(x)
    engine.close()
    (record,) = engine.everything()
    return record


@pytest.mark.parametrize(("share_bias", "bias"), [(False, True), (True, True), (False, False)])
def test_linear_layers_with_one_weight_are_one_layer_called_twice(share_bias: bool, bias: bool) -> None:
    model, x, y = Tower(share_bias, bias), torch.randn(N, T, D), torch.randn(N, 2)
    coverage = cover(model)
    assert list(coverage.layers) == ["first", "read"]
    layer = coverage.layers["first"]
    assert [use.name for use in layer.uses] == ["first", "second"] and layer.kind == "plain"
    record = recorded(model, x, y)
    (seen,) = record.captures(layer)
    assert type(seen) is Capture and seen.a.shape[-2] == T + 1 and seen.rows == N * (T + 1)
    (DW,) = seen.weight_gradients()
    expected = per_example_gradients(model, half_square, x, y)["first"]
    own = slice(None) if share_bias else slice(D)  # biases that are not shared are not in the block
    assert_equal(DW, expected[..., own])
    assert DW.shape[-1] == D + share_bias
    assert set(coverage.uncovered) == ({"first.bias", "second.bias"} if bias and not share_bias else set())
    assert set(coverage.uncovered.values()) <= {"a bias that does not go with all uses of its layer's weight"}
    V_ = [torch.randn_like(p) for p in layer.parameters]
    u = record.directional(layer, V_)
    assert u is not None
    assert_equal(u, torch.einsum("noi,oi->n", DW, layer.pack(V_)).unsqueeze(0))


def language_gradients(model: Language, ids: Tensor, y: Tensor) -> Tensor:
    rows = [
        torch.autograd.grad(half_square(model(ids[n : n + 1]), y[n : n + 1]), model.embed.weight)[0].mT
        for n in range(len(ids))
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
def test_an_embedding_and_the_head_that_is_its_transpose(bias: bool) -> None:
    model, ids, y = Language(bias), torch.randint(V, (N, T)), torch.randn(N, V, T)
    layer = cover(model).layers["embed"]
    assert layer.kind == "mixed" and layer.shape == (D, V) and layer.parameters[0] is model.head.weight
    record = recorded(model, ids, y)
    (seen,) = record.captures(layer)
    assert isinstance(seen, Together)
    expected = language_gradients(model, ids, y)
    (DW,) = seen.weight_gradients()
    assert_equal(DW, expected)
    assert_equal(seen.second_moment(), expected.square().sum(0))
    direction, c = torch.randn(V, D), torch.randn(N)
    assert_equal(seen.along(direction.mT), torch.einsum("noi,io->n", expected, direction))
    assert_equal(seen.combine(c), torch.einsum("noi,n->oi", expected, c))
    u = record.directional(layer, [direction])
    assert u is not None
    assert_equal(u, torch.einsum("noi,io->n", expected, direction).unsqueeze(0))
    assert_equal(seen.to(torch.float32).second_moment().double(), expected.square().sum(0), 1e-6)


def test_both_uses_have_one_factor_with_the_traces_of_the_fisher_of_their_positions() -> None:
    model, ids, y = Language(), torch.randint(V, (N, T)), torch.randn(N, V, T)
    layer = cover(model).layers["embed"]
    (seen,) = recorded(model, ids, y).captures(layer)
    matrix = estimate(TKFAC(), seen)
    assert isinstance(matrix, Kronecker) and matrix.right.shape == (V, 1)
    positions = position_fisher(Capture(seen.a, seen.g, seen.count, seen.rows)).view(D, V, D, V)
    assert_equal(matrix.trace(), torch.einsum("oioi->", positions))
    assert_equal(matrix.left * matrix.right.sum(), torch.einsum("oipi->op", positions))
    assert_equal(matrix.right.squeeze(-1) * matrix.left.trace(), torch.einsum("oioi->i", positions))


def test_the_scale_between_the_uses_does_not_matter() -> None:
    """TKFAC of both uses does not change when a is divided and g multiplied by a number in one of them; KFAC does."""
    model, ids, y = Language(), torch.randint(V, (N, T)), torch.randn(N, V, T)
    (seen,) = recorded(model, ids, y).captures(cover(model).layers["embed"])
    assert isinstance(seen, Together)
    tokens, head = seen.parts
    scaled = Together([tokens, Capture(head.a / 3, head.g * 3, head.count, head.rows, diagonal=head.diagonal)])
    assert_equal(estimate(TKFAC(), scaled).dense(), estimate(TKFAC(), seen).dense())
    found, other = (estimate(KFAC(), x).dense() for x in (scaled, seen))
    assert (found - other).norm() > 0.1 * other.norm()


# Who may share, and who may not.


def test_one_module_under_two_names_is_one_use() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3)})
    model["b"] = model["a"]
    coverage = cover(model)
    assert list(coverage.layers) == ["a"] and not coverage.layers["a"].others and not coverage.uncovered


def test_a_weight_with_a_use_that_no_adapter_knows_stays_uncovered() -> None:
    class Odd(nn.Module):
        weight: nn.Parameter

    linear = nn.Linear(3, 3)
    for other in (Odd(), nn.Bilinear(3, 3, 3)):
        other.weight = linear.weight
        model = nn.ModuleList([linear, other])
        assert cover(model).layers == {}
        assert cover(model).uncovered["0.weight"] == "one parameter in several places: 0.weight, 1.weight"
    excluded = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    excluded[1].weight = excluded[0].weight
    assert cover(excluded, ["1"]).layers == {}


def test_convolutions_share_a_block_if_they_have_as_many_groups() -> None:
    one, other = nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.Conv2d(4, 4, 3, groups=2, stride=2, bias=False)
    other.weight = one.weight
    assert len(cover(nn.Sequential(one, other)).layers["0"].uses) == 2
    single = nn.Conv2d(2, 4, 3, bias=False)
    single.weight = one.weight
    assert cover(nn.ModuleList([one, single])).layers == {}


def test_a_bias_used_elsewhere_is_left_out_of_the_block() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].bias = model[0].bias
    coverage = cover(model)
    assert [layer.shape for layer in coverage.layers.values()] == [(3, 3), (3, 3)]
    assert coverage.uncovered == {"0.bias": "a bias that does not go with all uses of its layer's weight"}


def test_reconstruction_leaves_shared_weights_and_tokens_alone() -> None:
    model = Language()
    natgrad.reconstruct(model, [(torch.randint(V, (N, T)), torch.zeros(N))])
    assert natgrad.restore(model) is model
    assert isinstance(model.head.weight, nn.Parameter) and model.head.weight is model.embed.weight


# Products that are written out.


class ByLinear(Language):
    """The head is written as a product with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        return self.head_of(torch.tanh(self.inner(h)).cumsum(1) + h).mT

    def head_of(self, h: Tensor) -> Tensor:
        return nn.functional.linear(h, self.embed.weight)


class ByMatmul(ByLinear):
    def head_of(self, h: Tensor) -> Tensor:
        return h @ self.embed.weight.T


class ByTranspose(ByLinear):
    def head_of(self, h: Tensor) -> Tensor:
        return torch.matmul(h, self.embed.weight.transpose(0, 1))


class Flattened(ByLinear):
    def head_of(self, h: Tensor) -> Tensor:
        return (h.reshape(-1, D) @ self.embed.weight.t()).view(*h.shape[:-1], V)


class FlatHead(Language):
    """The head is called on all states as one batch."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = torch.tanh(self.inner(h)).cumsum(1) + h
        return self.head(h.flatten(0, 1)).unflatten(0, ids.shape).mT


@pytest.mark.parametrize("make", [ByLinear, ByMatmul, ByTranspose, Flattened, FlatHead])
def test_a_head_that_is_written_as_a_product_or_called_on_flat_states(make: type[Language]) -> None:
    model, ids, y = make(), torch.randint(V, (N, T)), torch.randn(N, V, T)
    layer = cover(model).layers["embed"]
    assert layer.kind == "mixed" and len(layer.uses) == 2 and not cover(model).uncovered
    record = recorded(model, ids, y)
    (seen,) = record.captures(layer)
    expected = language_gradients(model, ids, y)
    (DW,) = seen.weight_gradients()
    assert_equal(DW, expected)
    assert seen.rows == 2 * N * T
    direction = torch.randn(V, D)
    u = record.directional(layer, [direction])
    assert u is not None
    assert_equal(u, torch.einsum("noi,io->n", expected, direction).unsqueeze(0))


class Again(nn.Module, ABC):
    """A linear layer that is called, and multiplied with in a method."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.read = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).mean(1)
        return self.read(torch.tanh(self.again(h) + h))

    @abstractmethod
    def again(self, h: Tensor) -> Tensor: ...


class Written(Again):
    def again(self, h: Tensor) -> Tensor:
        return nn.functional.linear(h, self.first.weight)


class WrittenWithBias(Again):
    def again(self, h: Tensor) -> Tensor:
        return h @ self.first.weight.T + self.first.bias


@pytest.mark.parametrize("make", [Written, WrittenWithBias])
def test_a_linear_layer_that_is_also_multiplied_with(make: type[Again]) -> None:
    model, x, y = make(), torch.randn(N, T, D), torch.randn(N, 2)
    biased = make is WrittenWithBias
    coverage = cover(model)
    layer = coverage.layers["first"]
    assert len(layer.uses) == 2 and set(coverage.uncovered) == (set() if biased else {"first.bias"})
    (seen,) = recorded(model, x, y).captures(layer)
    (DW,) = seen.weight_gradients()
    assert_equal(DW, per_example_gradients(model, half_square, x, y)["first"][..., : D + biased])
    trained(model, x, y)


def trained(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Without a likelihood the gradients are those of the user's backward pass, and also seen once."""
    engine = Engine(model, cover(model).layers.values())
    engine.armed = True
    half_square(model(x), y).backward()
    engine.close()
    (record,) = engine.everything()
    for layer in cover(model).layers.values():
        (seen,) = record.captures(layer)
        total = layer.unpack(sum(DW.sum(0) for DW in seen.weight_gradients()) + torch.zeros(layer.shape))
        for found, p in zip(total, layer.parameters, strict=True):
            assert p.grad is not None
            assert_equal(found, p.grad)


class Decoder(Again):
    """Tied weights of an auto-encoder."""

    def again(self, h: Tensor) -> Tensor:
        return h @ self.first.weight


def test_a_product_that_has_no_common_block_leaves_the_weight_uncovered_with_the_reason() -> None:
    assert list(cover(Decoder()).layers) == ["read"]
    reason = "used by a module, and by hand in a way that has no common block"
    assert cover(Decoder()).uncovered == {"first.weight": reason, "first.bias": reason}


def test_the_exact_fisher_of_a_tied_weight() -> None:
    model, ids = Language(), torch.randint(V, (N, T))
    found = natgrad.fisher(model, ExactFisher(), Gaussian(), [(ids, torch.zeros(N, V, T))])["embed"]
    output = model(ids).flatten(1)
    rows = [
        torch.autograd.grad(output[n, c], model.embed.weight, retain_graph=True)[0].mT.flatten()
        for n in range(N)
        for c in range(V * T)
    ]
    U = torch.stack(rows)
    ratio = found.trace() / (U.square().sum() / N)  # Gaussian counts the terms of an example as it sees fit
    assert_equal(found.dense(), ratio * U.mT @ U / N)
