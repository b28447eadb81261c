"""A number says whether tensors are finite, and does not overflow."""

from __future__ import annotations

import pytest
import torch

from natgrad.optim.finiteness import finiteness, norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 40, 41)])
def test_one_bad_entry_is_found_wherever_it_is(shape: tuple[int, ...], bad: float, dtype: torch.dtype) -> None:
    good = torch.randn(4).to(dtype)
    X = torch.randn(shape).to(dtype)
    for place in {0, X.numel() // 2, X.numel() - 1}:
        Y = X.clone()
        Y.view(-1)[place] = bad
        found = finiteness([good, Y, good])
        assert found is not None and found.isnan()
    both = finiteness([torch.tensor([float("inf"), -float("inf")], dtype=dtype)])
    assert both is not None and both.isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    X = torch.full((50, 50), largest, dtype=dtype)
    found = finiteness([X, X, -X, torch.zeros(0, dtype=dtype)])
    assert found is not None and found == 0


def test_nothing_has_no_finiteness_and_norm_0() -> None:
    assert finiteness([]) is None and finiteness([torch.zeros(0)]) is None
    assert norm([]) == 0
    assert norm([torch.full((3, 3), 1.0), torch.full((7,), 1.0)]) == 4
