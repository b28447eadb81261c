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
from natgrad.layers import Coverage, Layer
from natgrad.look import look
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


def recorded(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Record, Coverage]:
    engine = Engine(model, Labels(Gaussian(), "empirical", targets=y))
    engine.armed = True
    model(x)
    (record,) = engine.everything()
    engine.close()
    return record, engine.inventory.coverage()


def embedding(model: nn.Module, ids: Tensor, y: Tensor) -> tuple[Capture, Layer]:
    record, found = recorded(model, ids, y)
    (seen,) = record.captures(found.layers["embed"])
    return seen, found.layers["embed"]


@pytest.mark.parametrize(("share_bias", "bias"), [(False, True), (True, True), (False, False)])
def test_linear_layers_with_one_weight_are_one_layer_called_twice(share_bias: bool, bias: bool) -> None:
    model, x, y = Tower(share_bias, bias), torch.randn(N, T, D), torch.randn(N, 2)
    record, coverage = recorded(model, x, y)
    apart = ["first.bias", "second.bias"] if bias and not share_bias else []
    assert sorted(coverage.layers) == sorted(["first", "read", *apart]) and not coverage.uncovered
    layer = coverage.layers["first"]
    assert layer.names == ("first.weight", "second.weight") and layer.kind == "plain"
    assert [use.x.shape for use in record.calls["first"]] == [(N, T, D), (N, D)]
    (seen,) = record.captures(layer)
    assert type(seen) is Capture and seen.a.shape[-2] == T + 1 and seen.rows == N * (T + 1)
    (DW,) = seen.weight_gradients()
    expected = per_example_gradients(model, half_square, x, y)["first"]
    own = slice(None) if share_bias else slice(D)  # biases that are not shared are not in the block
    assert_equal(DW, expected[..., own])
    assert DW.shape[-1] == D + share_bias
    for name in apart:
        (alone,) = record.captures(coverage.layers[name])
        (db,) = alone.weight_gradients()
        losses = (half_square(model(x[n : n + 1]), y[n : n + 1]) for n in range(N))
        by_autograd = torch.stack([torch.autograd.grad(loss, coverage.layers[name].parameters)[0] for loss in losses])
        assert_equal(db.squeeze(-1), by_autograd)
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
    record, found = recorded(model, ids, y)
    layer = found.layers["embed"]
    assert layer.kind == "mixed" and layer.shape == (D, V) and layer.parameters[0] is model.head.weight
    assert sorted(found.layers) == ["embed", *(["head.bias"] if bias else []), "inner"] and not found.uncovered
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
    seen, _ = embedding(model, ids, y)
    matrix = estimate(TKFAC(), seen)
    assert isinstance(matrix, Kronecker) and matrix.right.shape == (V, 1)
    positions = position_fisher(Capture(seen.a, seen.g, seen.count, seen.rows)).view(D, V, D, V)
    assert_equal(matrix.trace(), torch.einsum("oioi->", positions))
    assert_equal(matrix.left * matrix.right.sum(), torch.einsum("oipi->op", positions))
    assert_equal(matrix.right.squeeze(-1) * matrix.left.trace(), torch.einsum("oioi->i", positions))


def test_the_scale_between_the_uses_does_not_matter() -> None:
    """TKFAC of both uses does not change when a is divided and g multiplied by a number in one of them; KFAC does."""
    model, ids, y = Language(), torch.randint(V, (N, T)), torch.randn(N, V, T)
    seen, _ = embedding(model, ids, y)
    assert isinstance(seen, Together)
    tokens, head = seen.parts
    scaled = Together([tokens, Capture(head.a / 3, head.g * 3, head.count, head.rows, diagonal=head.diagonal)])
    assert_equal(estimate(TKFAC(), scaled).dense(), estimate(TKFAC(), seen).dense())
    found, other = (estimate(KFAC(), x).dense() for x in (scaled, seen))
    assert (found - other).norm() > 0.1 * other.norm()


# Who may share, and who may not.


class InTurn(nn.Module):
    """Modules one after the other."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.inner:
            x = torch.tanh(module(x))
        return x.flatten(1)


def assert_examples(model: nn.Module, x: Tensor) -> Coverage:
    """Every layer has the gradients of every example."""
    y = torch.randn_like(model(x))
    record, found = recorded(model, x, y)
    for layer in found.layers.values():
        (seen,) = record.captures(layer)
        (DW,) = seen.weight_gradients()
        for n in range(len(x)):
            loss = half_square(model(x[n : n + 1]), y[n : n + 1])
            gradients = layer.parts(list(torch.autograd.grad(loss, layer.parameters)))
            for mine, theirs in zip(layer.unpack(DW.select(-3, n)), gradients, strict=True):
                assert_equal(mine, theirs)
    return found


def test_one_module_under_two_names_is_one_layer() -> None:
    linear = nn.Linear(3, 3)
    found = assert_examples(InTurn(linear, linear), torch.randn(N, 3))
    assert list(found.layers) == ["inner.0"] and found.layers["inner.0"].biased and not found.uncovered


class Odd(nn.Module):
    """A function of a weight that is not linear in it."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.exp().sum()


