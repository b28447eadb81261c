"""The Gram matrix of per-example gradients, and products with them, against a loop over examples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from natgrad import capture as module
from natgrad.capture import Capture
from oracles import SHAPES, assert_equal, random_capture


def loop(seen: Capture) -> Tensor:
    """DW (*groups, n, out, in), one example after the other."""
    return torch.stack([(g.mT @ a) for a, g in zip(seen.a.unbind(-3), seen.g.unbind(-3), strict=True)], -3)


@pytest.mark.parametrize("chunk", [1 << 25, 700, 1], ids=["whole", "chunks", "one by one"])
@pytest.mark.parametrize("shape", SHAPES)
def test_law_16_both_ways_to_the_gram_matrix_are_inner_products_of_gradients(
    shape: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    seen = random_capture(1, shape, n=7)
    U = loop(seen).flatten(-2)
    for K in (seen.gram(), seen._gram_of_positions(), seen._gram_of_gradients()):
        assert_equal(K, U @ U.mT, 1e-13)


@pytest.mark.parametrize(
    ("n", "t", "out", "width", "gradients"),
    [(50, 1, 3, 4, False), (50, 8, 3, 4, True), (50, 2, 60, 80, False), (50, 8, 60, 80, True), (2, 8, 60, 80, False)],
)
def test_the_way_with_fewer_flops_is_taken(
    n: int, t: int, out: int, width: int, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Capture(torch.randn(n, t, width), torch.randn(n, t, out), n, n * t)
    unused = "_gram_of_positions" if gradients else "_gram_of_gradients"
    monkeypatch.delattr(Capture, unused)
    assert seen.gram().shape == (n, n)


@pytest.mark.parametrize("shape", SHAPES)
def test_law_30_products_with_the_gradients_are_those_of_a_loop_over_examples(shape: str) -> None:
    seen = random_capture(2, shape, n=7)
    DW = loop(seen)
    V, w = torch.randn(*DW.shape[:-3], *DW.shape[-2:]), torch.randn(DW.shape[:-2])
    assert_equal(seen.along(V), torch.stack([(x * V).sum((-2, -1)) for x in DW.unbind(-3)], -1))
    weighted = [c[..., None, None] * x for c, x in zip(w.unbind(-1), DW.unbind(-3), strict=True)]
    assert_equal(seen.combine(w), torch.stack(weighted).sum(0))
