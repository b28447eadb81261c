"""Training with tokens, shared weights, wide sides, and Shampoo for the matrices that no rule reads."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import Batch, copy_of, same, through_a_file, train

import natgrad
from natgrad import (
    EKFAC,
    KFAC,
    KPSVD,
    SNGD,
    BlockTridiagonal,
    Categorical,
    Constant,
    ExactFisher,
    ExactQuadraticModel,
    JointWoodbury,
    KLLimit,
    NaturalGradient,
    QuadraticModel,
    Woodbury,
)
from natgrad.matrix import Kronecker, Spectral
from oracles import assert_equal

T, V, D = 3, 7, 4


class Language(nn.Module):
    """A language model of one layer, whose head is its embedding if ``tied``."""

    def __init__(self, tied: bool = True, positions: int = 0, **settings: Any) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(V, D, **settings), nn.Linear(D, D)
        self.positions = nn.Embedding(positions, D) if positions else None
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def features(self, h: Tensor) -> Tensor:
        return torch.tanh(self.inner(h)).cumsum(1) + h

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        if self.positions is not None:
            h = h + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.features(h)).mT  # (n, V, T)


def batches(steps: int, tokens: int = V) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(tokens, (16, 1), generator=generator) for _ in range(steps)]
    return [((x + torch.arange(T)) % tokens, (x + torch.arange(T) + 1) % tokens) for x in rows]


def made(approximation: Any = None, **settings: Any) -> tuple[Language, NaturalGradient]:
    torch.manual_seed(0)
    model = Language(**settings)
    return model, NaturalGradient(model, approximation, likelihood=Categorical(class_dim=1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "approximation", [KFAC(), EKFAC(), KPSVD(), SNGD(), Woodbury(), BlockTridiagonal(), JointWoodbury(), ExactFisher()]
)
def test_a_language_model_trains_with_the_default_policy(approximation: natgrad.Approximation, tied: bool) -> None:
    model, optimizer = made(approximation, tied=tied)
    losses = train(model, optimizer, batches(60))
    torch.manual_seed(0)
    plain = Language(tied=tied)
    assert losses[-1] < train(plain, torch.optim.AdamW(plain.parameters()), batches(60))[-1]
    assert "100.0 % of" in str(optimizer)
    assert ("embed = head" in str(optimizer)) == tied


def shared_factors(model: Language, ids: Tensor) -> tuple[Tensor, Tensor]:
    """P (V,) and S (D, D): the partial traces of the Fisher of all positions of both uses, over the root of its trace.

    By one backward pass for every position and every column of the root of the softmax's Hessian.
    """
    embedded = model.embed(ids).detach().requires_grad_()
    features = model.features(embedded)
    logits = features @ model.embed.weight.detach().mT
    p, phi = logits.softmax(-1).detach(), features.detach()
    P, S, d = torch.zeros(V), torch.zeros(D, D), torch.zeros(())
    for c in range(V):
        for t in range(T):
            e = torch.zeros_like(p)  # p_c^(1/2) (e_c - p) at position t
            e[:, t] = p[:, t, c : c + 1].sqrt() * (F.one_hot(torch.tensor(c), V) - p[:, t])
            (g,) = torch.autograd.grad(logits, embedded, e, retain_graph=True)
            P.index_add_(0, ids.flatten(), g.square().sum(-1).flatten())
            P += torch.einsum("ntd,ntv->v", phi.square(), e.square())
            S += torch.einsum("ntd,nte->de", g, g) + torch.einsum("ntd,nte,ntv->de", phi, phi, e.square())
            d += g.square().sum() + torch.einsum("ntd,ntv->", phi.square(), e.square())
    root = (d * ids.numel()).sqrt()
    return P / root, S / root


def test_the_update_of_a_shared_weight_by_its_formula() -> None:
    """D = (S + sqrt(lambda)/pi)^-1 M (P + pi sqrt(lambda))^-1 with pi = sqrt(mean P / mean eigenvalue of S)."""
    torch.manual_seed(0)
    model, ((x, y),), damping = Language(), batches(1), 0.03
    settings = {"estimator": "exact", "step_size": Constant(), "lr": 0.1, "damping": damping, "overhead": None}
    optimizer = NaturalGradient(model, likelihood=Categorical(class_dim=1), **settings)  # type: ignore[arg-type]
    before = deepcopy(model)
    train(model, optimizer, [(x, y)])
    (M,) = torch.autograd.grad(F.cross_entropy(before(x), y), before.embed.weight)
    P, S = shared_factors(before, x)
    pi = (P.mean() / (S.trace() / D)).sqrt()
    expected = torch.linalg.solve(S + damping**0.5 / pi * torch.eye(D), M.mT) / (P + pi * damping**0.5)
    assert_equal((before.embed.weight - model.embed.weight).detach(), 0.1 * expected.mT, 1e-9)


@pytest.mark.parametrize("approximation", [KFAC(), EKFAC(), KPSVD()])
def test_a_resumed_run_is_the_same_bit_for_bit(approximation: natgrad.Approximation) -> None:
    for settings in ({"tied": True}, {"tied": False, "padding_idx": 2, "positions": T}):
        data = batches(11)
        (model, optimizer), (broken, first), (resumed, second) = (made(approximation, **settings) for _ in range(3))
        train(model, optimizer, data)
        train(broken, first, data[:5])
        resumed.load_state_dict(through_a_file(broken.state_dict()))
        second.load_state_dict(through_a_file(first.state_dict()))
        train(resumed, second, data[5:])
        assert same(list(resumed.parameters()), list(model.parameters()))
        assert same(copy_of(second), copy_of(optimizer))


# Tokens.


@pytest.mark.parametrize("approximation", [KFAC(), EKFAC(), SNGD()])
def test_tokens_never_seen_do_not_move(approximation: natgrad.Approximation) -> None:
    model, optimizer = made(approximation, tied=False, padding_idx=1)
    before = model.embed.weight.detach().clone()
    train(model, optimizer, batches(12, tokens=5))
    after = model.embed.weight.detach()
    moved = (after != before).any(1)
    assert moved.tolist() == [True, False, True, True, True, False, False]
    assert torch.isfinite(after).all()


def test_sparse_gradients_give_the_same_run() -> None:
    (dense, first), (sparse, second) = made(tied=False), made(tied=False, sparse=True)
    losses = [train(model, optimizer, batches(8)) for model, optimizer in ((dense, first), (sparse, second))]
    assert losses[0] == losses[1]
    assert same(list(dense.parameters()), list(sparse.parameters()))


def test_positions_that_all_examples_share() -> None:
    """An embedding called without a batch: with drawn labels the sum over examples has the curvature of the sum."""
    model, optimizer = made(positions=T)
    losses = train(model, optimizer, batches(500))
    assert losses[-1] < 0.2 * losses[0]
    inverse = optimizer._now["positions"].inverse
    assert isinstance(inverse, Kronecker) and inverse.shape == (D, T)


def test_the_curvature_of_shared_positions_is_that_of_positions_given_to_every_example() -> None:
    """In the mean over draws; within the noise of 4000 of them."""

    class Every(Language):
        def forward(self, ids: Tensor) -> Tensor:
            assert self.positions is not None
            h = self.embed(ids) + self.positions(torch.arange(T).expand_as(ids))
            return self.head(self.features(h)).mT

    found = []
    for kind in (Language, Every):
        torch.manual_seed(0)
        model = kind(positions=T)
        settings: dict[str, Any] = {"estimator": "sampled", "draws": 4000, "seed": 1}
        found.append(
            natgrad.fisher(model, KFAC(), Categorical(class_dim=1), batches(1), **settings)["positions"].dense()
        )
    assert_equal(found[0], found[1], 0.06)


@pytest.mark.parametrize("step_size", [KLLimit(), QuadraticModel(), ExactQuadraticModel()])
def test_other_policies_see_both_uses_and_the_shared_positions(step_size: natgrad.StepSize) -> None:
    torch.manual_seed(0)
    model = Language(positions=T)
    optimizer = NaturalGradient(model, likelihood=Categorical(class_dim=1), step_size=step_size)
    losses = train(model, optimizer, batches(60))
    assert losses[-1] < 0.5 * losses[0]


def test_the_empirical_fisher_of_a_tied_model_trains() -> None:
    torch.manual_seed(0)
    model = Language()
    losses = train(model, NaturalGradient(model, EKFAC(), step_size=QuadraticModel()), batches(200))
    assert losses[-1] < 0.2 * losses[0]


def test_samples_and_jacobian_products_give_a_tied_model_the_same_step() -> None:
    """With exact labels the curvature along D, cross terms of both uses included, is the same by both ways."""
    data, found = batches(1), []
    for step_size in (QuadraticModel(), ExactQuadraticModel()):
        torch.manual_seed(0)
        model = Language()
        settings: dict[str, Any] = {"estimator": "exact", "step_size": step_size, "damping": 0.1}
        optimizer = NaturalGradient(model, likelihood=Categorical(class_dim=1), **settings)
        train(model, optimizer, data)
        found.append([p.detach() for p in model.parameters()])
    for sampled, exact in zip(*found, strict=True):
        assert_equal(sampled, exact, 1e-8)


# Wide sides.


@pytest.mark.parametrize(
    ("wide", "words"),
    [(6, ["G diagonal: 7 outputs"]), (4, ["A diagonal: 5 inputs", "G diagonal: 7 outputs"]), (None, [])],
)
def test_a_side_above_the_limit_is_diagonal_and_the_table_says_so(wide: int | None, words: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 7))
    x, y = torch.randn(40, 4), torch.randint(7, (40,))
    for approximation in (KFAC(), EKFAC()):
        optimizer = NaturalGradient(deepcopy(model), approximation, likelihood=Categorical(class_dim=1), wide=wide)
        train(optimizer.model, optimizer, [(x, y)] * 3)
        reports = (natgrad.coverage(model, *inputs, approximation=approximation, wide=wide) for inputs in ((), (x,)))
        for text in (str(optimizer), *map(str, reports)):
            assert [remark for remark in ("A diagonal: 5 inputs", "G diagonal: 7 outputs") if remark in text] == words
        first, last = (optimizer._now[name].inverse for name in ("0", "2"))
        assert isinstance(first, (Kronecker, Spectral)) and isinstance(last, (Kronecker, Spectral))
        assert first.right.shape == (5, 1 if wide == 4 else 5)
        assert last.left.shape == (7, 7 if wide is None else 1)
    F_wide = natgrad.fisher(model, KFAC(), Categorical(class_dim=1), [(x, y)], wide=wide)["2"]
    F_full = natgrad.fisher(model, KFAC(), Categorical(class_dim=1), [(x, y)], wide=None)["2"]
    assert isinstance(F_wide, Kronecker) and isinstance(F_full, Kronecker)
    assert_equal(F_wide.left.squeeze(), F_full.left.diagonal() if wide else F_full.left)


def test_a_head_of_50_000_outputs_has_no_impossible_factor() -> None:
    model = nn.Sequential(nn.Linear(4, 50_000)).float()
    x, y = torch.randn(8, 4, dtype=torch.float32), torch.randint(50_000, (8,))
    optimizer = NaturalGradient(model, likelihood=Categorical(class_dim=1), step_size=QuadraticModel())
    losses = train(model, optimizer, [(x, y)] * 12)
    assert losses[-1] < 0.1 * losses[0]
    assert "G diagonal: 50,000 outputs" in str(optimizer)


def test_the_table_says_what_stands_in() -> None:
    model, _ = made()
    ((x, _),) = batches(1)
    told = str(natgrad.coverage(model, x, approximation=KPSVD()))
    assert told.splitlines()[2].split()[:3] == ["embed", "=", "head"] and "embedding, linear; A diagonal" in told
    assert "A diagonal: 7 tokens; one factor for both uses; TKFAC in place of KPSVD" in told
    untied = Language(tied=False)
    assert "A diagonal: 7 tokens; KFAC in place of Woodbury" in str(
        natgrad.coverage(untied, x, approximation=Woodbury())
    )
    assert "A diagonal: 7 tokens; KFAC in place of Woodbury" in str(natgrad.coverage(untied, approximation=Woodbury()))
    assert "in place of" not in str(natgrad.coverage(untied, x, approximation=KFAC()))


@pytest.mark.parametrize("wide", [0, -1, 2.5, True, "wide"])
def test_a_limit_that_is_none_is_refused(wide: Any) -> None:
    model = Language()
    refused = pytest.raises(ValueError, match="wide must be a whole number of at least 1, or None for no limit")
    with refused:
        NaturalGradient(model, wide=wide)
    with refused:
        natgrad.coverage(model, wide=wide)
    with refused:
        natgrad.fisher(model, KFAC(), Categorical(class_dim=1), batches(1), wide=wide)
    assert not model.embed._forward_hooks


# Shampoo.


class Raw(nn.Module):
    """A network of bare parameters, none of which is used as it is: two matrices, a bias and a kernel with a dimension
    of size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(6, 5) / 3), nn.Parameter(torch.zeros(6))
        self.U = nn.Parameter(torch.randn(3, 1, 2, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("ni,oi->no", x, self.W.sinh()) + self.b.sinh())
        return torch.einsum("nij,oij->no", h.view(-1, 2, 3), self.U.squeeze(1).sinh())


def noisy(steps: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(16, 5, generator=generator) for _ in range(steps)]
    return [(x, (x[:, :3] + 0.3 * x[:, 2:]).argmax(1)) for x in xs]


def test_shampoo_by_its_formula() -> None:
    """The first step from zero is the polar factor of M, at the length of AdamW's step."""
    torch.manual_seed(0)
    model, data = Raw(), noisy(1)
    before = deepcopy(model)
    optimizer = NaturalGradient(model, shampoo=True, adamw={"lr": 0.01, "weight_decay": 0.1})
    train(model, optimizer, data)
    M = torch.autograd.grad(F.cross_entropy(before(data[0][0]), data[0][1]), [before.W, before.U, before.b])
    for p, old, gradient in ((model.W, before.W, M[0]), (model.U, before.U, M[1])):
        U, s, Vh = torch.linalg.svd(gradient.squeeze().flatten(1), full_matrices=False)
        floor = 1e-6 * s.max().square()
        D = U * (s / (s.square() + floor).sqrt()) @ Vh
        length = (gradient / (gradient.abs() + 1e-8)).norm()
        expected = old * (1 - 0.01 * 0.1) - 0.01 * (D * length / D.norm()).view_as(old)
        assert_equal(p.detach(), expected.detach(), 1e-10)
    adamw = before.b * (1 - 0.01 * 0.1) - 0.01 * M[2] / (M[2].abs() + 1e-8)
    assert_equal(model.b.detach(), adamw.detach())


def test_shampoo_is_off_by_default_and_the_table_says_who_steps() -> None:
    model = Raw()
    ((x, _),) = noisy(1)
    for shampoo, rule in ((False, "AdamW"), (True, "Shampoo")):
        optimizer = NaturalGradient(model, shampoo=shampoo)
        for inputs in ((), (x,)):
            for text in (str(optimizer), str(natgrad.coverage(model, *inputs, shampoo=shampoo))):
                rules = {line.split()[0]: line.split()[1] for line in text.splitlines()[2:5]}
                assert rules == {"W": rule, "b": "AdamW", "U": rule}
                assert text.count("known after a pass") == (0 if inputs else 3)
                assert text.count("used by sinh: no rule") == (3 if inputs else 0)
            model(x)
    with pytest.raises(TypeError, match="shampoo must be True or False"):
        NaturalGradient(model, shampoo=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("wide", [None, 5, 4])
def test_shampoo_trains_and_resumes_bit_for_bit(wide: int | None) -> None:
    def raw() -> tuple[Raw, NaturalGradient]:
        torch.manual_seed(0)
        model = Raw()
        return model, NaturalGradient(model, shampoo=True, wide=wide, adamw={"lr": 0.01})

    data = noisy(60)
    (model, optimizer), (broken, first), (resumed, second) = raw(), raw(), raw()
    losses = train(model, optimizer, data)
    assert losses[-1] < 0.6 * losses[0]
    assert ("left" in optimizer.state[model.W]) == (wide is None)
    train(broken, first, data[:23])
    resumed.load_state_dict(through_a_file(broken.state_dict()))
    second.load_state_dict(through_a_file(first.state_dict()))
    train(resumed, second, data[23:])
    assert same(list(resumed.parameters()), list(model.parameters()))
    assert same(copy_of(second), copy_of(optimizer))


def test_shampoo_learns_more_a_step_than_adamw_at_the_same_settings() -> None:
    ends = {}
    for shampoo in (False, True):
        losses = []
        for seed in range(5):
            torch.manual_seed(seed)
            model = Raw()
            losses.append(train(model, NaturalGradient(model, shampoo=shampoo, adamw={"lr": 0.01}), noisy(60))[-10:])
        ends[shampoo] = float(torch.tensor(losses).mean())
    assert ends[True] < ends[False]
