"""Weights that a module of one's own uses: whatever operation it is, and whatever is done to the weight before."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functional import EVERYTHING, assert_captured, assert_exact_fisher, blocks_by_hand, by_a_loop, record_of
from test_capture import armed
from torch import Tensor, nn

import natgrad
from natgrad import ExactFisher, Gaussian, NaturalGradient
from natgrad.labels import Labels
from natgrad.look import look
from oracles import assert_equal

IN, OUT, N, T = 3, 4, 5, 2

Use = Callable[[Tensor, Tensor], Tensor]
"""(W, x) to an output."""


class By(nn.Module):
    """One parameter, and what is done with it at a nonlinear function of the input."""

    def __init__(self, use: Use, *shape: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.use(self.matrix, x)).flatten(1)


def scaled_norm(w: Tensor, x: Tensor) -> Tensor:
    """RMSNorm, written out."""
    return w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


def in_place(w: Tensor, x: Tensor) -> Tensor:
    return x.cos().mul_(w).add_(1.0)


def shifted_in_place(w: Tensor, x: Tensor) -> Tensor:
    return x.cos().add_(w)


def class_token(w: Tensor, x: Tensor) -> Tensor:
    return torch.cat([w.expand(len(x), -1, -1), x], 1).cumsum(1)


def repeated_token(w: Tensor, x: Tensor) -> Tensor:
    return torch.cat([w.repeat(len(x), 1, 1), x], 1).cumsum(1)


def token_used_twice(w: Tensor, x: Tensor) -> Tensor:
    token = w.expand(len(x), -1, -1)
    return torch.cat([token.cumsum(-1), torch.cat([token, x], 1).cumsum(1)], 1)


def queries(w: Tensor, x: Tensor) -> Tensor:
    """Learned queries, the same for every example, that attend to it."""
    z = w.expand(len(x), -1, -1)
    return F.scaled_dot_product_attention(F.layer_norm(z, (IN,)), x, x) + z


def several_names(w: Tensor, x: Tensor) -> Tensor:
    kernel = w
    again = kernel.T
    return F.linear(x, kernel) + x.sin() @ again


def chunks(w: Tensor, x: Tensor) -> Tensor:
    q, k = w.chunk(2)
    return F.linear(x, q).sin() * F.linear(x, k)


PRODUCTS: dict[str, tuple[Use, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (lambda w, x: F.linear(x, w), (T, IN), (OUT, IN)),
    "linear by keyword": (lambda w, x: F.linear(input=x, weight=w), (T, IN), (OUT, IN)),
    "linear of vectors": (lambda w, x: F.linear(x, w), (IN,), (OUT, IN)),
    "x @ W": (lambda w, x: x @ w, (T, IN), (IN, OUT)),
    "x @ W.T": (lambda w, x: x @ w.T, (T, IN), (OUT, IN)),
    "x.matmul(W.t())": (lambda w, x: x.matmul(w.t()), (T, IN), (OUT, IN)),
    "torch.matmul(x, W.mT)": (lambda w, x: torch.matmul(x, w.mT), (T, IN), (OUT, IN)),
    "W @ x": (lambda w, x: w @ x, (IN, T), (OUT, IN)),
    "W @ x of vectors by transposing": (lambda w, x: (w @ x.T).T, (IN,), (OUT, IN)),
    "mm": (lambda w, x: torch.mm(x, w), (IN,), (IN, OUT)),
    "mv": (lambda w, x: torch.mv(x, w).unsqueeze(-1), (IN,), (IN,)),
    "addmm": (lambda w, x: torch.addmm(x.sin()[:, :1], x, w), (IN,), (IN, OUT)),
    "addmm with numbers": (lambda w, x: torch.addmm(x[:, :1], x, w, beta=0.5, alpha=-3), (IN,), (IN, OUT)),
    "bmm of a weight for every example": (lambda w, x: torch.bmm(x, w.expand(len(x), -1, -1)), (T, IN), (IN, OUT)),
    "einsum": (lambda w, x: torch.einsum("nti,oi->nto", x, w), (T, IN), (OUT, IN)),
    "einsum, weight first": (lambda w, x: torch.einsum("oi,nti->nto", w, x), (T, IN), (OUT, IN)),
    "einsum, transposed": (lambda w, x: torch.einsum("...i,io->...o", x, w), (T, IN), (IN, OUT)),
    "einsum without result": (lambda w, x: torch.einsum("ni,io", x, w), (IN,), (IN, OUT)),
    "einsum that turns the output": (lambda w, x: torch.einsum("nti,oi->not", x, w), (T, IN), (OUT, IN)),
    "einsum that sums positions": (lambda w, x: torch.einsum("nti,oi->no", x, w), (T, IN), (OUT, IN)),
    "under two names, both ways": (several_names, (T, IN), (OUT, IN)),
    "times 2": (lambda w, x: F.linear(x, 2 * w), (T, IN), (OUT, IN)),
    "negative": (lambda w, x: x @ -w, (T, IN), (IN, OUT)),
    "over 3, of a transpose": (lambda w, x: x @ (w.T / 3), (T, IN), (OUT, IN)),
    "1 + w": (lambda w, x: F.linear(x, 1 + w), (T, IN), (OUT, IN)),
    "1 - w / 2": (lambda w, x: F.linear(x, 1 - w * 0.5), (T, IN), (OUT, IN)),
    "cast": (lambda w, x: F.linear(x, w.to(x.dtype).contiguous()), (T, IN), (OUT, IN)),
    "clone": (lambda w, x: F.linear(x, w.clone()), (T, IN), (OUT, IN)),
    "reshaped": (lambda w, x: F.linear(x, w.view(OUT, IN)), (T, IN), (OUT * IN,)),
    "of a kernel of one": (lambda w, x: F.linear(x, w.squeeze(-1)), (T, IN), (OUT, IN, 1)),
    "a kernel of one": (lambda w, x: F.conv1d(x, w.unsqueeze(-1)), (IN, T), (OUT, IN)),
    "matmul of a matrix for every head": (lambda w, x: x.unsqueeze(1) @ w, (T, IN), (2, IN, OUT)),
}  # fmt: skip


def loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradients (n, ...) of half the square to y of every example in the parameter."""
    (p,) = model.parameters()
    losses = (0.5 * (model(x[n : n + 1]) - y[n : n + 1]).square().sum() for n in range(len(x)))
    return torch.stack([torch.autograd.grad(loss, p)[0] for loss in losses])


