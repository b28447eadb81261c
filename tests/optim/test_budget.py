"""What curvature may cost: plans and accounts on random tables of layers, and training under them."""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import batch, copy_of, network, optimizer_of, same, train, values

from natgrad import EKFAC, FOOF, KFAC, TKFAC, Categorical, KLLimit, NaturalGradient, QuadraticModel
from natgrad.optim.budget import BURST, CREDIT, Account, Budget, Load, Plan
from natgrad.optim.cadence import Cadence
from natgrad.optim.cost import Counting, work
from natgrad.optim.curvature import LayerCurvature

SEEDS = range(12)


def table(seed: int) -> dict[str, Load]:
    """Layers of very different costs, in a unit of their own."""
    rng = random.Random(seed)

    def load() -> Load:
        plain = 10 ** rng.uniform(0, 3)
        observe, refresh = plain * 10 ** rng.uniform(-2, 1.3), plain * 10 ** rng.uniform(-2, 2.5)
        sizes = rng.choice([(8, 1), (64, 1), (32, 256), (4, 4096)])
        side, reads = 2 ** rng.randrange(1, 11), rng.choice(["positions", "examples", "all"])
        return Load(plain, plain * rng.random(), observe, refresh, rng.random(), *sizes, side, reads)  # type: ignore[arg-type]

    return {f"layer {k}": load() for k in range(rng.randrange(1, 25))}


def simulated(plan: Plan, steps: int) -> tuple[list[float], list[Any], Account]:
    """What every step cost, in plain steps, and what it did."""
    account, costs, done, layers = Account(), [], [], [*plan.turns]
    for step in range(steps):
        due = plan.due(account, step, layers)
        after = plan.charged(account, step, [*due.observe], [*due.observe], [*due.refresh])
        costs.append(after.spent - account.spent)
        done.append(due)
        account = after
    return costs, done, account


@pytest.mark.parametrize("overhead", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_law_an_account_is_never_overdrawn(seed: int, overhead: float) -> None:
    plan = Budget(overhead, Cadence()).plan(table(seed))
    costs, _, _ = simulated(plan, 1000)
    total = 0.0
    for step, cost in enumerate(costs):
        total += cost
        assert total <= CREDIT + overhead * (step + 1) + 1e-9
    dearest = max(turn.observe + turn.refresh for turn in plan.turns.values()) + plan.seeing
    assert max(costs) <= max(BURST, dearest) + 1e-9
    assert plan.rate() <= overhead + 1e-9


@pytest.mark.parametrize("seed", SEEDS)
def test_law_every_layer_gets_its_turn_again_and_again(seed: int) -> None:
    plan = Budget(0.2, Cadence()).plan(table(seed))
    longest = max(max(turn.observe_every, turn.refresh_every) for turn in plan.turns.values())
    _, done, _ = simulated(plan, min(6 * longest, 30_000))
    for name, turn in plan.turns.items():
        observed = [step for step, due in enumerate(done) if name in due.observe]
        renewed = [step for step, due in enumerate(done) if name in due.refresh]
        assert observed and renewed and renewed[0] >= observed[0]
        late = 3 * longest + 10
        assert (
            max(b - a for a, b in zip(observed, [*observed[1:], len(done)], strict=True)) <= turn.observe_every + late
        )
        assert max(b - a for a, b in zip(renewed, [*renewed[1:], len(done)], strict=True)) <= turn.refresh_every + late


@pytest.mark.parametrize("seed", SEEDS)
def test_law_periods_grow_as_the_overhead_shrinks(seed: int) -> None:
    plans = [Budget(overhead, Cadence()).plan(table(seed)) for overhead in (10.0, 1.0, 0.3, 0.1, 0.01)]
    for more, less in pairwise(plans):
        for name, turn in more.turns.items():
            other = less.turns[name]
            assert other.refresh_every >= turn.refresh_every
            assert other.share.fraction / other.share.stride <= turn.share.fraction / turn.share.stride
        assert min(t.observe_every for t in less.turns.values()) >= min(t.observe_every for t in more.turns.values())


def test_law_without_want_the_plan_is_the_cadence() -> None:
    cadence = Cadence(4, 10)
    load = Load(plain=1.0, see=0.3, observe=0.2, refresh=0.1)
    plan = Budget(10.0, cadence).plan({"one": load, "two": load})
    _, done, _ = simulated(plan, 60)
    for step, due in enumerate(done):
        assert [*due.observe] == (["one", "two"] if cadence.observes(step) else [])
        assert [*due.refresh] == (["one", "two"] if cadence.refreshes(step, 0, 2) else [])


@pytest.mark.parametrize("given", [{"observe"}, {"refresh"}])
def test_what_is_given_holds_and_the_rest_has_half_of_the_budget_at_least(given: set[str]) -> None:
    load = Load(plain=1.0, see=0.3, observe=2.0, refresh=5.0)
    plan = Budget(0.2, Cadence(2, 3), frozenset(given)).plan({"layer": load})
    _, done, _ = simulated(plan, 400)
    cadence = Cadence(2, 3)
    for step, due in enumerate(done):
        if "observe" in given:
            assert bool(due.observe) == cadence.observes(step)
        else:
            assert bool(due.refresh) == cadence.refreshes(step, 0, 1)
    assert plan.rate(frozenset({"observe", "refresh"} - given)) <= 0.1 + 1e-9


def test_the_first_ten_steps_cost_three_each_at_most() -> None:
    for seed in SEEDS:
        costs, _, _ = simulated(Budget(0.2, Cadence()).plan(table(seed)), 10)
        assert 10 + sum(costs) <= 30 + 1e-9


@pytest.mark.parametrize("reads", ["positions", "examples", "all"])
def test_law_a_share_is_enough_and_not_much_more(reads: Any) -> None:
    for n, t, side in ((32, 1024, 27), (512, 1, 40), (4, 2048, 768), (8, 9, 300), (2, 4096, 16)):
        load = Load(1.0, 1.0, 1.0, 1.0, 0.0, n, t, side, reads)
        share = load.share(8)
        read = max(1, round(share.fraction * n)) * -(-t // share.stride)
        assert read >= min(n * t, max(256, 8 * side))
        if reads == "all":
            assert read == n * t
        if reads == "positions":
            assert read <= 4 * max(256, 8 * side) + n
        assert reads == "positions" or share.stride == 1


def test_work_is_counted_without_data_and_grows_with_the_rows() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 5))
    optimizer = NaturalGradient(model, likelihood=Categorical())
    layer = optimizer.layers["0"]
    few, many = (work(KFAC(), layer, n, 3) for n in (10, 20))
    assert few is not None and many is not None
    assert many.observe == 2 * few.observe and many.refresh == few.refresh
    assert few.observe >= 2 * 30 * (41**2 + 30**2)
    corrected = work(EKFAC(), layer, 10, 3)
    assert corrected is not None and corrected.observe > few.observe and corrected.refresh > few.refresh


