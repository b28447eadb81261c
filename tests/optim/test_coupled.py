"""Approximations that couple layers, in training: what the optimizer makes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from test_accumulation import check
from test_resume import BREAKS, batches_of, run
from torch import Tensor, nn
from training import batch, copy_of, network, optimizer_of, same, train, values

from natgrad import (
    EKFAC,
    KFAC,
    Approximation,
    Automatic,
    BlockTridiagonal,
    Constant,
    Gaussian,
    KLLimit,
    KrylovNicolaides,
    KrylovResidual,
    QuadraticModel,
    ResidualSpace,
    SpectralSpace,
    Tselepidis,
    TwoLevel,
)
from natgrad.fishers import CoarseSpace
from natgrad.matrix import FactorisationError, LinearMap
from oracles import assert_equal, block, jacobians

COUPLED: dict[str, Approximation] = {
    "Nicolaides": TwoLevel(form="residual"),
    "Nicolaides-EKFAC": TwoLevel(EKFAC(), form="residual"),
    "Spectral": TwoLevel(KFAC(), SpectralSpace(), "residual"),
    "Residual": TwoLevel(KFAC(), ResidualSpace(), "residual", 0.5),
    "KrylovNicolaides": TwoLevel(KFAC(), KrylovNicolaides(), "balanced"),
    "KrylovResidual": TwoLevel(KFAC(), KrylovResidual(), "additive"),
    "Tselepidis": TwoLevel(KFAC(), Tselepidis(), "additive"),
    "BlockTridiagonal": BlockTridiagonal(),
}
every_approximation = pytest.mark.parametrize("approximation", COUPLED.values(), ids=COUPLED)


@dataclass(frozen=True)
class Everything(CoarseSpace):
    """All weights of a layer."""

    def vectors(self, inverse: LinearMap, r: Tensor) -> Tensor:
        return torch.eye(r.numel()).view(-1, *r.shape)


def test_with_all_weights_a_step_is_that_of_the_exact_natural_gradient_of_the_network() -> None:
    """theta - (J^T J / n + damping I)^-1 grad, J the Jacobian in all weights by autograd; labels summed over."""
    model, x, y = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(7, 4), torch.randn(7, 2)
    optimizer = optimizer_of(
        model,
        TwoLevel(KFAC(), Everything(), "residual"),
        likelihood=Gaussian(),
        estimator="exact",
        step_size=Constant(),
        lr=1.0,
        momentum=0.0,
        damping=0.1,
    )
    J = torch.cat(list(jacobians(model, x).values()), -1)
    (0.5 * (model(x) - y).square().sum() / 7).backward()

    def packed(tensors: list[Tensor]) -> Tensor:
        return torch.cat([block(W[None], b[None]).flatten() for W, b in zip(tensors[::2], tensors[1::2], strict=True)])

    before, M = packed(values(model)), packed([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.zero_grad()
    (0.5 * (model(x) - y).square().sum() / 7).backward()
    optimizer.step()
    expected = before - torch.linalg.solve(J.mT @ J / 7 + 0.1 * torch.eye(len(M)), M)
    assert_equal(packed(values(model)), expected)


@every_approximation
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(approximation: Approximation) -> None:
    batches = batches_of()
    parameters, state = run(batches, approximation=approximation, refresh_every=5)
    assert all(entry["refreshes"] > 2 for entry in state["state"].values() if "refreshes" in entry)
    assert same(run(batches, BREAKS, approximation=approximation, refresh_every=5), (parameters, state))


@every_approximation
def test_four_micro_batches_equal_the_one_batch(approximation: Approximation) -> None:
    check(approximation=approximation, step_size=KLLimit())


@every_approximation
def test_it_lowers_the_loss_and_is_not_its_base(approximation: Approximation) -> None:
    model, base = network(), network()
    optimizer = optimizer_of(model, approximation)
    losses = train(model, optimizer, [batch(step, 64) for step in range(24)])
    assert optimizer._now.joint is not None
    assert torch.stack(losses[-4:]).mean() < 0.5 * losses[0]
    inner = approximation.base if isinstance(approximation, TwoLevel) else KFAC()
    assert not same(train(base, optimizer_of(base, inner), [batch(step, 64) for step in range(24)])[1:3], losses[1:3])


@pytest.mark.parametrize(
    "policy", [QuadraticModel(), Automatic(look=1, agreement=0.0)], ids=["quadratic model", "automatic"]
)
def test_layers_that_are_joined_have_one_length(policy: Any) -> None:
    """The ratio of the layers is the map's business: without lengths of their own the run is the same."""
    quadratic = QuadraticModel(per_layer=False)
    without = quadratic if isinstance(policy, QuadraticModel) else replace(policy, precise=quadratic)
    for approximation, alike in ((TwoLevel(form="residual"), True), (KFAC(), False)):
        own, common = network(), network()
        train(own, optimizer_of(own, approximation, step_size=policy), batches_of())
        train(common, optimizer_of(common, approximation, step_size=without), batches_of())
        assert same(values(own), values(common)) == alike


