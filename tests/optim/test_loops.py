"""Training loops that people write: several optimizers, copies of a model, several losses, adversaries."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import backward, batch, network, noise, optimizer_of, same, train, values, weights

from natgrad import EKFAC, KFAC, TKFAC, Automatic, Categorical, Constant, KLLimit, NaturalGradient
from natgrad.scale import ENOUGH
from oracles import assert_equal

BATCHES = [batch(step) for step in range(8)]


# Several optimizers.


def test_another_optimizer_has_what_this_one_leaves() -> None:
    model, reference = network(), network()
    mine = optimizer_of(model, exclude=["0", "2"], adamw=False)
    theirs = torch.optim.AdamW(model[:3].parameters(), weight_decay=0.0)
    assert sum(len(group["params"]) for group in mine.param_groups) == 2
    assert "another optimizer" in repr(mine)
    for data in BATCHES:
        backward(model, mine, data)
        theirs.zero_grad()
        backward(model, mine, data)
        mine.step()
        theirs.step()
    train(reference, optimizer_of(reference, exclude=["0", "2"]), BATCHES)
    for found, expected in zip(values(model), values(reference), strict=True):
        assert_equal(found, expected, 1e-12)


class Positions(nn.Sequential):
    """Adds a parameter of its own, which nothing expects to have curvature."""

    def __init__(self) -> None:
        super().__init__(*network())
        self.positions = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x + self.positions)
        return y


def test_what_turns_out_to_have_curvature_stays_with_the_other_optimizer_that_was_given_it() -> None:
    model, reference = Positions(), Positions()
    mine, theirs = optimizer_of(model, adamw=False), torch.optim.SGD([model.positions], lr=0.1)
    reference.positions.requires_grad_(False)
    alone = optimizer_of(reference)
    for data in BATCHES:
        backward(model, mine, data)
        assert model.positions.grad is not None
        before, gradient = model.positions.detach().clone(), model.positions.grad.clone()
        mine.step()
        theirs.step()
        train(reference, alone, [data])
        assert_equal(model.positions.detach(), before - 0.1 * gradient)
        reference.positions.data.copy_(model.positions.detach())
    assert same(values(model), values(reference))
    assert mine.uncovered["positions"] == "in no group of parameters" and "positions" not in mine.layers
    assert next(line for line in repr(mine).splitlines() if line.startswith("positions")).split()[1] == "another"


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_an_optimizer_that_is_gone_leaves_no_hook() -> None:
    model = network()
    old, kept = optimizer_of(model), optimizer_of(model)
    train(model, old, BATCHES[:2])
    both = hooks(model)
    del old
    gc.collect()
    assert hooks(model) == both / 2
    del kept
    gc.collect()
    assert hooks(model) == 0


def test_a_model_that_holds_its_optimizer_goes_with_it() -> None:
    model = network()
    vars(model)["trainer"] = optimizer_of(model)
    gone = weakref.ref(model)
    train(model, vars(model)["trainer"], BATCHES[:2])
    del model
    gc.collect()
    assert gone() is None


class Parts(nn.Module):
    """``network()`` as a body and a head."""

    def __init__(self) -> None:
        super().__init__()
        whole = network()
        self.body, self.head = whole[:3], whole[3]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


def in_one_unit(model: nn.Module, **settings: Any) -> Any:
    """An optimizer that does not measure the unit of the loss at its own model's outputs."""
    optimizer = optimizer_of(model, **settings)
    optimizer.param_groups[0]["clock"]["loss_compared"] = ENOUGH
    return optimizer


