"""Odd ways to use a weight: what is covered has the right gradients, example by example, and the rest has a reason."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad
from natgrad import Categorical, ExactFisher, Gaussian, KLLimit, NaturalGradient
from natgrad.engine import Engine
from natgrad.labels import Labels
from oracles import assert_equal, error

N = 5


class Net(nn.Module):
    """A function of two parameters and the input."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.function = function
        self.w0, self.w1 = (nn.Parameter(torch.randn(shape)) for shape in (*shapes, (3,))[:2])
        self.register_buffer("c", torch.randn(N, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(self, x)
        return y.reshape(len(x), -1)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w, g.T @ x


def changed(w: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    w = w.clone()
    change(w)
    return w


X2, X3 = (N, 3), (N, 2, 3)
MASK = torch.tensor([[1.0, 0.0, 1.0]] * 4)
ODD: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    "in place after a product of sequences": (lambda s, x: F.linear(x, s.w0, s.w1).relu_(), ((4, 3), (4,)), X3),
    "in place after einsum": (lambda s, x: torch.einsum("nti,io->nto", x, s.w0).relu_(), ((3, 4),), X3),
    "in place, twice": (lambda s, x: F.linear(x, s.w0, s.w1).mul_(2).tanh_(), ((4, 3), (4,)), X3),
    "a copy that is masked in place": (lambda s, x: F.linear(x, changed(s.w0, lambda w: w.mul_(MASK))), ((4, 3),), X2),
    "a copy with a row of zeros": (lambda s, x: F.linear(x, changed(s.w0, lambda w: w[0].zero_())), ((4, 3),), X2),
    "a multiple that is changed": (lambda s, x: F.linear(x, (s.w0 * 2).tanh_()), ((4, 3),), X2),
    "a scale of a slice in place": (
        lambda s, x: changed(F.linear(x, s.w0), lambda h: h[:, :2].mul_(s.w1)).tanh(), ((4, 3), (2,)), X2
    ),
    "a shift of a slice in place": (
        lambda s, x: changed(F.linear(x, s.w0), lambda h: h[:, :2].add_(s.w1)).tanh(), ((4, 3), (2,)), X2
    ),
    "a weight that repeats": (lambda s, x: F.linear(x, s.w0.expand(4, 3)).tanh(), ((1, 3),), X2),
    "a bias that repeats": (lambda s, x: F.linear(x, s.w0, s.w1.expand(4)).tanh(), ((4, 3), (1,)), X2),
    "one kernel for all channels": (
        lambda s, x: F.conv1d(x.unsqueeze(-1).expand(-1, -1, 4), s.w0.expand(3, -1, -1), groups=3).tanh(),
        ((1, 1, 2),), X2,
    ),
    "a Toeplitz matrix": (lambda s, x: F.linear(x, s.w0.unfold(0, 3, 1)).tanh(), ((6,),), X2),
    "einsum of a repeated batch": (
        lambda s, x: torch.einsum("btd,bdk->btk", x, s.w0.expand(N, -1, -1)).tanh(), ((1, 3, 4),), X3
    ),
    "einsum with sizes of one": (lambda s, x: torch.einsum("btd,bdk->btk", x, s.w0).tanh(), ((1, 3, 4),), X3),
    "a function of one's own, too": (lambda s, x: Double.apply(x, s.w0).sin() + F.linear(x, s.w0), ((4, 3),), X2),
    "a transform, too": (
        lambda s, x: torch.func.vmap(lambda z: s.w0 @ z)(x).sin() + F.linear(x, s.w0), ((4, 3),), X2
    ),
    "biases that overlap": (
        lambda s, x: F.linear(x, s.w0, s.w1[:4]).sin() + F.linear(x.sin(), s.w0[:2], s.w1[2:4]).sum(1, True),
        ((4, 3), (6,)), X2,
    ),
    "a view without a gradient": (lambda s, x: F.linear(F.linear(x, s.w0).tanh(), frozen(s.w0)), ((4, 3),), X2),
    "a column of size one": (lambda s, x: F.linear(x, s.w0.T[:, :3]).tanh(), ((6, 1),), X2),
    "a bias of one entry": (lambda s, x: F.linear(x, s.w0, s.w1).tanh(), ((4, 3), (1,)), X2),
    "a factor by its name": (lambda s, x: torch.mm(x, mat2=s.w0).tanh(), ((3, 4),), X2),
    "a mask of a cast": (lambda s, x: (x[:4].type_as(s.w0) * 1).sum() + F.linear(x, s.w0).tanh(), ((4, 3),), X2),
    "numbers made into a tensor": (lambda s, x: F.linear(torch.tensor(x.tolist()), s.w0).tanh(), ((4, 3),), X2),
    "a buffer that is written": (lambda s, x: F.linear(s.c.copy_(x), s.w0).tanh(), ((4, 3),), X2),
}  # fmt: skip


def frozen(w: Tensor) -> Tensor:
    with torch.no_grad():
        return w.T


def by_hand(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(y.square().sum(), list(parameters.values()), retain_graph=True, materialize_grads=True)
        for y in model(x)
    ]
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(parameters)}


@pytest.mark.parametrize(("function", "shapes", "size"), ODD.values(), ids=ODD.keys())
def test_what_is_covered_has_the_gradients_of_every_example(function: Any, shapes: Any, size: tuple[int, ...]) -> None:
    model, x = Net(function, *shapes), torch.randn(size, generator=torch.Generator().manual_seed(2))
    likelihood = Gaussian()
    engine = Engine(model, Labels(likelihood, "empirical", targets=torch.zeros(N, model(x).shape[1])))
    engine.armed = True
    for _ in range(2):  # what the first pass shows to be used elsewhere is left to AdamW in the second
        model(x)
        records = engine.everything()
    expected = by_hand(model, x)
    used = {name for name, G in expected.items() if float(G.norm()) > 0}
    covered = set()
    for layer in engine.layers.values():
        found = {name: torch.zeros(N, *p.shape) for name, p in model.named_parameters()}
        for capture in records[0].captures(layer):
            DW = torch.cat(list(capture.weight_gradients()), -3).movedim(-3, 0)
            assert len(DW) == N
            for n, block in enumerate(DW):
                tensors = [found[engine.inventory.name(p)][n] for p in layer.parameters]
                for part, values in zip(layer.parts(tensors), layer.unpack(block), strict=True):
                    part += values
        for p in layer.parameters:
            name = engine.inventory.name(p)
            covered.add(name)
            assert_equal(2 * found[name], expected[name])
    reasons = engine.inventory.coverage().uncovered
    assert all(reasons[name] for name in used - covered)


def test_in_place_activations_of_a_transformer_like_block_train() -> None:
    """3 steps move the weight before an in-place activation as they do before an ordinary one."""
    moved = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(8, 2))
        optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=KLLimit())
        for step in range(3):
            x = torch.randn(N, 2, 3, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.zeros(N, dtype=torch.int64)).backward()
            optimizer.step()
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*moved)


