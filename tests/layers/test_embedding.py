"""Embeddings and bags: what is captured of tokens is what a dense layer would capture of one-hot vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from laws import estimate
from natgrad import EKFAC, FNGD, KFAC, SNGD, TEKFAC, TKFAC, Approximation, Diagonal, ExactFisher, Gaussian
from natgrad.capture import Capture
from natgrad.engine import Engine
from natgrad.fishers import for_layer
from natgrad.labels import Labels
from natgrad.layers import Layer
from natgrad.look import look
from natgrad.matrix import Kronecker, Spectral
from natgrad.record import Record, Share
from natgrad.sparse import Sparse, SparseCapture
from oracles import assert_equal, dense_fisher

N, V, D = 6, 7, 3
TOKENS = torch.tensor([[0, 2, 2, 5], [1, 1, 1, 1], [6, 0, 3, 0], [4, 2, 5, 4], [0, 0, 2, 1], [3, 6, 6, 2]])
OFFSETS = torch.tensor([0, 3, 3, 4, 9, 12])  # the second bag is empty
ENTRIES = torch.tensor([0, 2, 2, 5, 1, 1, 1, 4, 6, 0, 3, 0, 4, 2])


class Tokens(nn.Module):
    """An embedding, read with any arguments, and a head that mixes what comes out of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(D, 2)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        y = torch.tanh(self.inner(*args, **kwargs))
        return self.head(y.flatten(1, -2).cumsum(1).sum(1) if y.ndim > 2 else y)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], dict[str, Tensor]]] = {
    "tokens": (lambda: nn.Embedding(V, D), (TOKENS,), {}),
    "int32": (lambda: nn.Embedding(V, D), (TOKENS.int(),), {}),
    "by keyword": (lambda: nn.Embedding(V, D), (), {"input": TOKENS}),
    "one a example": (lambda: nn.Embedding(V, D), (TOKENS[:, 0],), {}),
    "of images": (lambda: nn.Embedding(V, D), (TOKENS.view(N, 2, 2),), {}),
    "padding": (lambda: nn.Embedding(V, D, padding_idx=2), (TOKENS,), {}),
    "padding at the end": (lambda: nn.Embedding(V, D, padding_idx=-1), (TOKENS,), {}),
    "sparse gradients": (lambda: nn.Embedding(V, D, sparse=True), (TOKENS,), {}),
    "bag of sums": (lambda: nn.EmbeddingBag(V, D, mode="sum"), (TOKENS,), {}),
    "bag of means": (lambda: nn.EmbeddingBag(V, D, mode="mean"), (TOKENS,), {}),
    "bag with padding": (lambda: nn.EmbeddingBag(V, D, mode="mean", padding_idx=1), (TOKENS,), {}),
    "bag with offsets": (lambda: nn.EmbeddingBag(V, D, mode="mean"), (ENTRIES, OFFSETS), {}),
    "bag with offsets by keyword": (lambda: nn.EmbeddingBag(V, D, mode="sum"), (ENTRIES,), {"offsets": OFFSETS}),
    "bag with the last offset": (
        lambda: nn.EmbeddingBag(V, D, mode="sum", include_last_offset=True),
        (ENTRIES, torch.cat([OFFSETS, torch.tensor([len(ENTRIES)])])),
        {},
    ),
    "weighted bag": (
        lambda: nn.EmbeddingBag(V, D, mode="sum"),
        (TOKENS,),
        {"per_sample_weights": torch.linspace(-1, 2, TOKENS.numel(), dtype=torch.float64).view_as(TOKENS)},
    ),
    "weighted bag with offsets": (
        lambda: nn.EmbeddingBag(V, D, mode="sum", padding_idx=0),
        (ENTRIES, OFFSETS, torch.linspace(-1, 2, len(ENTRIES), dtype=torch.float64)),
        {},
    ),
}
every_case = pytest.mark.parametrize(("make", "args", "kwargs"), CASES.values(), ids=CASES.keys())


