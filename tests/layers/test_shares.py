"""An observation may read a share of the examples and positions: all shares together are the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from natgrad import KFAC, TKFAC, Approximation, Categorical
from natgrad.engine import Engine
from natgrad.fishers import pool
from natgrad.labels import Labels
from natgrad.layers import Layer
from natgrad.layers.convolution import grid
from natgrad.record import Record, Share

N = 4


class Tokens(nn.Module):
    """A table, a norm and a dense layer on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.table(x))).transpose(1, 2)


class Twice(nn.Module):
    """One weight, used at positions of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        return self.layer(y[:, :4]).mean(1)


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolution": (lambda: images(nn.Conv2d(3, 4, 3, padding=1)), lambda: torch.randn(N, 3, 8, 8)),
    "stride, groups, odd sizes": (
        lambda: images(nn.Conv2d(4, 6, 3, stride=2, groups=2)),
        lambda: torch.randn(N, 4, 11, 17),
    ),
    "transposed": (
        lambda: images(nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)),
        lambda: torch.randn(N, 4, 4, 5),
    ),
    "one dimension": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()),
        lambda: torch.randn(N, 3, 13),
    ),
    "sequences": (Tokens, lambda: torch.randint(7, (N, 9))),
    "used twice": (Twice, lambda: torch.randn(N, 6, 5)),
}


def recorded(make: Callable[[], nn.Module], x: Tensor, targets: Tensor | None = None) -> tuple[Record, list[Layer]]:
    model = make()
    labels = Labels(Categorical(), "sampled")
    labels.targets = targets
    engine = Engine(model, labels)
    engine.armed = True
    model(x).float().sum().backward()
    (record,) = engine.take()
    return record, list(engine.layers.values())


def pooled(approximation: Approximation, record: Record, layer: Layer, shares: list[Share]) -> dict[str, Any]:
    return pool(approximation.observe(seen) for share in shares for seen in record.captures(layer, "expand", share))


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("approximation", [KFAC(), TKFAC()], ids=["kfac", "tkfac"])
@pytest.mark.parametrize(("fraction", "stride"), [(1.0, 4), (0.5, 2), (0.25, 1), (0.75, 4)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_law_the_shares_of_all_turns_pool_to_the_whole(
    case: Any, fraction: float, stride: int, approximation: Approximation
) -> None:
    make, x = case
    record, layers = recorded(make, x())
    shares = [Share(fraction, stride, turn) for turn in range(stride * math.ceil(1 / fraction))]
    for layer in layers:
        whole = pooled(approximation, record, layer, [Share()])
        parts = pooled(approximation, record, layer, shares)
        for name, statistic in whole.items():
            assert_close(parts[name].value, statistic.value)
            assert_close(torch.as_tensor(float(parts[name].weight)), torch.as_tensor(float(statistic.weight)))


def test_law_the_mean_over_equal_shares_is_the_whole() -> None:
    def make() -> nn.Module:
        return images(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh())

    record, (layer,) = recorded(make, torch.randn(N, 3, 8, 8))
    whole = pooled(KFAC(), record, layer, [Share()])
    each = [pooled(KFAC(), record, layer, [Share(0.5, 4, turn)]) for turn in range(8)]
    for name, statistic in whole.items():
        values = torch.stack([stats[name].value for stats in each])
        assert_close(values.mean(0), statistic.value)
        assert not torch.allclose(values[0], values[1])


def test_law_shares_leave_out_what_the_whole_leaves_out() -> None:
    x = torch.randint(7, (N, 9))
    targets = torch.randint(3, (N, 9))
    targets[0, 5:], targets[2, 1:] = -100, -100
    record, layers = recorded(Tokens, x, targets)
    for layer in layers:
        whole = pooled(KFAC(), record, layer, [Share()])
        parts = pooled(KFAC(), record, layer, [Share(0.5, 2, turn) for turn in range(4)])
        assert_close(parts["A"].value, whole["A"].value)
        assert_close(torch.as_tensor(float(parts["A"].weight)), torch.as_tensor(float(whole["A"].weight)))
        assert_close(parts["G"].total, whole["G"].total)


def test_a_weight_in_two_roles_and_reduce_keep_all_positions() -> None:
    record, layers = recorded(Tokens, torch.randint(7, (N, 8)))
    for layer in layers:
        (some,), (all_of_them,) = (record.captures(layer, "reduce", Share(1.0, stride)) for stride in (4, 1))
        assert_close(some.moment_g(), all_of_them.moment_g())


@pytest.mark.parametrize(("sizes", "stride"), [((8, 8), 4), ((3, 20), 8), ((2, 2), 64), ((5,), 3), ((4, 6, 8), 16)])
def test_a_grid_has_about_one_position_in_so_many(sizes: tuple[int, ...], stride: int) -> None:
    x = torch.ones(1, 1, *sizes)
    seen = torch.zeros_like(x)
    for turn in range(stride):
        part = torch.zeros_like(x)
        part[grid(sizes, stride, turn)] = 1
        assert part.sum() >= 1 and part.sum() <= max(2 ** len(sizes), 2 * math.ceil(x.numel() / stride))
        seen += part
    assert (seen > 0).all()