def test_two_natural_gradients_on_two_parts_are_that_on_the_whole() -> None:
    model: Any = Parts()
    reference = Parts()
    settings: Any = {"likelihood": None, "step_size": Constant(), "lr": 1e-3}
    body, head = in_one_unit(model.body, **settings), in_one_unit(model.head, **settings)
    for data in BATCHES:
        body.zero_grad()
        backward(model, head, data)
        body.step()
        head.step()
    assert list(body.layers) == ["0"] and list(head.layers) == [""]
    assert body.state[model.body[0].weight]["observations"] == head.state[model.head.weight]["observations"] > 0
    train(reference, in_one_unit(reference, **settings), BATCHES)
    for found, expected in zip(values(model), values(reference), strict=True):
        assert_equal(found, expected, 1e-12)


# Copies of a model.


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    result: nn.Module = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    return result


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_copy_of_the_model_has_no_part_in_its_training(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, reference = network(), network()
    optimizer = optimizer_of(model)
    train(model, optimizer, BATCHES[:2])
    other = duplicate(model)
    assert same(values(other), values(model))
    for data in BATCHES[2:]:
        backward(model, optimizer, data)
        F.cross_entropy(other(noise(3)[0]), noise(3)[1]).backward()
        optimizer.step()
    train(reference, optimizer_of(reference), BATCHES)
    assert same(values(model), values(reference))
    train(other, optimizer_of(other), BATCHES)  # it may have an optimizer of its own
    assert not same(values(other), values(model))


def test_averages_of_the_weights_do_not_touch_the_run() -> None:
    model, reference = network(), network()
    optimizer = optimizer_of(model)
    averages = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
    expected = [values(model), values(model)]
    for step, data in enumerate(BATCHES):
        train(model, optimizer, [data])
        for average in averages:
            average.update_parameters(model)
            average(data[0])
        old, ema = expected
        expected[0] = [(a * step + p) / (step + 1) for a, p in zip(old, values(model), strict=True)]
        expected[1] = (
            values(model) if step == 0 else [0.9 * a + 0.1 * p for a, p in zip(ema, values(model), strict=True)]
        )
    train(reference, optimizer_of(reference), BATCHES)
    assert same(values(model), values(reference))
    for average, parameters in zip(averages, expected, strict=True):
        for found, wanted in zip(values(average.module), parameters, strict=True):
            assert_equal(found, wanted, 1e-12)


# Losses and outputs.


class Heads(nn.Module):
    """Logits and a value, from one body."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.logits, self.value = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.body(x))
        return {"logits": self.logits(h), "value": self.value(h)}


@pytest.mark.parametrize("likelihood", [None, Categorical(output="logits")])
def test_terms_of_a_loss_may_have_backward_passes_of_their_own(likelihood: Any) -> None:
    found = []
    for together in (True, False):
        model = Heads()
        excluded = ["value"] if likelihood else []
        optimizer = optimizer_of(model, likelihood=likelihood, exclude=excluded)
        for x, y in BATCHES:
            optimizer.zero_grad()
            out = model(x)
            terms = [F.cross_entropy(out["logits"], y), 0.3 * out["value"].square().mean()]
            terms.append(1e-3 * sum((p.square().sum() for p in model.parameters()), start=torch.zeros(())))
            if together:
                torch.stack(terms).sum().backward()
            else:
                for term in terms:
                    term.backward(retain_graph=True)
            optimizer.step()
        assert all(optimizer.state[w]["observations"] > 0 for w in weights(optimizer))
        found.append(values(model))
    for mine, theirs in zip(*found, strict=True):
        assert_equal(mine, theirs, 1e-10)


def test_a_head_outside_of_the_likelihood_is_named() -> None:
    model = Heads()
    optimizer = optimizer_of(model, likelihood=Categorical(output="logits"))
    x, y = BATCHES[0]
    out = model(x)
    (F.cross_entropy(out["logits"], y) + out["value"].square().mean()).backward()
    with pytest.warns(UserWarning, match=r"not observed: value.weight, value.bias;"):
        optimizer.step()


# Adversaries.


def adversaries(generator_learns: bool, steps: int = 6) -> tuple[list[Tensor], list[Tensor]]:
    """Critic and generator after alternating steps; a generator that does not learn has no optimizer and no turns."""
    torch.manual_seed(6)
    generator = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5))
    critic = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
    settings: Any = {"likelihood": None, "step_size": KLLimit()}
    critics = optimizer_of(critic, **settings)
    generators = optimizer_of(generator, lr=0.0, **settings) if generator_learns else None
    for step in range(steps):
        critics.zero_grad()
        z, real = batch(step)[0][:, :2], batch(step + 50)[0]
        loss = F.softplus(-critic(real)).mean() + F.softplus(critic(generator(z).detach())).mean()
        loss.backward()
        critics.step()
        if generators is not None:
            generators.zero_grad()
            F.softplus(-critic(generator(z))).mean().backward()
            generators.step()
    return values(critic), values(generator)


def test_steps_of_the_generator_in_between_leave_the_critic_alone() -> None:
    assert same(adversaries(True), adversaries(False))


class WithWeight(nn.Module):
    """Returns a weight beside its logits, as models with a penalty in the loss do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.inner(x), self.inner[0].weight


def test_a_parameter_that_a_model_returns_keeps_no_records() -> None:
    """Nor does its gradient, to which every loss adds, say that a pass had a backward pass."""
    model, reference = WithWeight(), WithWeight()
    optimizer = optimizer_of(model, likelihood=Categorical(output=0))
    alone = optimizer_of(reference, likelihood=Categorical(output=0))
    for step, (x, y) in enumerate(BATCHES):
        for trained, own in ((model, optimizer), (reference, alone)):
            own.zero_grad()
            logits, weight = trained(x)
            (F.cross_entropy(logits, y) + 0.01 * weight.square().sum()).backward()
            if trained is model and step % 2:
                trained(noise(step)[0])  # without a backward pass
            own.step()
    assert not model.inner[0].weight._backward_hooks
    assert same(values(model), values(reference))


@pytest.mark.filterwarnings("ignore:.*of a set length")
def test_the_default_goes_on_with_set_lengths_where_a_pass_was_not_observed() -> None:
    model = network().double()
    optimizer = optimizer_of(model, step_size=Automatic(look=1, agreement=0.0))
    train(model, optimizer, BATCHES[:3])
    assert optimizer.statistics()["precise"] == 1
    before = values(model)
    with pytest.warns(UserWarning, match="of a set length"):
        optimizer.step()  # on the same gradients
    assert not same(values(model), before)
    model.eval()
    losses = train(model, optimizer, BATCHES)
    assert losses[-1] < losses[0]
    model.train()
    train(model, optimizer, BATCHES[:3])
    assert optimizer.statistics()["precise"] == 1


@pytest.mark.filterwarnings("ignore:.*of a set length", "ignore:step .* skipped")
def test_a_skipped_step_without_an_observed_pass_leaves_the_policy_as_it_was() -> None:
    model = network().double()
    optimizer = optimizer_of(model, step_size=Automatic(look=1, agreement=0.0))
    train(model, optimizer, BATCHES[:3])
    before = copy.deepcopy(optimizer.param_groups[0]["clock"]["memory"])
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert optimizer.statistics()["skipped"] == 1
    assert optimizer.param_groups[0]["clock"]["memory"] == before


@pytest.mark.parametrize("approximation", [KFAC(), TKFAC(), EKFAC()], ids=lambda a: type(a).__name__)
def test_a_batch_in_which_no_term_counts_leaves_the_size_of_inputs_alone(approximation: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = NaturalGradient(
        model, approximation, likelihood=Categorical(ignore_index=-100), observe_every=1, overhead=None
    )
    for step in range(6):
        x, y = torch.randn(16, 4, 8), torch.randint(3, (16, 4))
        if step in (0, 3):
            y[:] = -100
        optimizer.zero_grad()
        optimizer.targets(y)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum", ignore_index=-100)
        loss.backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
    inputs = optimizer._now["0"].inputs
    assert inputs is not None and 4 < float(inputs) < 9