# Training.


def images(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 12, 12, generator=generator), torch.randint(4, (8,), generator=generator)


def convnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    "settings",
    [{"step_size": KLLimit()}, {"step_size": QuadraticModel()}, {"approximation": EKFAC(), "step_size": KLLimit()},
     {"step_size": KLLimit(), "overhead": 2.0, "staggered": True}, {"step_size": KLLimit(), "refresh_every": 7}],
    ids=["kl limit", "quadratic model", "ekfac", "plenty", "a period given"],
)  # fmt: skip
def test_a_resumed_run_under_a_budget_equals_an_unbroken_one_bit_for_bit(settings: dict[str, Any]) -> None:
    def run(breaks: tuple[int, ...]) -> Any:
        settled = {"overhead": 0.2, "likelihood": Categorical(), **settings}
        model = convnet()
        optimizer = NaturalGradient(model, **settled)
        for step in range(40):
            if step in breaks:
                fresh = convnet(9)
                renewed = NaturalGradient(fresh, **settled)
                fresh.load_state_dict(model.state_dict())
                renewed.load_state_dict(copy_of(optimizer))
                model, optimizer = fresh, renewed
            train(model, optimizer, [images(step)])
        return values(model), copy_of(optimizer)

    assert same(run((1, 3, 22)), run(()))


def test_a_large_budget_and_none_are_the_same_where_all_is_read() -> None:
    def run(**settings: Any) -> Any:
        model = network()
        optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=KLLimit(), **settings)
        train(model, optimizer, [batch(step) for step in range(30)])
        return values(model)

    assert same(run(overhead=None), run(overhead=1e6))
    assert same(run(overhead=None), run(observe_every=4, refresh_every=10))
    assert same(run(overhead=None), run(overhead=float("inf")))
    assert not same(run(overhead=None), run(overhead=0.2))


def test_an_account_counts_what_was_done() -> None:
    model = convnet()
    optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=KLLimit(), overhead=0.05)
    train(model, optimizer, [images(step) for step in range(60)])
    account = optimizer.param_groups[0]["clock"]["account"]
    plan = optimizer._plan
    assert plan is not None and plan.turns.keys() == optimizer.layers.keys()
    observations = {name: optimizer._now[name].observations for name in optimizer.layers}
    refreshes = {name: optimizer._now[name].refreshes for name in optimizer.layers}
    assert observations == {name: count for name, (_, _, count) in account["last"].items()}
    known = sum(plan.turns[n].observe * observations[n] + plan.turns[n].refresh * refreshes[n] for n in plan.turns)
    assert known < account["spent"] <= CREDIT + 0.05 * 60
    assert all(count < 16 for count in observations.values())
    assert "observed every" in repr(optimizer) and "% of a training step" in repr(optimizer)
    assert "account" not in optimizer.statistics()


