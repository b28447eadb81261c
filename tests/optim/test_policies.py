"""Policies decide by their formulas; the cadence is a table of steps."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import backward, batch, copy_of, network, optimizer_of, same, train, values

import natgrad
from natgrad import (
    EKFAC,
    FOOF,
    KFAC,
    TEKFAC,
    TKFAC,
    Automatic,
    Categorical,
    Constant,
    ExactQuadraticModel,
    Gaussian,
    KLLimit,
    LayerLength,
    LevenbergMarquardt,
    NaturalGradient,
    QuadraticModel,
    SpectralDescent,
    TraceDamping,
)
from natgrad.optim.cadence import Cadence
from natgrad.optim.clock import new_clock, remember
from natgrad.optim.damping import ConstantDamping
from natgrad.optim.directions import Directions
from natgrad.optim.step_size import Decision, Situation
from oracles import assert_equal

# The quadratic model.


def test_the_samples_of_the_exact_estimator_give_the_model_of_exact_jacobian_products() -> None:
    runs = []
    for step_size in (QuadraticModel(), ExactQuadraticModel()):
        model = network()
        optimizer = optimizer_of(model, step_size=step_size, estimator="exact")
        train(model, optimizer, [batch(step) for step in range(5)])
        seen = optimizer.statistics()
        runs.append((torch.tensor([seen["alpha"], seen["mu"], seen["kl"]]), values(model)))
    assert_equal(runs[0][0], runs[1][0], 1e-6)  # the scalars are read in single precision
    for found, expected in zip(runs[0][1], runs[1][1], strict=True):
        assert_equal(found, expected, 1e-6)


def test_sampled_and_exact_curvature_along_the_directions_agree_to_1e_8(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    optimizer = optimizer_of(model, step_size=ExactQuadraticModel(), estimator="exact")
    pairs = []

    def both(self: Any, directions: Any, *others: Any) -> Any:
        pairs.append((directions.sampled_curvature(), directions.exact_curvature()))
        return QuadraticModel.products(self, directions, *others)

    monkeypatch.setattr(ExactQuadraticModel, "products", both)
    train(model, optimizer, [batch(step) for step in range(4)])
    for sampled, exact in pairs:
        assert_equal(sampled, exact, 1e-8)
    assert len(pairs) == 4


def situation(seed: int, lr: float = 1.0) -> tuple[Situation, torch.Tensor, torch.Tensor]:
    """A random 2 x 2 quadratic model, with its matrix B and slopes b."""
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn(2, 2, generator=generator)
    B = R @ R.mT + 0.1 * torch.eye(2)
    b = torch.randn(2, generator=generator).abs()
    dd, dp, pp = float(B[0, 0]), float(B[0, 1]), float(B[1, 1])
    read = {"slope": float(b[0]), "drift": float(b[1])}
    read |= {f"D{x}D": dd for x in "BF"} | {f"D{x}P": dp for x in "BF"} | {f"P{x}P": pp for x in "BF"}
    return Situation(read, lr=lr), B, b


@pytest.mark.parametrize("seed", range(5))
def test_the_quadratic_model_returns_the_minimiser_of_a_dense_solve_and_no_grid_point_is_lower(seed: int) -> None:
    now, B, b = situation(seed)
    decided = QuadraticModel(limit=None).decide(now)
    found = torch.tensor([decided.alpha, decided.mu])
    assert_equal(found, torch.linalg.solve(B, b), 1e-10)

    def q(v: torch.Tensor) -> torch.Tensor:
        return 0.5 * (v @ B * v).sum(-1) - v @ b

    grid = found + 0.3 * torch.cartesian_prod(torch.linspace(-1, 1, 11), torch.linspace(-1, 1, 11))
    assert (q(grid) >= q(found.unsqueeze(0)) - 1e-12).all()


def test_the_quadratic_model_goes_along_d_alone_where_the_plane_is_degenerate() -> None:
    read = {"slope": 2.0, "drift": 0.0, **dict.fromkeys(("DBP", "PBP", "DFP", "PFP"), 0.0), "DBD": 4.0, "DFD": 4.0}
    decided = QuadraticModel(limit=None).decide(Situation(read))
    assert (decided.alpha, decided.mu) == (0.5, 0.0)


def test_the_quadratic_model_keeps_its_kl_limit() -> None:
    now, _, _ = situation(0)
    decided = QuadraticModel(limit=1e-3).decide(now)
    assert 0.5 * now.form("F", decided.alpha, decided.mu) == pytest.approx(1e-3)
    doubled = QuadraticModel(limit=1e-3).decide(replace(now, capacity=2.0))
    assert 0.5 * now.form("F", doubled.alpha, doubled.mu) == pytest.approx(2e-3)


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_every_layer_has_the_length_that_minimises_the_model_along_it_alone(damping: float) -> None:
    model = network()
    optimizer = optimizer_of(model, estimator="exact", damping=damping, step_size=QuadraticModel(per_layer=False))
    train(model, optimizer, [batch(step) for step in range(3)])
    seen = []

    class Looking(QuadraticModel):
        def prepare(self, directions: Any, *others: Any) -> Any:
            seen.append((directions.lengths(damping), {name: block.clone() for name, block in directions.D.items()}))
            alone = []
            for name in directions.layers:  # the same through exact Jacobian products, with all other layers at 0
                only = {other: D * (other == name) for other, D in seen[0][1].items()}
                still = {other: P * 0 for other, P in directions.P.items()}
                one = replace(directions, D=only, P=still)
                curvature = torch.maximum(one.exact_curvature()[0], one.slope() ** 2 / math.log(3))
                alone.append(one.slope() / (curvature + damping * one.gram()[0]))
            seen.append((torch.stack(alone), {}))
            scaled = directions.scaled(seen[0][0])
            afresh = replace(scaled)  # without the responses that were kept
            assert_equal(scaled.sampled_curvature(), afresh.sampled_curvature(), 1e-10)
            return scaled

    optimizer.step_size = Looking()
    optimizer._engine.keep_inputs = True
    train(model, optimizer, [batch(9)])
    assert_equal(seen[0][0], seen[1][0], 1e-8)
    assert not torch.allclose(seen[0][0][0], seen[0][0][1], rtol=0.05)


def test_samples_of_a_model_that_is_sure_of_wrong_answers_do_not_lengthen_the_step() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.mul_(1e3)
    x = torch.randn(16, 4)
    y = model(x).argmin(1)  # the likelihood of every label is 0 to rounding, and so is the Fisher
    optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=QuadraticModel(limit=None))
    before = values(model)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    pairs = zip(before, model.parameters(), strict=True)
    promise = sum(float(((old - p.detach()) * p.grad).sum()) for old, p in pairs if p.grad is not None)
    assert 0 < promise <= math.log(3) + 1e-6  # damping alone would promise 400 nats


def test_a_layer_that_does_not_move_keeps_length_zero_and_no_nan_appears() -> None:
    model = network()
    optimizer = optimizer_of(model, step_size=QuadraticModel())
    train(model, optimizer, [batch(0)])
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
    for p in optimizer.layers["0"].parameters:
        p.grad = torch.zeros_like(p)
    lengths = []

    class Looking(QuadraticModel):
        def prepare(self, directions: Any, damping: float, memory: Any) -> Any:
            lengths.extend(directions.lengths(damping).tolist())
            return super().prepare(directions, damping, memory)

    optimizer.step_size = Looking()
    optimizer.step()
    assert lengths[0] == 0.0 < lengths[1]
    assert optimizer.statistics()["skipped"] == 0
    assert all(value.isfinite().all() for value in values(model))


# The trust region and the trust of the automatic policy.

STEP = {"moved": 1.0, "slope": -1.0, "last": 0.04, "cap": 0.05, "back": 0.0, "trust": 1.0, "seen": 60.0}
STEP |= {"precise": 1.0, "looked": 10.0}
LIKE_D = dict.fromkeys(("DBD", "DFD", "PBP", "PFP"), 1.0) | dict.fromkeys(("DBP", "DFP", "DID", "DIP", "PIP"), 0.0)


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_a_step_that_ends_uphill_goes_back_to_where_the_line_through_its_slopes_is_zero(lr: float) -> None:
    read = {"slope": 1.0, "drift": -3.0, **LIKE_D}  # the loss fell by 1 per step at the start and rises by 3 at the end
    decided = Automatic().decide(Situation(read, lr=lr, memory=STEP))
    assert decided.rejected
    assert decided.alpha == 0.0
    assert -lr * decided.mu == pytest.approx(0.75)  # of the way back
    assert decided.memory["cap"] == pytest.approx(0.01)
    assert decided.memory["back"] == 1.0
    assert decided.memory["trust"] == 1.0  # that step said nothing of noise


def test_a_step_that_ends_less_steeply_than_it_began_is_kept() -> None:
    for drift in (0.9, 0.0, -0.9):
        decided = Automatic().decide(Situation({"slope": 1.0, "drift": drift, **LIKE_D}, memory=STEP))
        assert not decided.rejected
        assert decided.alpha > 0


def test_the_trust_region_opens_while_promises_are_kept_and_closes_where_they_are_not() -> None:
    memory = {**STEP, "promise": 1.0, "known": 0.0, "bend": 0.0}
    for drift, cap, trust in [(0.5, 0.1, 0.95), (0.1, 0.035, 0.91), (-0.5, 0.035, 0.85)]:
        read = {"slope": 1.0, "drift": drift, **LIKE_D}
        decided = Automatic(precise=QuadraticModel(limit=1.0)).decide(Situation(read, memory=memory))
        assert decided.memory["cap"] == pytest.approx(cap)
        assert decided.memory["trust"] == pytest.approx(trust)


def test_below_the_threshold_of_trust_the_noisy_policy_is_back() -> None:
    policy = Automatic(threshold=0.9)
    memory = {**STEP, "trust": 0.5, "promise": 1.0, "known": 0.0, "bend": 0.0, "settled": 7.0}
    read = {"slope": 1.0, "drift": 0.1, **LIKE_D}
    assert not policy.decide(Situation(read, memory={**memory, "seen": 5.0})).restart
    long = policy.decide(Situation(read, memory={**memory, "seen": 30.0}))
    assert long.restart and long.memory == {"settled": 7.0}  # it looks again
    decided = policy.decide(Situation(read, memory={**memory, "seen": 20.0}))
    assert decided.restart
    assert decided.memory == {"settled": 7.0, "looked": 10.0}
    assert not policy.needs_samples(decided.memory)
    agreed = {"slope": 1.0, "drift": 0.1, "MV": 1.0, "MM": 1.0, "VV": 1.0}
    later = policy.decide(Situation(agreed, memory=decided.memory))
    assert "precise" not in later.memory


def test_a_step_of_the_model_is_no_longer_than_its_reach_and_the_reach_follows_its_promises() -> None:
    read = {"slope": 1.0, "drift": 0.5, **LIKE_D, "DID": 4.0, "DIP": 0.0, "PIP": 1.0}
    memory = {**STEP, "promise": 1.0, "known": 0.0, "bend": 0.0, "reach": 0.01}
    for drift, reach in [(0.5, 0.02), (0.1, 0.007)]:
        now = Situation({**read, "drift": drift}, memory=memory)
        decided = Automatic(QuadraticModel(limit=None)).decide(now)
        assert decided.memory["reach"] == pytest.approx(reach)
        assert now.form("I", decided.alpha, decided.mu) ** 0.5 == pytest.approx(reach)
        free = QuadraticModel(limit=None).decide(now)
        share = decided.alpha / free.alpha
        assert share < 1 and decided.mu == pytest.approx(share * free.mu)
        assert decided.slope == pytest.approx(share * free.slope)
        assert decided.predicted - decided.slope == pytest.approx(share**2 * (free.predicted - free.slope))


@pytest.mark.parametrize(("cosine", "precise"), [(0.9, True), (0.7, False)])
def test_the_quadratic_model_takes_over_where_gradients_agree(cosine: float, precise: bool) -> None:
    policy, memory = Automatic(look=1), {"settled": 0.0}
    assert policy.averages(memory) == 0.95
    read = {"slope": 1.0, "drift": 0.1, "MV": 6 * cosine, "MM": 4.0, "VV": 9.0}
    memory = dict(policy.decide(Situation(read, lr=0.01, memory=memory)).memory)
    assert memory["agreement"] == pytest.approx(cosine)
    assert policy.needs_samples(memory) is precise
    assert policy.unit(memory) == pytest.approx(50.0 if precise else 1.0)
    assert policy.averages(memory) == (None if precise else 0.95)


@pytest.mark.parametrize(("cosine", "looked"), [(0.5, 10.0), (0.7, 5.0), (0.9, 10.0)])
def test_the_look_is_over_early_where_it_is_clear_and_steps_are_long_then(cosine: float, looked: float) -> None:
    memory: dict[str, float] = {}
    alphas = []
    for step in range(6):
        read = {} if memory.get("looked") == 10 else {"MV": 6 * cosine, "MM": 4.0, "VV": 9.0 if step else 0.0}
        decided = Automatic(noisy=LayerLength(settle=None)).decide(Situation(read, lr=0.02, memory=memory))
        memory = dict(decided.memory)
        alphas.append(decided.alpha)
    assert memory["looked"] == looked and memory["agreement"] == pytest.approx(cosine)
    assert alphas[:5] == pytest.approx([0.05, 0.05, 0.1, 0.15, 0.2])
    assert Automatic().needs_samples(memory) is (cosine > 0.75)
    if cosine > 0.75:
        return
    decided = Automatic(noisy=LayerLength(settle=None)).decide(Situation({}, lr=0.02, memory=memory))
    assert decided.alpha == 1.0


@pytest.mark.parametrize(("late", "precise"), [(0.9, True), (0.7, False)])
def test_where_it_is_not_clear_the_later_comparisons_decide(late: float, precise: bool) -> None:
    policy, memory = Automatic(), {"settled": 0.0}
    for step in range(10):
        assert not policy.needs_samples(memory)
        read = {"MV": 6 * (0.7 if step < 5 else late), "MM": 4.0, "VV": 9.0}
        memory = dict(policy.decide(Situation(read, lr=0.02, memory=memory)).memory)
    assert memory["looked"] == 10 and memory["agreement"] == pytest.approx(late)
    assert policy.needs_samples(memory) is precise


def test_a_step_reaches_the_minimum_of_a_layer_s_own_model_or_a_share_of_the_capacity_if_that_is_further() -> None:
    X = {
        name: torch.full((2, 3), size) for name, size in (("far", 10.0), ("flat", 1e-6), ("natural", 0.5), ("one", 1.0))
    }
    D = {name: torch.ones(2, 3) for name in X}
    bends = {"far": 2.0, "flat": 2.0, "natural": 3.0, "one": 0.0}
    curvature: Any = {name: SimpleNamespace(bend=lambda D, along, b=b: torch.tensor(b)) for name, b in bends.items()}
    labels: Any = SimpleNamespace(factor=0.5, capacity=4.0)
    directions = Directions({}, X, D, X, [], labels=labels, curvature=curvature, X=X)
    at_share = (2 * 0.01 * 2 / 2) ** 0.5

    assert directions.reach(0.01).tolist() == pytest.approx([30.0, at_share, 1.0, math.inf])
    assert directions.reach(0.0).tolist() == pytest.approx([30.0, 3e-6, 1.0, math.inf])
    together = replace(directions, joint=True)
    assert together.reach(0.01).tolist() == pytest.approx([1.0] * 4)
    assert together.reach(50.0).tolist() == pytest.approx([(2 * 50 * 2 / (60 + 6e-6 + 3 + 6)) ** 0.5] * 4)


@pytest.mark.parametrize(("approximation", "sides", "bounds"), [
    (KFAC(), "both", True), (EKFAC(), "both", True), (KFAC(), "inputs", False), (FOOF(), "both", False),
])  # fmt: skip
def test_a_metric_that_is_no_fisher_bounds_no_step(approximation: Any, sides: Any, bounds: bool) -> None:
    model = network()
    policy = LayerLength(norm=SpectralDescent(sides=sides))
    optimizer = NaturalGradient(model, approximation, likelihood=Categorical(), step_size=policy, overhead=None)
    train(model, optimizer, [batch(step) for step in range(3)])
    found = [c.bend(optimizer.state[optimizer.layers[name].weight]["momentum"], torch.ones(())) for name, c in
             optimizer._now.items()]  # fmt: skip
    assert [float(bend) > 0 for bend in found] == [bounds] * len(found)


def test_steps_do_not_stand_still_where_gradients_are_small_beside_their_noise() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    optimizer = NaturalGradient(
        model, likelihood=Categorical(), step_size=LayerLength(settle=None, large=None), overhead=None
    )
    moved = []
    for _ in range(40):  # labels have nothing to do with inputs
        before = model.weight.detach().clone()
        x, y = torch.randn(4096, 8), torch.randint(4, (4096,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        moved.append(float((model.weight.detach() - before).square().mean() ** 0.5))
    assert min(moved[10:]) > 0.5 * 0.2 * 0.02


def test_a_resumed_run_knows_the_capacity_before_its_first_observed_pass() -> None:
    runs = []
    for halt in (False, True):
        model = network()
        optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=LayerLength(), observe_every=4)
        train(model, optimizer, [batch(step) for step in range(9)])
        if halt:
            saved = optimizer.state_dict()
            optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=LayerLength(), observe_every=4)
            optimizer.load_state_dict(saved)
        labels = optimizer._engine.labels
        assert labels is not None and labels.capacity == pytest.approx(math.log(3))
        train(model, optimizer, [batch(step) for step in range(9, 12)])
        runs.append(values(model))
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def test_a_layer_with_many_inputs_moves_its_outputs_as_one_with_64() -> None:
    moved = {}
    for width in (16, 1024):
        model = nn.Linear(width, 8)
        optimizer = NaturalGradient(
            model,
            likelihood=Categorical(),
            step_size=LayerLength(momentum=0.0, warm_up=1, settle=None, large=None),
            overhead=None,
        )
        before = model.weight.detach().clone()
        x = torch.randn(64, width).clamp(-1, 1).sign()
        train(model, optimizer, [(x, torch.arange(64) % 8)])
        block = torch.cat([model.weight - before, model.bias.detach()[:, None] * 0], 1)
        moved[width] = float(block.detach().square().mean()) ** 0.5
        inputs = optimizer._now[""].inputs
        assert inputs is not None and float(inputs) == pytest.approx(width + 1)
    assert moved[16] == pytest.approx(0.2 * 0.02, rel=0.1)
    assert moved[1024] == pytest.approx(0.2 * 0.02 * (64 / 1025) ** 0.5, rel=0.01)


def test_steps_on_small_batches_are_shorter() -> None:
    def alphas(policy: LayerLength, *terms: float, scheduled: tuple[bool, ...] = ()) -> list[float]:
        policy, memory, found = replace(policy, settle=None), {"warmed": 5.0}, []
        for count, held in zip(terms, scheduled or [False] * len(terms), strict=True):
            decided = policy.decide(Situation({}, lr=0.02, memory=memory, scheduled=held, terms=count))
            memory = dict(decided.memory)
            found.append(decided.alpha)
        return found

    assert alphas(LayerLength(), 16, 0, 4, 1) == pytest.approx([0.5] * 4)  # the most that a step has had
    assert alphas(LayerLength(), 1, 256, 512) == pytest.approx([0.25, 1, 1])
    assert alphas(LayerLength(large=4096), 256) == pytest.approx([0.5])
    assert alphas(LayerLength(large=None), 16) == [1.0]
    assert alphas(LayerLength(), 0) == [1.0]
    assert alphas(LayerLength(), 16, 1, scheduled=(True, True)) == [1.0, 1.0]  # a schedule sets lengths itself
    assert alphas(LayerLength(), 16, 16, scheduled=(False, True)) == [0.5, 0.5]  # lr was halved by hand
    assert alphas(LayerLength(), 16, 16, scheduled=(True, False)) == [1.0, 1.0]


@pytest.mark.parametrize(("momentum", "steady", "noise"), [
    (0.95, 0.1, 1.0), (0.95, 0.2, 1.0), (0.95, 0.5, 0.5), (0.95, 0.8, 0.0), (0.95, 1.0, 0.0), (0.0, 1.0, 1.0),
])  # fmt: skip
def test_steps_become_shorter_by_the_noise_in_them(momentum: float, steady: float, noise: float) -> None:
    policy = LayerLength(momentum=momentum, settle=10.0, large=256.0)
    memory = {"warmed": 5.0, "settled": 10.0}
    decided = policy.decide(Situation({"steady": steady}, lr=0.02, memory=memory, terms=16))
    assert decided.alpha == pytest.approx(0.5 * 0.5**noise)
    assert decided.memory["settled"] == pytest.approx(10 + noise)


def test_targets_of_scale_a_hundred_are_reached_as_by_adamw() -> None:
    x = torch.randn(1024, 10, generator=torch.Generator().manual_seed(0))
    y = 100 * (x[:, :1] * x[:, 1:2] + x[:, 2:3])
    final = []
    for make in (lambda m: NaturalGradient(m, likelihood=Gaussian()), lambda m: torch.optim.AdamW(m.parameters())):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
        optimizer, order = make(model), torch.Generator().manual_seed(0)
        for i in torch.randint(1024, (500, 32), generator=order):
            optimizer.zero_grad()
            (0.5 * (model(x[i]) - y[i]).square().sum() / 32).backward()
            optimizer.step()
        final.append(float(0.5 * (model(x) - y).square().mean().detach()))
    assert final[0] < 0.7 * final[1]  # 4,900 and 8,400; 8,600 where steps become shorter all the same


@pytest.mark.parametrize(("likelihood", "terms"), [(Categorical(class_dim=-1), 2 * 8 * 5), (None, 0)])
def test_terms_are_counted_over_positions_and_passes(likelihood: Categorical | None, terms: int) -> None:
    model = nn.Linear(3, 4)
    optimizer = NaturalGradient(model, likelihood=likelihood, overhead=None)
    for _ in range(2):
        y = model(torch.randn(8, 5, 3))
        (nn.functional.cross_entropy(y.flatten(0, 1), torch.randint(4, (40,))) / 2).backward()
    optimizer.step()

    assert optimizer.statistics().get("terms", 0.0) == terms


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_parameters_return_to_the_zero_of_the_line_through_both_slopes(lr: float) -> None:
    model = network()
    optimizer = optimizer_of(model, step_size=Automatic(QuadraticModel(limit=None), look=1, agreement=0.0))
    train(model, optimizer, [batch(0, n=512) for step in range(6)])
    assert optimizer.param_groups[0]["clock"]["memory"]["precise"] == 1.0
    before = values(model)
    train(model, optimizer, [batch(0, n=512)])
    after = values(model)
    clock = optimizer.param_groups[0]["clock"]
    slope, damping = clock["memory"]["slope"], clock["damping"]
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * lr
    backward(model, optimizer, batch(5))
    for p, old, new in zip(model.parameters(), before, after, strict=True):
        p.grad = 1e3 * (new - old)  # uphill is where the step went
    covered = {id(p): p for layer in optimizer.layers.values() for p in layer.parameters}
    end = sum(float((p.grad**2).sum()) for p in covered.values() if p.grad is not None) / 1e3
    optimizer.step()
    assert optimizer.statistics()["back"] == 1.0
    assert optimizer.statistics()["damping"] > damping
    for p, old, new in zip(model.parameters(), before, after, strict=True):
        if id(p) in covered:
            assert_equal(p.detach(), new + end / (end - slope) * (old - new), 1e-6)


def test_a_step_that_moves_nothing_keeps_the_policy_and_forgets_the_last_step() -> None:
    policy = Automatic()
    kept = policy.idle({**STEP, "promise": 1.0, "known": 0.0, "bend": 0.0})
    assert set(kept) == {"precise", "looked", "cap", "trust", "seen", "back"}
    model = network()
    optimizer = optimizer_of(model, step_size=policy)
    train(model, optimizer, [batch(step) for step in range(3)])
    clock = optimizer.param_groups[0]["clock"]
    clock["memory"] = {"settled": 5.0, "looked": 10.0}
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.param_groups[0]["clock"]["memory"] == {"settled": 5.0, "looked": 10.0}


# What the clock remembers.


def test_damping_restarts_on_a_hand_over_and_rises_when_a_step_is_taken_back() -> None:
    rule = LevenbergMarquardt(initial=0.1, factor=0.5, every=1)
    clock = {**new_clock(3.0), "steps": 1}
    remember(clock, rule, Decision(1.0, 0.0, restart=True), 0.0, 1.0)
    assert clock["damping"] == 0.1
    remember(clock, rule, Decision(1.0, 0.0, rejected=True), 0.0, 1.0)
    assert clock["damping"] == pytest.approx(0.4)


def test_one_bad_step_counts_for_no_more_than_the_opposite_of_its_prediction() -> None:
    for drift, ratio in [(-1e6, -1.0), (-1.0, 0.0), (0.0, 1.0), (0.5, 1.5)]:  # a slope of 1, predicted to end at 0
        clock = new_clock(1.0) | {"slope": -1.0, "predicted": -0.5, "last_lr": 1.0}
        assert remember(clock, LevenbergMarquardt(), Decision(1.0, 0.0), drift, 1.0)["ratio"] == pytest.approx(ratio)


# The KL limit and Levenberg-Marquardt.


@pytest.mark.parametrize(
    ("slope", "lr", "alpha"), [(4.0, 0.1, (1e-3 / 0.04) ** 0.5), (1e-6, 0.1, 1.0), (0.0, 0.1, 0.0), (-1.0, 0.1, 0.0)]
)
def test_the_kl_limit_is_the_square_root_of_the_limit_over_the_predicted_kl(slope: Any, lr: Any, alpha: Any) -> None:
    decided = KLLimit(1e-3).decide(Situation({"slope": slope, "drift": 0.0}, lr, 0.8))
    assert decided.alpha == pytest.approx(alpha)
    assert decided.mu == 0.8


def test_levenberg_marquardt_lowers_damping_where_the_model_is_right_and_raises_it_where_it_is_wrong() -> None:
    rule = LevenbergMarquardt(initial=1.0, factor=0.9, every=5, minimum=0.5, maximum=2.0)
    change = 0.9**5
    for ratio, expected in [(0.9, change), (0.75, 1.0), (0.5, 1.0), (0.25, 1.0), (0.1, 1 / change), (-3.0, 1 / change)]:
        assert rule.adapt(1.0, ratio) == pytest.approx(expected)
    assert rule.adapt(0.5, 1.0) == 0.5
    assert rule.adapt(2.0, 0.0) == 2.0
    assert rule.rejected(0.5) == pytest.approx(0.5 * change**-2)
    assert rule.rejected(1.9) == 2.0
    assert ConstantDamping(0.3).rejected(0.3) == 0.3


@pytest.mark.parametrize("approximation", [KFAC, TKFAC, TEKFAC])
def test_the_default_steps_do_not_depend_on_the_scale_of_the_loss(approximation: Any) -> None:
    runs = []
    sum_and_mean = (natgrad.Gaussian(), 0.5), (natgrad.Gaussian(reduction="mean"), 1 / 4)
    for likelihood, scale in sum_and_mean:  # half the squared error, and torch's mean over 4 outputs
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        optimizer = optimizer_of(model, approximation(), likelihood=likelihood)
        for step in range(12):
            x, _ = batch(step, n=30)
            optimizer.zero_grad()
            (scale * (model(x) - x[:, :4].sin()).square().sum(1).mean()).backward()
            optimizer.step()
        runs.append((values(model), optimizer.statistics()["damping"]))
    assert runs[1][1] == pytest.approx(0.5 * runs[0][1])
    for found, expected in zip(runs[1][0], runs[0][0], strict=True):
        assert_equal(found, expected, 1e-5)  # the scalars are read in single precision


def convolutional() -> nn.Sequential:
    torch.manual_seed(5)
    convolutions = nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Conv1d(3, 2, 2)
    return nn.Sequential(nn.Unflatten(1, (1, 5)), *convolutions, nn.Flatten(), nn.Linear(6, 3))


@pytest.mark.parametrize("approximation", [TKFAC, EKFAC, KFAC])
def test_trace_damping_takes_mean_eigenvalues_of_convolutions_and_their_largest_elsewhere(approximation: Any) -> None:
    model, x = convolutional(), batch(n=30)
    settings = {"estimator": "exact", "step_size": Constant(), "lr": 1e-12, "overhead": None}
    optimizer = optimizer_of(model, approximation(), damping=TraceDamping(0.3), **settings)
    train(model, optimizer, [x, x])  # eigenvalues are measured after the first refresh, and count at the next
    F = natgrad.fisher(model, approximation(), Categorical(), [x])
    means = {name: float(block.trace() / block.dense().shape[0]) for name, block in F.items()}
    expected = {"1": means["1"], "3": means["3"], "5": 0.3 * max(means["1"], means["3"])}
    found = {name: optimizer.state[optimizer.layers[name].parameters[0]]["damping"] for name in expected}
    assert found == pytest.approx(expected)
    assert optimizer.statistics()["damping"] == 0.3


def test_trace_damping_is_constant_without_convolutions_and_never_below_its_floor() -> None:
    assert TraceDamping(0.3).spread(0.3, {"a": 5.0, "b": 0.0}, []) == {"a": 0.3, "b": 0.3}
    assert TraceDamping(0.3, floor=0.5).spread(0.3, {"a": 5.0, "b": 0.0}, ["b"]) == {"a": 0.15, "b": 0.5}
    with pytest.raises(ValueError, match="floor"):
        TraceDamping(0.3, floor=0.0)
    with pytest.raises(ValueError, match="damping"):
        TraceDamping(-1.0)


# The cadence.


def test_a_period_starts_with_refreshes_at_powers_of_two() -> None:
    cadence = Cadence(observe_every=10, refresh_every=10)
    expected = [0, 1, 2, 4, 8, 10, 20, 30]
    assert [step for step in range(40) if cadence.refreshes(step, 0, 3)] == expected
    assert [step for step in range(40) if cadence.observes(step)] == expected


@pytest.mark.parametrize(("period", "layers"), [(10, 3), (4, 9), (7, 7), (1, 4)])
def test_staggered_refreshes_cover_every_layer_exactly_once_a_period(period: int, layers: int) -> None:
    cadence = Cadence(refresh_every=period, staggered=True)
    for start in (period, 5 * period + 3):
        steps = range(start, start + period)
        counts = [sum(cadence.refreshes(step, layer, layers) for step in steps) for layer in range(layers)]
        assert counts == [1] * layers
        most = max(sum(cadence.refreshes(step, layer, layers) for layer in range(layers)) for step in steps)
        assert most <= -(-layers // period)


@pytest.mark.parametrize("staggered", [False, True])
def test_law_29_every_layer_is_refreshed_again_after_its_first_refresh(staggered: bool) -> None:
    model = network()
    optimizer = optimizer_of(model, observe_every=2, refresh_every=8, staggered=staggered)
    history = []
    for step in range(17):
        train(model, optimizer, [batch(step)])
        states = (optimizer.state[model.get_parameter(f"{name}.weight")] for name in optimizer.layers)
        history.append([state["refreshes"] for state in states])
    cadence = Cadence(2, 8, staggered=staggered)
    for layer in range(2):
        due = [step for step in range(17) if cadence.refreshes(step, layer, 2)]
        assert due[-1] >= 12
        assert history[-1][layer] == len(due)


def test_the_inverse_changes_at_refreshes_alone() -> None:
    model = network()
    optimizer = optimizer_of(model, step_size=KLLimit(), observe_every=1, refresh_every=6)

    def inverses() -> list[torch.Tensor]:
        state = copy_of(optimizer)["state"]
        return [v for entry in state.values() for name, v in entry.items() if name.startswith("inverse")]

    train(model, optimizer, [batch(0)])
    before = inverses()
    for step in range(1, 14):
        train(model, optimizer, [batch(step)])
        assert same(inverses(), before) == (not Cadence(1, 6).refreshes(step, 0, 2))
        before = inverses()