@pytest.mark.parametrize("t", [2, 7, 10, 15])
def test_sequences_that_are_turned_have_their_examples_second(t: int) -> None:
    """Also where their length is a multiple of the number of examples."""

    def function(s: Any, x: Tensor) -> Tensor:
        return F.linear(F.linear(x.transpose(0, 1), s.w0).tanh().sum(0), s.w1)

    model, x = Net(function, (4, 3), (2, 4)), torch.randn(N, t, 3)
    found = natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)])["w0"].dense()
    J = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(model, {"w0": w}, (x,)), model.w0.detach()
    )
    J = J.reshape(N, 2, -1)
    assert_equal(found, torch.einsum("nki,nkj->ij", J, J) / N)


def test_square_windows_as_long_as_the_batch_have_their_examples_in_front() -> None:
    """They are cut out of images (n, h, w, c) as (n windows, side, side, c)."""

    def function(s: Any, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (2, N)).unflatten(3, (2, N)).transpose(2, 3).flatten(0, 2)
        return F.linear(F.linear(windows, s.w0).tanh().unflatten(0, (len(x), -1)).mean((1, 2, 3)), s.w1)

    model, x = Net(function, (4, 3), (2, 4)), torch.randn(N, 2 * N, 2 * N, 3)
    found = natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)])["w0"].dense()
    J = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(model, {"w0": w}, (x,)), model.w0.detach()
    )
    assert_equal(found, torch.einsum("nki,nkj->ij", J.reshape(N, 2, -1), J.reshape(N, 2, -1)) / N)


