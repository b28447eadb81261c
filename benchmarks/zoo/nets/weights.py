"""Random weights."""

from __future__ import annotations

import math

import torch
from torch import nn


def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A random weight (fan_in, ..., fan_out) of about unit gain."""
    return nn.Parameter(torch.randn(*shape, dtype=dtype) / math.sqrt(shape[0]))
