"""Weights that a module of one's own multiplies with: found in its source, recorded when they are used."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functional import EVERYTHING, assert_captured, assert_exact_fisher, record_of
from torch import Tensor, nn

from natgrad import Gaussian, NaturalGradient
from natgrad.layers import cover

IN, OUT, N, T = 3, 4, 5, 2


class Own(nn.Module):
    """A weight and a bias of its own; what to do with them is said below."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(shape or (OUT, IN)))
        self.shift = nn.Parameter(torch.randn(OUT))


class ByLinear(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.shift).tanh().flatten(1)


class ByKeyword(Own):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix, bias=self.shift).tanh().flatten(1)


class ByTransposed(Own):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrix.T + self.shift).flatten(1)


class ByMatmul(Own):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.matmul(x, self.matrix.mT) + self.shift).flatten(1)


class ByMethod(Own):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.matmul(self.matrix.t()) + self.shift).flatten(1)


class FromTheRight(Own):
    def __init__(self) -> None:
        super().__init__(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrix + self.shift).flatten(1)


class Twice(Own):
    def __init__(self) -> None:
        super().__init__()
        self.back = nn.Parameter(torch.randn(IN, OUT))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(x + self.out(torch.tanh(F.linear(x, self.matrix, self.shift))))
        return x.flatten(1)

    def out(self, h: Tensor) -> Tensor:
        return h @ self.back.T


@pytest.mark.parametrize("make", [ByLinear, ByKeyword, ByTransposed, ByMatmul, ByMethod])
def test_a_weight_of_the_modules_own_is_captured(make: Callable[[], Own]) -> None:
    slices = {"matrix": ("matrix", EVERYTHING, "shift", EVERYTHING)}
    for shape in ((N, IN), (N, T, IN)):
        assert_captured(make(), torch.randn(shape), slices)
        assert_exact_fisher(make(), torch.randn(shape), slices)


def test_a_weight_that_is_used_twice_with_several_positions() -> None:
    slices = {
        "matrix": ("matrix", EVERYTHING, "shift", EVERYTHING),
        "back": ("back", EVERYTHING, "none", EVERYTHING),
    }
    assert_captured(Twice(), torch.randn(N, T, IN), slices)
    assert_exact_fisher(Twice(), torch.randn(N, T, IN), slices)


def test_a_weight_in_times_out_is_a_block_out_times_in() -> None:
    model, x = FromTheRight(), torch.randn(N, IN)
    record, _ = record_of(model, x, None)
    layer = cover(model).layers["matrix"]
    assert layer.shape == (OUT, IN + 1)
    (capture,) = record.captures(layer)
    (DW,) = capture.weight_gradients()
    h = torch.tanh(x @ model.matrix + model.shift)
    g = h * (1 - h**2)
    expected = torch.cat([g.unsqueeze(-1) * x.unsqueeze(1), g.unsqueeze(-1)], -1)
    assert torch.allclose(DW, expected, rtol=1e-12)
    twin = ByTransposed()
    twin.load_state_dict({"matrix": model.matrix.mT, "shift": model.shift})
    for net in (model, twin):
        optimizer = NaturalGradient(net, likelihood=Gaussian())
        for _ in range(3):
            optimizer.zero_grad()
            (0.5 * net(x).square().sum() / N).backward()
            optimizer.step()
    assert torch.allclose(model.matrix.mT, twin.matrix, rtol=1e-10)
    assert torch.allclose(model.shift, twin.shift, rtol=1e-10)


class Shared(Own):
    """Used with two different biases."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix, self.shift) + F.linear(x.cos(), self.matrix)


class Scaled(Own):
    """Used under another name."""

    def forward(self, x: Tensor) -> Tensor:
        weight = 2 * self.matrix
        return F.linear(x, weight, self.shift)


@pytest.mark.parametrize("make", [Shared, Scaled, Own])
def test_what_is_not_found_goes_to_adamw(make: Callable[[], Own]) -> None:
    assert cover(make()).layers == {}
    assert cover(make()).uncovered["matrix"] == f"no adapter for {make.__name__}"


class LowRank(nn.Module):
    """W = B A, a product of two parameters before there is any data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(OUT, 2)), nn.Parameter(torch.randn(2, IN))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.first @ self.second)


def test_a_product_of_two_parameters_is_left_to_adamw_with_the_reason() -> None:
    model, x = LowRank(), torch.randn(N, IN)
    optimizer = NaturalGradient(model, likelihood=Gaussian())
    before = copy.deepcopy(list(model.parameters()))
    (0.5 * model(x).square().sum() / N).backward()
    with pytest.warns(UserWarning, match=r"not observed: second \(multiplied with"):
        optimizer.step()
    (row,) = (line for line in repr(optimizer).splitlines() if line.startswith("second"))
    assert row.endswith("multiplied with another parameter: AdamW")
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