def test_one_position_at_a_time_with_the_examples_second() -> None:
    model = Net(lambda s, x: F.linear(x, s.w0).tanh()[0], (4, 3))
    model.forward = lambda x: F.linear(x, model.w0).tanh()[0]  # type: ignore[method-assign]
    x = torch.randn(1, 7, 3)
    found = natgrad.fisher(model, ExactFisher(), Gaussian(), [(x, None)])["w0"].dense()
    flat = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh())
    flat[0].weight = model.w0
    assert_equal(found, natgrad.fisher(flat, ExactFisher(), Gaussian(), [(x[0], None)])["0"].dense())


def test_a_part_of_a_parameter_that_is_not_contiguous_trains() -> None:
    moved = []
    for turned in (True, False):
        torch.manual_seed(0)
        attention: Any = nn.MultiheadAttention(4, 2, batch_first=True)
        if turned:
            attention.in_proj_weight = nn.Parameter(attention.in_proj_weight.detach().T.contiguous().T)
        optimizer = NaturalGradient(attention, likelihood=Gaussian(output=0), step_size=KLLimit())
        for step in range(3):
            x = torch.randn(N, 3, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            attention(x, x, x)[0].square().sum().backward()
            optimizer.step()
        moved.append(attention.in_proj_weight.detach().contiguous())
    assert_equal(moved[0], moved[1], 1e-12)


def test_threads_keep_the_hooks_of_their_users() -> None:
    counts = [0, 0]

    def run(k: int) -> None:
        torch.manual_seed(k)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

        def hook(*args: Any) -> None:
            counts[k] += 1

        model[2].register_full_backward_hook(hook)
        engine = Engine(model, Labels(Categorical(), "sampled"))
        engine.armed = True
        for _ in range(20):
            F.cross_entropy(model(torch.randn(N, 3)), torch.zeros(N, dtype=torch.int64)).backward()

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [20, 20]


def test_a_retained_gradient_is_the_users() -> None:
    kept = []

    def function(s: Any, x: Tensor) -> Tensor:
        h = F.linear(x, s.w0)
        h.retain_grad()
        kept.append(h)
        return h.tanh()

    model, x = Net(function, (4, 3)), torch.randn(N, 3)
    engine = Engine(model, Labels(Gaussian(), "exact"))
    for armed in (False, True):
        engine.armed = armed
        model(x).sum().backward()
    assert kept[0].grad is not None and kept[1].grad is not None
    assert_equal(kept[1].grad, kept[0].grad)


def test_a_batch_of_one_loses_no_layer() -> None:
    model = Net(lambda s, x: F.linear(x + s.w0, s.w1).tanh(), (1, 2, 3), (4, 3))
    engine = Engine(model, Labels(Gaussian(), "sampled"))
    engine.armed = True
    for n in (N, 1, N):
        model(torch.randn(n, 2, 3))
        assert sorted(engine.layers) == ["w0", "w1"]


def test_a_mask_that_is_none_is_refused_by_name() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="mask='attention_msk' is no argument of the model, whose forward takes input"):
        NaturalGradient(model, mask="attention_msk")
    with pytest.raises(TypeError, match="mask must be the name of an argument"):
        NaturalGradient(model, mask=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_dim must be a whole number of at least 0, got -7"):
        NaturalGradient(model, batch_dim=-7)
    with pytest.raises(TypeError, match=r"calls must be names of methods, such as \('act',\)"):
        NaturalGradient(model, calls="act")
    assert error(torch.ones(1), torch.ones(1)) == 0


class Scored(nn.Module):
    """With a method whose arguments are those of forward in another order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor, exists: Tensor, shift: Tensor) -> Tensor:
        return self.head(x) + shift.unsqueeze(-1)

    def score(self, x: Tensor, shift: Tensor, exists: Tensor) -> Tensor:
        return self.head(x) + shift.unsqueeze(-1)


@pytest.mark.parametrize("engines", [1, 2])
def test_a_mask_is_an_argument_of_the_method_that_is_called(engines: int) -> None:
    model, x, shift = Scored(), torch.randn(N, 4, 3), torch.ones(N, 4)
    exists = torch.arange(4) < torch.tensor([[1], [2], [3], [4], [2]])
    made = [Engine(model, Labels(Gaussian(), "exact"), mask="exists", calls=("score",)) for _ in range(engines)]
    for engine in made:
        engine.armed = True
    model(x, exists, shift)
    model.score(x, shift, exists)
    for engine in made:
        masks = [record.mask for record in engine.everything()]
        assert len(masks) == 2 and all(mask is not None and torch.equal(mask, exists) for mask in masks)
