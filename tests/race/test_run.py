import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from natgrad.race.data import Dataset
from natgrad.race.entries import ENTRIES, Entry, Settings
from natgrad.race.results import record
from natgrad.race.run import Rules, Run, mean_loss, paced, run, schedule, steps_per_epoch, train
from natgrad.race.tasks import Task
from natgrad.race.tune import trials

SGD = ENTRIES["sgd"]


def quick(task: Task, entry: Entry = SGD, settings: Settings | None = None, **rules: Any) -> Run:
    settings = {"lr": 0.05, **(settings or {})} if entry is SGD else {**entry.defaults, **(settings or {})}
    return run(task, task.data(None), entry, settings=settings, seed=0, rules=Rules(**{"epochs": 3, **rules}))


def test_a_run_records_the_start_and_every_epoch(tiny: Task) -> None:
    done = quick(tiny)
    assert [(p.epoch, p.step) for p in done.curve] == [(0, 0), (1, 6), (2, 12), (3, 18)]
    assert done.curve[0].seconds == 0 < done.curve[1].seconds < done.curve[-1].seconds
    assert done.curve[-1].loss < done.curve[0].loss
    assert all(p.test_loss is not None for p in done.curve)
    assert [len(epoch.batch_losses) for epoch in done.epochs] == [0, 6, 6, 6]
    assert done.stopped == "" and not done.diverged


def test_the_same_seed_gives_the_same_losses(tiny: Task) -> None:
    first, second = quick(tiny), quick(tiny)
    assert [p.loss for p in first.curve] == [p.loss for p in second.curve]


def test_every_entry_starts_from_the_same_weights_and_sees_the_same_batches(tiny: Task) -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    def watched(name: str) -> Task:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            seen.setdefault(name, []).append(target.clone())
            return tiny.loss(output, target)

        return replace(tiny, loss=loss)

    starts = [quick(watched(name), ENTRIES[name]).curve[0].loss for name in ("sgd", "adamw")]
    assert starts[0] == starts[1]
    assert all(torch.equal(a, b) for a, b in zip(seen["sgd"], seen["adamw"], strict=True))


def test_a_run_that_blows_up_is_marked_diverged(tiny: Task) -> None:
    done = quick(tiny, settings={"lr": 1e6})
    assert done.diverged and done.curve[-1].epoch == 1


def test_an_optimizer_that_gives_up_counts_as_diverged(tiny: Task) -> None:
    done = quick(tiny, raising(RuntimeError("three failures in a row")))
    assert done.stopped == "diverged: RuntimeError: three failures in a row"
    assert len(done.curve) == 1


def test_a_bug_in_an_optimizer_is_not_hidden_as_divergence(tiny: Task) -> None:
    with pytest.raises(TypeError):
        quick(tiny, raising(TypeError("a bug")))


def test_an_interrupted_run_keeps_what_was_done(tiny: Task) -> None:
    done = quick(tiny, raising(KeyboardInterrupt(), after=7))
    assert done.stopped == "interrupted" and done.curve[-1].epoch == 1


def test_the_budget_ends_a_run_within_an_epoch(tiny: Task) -> None:
    done = quick(tiny, budget=0.0)
    assert done.stopped == "budget" and done.curve[-1].step == 1


def test_the_cosine_schedule_falls_from_one_to_zero(tiny: Task) -> None:
    factor = schedule("cosine", 10)
    assert factor(0) == 1 and math.isclose(factor(5), 0.5) and math.isclose(factor(10), 0, abs_tol=1e-12)
    with pytest.raises(ValueError, match="constant"):
        schedule("steps", 10)


def test_the_warm_up_takes_a_20th_of_the_steps_and_the_cosine_the_others() -> None:
    factor = schedule("warmup-cosine", 100)
    assert [factor(step) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factor(5) == 1 and factor(99) == pytest.approx((1 - math.cos(math.pi / 95)) / 2)
    assert factor(5 + 19) == pytest.approx((1 + math.cos(math.pi / 5)) / 2)
    assert schedule("warmup-cosine", 1)(0) == 1 and schedule("warmup-cosine", 10)(0) == 1


def test_a_scheduled_run_ends_with_a_small_learning_rate(tiny: Task) -> None:
    rates: list[float] = []

    def build(model: nn.Module, task: Task, settings: Settings) -> torch.optim.Optimizer:
        optimizer = SGD.build(model, task, settings)
        optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"]))
        return optimizer

    chosen = {"lr": 0.1, "schedule": "cosine"}
    list(train(tiny, tiny.data(None), Entry("s", build, lambda trial: {}), settings=chosen, seed=0, rules=Rules(2)))
    assert rates[0] == 0.1 and rates == sorted(rates, reverse=True) and rates[-1] < 0.01


def test_every_group_of_an_entry_follows_the_schedule_from_its_own_rate(tiny: Task) -> None:
    together = ENTRIES["muon"].build(tiny.model(tiny.data(None)), tiny, {**ENTRIES["muon"].defaults, "ends": True})
    paced(together, "warmup-cosine", 40)(0)
    assert [group["lr"] for group in together.param_groups] == [0.02 / 2, 1e-3 / 2]


def test_a_last_incomplete_batch_is_kept_where_the_task_says_so(tiny: Task) -> None:
    seen: list[int] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(len(target))
        return tiny.loss(output, target)

    for keep, sizes in ((False, [20] * 4), (True, [20] * 4 + [16])):
        seen.clear()
        task = replace(tiny, batch=20, loss=loss, chunk=1000, keep_last=keep)
        done = quick(task, epochs=2)
        assert [n for n in seen if n <= 20] == 2 * sizes and done.curve[-1].step == 2 * len(sizes)
        assert steps_per_epoch(task, tiny.data(None)) == len(sizes)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "woodbury", "tengrad", "sngd", "fngd", "diagonal"])