def assert_every_example(model: nn.Module, x: Tensor, names: list[str] | None = None) -> None:
    """The parameter is covered by layers, whose captured and directional gradients are those of every example."""
    y = torch.randn_like(model(x))
    (p,) = model.parameters()
    plain = model(x).detach()
    for target in (y, None):
        model.zero_grad()
        record, output, layers = record_of(model, x, target)
        assert torch.equal(output, plain)
        assert list(layers) == (names or ["matrix"])
        expected, entries = loop(model, x, torch.zeros_like(y) if target is None else y), 0
        V, along = torch.randn_like(p), torch.zeros(len(x))
        for layer in layers.values():
            (capture,) = record.captures(layer)
            DW = torch.cat(list(capture.weight_gradients()), -3)
            entries += layer.view.entries
            for n in range(len(x)):
                (mine,), (theirs,) = layer.unpack(DW.select(-3, n)), layer.parts([expected[n]])
                assert_equal(mine.reshape(theirs.shape), theirs)
            u = record.directional(layer, layer.parts([V]))
            assert u is not None
            along = along + u[0]
        assert entries == p.numel()
        assert_equal(along, (expected * V).reshape(len(x), -1).sum(1))


def assert_fisher(model: nn.Module, x: Tensor) -> None:
    """natgrad.fisher is J^T J / n of the model's output in every block, J by autograd."""
    (p,) = model.parameters()
    J = torch.stack([torch.autograd.grad(value, p, retain_graph=True)[0] for value in model(x).flatten()])
    found, layers = natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)]), look(model, (x,)).layers
    for name, layer in layers.items():
        rows = torch.stack([layer.pack([each]) for each in J])
        if len(layer.shape) == 3:  # groups, each a block
            blocks = [rows[:, k].flatten(1) for k in range(layer.shape[0])]
            assert_equal(found[name].dense(), torch.block_diag(*(block.mT @ block for block in blocks)) / len(x))
        else:
            assert_equal(found[name].dense(), rows.flatten(1).mT @ rows.flatten(1) / len(x))


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_with_a_weight_of_ones_own_is_captured(name: str) -> None:
    use, shape, size = PRODUCTS[name]
    model, x = By(use, *size), torch.randn(N, *shape)
    assert_every_example(model, x)
    assert_fisher(model, x)


