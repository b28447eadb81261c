"""A model that has learnt something before is told from a fresh one, and trained further in shorter steps."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from natgrad import Categorical, NaturalGradient, QuadraticModel
from natgrad.optim.pretrained import is_pretrained
from natgrad.optim.step_size import Automatic, Situation


def with_weight(*shape: int, fill: Callable[[Tensor], object]) -> nn.Module:
    weight = nn.Parameter(torch.empty(*shape))
    with torch.no_grad():
        fill(weight)
    return nn.ParameterList([weight])


def learnt(*sides: int) -> nn.Sequential:
    """A perceptron whose weights have one large singular value beside random ones."""
    torch.manual_seed(0)
    layers = [nn.Linear(*pair) for pair in pairwise(sides)]
    for layer in layers:
        m, n = layer.weight.shape
        spike = torch.outer(torch.randn(m), torch.randn(n)) / (m * n) ** 0.5
        layer.weight.data += 3 * layer.weight.std() * (m**0.5 + n**0.5) * spike
    return nn.Sequential(*layers)


class Tables(nn.Module):
    """Has a parameter without curvature, stepped by AdamW's rule in the group of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cumsum(self.table, 0)


RANDOM: dict[str, Callable[[Tensor], object]] = {
    "normal": nn.init.normal_,
    "uniform": nn.init.kaiming_uniform_,
    "truncated": nn.init.trunc_normal_,
    "orthogonal": nn.init.orthogonal_,
    "positive": nn.init.uniform_,
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
}


@pytest.mark.parametrize("shape", [(64, 64), (10, 300), (400, 1500), (32, 16, 3, 3), (12, 40)])
@pytest.mark.parametrize("fill", RANDOM.values(), ids=RANDOM)
def test_random_weights_have_learnt_nothing(fill: Callable[[Tensor], object], shape: tuple[int, ...]) -> None:
    found = [is_pretrained(with_weight(*shape, fill=fill)) for _ in range(20)]

    assert not any(found)


def test_training_is_seen() -> None:
    torch.manual_seed(0)
    x, teacher = torch.randn(512, 32), torch.randn(32, 10)
    y = (x @ teacher).argmax(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    assert not is_pretrained(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    assert is_pretrained(model)


def test_most_numbers_decide_and_frozen_ones_count() -> None:
    model = learnt(64, 64, 64)
    model.requires_grad_(False)
    model.append(nn.Linear(64, 16))

    assert is_pretrained(model)
    assert not is_pretrained(nn.Sequential(*model, nn.Linear(64, 500)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_tell_nothing(bad: float) -> None:
    model = learnt(32, 32)
    model.state_dict()["0.weight"][3, 4] = bad

    assert not is_pretrained(model)


def test_weights_without_data_tell_nothing() -> None:
    assert not is_pretrained(nn.Sequential(nn.LazyLinear(64)))
    assert not is_pretrained(learnt(32, 32).to("meta"))
    assert not is_pretrained(nn.Linear(64, 1))


def test_the_defaults_of_both_rules_are_a_twentieth() -> None:
    with pytest.warns(UserWarning, match="learnt something before: lr is 0.001"):
        optimizer = NaturalGradient(learnt(32, 32, 16), likelihood=Categorical(), exclude=["0"])
    natural, adamw = optimizer.param_groups

    assert natural["lr"] == pytest.approx(0.001)
    assert adamw["lr"] == pytest.approx(5e-5)
    assert "learnt before: 0.05 of the default lr" in str(optimizer)


@pytest.mark.filterwarnings("ignore:the weights of this model have learnt")
def test_what_is_given_holds() -> None:
    model = learnt(32, 32, 16)
    given = NaturalGradient(model, likelihood=Categorical(), lr=0.01, exclude=["0"])
    assert [group["lr"] for group in given.param_groups] == [0.01, 1e-3]
    assert "learnt before" not in str(given)
    of_adamw = NaturalGradient(model, likelihood=Categorical(), adamw={"lr": 2e-3}, exclude=["0"])
    assert [group["lr"] for group in of_adamw.param_groups] == pytest.approx([0.001, 2e-3])
    other = NaturalGradient(model, likelihood=Categorical(), step_size=QuadraticModel())
    assert other.param_groups[0]["lr"] == 1.0


def steps(model: nn.Module, optimizer: NaturalGradient, count: int) -> None:
    generator = torch.Generator().manual_seed(optimizer.steps)
    for _ in range(count):
        x, y = torch.randn(64, 32, generator=generator), torch.randint(16, (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:the weights of this model have learnt")
def test_a_resumed_run_keeps_its_share_whatever_the_model_is_at_the_restart() -> None:
    model = learnt(32, 32, 16).append(Tables())
    optimizer = NaturalGradient(model, likelihood=Categorical(), exclude=["0"])
    steps(model, optimizer, 6)
    saved = deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    fresh = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16), Tables())
    other = NaturalGradient(fresh, likelihood=Categorical(), exclude=["0"])
    fresh.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    steps(model, optimizer, 6)
    steps(fresh, other, 6)

    assert optimizer.statistics()["share"] == other.statistics()["share"] == 0.05
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_the_quadratic_model_goes_its_whole_way() -> None:
    policy = Automatic()

    assert policy.unit({"precise": 1.0, "share": 0.05}) * 0.001 == pytest.approx(1.0)
    assert policy.unit({"share": 0.05}) == 1.0
    read = {"MV": 6.0, "MM": 4.0, "VV": 9.0}
    memory = Automatic(look=1).decide(Situation(read, lr=0.001, memory={"share": 0.05})).memory
    assert policy.unit(memory) * 0.001 == pytest.approx(1.0)
