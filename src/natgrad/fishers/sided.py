"""Which approximation a layer gets that is not as any other: on tokens, with a side too wide, or both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from natgrad.capture import Kind
from natgrad.fishers.base import Approximation
from natgrad.fishers.kfac import KFAC


class Block(Protocol):
    """What is asked of a layer."""

    @property
    def name(self) -> str:
        """Its name in the model."""

    @property
    def kind(self) -> Kind:
        """How it uses its weight."""

    @property
    def shape(self) -> torch.Size:
        """(*groups, out, in)."""


def for_layer(approximation: Approximation, kind: Kind) -> Approximation:
    """The approximation itself for a plain layer; for others what it says, or KFAC where it has no diagonal side."""
    if kind == "plain":
        return approximation
    return approximation.sided(kind) or KFAC().sided(kind)


def check_layers(approximation: Approximation, layers: Iterable[Block]) -> None:
    """Raise ``ValueError`` for a layer that is too much for the approximation that it gets."""
    for layer in layers:
        for_layer(approximation, layer.kind).check(layer.name, layer.shape)
