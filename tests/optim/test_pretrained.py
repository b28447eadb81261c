"""A model that has learnt something before is told from a fresh one, and trained further in shorter steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from natgrad import Categorical, NaturalGradient, QuadraticModel
from natgrad.optim.pretrained import is_pretrained
from natgrad.optim.step_size import Automatic


def with_weight(*shape: int, fill: Callable[[Tensor], object]) -> nn.Module:
    weight = nn.Parameter(torch.empty(*shape))
    with torch.no_grad():
        fill(weight)
    return nn.ParameterList([weight])


def learnt(*sides: int) -> nn.Sequential:
    """A perceptron whose weights have two large singular values beside random ones."""
    torch.manual_seed(0)
    layers = [nn.Linear(*pair) for pair in pairwise(sides)]
    for layer in layers:
        m, n = layer.weight.shape
        spikes = torch.randn(m, 2) @ torch.randn(2, n) / (m * n) ** 0.5
        layer.weight.data += 8 * layer.weight.std() * (m**0.5 + n**0.5) * spikes
    return nn.Sequential(*layers)


class Tables(nn.Module):
    """Has a parameter without curvature, stepped by AdamW's rule in the group of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cumsum(self.table, 0)


def rows_of_unequal_scale(W: Tensor) -> None:
    W.normal_().mul_(torch.randn(len(W)).mul(2).exp().reshape(-1, *[1] * (W.ndim - 1)))


def columns_too(W: Tensor) -> None:
    rows_of_unequal_scale(W)
    W.mul_(torch.randn(W.shape[1:]).mul(2).exp())


def blocks_of_unequal_scale_and_mean(W: Tensor) -> None:
    W.normal_()
    for block, (scale, mean) in zip(W.chunk(4), ((1.0, 0.0), (0.01, 1.0), (3.0, -1.0), (0.1, 0.1)), strict=False):
        block.mul_(scale).add_(mean)


def columns_of_unequal_mean(W: Tensor) -> None:
    W.normal_().add_(3 * torch.randn(W.shape[1:]))