def test_entries_train_with_a_last_batch_that_is_smaller(tiny: Task, name: str) -> None:
    done = quick(replace(tiny, batch=20, keep_last=True), ENTRIES[name])
    assert done.stopped == "" and done.curve[-1].loss < done.curve[0].loss


def test_what_is_drawn_for_the_batches_depends_on_the_seed_alone(tiny: Task) -> None:
    seen: dict[tuple[str, int], list[Tensor]] = {}

    def drawn(name: str, seed: int) -> None:
        def augment(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            x = x + torch.randn(x.shape, generator=generator)
            seen.setdefault((name, seed), []).append(x)
            return x, y

        task, entry = replace(tiny, augment=augment), ENTRIES[name]
        run(task, tiny.data(None), entry, settings=entry.defaults, seed=seed, rules=Rules(2))

    for name, seed in (("sgd", 0), ("adamw", 0), ("kfac", 0), ("sgd", 1)):
        drawn(name, seed)
    assert len(seen["sgd", 0]) == 12
    for name in ("adamw", "kfac"):
        assert all(torch.equal(a, b) for a, b in zip(seen["sgd", 0], seen[name, 0], strict=True))
    assert not torch.equal(seen["sgd", 0][0], seen["sgd", 1][0])


def test_losses_of_drawn_inputs_are_measured_on_the_same_draws_every_time(tiny: Task) -> None:
    def noisy(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return x + torch.randn(x.shape, generator=generator), y

    found, task = tiny.data(None), replace(tiny, measured=noisy, chunk=40)
    model = tiny.model(found)
    loss = mean_loss(task, model, found.train)
    assert loss == mean_loss(task, model, found.train) != mean_loss(tiny, model, found.train)


def test_losses_are_measured_as_often_within_an_epoch_as_the_task_says(tiny: Task) -> None:
    once, thrice = quick(tiny, epochs=2), quick(replace(tiny, points=3), epochs=2)
    where = [(p.epoch, p.step) for p in thrice.curve]
    assert where == [(0, 0), (0, 2), (0, 4), (1, 6), (1, 8), (1, 10), (2, 12)]
    assert [p.loss for p in thrice.curve if p.step % 6 == 0] == [p.loss for p in once.curve]
    assert [len(epoch.batch_losses) for epoch in thrice.epochs] == [0, 2, 2, 2, 2, 2, 2]
    seconds = [p.seconds for p in thrice.curve]
    assert seconds == sorted(seconds)


def test_metrics_are_measured_once_after_training_in_evaluation_mode(tiny: Task) -> None:
    asked: list[bool] = []

    def metric(model: nn.Module, data: Dataset) -> float:
        asked.append(model.training)
        return 7.0

    measured = replace(tiny, metrics={"seven": metric})
    done = quick(measured)
    assert asked == [False] and [dict(point.metrics) for point in done.curve] == [{}, {}, {}, {"seven": 7.0}]
    assert record(done)["metrics"] == {"seven": 7.0}
    assert quick(measured, budget=0.0).curve[-1].metrics and not quick(measured, settings={"lr": 1e6}).curve[-1].metrics
    asked.clear()
    tried = trials(measured, tiny.data(None), SGD, count=2, rules=Rules(1), fixed={}, show=lambda _: lambda _: None)
    assert len(list(tried)) == 2 and not asked, "trials are judged by their loss"


def test_an_optimizer_that_asks_for_the_targets_is_told_those_of_every_batch(tiny: Task) -> None:
    told: list[Tensor | None] = []

    def build(model: nn.Module, task: Task, settings: Settings) -> Any:
        optimizer: Any = SGD.build(model, task, settings)
        optimizer.targets = told.append
        return optimizer

    quick(tiny, Entry("s", build, lambda trial: {}, {"lr": 0.05}), epochs=1)
    assert len(told) == 6 and all(y is not None and len(y) == tiny.batch for y in told)


def raising(error: BaseException, after: int = 1) -> Entry:
    def build(model: nn.Module, task: Task, settings: Settings) -> torch.optim.Optimizer:
        optimizer = SGD.build(model, task, {"lr": 0.01})
        steps = iter(range(1, 1000))

        def hook(*_: Any) -> None:
            if next(steps) >= after:
                raise error

        optimizer.register_step_pre_hook(hook)
        return optimizer

    return Entry("raising", build, lambda trial: {})
