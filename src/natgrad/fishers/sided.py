"""Which approximation a layer gets that is not as any other: on tokens, with a side too wide, or both."""

from __future__ import annotations

from natgrad.capture import Kind
from natgrad.fishers.base import Approximation
from natgrad.fishers.kfac import KFAC


def for_layer(approximation: Approximation, kind: Kind) -> Approximation:
    """The approximation itself for a plain layer; for others what it says, or KFAC where it has no diagonal side."""
    if kind == "plain":
        return approximation
    return approximation.sided(kind) or KFAC().sided(kind)