def repeated_rows(W: Tensor) -> None:
    W.copy_(torch.randn(-(-len(W) // 4), *W.shape[1:]).repeat_interleave(4, 0)[: len(W)])


def mean_of_rank_one(W: Tensor) -> None:
    W.normal_().flatten(1).add_(torch.randn(len(W), 1) @ torch.randn(1, W[0].numel()))


def sparse(W: Tensor) -> None:
    W.normal_().mul_(torch.rand(W.shape) < 0.1)


def identity_and_noise(W: Tensor) -> None:
    W.normal_(std=0.01).flatten(1).diagonal().add_(1)


RANDOM: dict[str, Callable[[Tensor], object]] = {
    "normal": nn.init.normal_,
    "uniform": nn.init.kaiming_uniform_,
    "truncated": nn.init.trunc_normal_,
    "orthogonal": nn.init.orthogonal_,
    "positive": nn.init.uniform_,
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
    "Cauchy": Tensor.cauchy_,
    "log-normal": Tensor.log_normal_,
    "rows": rows_of_unequal_scale,
    "rows and columns": columns_too,
    "blocks": blocks_of_unequal_scale_and_mean,
    "columns of unequal mean": columns_of_unequal_mean,
    "repeated": repeated_rows,
    "mean": mean_of_rank_one,
    "sparse": sparse,
    "identity": identity_and_noise,
}


@pytest.mark.parametrize("shape", [(64, 64), (10, 300), (400, 1500), (32, 16, 3, 3), (12, 40)])
@pytest.mark.parametrize("fill", RANDOM.values(), ids=RANDOM)
def test_random_weights_have_learnt_nothing(fill: Callable[[Tensor], object], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    found = [is_pretrained(with_weight(*shape, fill=fill).parameters()) for _ in range(10)]

    assert not any(found)


def test_the_bound_has_a_margin() -> None:
    torch.manual_seed(0)  # by the bound itself 2 % of these would count
    found = [is_pretrained(with_weight(10, 300, fill=nn.init.normal_).parameters()) for _ in range(300)]

    assert not any(found)


def test_filters_of_identities_have_learnt_nothing() -> None:
    assert not is_pretrained(with_weight(64, 16, 3, 3, fill=lambda W: nn.init.dirac_(W, 4)).parameters())


def test_training_is_seen() -> None:
    torch.manual_seed(0)
    x, teacher = torch.randn(512, 32), torch.randn(32, 10)
    y = (x @ teacher).argmax(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    assert not is_pretrained(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    assert is_pretrained(model.parameters())


def test_most_numbers_decide() -> None:
    model = learnt(64, 64, 64).append(nn.Linear(64, 16))
    assert is_pretrained(model.parameters())
    assert not is_pretrained(nn.Sequential(*model, nn.Linear(64, 500)).parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_tell_nothing(bad: float) -> None:
    model = learnt(32, 32)
    model.state_dict()["0.weight"][3, 4] = bad

    assert not is_pretrained(model.parameters())


def test_weights_without_data_tell_nothing() -> None:
    assert not is_pretrained(nn.Sequential(nn.LazyLinear(64)).parameters())
    assert not is_pretrained(learnt(32, 32).to("meta").parameters())
    assert not is_pretrained(nn.Linear(64, 1).parameters())


def steps(model: nn.Module, optimizer: NaturalGradient, count: int) -> None:
    generator = torch.Generator().manual_seed(optimizer.steps)
    for _ in range(count):
        x, y = torch.randn(64, 32, generator=generator), torch.randint(16, (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def asked(optimizer: NaturalGradient) -> list[bool | None]:
    return [group["pretrained"] for group in optimizer.param_groups]


quietly = pytest.mark.filterwarnings("ignore:these weights have learnt")
never = pytest.mark.filterwarnings("error:these weights have learnt")


def test_weights_that_have_learnt_are_named_at_the_first_step_and_in_print() -> None:
    model = learnt(32, 32, 16)
    optimizer = NaturalGradient(model, likelihood=Categorical(), exclude=["0"])
    assert asked(optimizer) == [None, None]
    told = "learnt something before: learning rates that were not given count 0.05 times .the default as 0.001"
    with pytest.warns(UserWarning, match=told):
        steps(model, optimizer, 1)

    assert asked(optimizer) == [True, True]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 1e-3]
    assert "their lr counts 0.05 times" in str(optimizer)
    fresh = NaturalGradient(nn.Sequential(nn.Linear(32, 16)), likelihood=Categorical())
    steps(fresh.model, fresh, 1)
    assert asked(fresh) == [False]
    assert "counts" not in str(fresh)


@quietly
@pytest.mark.parametrize(("given", "lr", "of_adamw"), [
    ({}, 0.001, 5e-5),
    ({"adamw": {"lr": 2e-3}}, 0.001, 2e-3),
    ({"lr": 0.02}, 0.02, 1e-3),
])  # fmt: skip
def test_steps_and_decay_are_those_of_a_twentieth_of_every_rate_that_is_not_given(
    given: dict[str, Any], lr: float, of_adamw: float
) -> None:
    sides = 32, 32, 32, 16
    shared, told, start = learnt(*sides).append(Tables()), learnt(*sides).append(Tables()), learnt(*sides)
    rest: dict[str, Any] = {"likelihood": Categorical(), "exclude": ["0"], "weight_decay": 0.1}
    own = {"params": [*shared[1].parameters()], "lr": 0.01}
    steps(shared, NaturalGradient(shared, groups=[own], **given, **rest), 6)
    own = {"params": [*told[1].parameters()], "lr": 0.01}
    steps(told, NaturalGradient(told, lr=lr, adamw={"lr": of_adamw}, groups=[own], **rest), 6)
    for p, q, r in zip(shared.parameters(), told.parameters(), [*start.parameters(), torch.ones(16)], strict=True):
        assert not torch.equal(p, r)
        torch.testing.assert_close(p - r, q - r, rtol=1e-9, atol=1e-14)


@quietly
def test_weights_loaded_after_construction_and_held_back_at_first_count() -> None:
    model, trained = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16)), learnt(32, 32, 16)
    optimizer = NaturalGradient(model, likelihood=Categorical())
    model.load_state_dict(trained.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    steps(model, optimizer, 1)
    assert asked(optimizer) == [None]
    optimizer.param_groups[0]["lr"] = 0.02
    model.requires_grad_(False)[1].requires_grad_(True)
    steps(model, optimizer, 1)

    assert asked(optimizer) == [True]


@quietly
def test_a_body_that_is_unfrozen_later_is_asked_then() -> None:
    model = learnt(32, 32).append(nn.Linear(32, 16))
    model[0].requires_grad_(False)
    optimizer = NaturalGradient(model, likelihood=Categorical())
    steps(model, optimizer, 2)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": [*model[0].parameters()]})
    steps(model, optimizer, 2)

    assert asked(optimizer) == [False, True]


@never
def test_weights_are_asked_once_and_by_policies_that_set_lengths_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    optimizer = NaturalGradient(model, likelihood=Categorical())
    steps(model, optimizer, 1)
    trained = learnt(32, 32, 16)
    model.load_state_dict(trained.state_dict())
    steps(model, optimizer, 1)
    other = NaturalGradient(trained, likelihood=Categorical())
    other.load_state_dict(optimizer.state_dict())
    steps(trained, other, 1)
    quadratic = NaturalGradient(trained, likelihood=Categorical(), step_size=QuadraticModel())
    steps(trained, quadratic, 1)

    assert asked(other) == asked(optimizer) == asked(quadratic) == [False]


def test_a_step_that_is_skipped_asks_and_warns_once() -> None:
    model = learnt(32, 32, 16)
    optimizer = NaturalGradient(model, likelihood=Categorical())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.randn(64, 32)).sum() * float("nan")).backward()
            optimizer.step()
    told = [str(warning.message) for warning in seen]

    assert sum("skipped" in text for text in told) == 3
    assert sum("learnt something before" in text for text in told) == 1


@quietly
def test_a_resumed_run_goes_on_alike_whatever_the_model_is_at_the_restart() -> None:
    model = learnt(32, 32, 32, 16).append(Tables())
    model[1].requires_grad_(False)
    optimizer = NaturalGradient(model, likelihood=Categorical(), exclude=["0"])
    steps(model, optimizer, 6)
    saved = deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    fresh = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16), Tables())
    fresh[1].requires_grad_(False)
    other = NaturalGradient(fresh, likelihood=Categorical(), exclude=["0"])
    fresh.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for net, its in ((model, optimizer), (fresh, other)):
        net[1].requires_grad_(True)
        its.add_param_group({"params": [*net[1].parameters()]})
        steps(net, its, 6)

    assert asked(optimizer) == asked(other) == [True, True, True]
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_the_quadratic_model_goes_its_whole_way() -> None:
    policy = Automatic()

    assert policy.share_of_pretrained({"precise": 1.0}) == 1.0
    assert policy.share_of_pretrained({}) == 0.05
