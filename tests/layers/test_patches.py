"""The covariance of patches without the patches: that of the patches, for every kind of convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad import Categorical, NaturalGradient, capture
from natgrad.capture import Capture
from natgrad.layers import patches
from natgrad.layers.convolution import Convolution, TransposedConvolution
from natgrad.layers.patches import Patches, correlates
from oracles import assert_equal

SAME, NONE = ((1, 1), (1, 1)), ((0, 0), (0, 0))
# kernel, stride, padding, dilation, groups; size of the images.
CASES: dict[str, tuple[Convolution, tuple[int, ...]]] = {
    "same": (Convolution((3, 3), (1, 1), SAME, (1, 1)), (16, 15)),
    "valid": (Convolution((3, 3), (1, 1), NONE, (1, 1)), (8, 9)),
    "wide": (Convolution((5, 3), (1, 1), ((2, 2), (1, 1)), (1, 1)), (12, 10)),
    "uneven": (Convolution((3, 2), (1, 1), ((1, 2), (0, 1)), (1, 1), 2), (8, 9)),
    "dilated": (Convolution((3, 3), (1, 1), ((2, 1), (3, 3)), (2, 3)), (9, 11)),
    "depthwise": (Convolution((3, 3), (1, 1), SAME, (1, 1), 6), (7, 5)),
    "one": (Convolution((1, 1), (1, 1), NONE, (1, 1)), (5, 4)),
    "smaller than its padding": (Convolution((3, 3), (1, 1), ((2, 2), (2, 2)), (1, 1)), (2, 1)),
    "strided": (Convolution((3, 3), (2, 1), SAME, (1, 1)), (8, 8)),
    "line": (Convolution((3,), (1,), ((1, 1),), (1,)), (9,)),
    "volume": (Convolution((3, 3, 2), (1, 1, 1), ((1, 1), (0, 0), (1, 0)), (1, 1, 2), 3), (5, 4, 6)),
    "transposed": (TransposedConvolution((3, 3), (2, 2), SAME, (1, 1), 2, (1, 0)), (5, 4)),
}


def images(size: tuple[int, ...]) -> Tensor:
    return torch.randn(4, 6, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_moment_is_that_of_the_patches(name: str, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    form, size = CASES[name]
    x = images(size)
    a = form.inputs(x, biased).flatten(-3, -2)
    expected = a.mT @ a
    assert_equal(Patches(form, x, biased).moment(x.dtype), expected, 1e-13)
    monkeypatch.setattr(patches, "_CHUNK", 1)
    monkeypatch.setattr(patches, "correlates", lambda form, x: False)  # one example at a time
    assert_equal(Patches(form, x, biased).moment(x.dtype), expected, 1e-13)
    if type(form) is Convolution and set(form.stride) == {1}:  # whether or not it pays
        found = patches._correlated(form, x, biased)
        assert_equal(found, expected, 1e-13)
        assert torch.equal(found, found.mT)


def test_correlations_are_taken_where_they_pay() -> None:
    """Of images and kernels large enough, with stride 1; shapes alone decide."""

    def takes(name: str, *shape: int) -> bool:
        return correlates(CASES[name][0], torch.empty(1).expand(shape))

    assert takes("same", 64, 16, 32, 32) and takes("wide", 8, 4, 16, 32, 32) and takes("volume", 8, 24, 16, 16, 16)
    assert not takes("same", 32, 1, 28, 28)  # too little to do
    assert not takes("same", 512, 64, 1, 1)  # images of one pixel are nothing but padding
    assert not any(takes(name, 64, 24, 32, 32) for name in ("one", "strided", "transposed"))


def test_several_images_an_example_are_patches_of_one_example() -> None:
    form = Convolution((3, 3), (1, 1), SAME, (1, 1))
    x = images((8, 8)).reshape(2, 2, 6, 8, 8)
    a = form.inputs(x, True).flatten(-3, -2)
    assert_equal(Patches(form, x, True).moment(x.dtype), a.mT @ a, 1e-13)


@pytest.mark.parametrize("settings", [{}, {"observe_fraction": 0.5}, {"weight_sharing": "reduce"}], ids=str)
def test_a_network_has_the_statistics_of_its_patches(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def statistics() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(6, 4, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, stride=2, groups=2),
            nn.Flatten(),
            nn.Linear(36, 3),
        )
        optimizer = NaturalGradient(model, likelihood=Categorical(), **settings)
        F.cross_entropy(model(images((8, 8))), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        return [v for state in optimizer.state.values() for name, v in state.items() if name.startswith("stats.")]

    monkeypatch.setattr(patches, "_CALL", 0)  # the images are small
    assert correlates(CASES["same"][0], images((8, 8)))
    found = statistics()
    monkeypatch.setattr(patches.PatchCapture, "moment_a", patches.Capture.moment_a)
    for own, expected in zip(found, statistics(), strict=True):
        assert_equal(own, expected, 1e-13)


@pytest.mark.parametrize(("n", "d"), [(40, 7), (40, 8), (17, 33), (16, 33)])
def test_a_symmetric_product_by_block_rows_is_the_product(n: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_LARGE", 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    seen = Capture(x.unsqueeze(1), x.unsqueeze(1), 1.0, 1.0)
    assert_equal(seen.moment_a(), x.mT @ x, 1e-14)
    assert_equal(seen.moment_g(weights), (weights * x).mT @ x, 1e-14)