def test_a_skipped_step_costs_nothing() -> None:
    model = convnet()
    optimizer = NaturalGradient(model, likelihood=Categorical(), step_size=KLLimit())
    train(model, optimizer, [images(step) for step in range(3)])
    before = copy_of(optimizer)["param_groups"][0]["clock"]["account"]
    x, y = images(3)
    optimizer.zero_grad()
    F.cross_entropy(model(x * float("nan")), y).backward()
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    assert copy_of(optimizer)["param_groups"][0]["clock"]["account"] == before


def test_a_network_trains_on_a_twentieth_of_a_step() -> None:
    model = network()
    optimizer = optimizer_of(model, step_size=KLLimit(1e-2), overhead=0.05, refresh_every=None)
    losses = train(model, optimizer, [batch(step % 4, 32) for step in range(200)])
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("overhead", [0, -1, True, "much", float("nan")])
def test_an_overhead_that_is_none_is_refused(overhead: Any) -> None:
    with pytest.raises(ValueError, match="overhead"):
        NaturalGradient(network(), overhead=overhead)


def test_a_plan_is_made_of_values_alone() -> None:
    plan = Budget(0.2, Cadence()).plan(table(3))
    assert plan == Budget(0.2, Cadence()).plan(table(3))
    account = replace(Account(), spent=1.5, last={"a": (3, -1, 2)}, seen={"a": (4, 5, 1)})
    assert Account.of(account.values()) == account


@pytest.mark.parametrize("approximation", [KFAC(), EKFAC(), TKFAC(), FOOF()], ids=["kfac", "ekfac", "tkfac", "foof"])
def test_the_placeholder_of_a_large_layer_has_the_names_and_shapes_of_its_curvature(approximation: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(800, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = NaturalGradient(model, approximation, likelihood=Categorical(), step_size=KLLimit())
    blank = LayerCurvature.empty(approximation, optimizer.layers["0"]).state()
    assert all(not value.any() for value in blank.values() if isinstance(value, torch.Tensor))
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 800)), torch.tensor([0, 1, 0, 1])).backward()
    optimizer.step()
    real = optimizer._now["0"].state()
    assert {n: v.shape for n, v in blank.items() if isinstance(v, torch.Tensor)} == {
        n: v.shape for n, v in real.items() if isinstance(v, torch.Tensor)
    }
    assert blank.keys() == real.keys()


def test_roots_are_turned_at_every_step_where_it_is_cheap_and_else_as_the_rest_of_their_share_pays() -> None:
    small = Load(plain=1.0, see=0.0, observe=0.0, refresh=0.0, turn=0.1, longest=10)
    large = replace(small, turn=5.0)
    loads = {"a": small, "b": small, "c": large, "d": replace(large, turn=2.0, plain=5.0)}
    serves = {name: turn.serves for name, turn in Budget(0.1, Cadence()).plan(loads).turns.items()}
    share = 0.2 * 8.0 - 0.2  # what is left of twice the overhead
    assert serves == {"a": 1, "b": 1, "c": math.ceil(7.0 / share), "d": math.ceil(7.0 / share)}
    dear = {name: replace(large, turn=1e3) for name in "ab"}
    assert {turn.serves for turn in Budget(0.1, Cadence()).plan(dear).turns.values()} == {10}


@pytest.mark.parametrize("settings", [{}, {"observe_every": 4, "refresh_every": 10}])
def test_what_turns_a_root_serves_its_steps_and_a_resumed_run_equals_an_unbroken_one(settings: Any) -> None:
    def begin() -> tuple[nn.Module, NaturalGradient]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 3))
        return model, NaturalGradient(model, likelihood=Categorical(), **settings)

    batches = [batch(seed) for seed in range(28)]
    model, optimizer = begin()
    train(model, optimizer, batches[:17])
    plan = optimizer._plan
    assert plan is not None and plan.turns["2"].serves > 1 and "turned every" in repr(optimizer)
    other, resumed = begin()
    train(other, resumed, batches[:1])
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, batches[17:])
    train(other, resumed, batches[17:])
    assert same(values(model), values(other))


def without_data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("shapes", [((3, 1, 4), (2, 1)), ((3, 4), ()), ((), (3, 4)), ((), ())])
def test_elementwise_results_without_data_are_those_of_torch(shapes: tuple[tuple[int, ...], ...]) -> None:
    X, Y = without_data(*shapes[0]), without_data(*shapes[1], dtype=torch.float32)
    P, Q = (without_data(*shape, dtype=torch.bool) for shape in shapes)

    def results() -> list[Tensor]:
        both = [X * Y, X + Y, X - Y, X / Y, X == Y, X < Y, X >= Y, P & Q, P | Q, X * P, Y * X, 2 * Y, 2.0 * P, Y**2]
        return [*both, X.abs(), Y.sqrt(), X.clamp(min=1), X.reciprocal(), X.isfinite(), (X > 0).all(), X > 0, X != 1]

    with Counting():
        found = results()
    assert [(x.shape, x.dtype, x.is_meta) for x in found] == [(x.shape, x.dtype, x.is_meta) for x in results()]