def recorded(
    model: nn.Module, y: Tensor, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[Record, Mapping[str, Layer]]:
    engine = Engine(model, Labels(Gaussian(), "empirical", targets=y))
    engine.armed = True
    model(*args, **kwargs)
    (record,) = engine.everything()
    engine.close()
    return record, engine.layers


def per_example(model: Tokens, y: Tensor, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """Gradients (n, out, in) of the half squares of each example alone, by autograd through torch's own module."""
    output = model(*args, **kwargs)
    weight = model.inner.weight
    assert isinstance(weight, Tensor)
    rows = []
    for error in 0.5 * (output - y).square().sum(1):
        (g,) = torch.autograd.grad(error, weight, retain_graph=True)
        rows.append((g.to_dense() if g.is_sparse else g).mT)
    return torch.stack(rows)


@every_case
def test_captured_gradients_are_per_example_gradients(
    make: Callable[[], nn.Module], args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> None:
    model, y = Tokens(make()), torch.randn(N, 2)
    record, layers = recorded(model, y, args, kwargs)
    layer = layers["inner"]
    expected = per_example(model, y, args, kwargs)
    (seen,) = record.captures(layer)
    assert isinstance(seen, SparseCapture)
    (DW,) = seen.weight_gradients()
    assert_equal(DW, expected)
    assert_equal(seen.second_moment(), expected.square().sum(0))
    assert_equal(dense_fisher(seen), torch.einsum("noi,npj->oipj", expected, expected).flatten(2).flatten(0, 1) / N)
    direction = torch.randn(V, D)
    u = record.directional(layer, [direction])
    assert u is not None
    assert_equal(u, torch.einsum("noi,io->n", expected, direction).unsqueeze(0))
    (part,) = record.captures(layer, share=Share(0.5))
    assert_equal(torch.cat(list(part.weight_gradients())), expected[:3])


@every_case
def test_inputs_times_the_block_are_the_outputs(
    make: Callable[[], nn.Module], args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> None:
    module = make()
    record, layers = recorded(module, torch.zeros_like(module(*args, **kwargs)), args, kwargs)
    layer, (use,) = layers[""], record.calls[""]
    form, weights = use.call.form, [p.detach() for p in layer.parameters]
    with torch.no_grad():
        s = form.inputs(use.x, layer.biased) @ layer.pack(weights).mT
        y = form.outputs(module(*args, **kwargs))
        padding = getattr(module, "padding_idx", None)
        if (
            isinstance(module, nn.Embedding) and padding is not None
        ):  # torch hands out the row, and gives it no gradient
            y = y * (args[0] != padding).view(*y.shape[:2], 1)
        assert_equal(s, y, 1e-12)
        assert_equal(form.outputs(form.product(use.operand(layer, weights[0]), None, use.x)), y, 1e-12)
    assert_equal(layer.pack(layer.unpack(layer.pack(weights))), weights[0].mT)


def random_tokens(seed: int, k: int = 1, dtype: torch.dtype = torch.float64) -> tuple[SparseCapture, Capture]:
    """The same inputs sparse and written out, tokens repeated within positions and examples."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V - 1, (20, 4, k), generator=generator)  # the last token never occurs
    values = torch.ones(20, 4, k) if k == 1 else torch.randn(20, 4, k, generator=generator)
    g = torch.randn(20, 4, D, generator=generator) @ torch.randn(D, D, generator=generator)
    sparse = SparseCapture(Sparse(ids, values, V), g, 20, 80)
    return sparse, Capture(sparse.inputs.dense(), g, 20, 80, diagonal=(False, True))


@pytest.mark.parametrize("k", [1, 3])
def test_a_sparse_capture_is_the_dense_one(k: int) -> None:
    sparse, dense = random_tokens(1, k)
    w = torch.randn(80, 1)
    for weights in (None, w):
        assert_equal(sparse.moment_a(weights), dense.moment_a(weights))
        assert_equal(sparse.moment_g(weights), dense.moment_g(weights))
    assert_equal(dense.moment_a(w).squeeze(-1), ((dense.flat_a * w).mT @ dense.flat_a).diagonal())
    assert_equal(sparse.norm_a, dense.norm_a)
    assert_equal(sparse.second_moment(), dense.second_moment())
    assert_equal(torch.cat(list(sparse.weight_gradients())), torch.cat(list(dense.weight_gradients())))
    V_, c = torch.randn(D, V), torch.randn(20)
    assert_equal(sparse.along(V_), dense.along(V_))
    assert_equal(sparse.combine(c), dense.combine(c))
    assert_equal(sparse.gram(), dense.gram())
    left, right = torch.randn(D, D), torch.rand(V, 1)
    assert_equal(sparse.project(left, right).second_moment(), dense.project(left, right).second_moment())
    assert sparse.shared
    single = sparse.to(torch.float32)
    assert single.inputs.dtype == single.g.dtype == torch.float32


def test_the_sparse_capture_of_many_examples_is_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(random_tokens(2))
    expected = whole[1].second_moment()
    monkeypatch.setattr("natgrad.capture._CHUNK", 50)
    assert len(list(whole[0].weight_gradients())) == 10
    assert_equal(whole[0].second_moment(), expected)
    assert_equal(torch.cat(list(whole[0].weight_gradients())), torch.cat(list(whole[1].weight_gradients())))


@pytest.mark.parametrize("make", [KFAC, TKFAC, EKFAC, TEKFAC, SNGD, Diagonal, ExactFisher])
def test_every_approximation_sees_the_same_in_tokens_and_in_one_hot_vectors(
    make: Callable[[], Approximation],
) -> None:
    sparse, dense = random_tokens(3)
    approximation = for_layer(make(), "tokens")
    assert approximation == make()
    assert_equal(estimate(approximation, sparse).dense(), estimate(approximation, dense).dense())
    plain = estimate(make(), Capture(dense.a, dense.g, 20, 80))
    if not isinstance(plain, Spectral):  # one-hot vectors have a diagonal covariance; eigenvectors are not unique there
        assert_equal(estimate(approximation, sparse).dense(), plain.dense())


def test_nothing_of_size_tokens_squared_or_positions_times_tokens_is_made() -> None:
    """A million tokens: a one-hot batch would be 16 GB, a covariance 4 TB."""
    ids = torch.randint(1 << 20, (16, 128))
    model = nn.Sequential(nn.Embedding(1 << 20, 2), nn.Flatten(), nn.Linear(256, 2)).float()
    y = torch.randint(2, (16,))
    for approximation in (KFAC(), EKFAC()):
        optimizer = natgrad.NaturalGradient(model, approximation, likelihood=natgrad.Categorical())
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(ids), y).backward()
            optimizer.step()
        kept = optimizer.state[next(model.parameters())].values()
        assert max(x.numel() for x in kept if isinstance(x, Tensor)) <= 2 << 20


# The Fisher of a model with an embedding.


def test_the_fisher_of_an_embedding_and_its_kfac() -> None:
    model, y = Tokens(nn.Embedding(V, D, padding_idx=2)), torch.randn(N, 2)
    F = natgrad.fisher(model, ExactFisher(), Gaussian(), [(TOKENS, y)])["inner"]
    rows, weight = [], model.inner.weight
    assert isinstance(weight, Tensor)
    for c in range(2):
        output = model(TOKENS)[:, c]
        rows += [torch.autograd.grad(s, weight, retain_graph=True)[0].mT.flatten() for s in output]
    U = torch.stack(rows)
    assert_equal(F.dense(), U.mT @ U / N)
    product = natgrad.fisher(model, KFAC(), Gaussian(), [(TOKENS, y)])["inner"]
    assert isinstance(product, Kronecker)
    counts = torch.bincount(TOKENS[TOKENS != 2], minlength=V).double()
    assert_equal(product.right.squeeze(-1), counts / counts.sum())
    corrected = natgrad.fisher(model, EKFAC(), Gaussian(), [(TOKENS, y)])["inner"]
    assert_equal(corrected.trace(), F.trace())
    distances = [(F.dense() - other.dense()).norm() for other in (corrected, product)]
    assert distances[0] < distances[1]


def test_kfac_is_exact_for_one_token_an_example_and_a_linear_head() -> None:
    """g does not depend on the token: A and G are independent, and A is exactly diagonal."""
    model = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, 2))
    data = [(TOKENS[:, 0], torch.zeros(N, 2))]
    exact, product = (
        natgrad.fisher(model, approximation, Gaussian(), data)["0"] for approximation in (ExactFisher(), KFAC())
    )
    assert_equal(product.dense(), exact.dense())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_reduce_sums_the_tokens_of_an_example(sharing: Any) -> None:
    model = Tokens(nn.Embedding(V, D, padding_idx=2))
    record, layers = recorded(model, torch.randn(N, 2), (TOKENS,), {})
    (seen,) = record.captures(layers["inner"], sharing)
    hot = nn.functional.one_hot(TOKENS, V).double()
    hot[..., 2] = 0
    expected = hot.sum(1, keepdim=True) if sharing == "reduce" else hot
    assert_equal(seen.a, expected)
    assert float(seen.rows) == (N if sharing == "reduce" else float((TOKENS != 2).sum()))


# What is not covered.


def test_settings_that_are_not_linear_are_left_out_with_the_reason() -> None:
    reasons = {}
    for inner in (nn.Embedding(V, D, scale_grad_by_freq=True), nn.EmbeddingBag(V, D, mode="max")):
        found = look(Tokens(inner), (TOKENS,)).coverage()
        assert list(found.layers) == ["head"]
        reasons[type(inner).__name__] = found.uncovered
    assert reasons == {
        "Embedding": {
            "inner.weight": "used by embedding with scale_grad_by_freq: not the gradient of the loss: no rule"
        },
        "EmbeddingBag": {"inner.weight": "used by embedding_bag: mode 'max' is not linear in the weight: no rule"},
    }


def test_a_method_that_weighs_examples_leaves_tokens_to_adamw() -> None:
    model = Tokens(nn.Embedding(V, D))
    optimizer = FNGD(model, first_phase=2)
    assert list(optimizer.layers) == ["head"]
    assert optimizer.uncovered == {"inner.weight": "Embedding; FNGD has no rule for tokens"}
    assert "inner.weight" in repr(optimizer)