@every_approximation
def test_a_layer_that_is_frozen_on_the_way_stays_where_it_is(approximation: Approximation) -> None:
    model = network()
    optimizer = optimizer_of(model, approximation)
    train(model, optimizer, [batch(step) for step in range(6)])
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    model[0].zero_grad()
    frozen, rest = values(model[0]), values(model[3])
    train(model, optimizer, [batch(step) for step in range(6, 12)])
    assert same(values(model[0]), frozen)
    assert not same(values(model[3]), rest)
    assert all(torch.isfinite(value).all() for value in values(model))


class Sometimes(nn.Module):
    """Its middle layer is used in some steps only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.whole = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.middle(x)) if self.whole else x)


@every_approximation
@pytest.mark.parametrize("start", [0, 3], ids=["reached at first", "reached later"])
def test_a_layer_that_some_steps_do_not_reach(approximation: Approximation, start: int) -> None:
    """Also resumed in between."""

    def few(stop: int | None) -> Any:
        torch.manual_seed(0)
        model = Sometimes()
        optimizer = optimizer_of(model, approximation, observe_every=2)
        for step in range(18):
            if step == stop:
                saved = copy_of(optimizer)
                optimizer = optimizer_of(model, approximation, observe_every=2)
                optimizer.load_state_dict(saved)
            model.whole = (step + start) % 6 < 3
            train(model, optimizer, [batch(step)])
        assert all(torch.isfinite(value).all() for value in values(model))
        return values(model), copy_of(optimizer)

    unbroken = few(None)
    assert same(few(11), unbroken)
    assert same(few(5), unbroken)


@pytest.mark.parametrize(("approximation", "anew"), [(BlockTridiagonal(), True), (TwoLevel(), True), (KFAC(), False)])
def test_statistics_that_span_the_layers_start_anew_when_one_comes_or_goes(
    approximation: Approximation, anew: bool
) -> None:
    torch.manual_seed(0)
    model = Sometimes()
    optimizer = optimizer_of(model, approximation, observe_every=1)
    observations = []
    for trained in (True, False, True):
        model.middle.requires_grad_(trained)
        train(model, optimizer, [batch(step) for step in range(2)])
        known = {name: curvature.observations for name, curvature in optimizer._now.items()}
        assert list(known) == (["first", "middle", "last"] if trained else ["first", "last"])
        observations.append((known["first"], known.get("middle", 0)))
    assert observations == ([(2, 2), (2, 0), (2, 2)] if anew else [(2, 2), (4, 0), (6, 4)])


@dataclass(frozen=True)
class Failing(TwoLevel):
    def couple(self, parts: Any) -> Any:
        raise FactorisationError("no")


def test_without_a_joint_map_the_layers_are_stepped_by_the_base_alone() -> None:
    alone, failing = network(), network()
    train(alone, optimizer_of(alone, KFAC(), step_size=QuadraticModel(), overhead=None), batches_of())
    train(failing, optimizer_of(failing, Failing(), step_size=QuadraticModel(), overhead=None), batches_of())
    assert same(values(failing), values(alone))


@every_approximation
def test_a_model_in_float32_and_in_bfloat16(approximation: Approximation) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = network().to(dtype)
        optimizer = optimizer_of(model, approximation, step_size=QuadraticModel())
        data = [(x.to(dtype), y) for x, y in (batch(step, 64) for step in range(12))]
        losses = train(model, optimizer, data)
        assert torch.stack(losses[-3:]).mean() < losses[0]
        assert not optimizer.statistics()["failures"]
