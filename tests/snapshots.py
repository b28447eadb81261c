"""What a model and an optimizer are at a moment, compared bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(found: Any, expected: Any) -> bool:
    """Bit for bit, through nested containers."""
    if isinstance(expected, Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)