class Double(nn.Module):
    """A convolution with a kernel of one, by another module's matrix."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv1d(x.unsqueeze(-1), self.weight.unsqueeze(-1)).squeeze(-1)


def test_a_weight_with_a_use_that_has_no_rule_stays_uncovered_and_its_bias_does_not() -> None:
    linear, other = nn.Linear(3, 3), Odd()
    other.weight = linear.weight
    found = assert_examples(InTurn(linear, other), torch.randn(N, 3))
    assert list(found.layers) == ["inner.0.bias"]
    assert found.uncovered == {"inner.0.weight": "used by exp too, which has no rule"}


def test_a_bias_with_a_use_that_has_no_rule_is_in_no_block() -> None:
    linear, other = nn.Linear(3, 3), Odd()
    other.weight = linear.bias
    found = assert_examples(InTurn(linear, other), torch.randn(N, 3))
    assert {name: layer.shape for name, layer in found.layers.items()} == {"inner.0": (3, 3)}
    assert found.uncovered == {"inner.0.bias": "used by exp too, which has no rule"}


def test_operations_of_different_kinds_share_a_block_where_their_entries_are_the_same() -> None:
    linear, other = nn.Linear(3, 3, bias=False), Double()
    other.weight = linear.weight
    found = assert_examples(InTurn(linear, other), torch.randn(N, 3))
    assert set(found.layers["inner.0"].operations) == {"linear", "conv1d"}


def test_a_weight_whose_other_use_is_excluded_is_seen_in_both() -> None:
    """A parameter is excluded by the name that it has first."""
    model = InTurn(nn.Linear(3, 3), nn.Linear(3, 3))
    setattr(model.inner[1], "weight", model.inner[0].weight)  # noqa: B010
    x = torch.randn(N, 3)
    assert list(look(model, (x,), exclude=["inner.0"]).layers) == ["inner.1.bias"]


def test_convolutions_share_a_block_if_they_have_as_many_groups() -> None:
    one, other = nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.Conv2d(4, 4, 3, groups=2, stride=2, bias=False)
    other.weight = one.weight
    found = assert_examples(InTurn(one, other), torch.randn(N, 4, 6, 6))
    assert found.layers["inner.0"].shape == (2, 2, 18) and not found.uncovered
    single = nn.Conv2d(2, 4, 3, bias=False)
    single.weight = one.weight
    reason = "used whole and in parts, or in two ways that have no common block"
    found = look(InTurn(one, nn.Conv2d(4, 2, 1, bias=False), single), (torch.randn(N, 4, 6, 6),)).coverage()
    assert list(found.layers) == ["inner.1"] and found.uncovered == {"inner.0.weight": reason}


def test_a_bias_of_two_weights_is_a_layer_of_its_own() -> None:
    model = InTurn(nn.Linear(3, 3), nn.Linear(3, 3))
    setattr(model.inner[1], "bias", model.inner[0].bias)  # noqa: B010
    found = assert_examples(model, torch.randn(N, 3))
    shapes = {"inner.0": (3, 3), "inner.0.bias": (3, 1), "inner.1": (3, 3)}
    assert {name: layer.shape for name, layer in found.layers.items()} == shapes and not found.uncovered


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
    record, found = recorded(model, ids, y)
    layer = found.layers["embed"]
    assert layer.kind == "mixed" and len(record.calls["embed"]) == 2 and not found.uncovered
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
    record, found = recorded(model, x, y)
    assert list(found.layers) == ["first", "first.bias", "read"] and not found.uncovered
    assert len(record.calls["first"]) == 2 and len(record.calls["first.bias"]) == 1 + (make is WrittenWithBias)
    expected = per_example_gradients(model, half_square, x, y)["first"]
    for name, own in (("first", expected[..., :D]), ("first.bias", expected[..., D:])):
        (seen,) = record.captures(found.layers[name])
        (DW,) = seen.weight_gradients()
        assert_equal(DW, own)
    trained(model, x, y)


def trained(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Without a likelihood the gradients are those of the user's backward pass, and also seen once."""
    engine = Engine(model)
    engine.armed = True
    half_square(model(x), y).backward()
    (record,) = engine.everything()
    engine.close()
    for layer in engine.layers.values():
        (seen,) = record.captures(layer)
        total = layer.unpack(sum(DW.sum(0) for DW in seen.weight_gradients()) + torch.zeros(layer.shape))
        for found, p in zip(total, layer.parameters, strict=True):
            assert p.grad is not None
            assert_equal(found, p.grad)


class Decoder(Again):
    """Tied weights of an auto-encoder."""

    def again(self, h: Tensor) -> Tensor:
        return h @ self.first.weight


def test_a_linear_layer_that_is_also_used_backwards_is_one_block() -> None:
    model, x, y = Decoder(), torch.randn(N, T, D), torch.randn(N, 2)
    record, found = recorded(model, x, y)
    layer = found.layers["first"]
    assert layer.shape == (D, D) and not found.uncovered
    assert sorted(use.swapped for use in record.calls["first"]) == [False, True]
    (seen,) = record.captures(layer)
    (DW,) = seen.weight_gradients()
    expected = per_example_gradients(model, half_square, x, y)["first"][..., :D]
    assert_equal(DW, expected)
    direction = torch.randn(D, D)
    u = record.directional(layer, [direction])
    assert u is not None
    assert_equal(u, torch.einsum("noi,oi->n", expected, direction).unsqueeze(0))
    trained(model, x, y)


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