ELEMENTWISE: dict[str, tuple[Use, tuple[int, ...], tuple[int, ...]]] = {
    "scale": (lambda w, x: x * w, (T, IN), (IN,)),
    "scale from the left": (lambda w, x: w * x, (T, IN), (IN,)),
    "scale of two dimensions": (lambda w, x: x.mul(w), (2, T, IN), (T, IN)),
    "scale of channels": (lambda w, x: x * w.view(-1, 1, 1), (IN, 2, T), (IN,)),
    "scale of channels, unsqueezed": (lambda w, x: w[:, None] * x, (IN, T), (IN,)),
    "layer scale": (lambda w, x: x + w * x.sin(), (T, IN), (IN,)),
    "one scale": (lambda w, x: w * x, (T, IN), ()),
    "one scale of one entry": (lambda w, x: w * x, (T, IN), (1,)),
    "scale in place": (in_place, (T, IN), (IN,)),
    "RMSNorm": (scaled_norm, (T, IN), (IN,)),
    "RMSNorm of Gemma": (lambda w, x: scaled_norm(1.0 + w, x), (T, IN), (IN,)),
    "shift": (lambda w, x: x.sin() + w, (T, IN), (IN,)),
    "shift, subtracted": (lambda w, x: x - w, (T, IN), (IN,)),
    "shift, subtracted from": (lambda w, x: w - x, (T, IN), (IN,)),
    "shift with a factor": (lambda w, x: torch.add(x, w, alpha=3), (T, IN), (IN,)),
    "shift in place": (shifted_in_place, (T, IN), (IN,)),
    "one shift": (lambda w, x: x + w, (T, IN), (1,)),
    "shift of channels": (lambda w, x: x + w.view(1, -1, 1), (IN, T), (IN,)),
    "positions": (lambda w, x: x + w, (T, IN), (T, IN)),
    "positions, with a dimension of one": (lambda w, x: x.sin() + w, (T, IN), (1, T, IN)),
    "PReLU of one slope": (lambda w, x: F.prelu(x, w), (IN, T), (1,)),
    "PReLU of channels": (lambda w, x: F.prelu(x, w), (IN, T), (IN,)),
    "class token": (class_token, (T, IN), (1, 1, IN)),
    "class token, repeated": (repeated_token, (T, IN), (1, 1, IN)),
    "class tokens": (class_token, (T, IN), (1, 2, IN)),
    "class token, used twice": (token_used_twice, (T, IN), (1, 1, IN)),
    "queries": (queries, (T, IN), (1, 2, IN)),
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_scales_and_shifts_of_ones_own_are_captured(name: str) -> None:
    use, shape, size = ELEMENTWISE[name]
    model, x = By(use, *size), torch.randn(N, *shape)
    assert_every_example(model, x)
    assert_fisher(model, x)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_batch_of_one_example_is_read_as_a_larger_one_is(name: str) -> None:
    use, shape, size = ELEMENTWISE[name]
    model, x = By(lambda w, x: use(w, x), *size), torch.randn(N, *shape, requires_grad=True)
    with armed(model, Labels(Gaussian(), "exact")) as engine:
        for batch in (x, x[:1]):
            model(batch)
        assert not engine.inventory.coverage().uncovered
        (layer,) = engine.layers.values()
        records = engine.everything()
        for draw in range(2):
            whole, one = (list(record.captures(layer)) for record in records)
            mine, theirs = (torch.cat(list(seen[draw].weight_gradients()), -3) for seen in (one, whole))
            assert_equal(mine.select(-3, 0), theirs.select(-3, 0))


def test_some_of_the_positions_are_a_part() -> None:
    model, x = By(lambda w, x: x + w[:, : x.shape[1]], 1, T + 2, IN), torch.randn(N, T, IN)
    y = torch.randn_like(model(x))
    record, _, layers = record_of(model, x, y)
    (layer,) = layers.values()
    (capture,) = record.captures(layer)
    expected = loop(model, x, y)
    DW = torch.cat(list(capture.weight_gradients()))
    for n in range(N):
        (mine,), (theirs,) = layer.unpack(DW[n]), layer.parts([expected[n]])
        assert_equal(mine.reshape(theirs.shape), theirs)
    assert layer.view.entries == T * IN


def test_a_cast_stands_for_the_parameter() -> None:
    model, x = By(lambda w, x: F.linear(x.float(), w.float()).double(), OUT, IN), torch.randn(N, T, IN)
    y = torch.randn_like(model(x))
    record, _, layers = record_of(model, x, y)
    (capture,) = record.captures(layers["matrix"])
    assert capture.a.dtype == torch.float32
    assert_equal(torch.cat(list(capture.weight_gradients())).double(), loop(model, x, y), 1e-6)


# Parts of a weight.


PARTS: dict[str, tuple[Use, tuple[int, ...], tuple[int, ...], list[str]]] = {
    "chunks": (chunks, (T, IN), (2 * OUT, IN), ["matrix[0:4]", "matrix[4:8]"]),
    "slices": (
        lambda w, x: F.linear(x, w[:1]) + x @ w[1:].T, (T, IN), (OUT, IN), ["matrix[0]", "matrix[1:4]"]
    ),
    "split": (
        lambda w, x: torch.cat([F.linear(x, part).sin() for part in w.split([1, 2, 1])], -1),
        (T, IN),
        (OUT, IN),
        ["matrix[0]", "matrix[1:3]", "matrix[3]"],
    ),
    "columns": (
        lambda w, x: F.linear(x[..., :2], w[:, :2]) * F.linear(x[..., 2:], w[:, 2:]),
        (T, IN),
        (OUT, IN),
        ["matrix@0", "matrix@2"],
    ),
    "experts one after the other": (
        lambda w, x: torch.stack([torch.tanh(x @ w[k]) for k in range(3)]).sum(0),
        (T, IN),
        (3, IN, OUT),
        ["matrix[0]", "matrix[1]", "matrix[2]"],
    ),
    "rows of positions": (
        lambda w, x: x.sin() * w[0] + w[1], (T, IN), (2, IN), ["matrix[0]", "matrix[1]"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_weight_are_layers_of_their_own(name: str) -> None:
    use, shape, size, names = PARTS[name]
    model, x = By(use, *size), torch.randn(N, *shape)
    assert_every_example(model, x, names)
    assert_fisher(model, x)


# Experts: groups of one parameter.


def by_bmm(w: Tensor, x: Tensor) -> Tensor:
    """x (n, groups, IN): one position for every group."""
    return torch.bmm(x.transpose(0, 1), w).transpose(0, 1)


GROUPS: dict[str, tuple[Use, tuple[int, ...], tuple[int, ...]]] = {
    "bmm": (by_bmm, (2, IN), (2, IN, OUT)),
    "baddbmm": (
        lambda w, x: torch.baddbmm(x.transpose(0, 1)[..., :1], x.transpose(0, 1), w).transpose(0, 1),
        (2, IN),
        (2, IN, OUT),
    ),
    "baddbmm with numbers": (
        lambda w, x: torch.baddbmm(x.transpose(0, 1)[..., :1], x.transpose(0, 1), w, beta=2, alpha=0.5).transpose(0, 1),
        (2, IN),
        (2, IN, OUT),
    ),
    "einsum": (lambda w, x: torch.einsum("nhi,hoi->nho", x, w), (2, IN), (2, OUT, IN)),
    "einsum of sequences": (lambda w, x: torch.einsum("nthi,hio->ntho", x, w), (T, 2, IN), (2, IN, OUT)),
    "einsum of two inputs": (lambda w, x: torch.einsum("nthi,hio->nto", x, w), (T, 2, IN), (2, IN, OUT)),
    "einsum of two outputs": (lambda w, x: torch.einsum("nti,iho->ntho", x, w), (T, IN), (IN, 2, OUT)),
    "einsum of heads in front": (lambda w, x: torch.einsum("nhti,hio->nhto", x, w), (2, T, IN), (2, IN, OUT)),
    "matmul": (lambda w, x: x @ w, (2, T, IN), (2, IN, OUT)),
    "matmul from the left": (lambda w, x: w @ x, (2, IN, T), (2, OUT, IN)),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_parameters_of_three_dimensions_are_groups(name: str) -> None:
    use, shape, size = GROUPS[name]
    model, x = By(use, *size), torch.randn(N, *shape)
    assert_every_example(model, x)
    assert_fisher(model, x)
    grouped = name not in ("einsum of two inputs", "einsum of two outputs")
    assert len(look(model, (x,)).layers["matrix"].shape) == (3 if grouped else 2)


class Mixture(nn.Module):
    """Experts as Mixtral has them: each is given the tokens that chose it, perhaps none."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, OUT, IN))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen = tokens[:, 0].gt(0).long()  # nobody chooses the last one
        y = torch.zeros(len(tokens), OUT)
        for k in range(3):
            rows = (chosen == k).nonzero().squeeze(-1)
            y = y.index_add(0, rows, F.linear(tokens[rows], self.up[k]))
        return y.tanh().view(len(x), -1)


def test_experts_are_given_the_tokens_that_chose_them() -> None:
    model, x = Mixture(), torch.randn(N, T, IN)
    record, _, layers = record_of(model, x, torch.zeros(N, T * OUT))
    assert list(layers)[:2] == ["up[0]", "up[1]"]
    (0.5 * model(x).square().sum()).backward()
    assert model.up.grad is not None
    for k in range(2):
        (capture,) = record.captures(layers[f"up[{k}]"])
        total = torch.cat(list(capture.weight_gradients())).sum(0)
        assert_equal(total, model.up.grad[k])
    assert "up[2]" not in layers or not list(record.captures(layers["up[2]"]))


# Rows of a weight by their numbers.


class Rows(nn.Module):
    """A table that is read by index."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], *more: int) -> None:
        super().__init__()
        self.table, self.read = nn.Parameter(torch.randn(4, *(more or (IN,)))), read

    def forward(self, ids: Tensor) -> Tensor:
        return self.read(self.table, ids).tanh().flatten(1).cumsum(1)


@pytest.mark.parametrize(
    "read",
    [
        lambda w, ids: w[ids],
        lambda w, ids: w[ids - 4],  # from the end
        lambda w, ids: torch.stack([w.index_select(0, column) for column in ids.T], 1),
        lambda w, ids: F.embedding(ids, w),
        lambda w, ids: 2 * w[ids],
        lambda w, ids: (w * 3)[ids],
    ],
    ids=["index", "negative index", "index_select", "embedding", "times 2 after", "times 3 before"],
)
def test_rows_by_their_numbers_are_tokens(read: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, ids = Rows(read), torch.randint(4, (N, T))
    y = torch.randn_like(model(ids))
    for target in (y, None):
        record, _, layers = record_of(model, ids, target)
        layer = layers["table"]
        assert layer.kind == "tokens" and layer.shape == (IN, 4)
        (capture,) = record.captures(layer)
        expected = loop(model, ids, torch.zeros_like(y) if target is None else y)
        assert_equal(torch.cat(list(capture.weight_gradients())), expected.mT)


def test_rows_of_several_dimensions_are_tokens_too() -> None:
    model, ids = Rows(lambda w, ids: w[ids], 2, 3), torch.randint(4, (N, T))
    y = torch.randn_like(model(ids))
    record, _, layers = record_of(model, ids, y)
    (capture,) = record.captures(layers["table"])
    assert_equal(torch.cat(list(capture.weight_gradients())), loop(model, ids, y).flatten(2).mT)


# A bias that is added by hand.


class Own(nn.Module):
    """A weight and a bias of its own; what to do with them is said below."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(shape or (OUT, IN)))
        self.shift = nn.Parameter(torch.randn(OUT))


class ByLinear(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.shift).tanh().flatten(1)


class ByKeyword(Own):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix, bias=self.shift).tanh().flatten(1)


class ByAddmm(Own):
    def forward(self, x: Tensor) -> Tensor:
        rows = x if x.ndim == 2 else x.flatten(1)[:, :IN]
        return torch.addmm(self.shift, rows, self.matrix.T).tanh()


class OnFlatRows(Own):
    """All positions of all examples as one batch of rows, as in GPT-2."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.shift, x.flatten(0, -2), self.matrix.T)
        return y.tanh().view(len(x), -1)


class ByTransposed(Own):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrix.T + self.shift).flatten(1)


class InPlace(Own):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.matrix.T
        y += self.shift
        return torch.tanh(y).flatten(1)


class WithNumbers(Own):
    def forward(self, x: Tensor) -> Tensor:
        rows = x if x.ndim == 2 else x.flatten(1)[:, :IN]
        return torch.addmm(self.shift, rows, self.matrix.T, beta=3, alpha=2).tanh()


class Normalised(Own):
    """LayerNorm, written out."""

    def __init__(self) -> None:
        super().__init__(OUT)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x.sin()], -1)[..., :OUT]
        z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return (self.matrix * z + self.shift).tanh().flatten(1)


class FromTheRight(Own):
    def __init__(self) -> None:
        super().__init__(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrix + self.shift).flatten(1)


class OfUnlikeFactors(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.matrix, self.shift / 3).tanh().flatten(1)


class OfOneFactor(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.matrix, self.shift * 2).tanh().flatten(1)


class Twice(Own):
    def __init__(self) -> None:
        super().__init__()
        self.back = nn.Parameter(torch.randn(IN, OUT))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(x + self.out(torch.tanh(F.linear(x, self.matrix, self.shift))))
        return x.flatten(1)

    def out(self, h: Tensor) -> Tensor:
        return h @ self.back.T


class Shared(Own):
    """Used with a bias and without."""

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.matrix, self.shift).sin() + F.linear(x.cos(), self.matrix)).flatten(1)


TOGETHER = {"matrix": ("matrix", EVERYTHING, "shift", EVERYTHING)}
APART = {"matrix": ("matrix", EVERYTHING, None, EVERYTHING), "shift": ("shift", EVERYTHING, None, EVERYTHING)}


@pytest.mark.parametrize("make", [ByLinear, ByKeyword, ByAddmm, OfOneFactor])
def test_a_bias_that_the_operation_adds_is_a_column_of_its_block(make: Callable[[], Own]) -> None:
    for shape in ((N, IN), (N, T, IN)):
        assert_captured(make(), torch.randn(shape), TOGETHER)
        assert_exact_fisher(make(), torch.randn(shape), TOGETHER)


@pytest.mark.parametrize("make", [ByTransposed, InPlace, WithNumbers, OfUnlikeFactors, Shared])
def test_a_bias_that_is_added_by_hand_is_a_layer_of_its_own(make: Callable[[], Own]) -> None:
    for shape in ((N, IN), (N, T, IN)):
        assert_captured(make(), torch.randn(shape), APART)
        assert_exact_fisher(make(), torch.randn(shape), APART)


def test_rows_of_positions_are_put_together_by_the_number_of_examples() -> None:
    model, x = OnFlatRows(), torch.randn(N, T, IN)
    y = torch.randn_like(model(x))
    for target in (y, None):
        used = torch.zeros_like(y) if target is None else y
        expected = blocks_by_hand(by_a_loop(model, x, used), TOGETHER)["matrix"]
        record, _, layers = record_of(model, x, target)
        (capture,) = record.captures(layers["matrix"])
        assert_equal(torch.cat(list(capture.weight_gradients())), expected)


def test_a_layer_norm_that_is_written_out_is_a_scale_and_a_shift() -> None:
    model = Normalised()
    assert_captured(model, torch.randn(N, T, IN), APART)
    assert look(model, (torch.randn(N, T, IN),)).layers["matrix"].shape == (OUT, 1, 1)


def test_a_weight_that_is_used_twice_with_several_positions() -> None:
    slices = {**TOGETHER, "back": ("back", EVERYTHING, "none", EVERYTHING)}
    assert_captured(Twice(), torch.randn(N, T, IN), slices)
    assert_exact_fisher(Twice(), torch.randn(N, T, IN), slices)


def test_a_weight_in_times_out_is_a_block_out_times_in() -> None:
    model, x = FromTheRight(), torch.randn(N, IN)
    record, _, layers = record_of(model, x)
    assert {name: layer.shape for name, layer in layers.items()} == {"matrix": (OUT, IN), "shift": (OUT, 1)}
    h = torch.tanh(x @ model.matrix + model.shift)
    g = h * (1 - h**2)
    for name, expected in (("matrix", g.unsqueeze(-1) * x.unsqueeze(1)), ("shift", g.unsqueeze(-1))):
        (capture,) = record.captures(layers[name])
        (DW,) = capture.weight_gradients()
        assert torch.allclose(DW, expected, rtol=1e-12)
    twin = ByTransposed()
    twin.load_state_dict({"matrix": model.matrix.mT, "shift": model.shift})
    for net in (model, twin):
        optimizer = NaturalGradient(net, likelihood=Gaussian())
        for _ in range(3):
            optimizer.zero_grad()
            (0.5 * net(x).square().sum() / N).backward()
            optimizer.step()
        assert not optimizer.uncovered
    assert torch.allclose(model.matrix.mT, twin.matrix, rtol=1e-10)
    assert torch.allclose(model.shift, twin.shift, rtol=1e-10)


# What has no rule.


class LowRank(nn.Module):
    """W = B A, a product of two parameters before there is any data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(OUT, 2)), nn.Parameter(torch.randn(2, IN))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.first @ self.second)


def test_a_product_of_two_parameters_is_left_to_adamw_with_the_reason() -> None:
    model, x = LowRank(), torch.randn(N, IN)
    optimizer = NaturalGradient(model, likelihood=Gaussian())
    before = copy.deepcopy(list(model.parameters()))
    for _ in range(2):
        optimizer.zero_grad()
        (0.5 * model(x).square().sum() / N).backward()
        optimizer.step()
    assert optimizer.uncovered == dict.fromkeys(("first", "second"), "used by a product of parameters: no rule")
    (row,) = (line for line in repr(optimizer).splitlines() if line.startswith("second"))
    assert "a product of parameters" in row and "AdamW" in row
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


REFUSED: dict[str, tuple[Use, tuple[int, ...], tuple[int, ...]]] = {
    "a function of it": (lambda w, x: F.linear(x, w.exp()), (T, IN), (OUT, IN)),
    "its norm": (lambda w, x: F.linear(x, w / w.norm(dim=1, keepdim=True)), (T, IN), (OUT, IN)),
    "its square": (lambda w, x: F.linear(x, w * w), (T, IN), (OUT, IN)),
    "a mask": (lambda w, x: F.linear(x, w * w.detach().gt(0)), (T, IN), (OUT, IN)),
    "data added to it": (lambda w, x: F.linear(x, w + x.detach()[0, :1]), (T, IN), (OUT, IN)),
    "its diagonal": (lambda w, x: torch.einsum("nti,ii->nti", x, w), (T, IN), (IN, IN)),
    "rows that overlap": (lambda w, x: F.linear(x, w[:3]) + F.linear(x, w[1:]), (T, IN), (OUT, IN)),
    "whole and in part": (lambda w, x: F.linear(x, w) + F.linear(x, w[:1]), (T, IN), (OUT, IN)),
    "used by a rule and by none": (lambda w, x: F.linear(x, w) + w.exp().sum(), (T, IN), (OUT, IN)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_left_out_with_a_reason_and_trains_unchanged(name: str) -> None:
    use, shape, size = REFUSED[name]
    model, x = By(use, *size), torch.randn(N, *shape)
    found = look(model, (x,)).coverage()
    assert not found.layers and set(found.uncovered) == {"matrix"}
    assert "not used" not in found.uncovered["matrix"]
    optimizer = NaturalGradient(model, likelihood=Gaussian())
    before = model.matrix.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        (0.5 * model(x).square().sum() / N).backward()
        optimizer.step()
    assert not optimizer.layers and not torch.equal(before, model.matrix)
