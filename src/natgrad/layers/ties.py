"""Weights that several modules use: one block, and what every use of it contributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.layers.base import Adapter
from natgrad.layers.functional import LinearPart
from natgrad.layers.linear import LinearAdapter
from natgrad.layers.source import Written


class HeadAdapter(LinearAdapter):
    """nn.Linear as a use of an embedding's weight: s = W a with the block W^T, (in, out)."""

    swapped: ClassVar[bool] = True
    weight_only = True

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(in, out)."""
        return weight.mT

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """(out, in)."""
        return matrix.mT

    def forward(self, module: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        """x W^T."""
        return F.linear(x, tensors[0])


class WrittenHead(HeadAdapter):
    """The same where the product is written out: ``F.linear(h, self.embed.weight)``, ``h @ self.embed.weight.T``."""

    def within(self, parameter: Tensor, w: Tensor) -> slice | None:
        """All rows, where w is the weight."""
        return slice(0, len(w)) if (w.shape, w.stride()) == (parameter.shape, parameter.stride()) else None


def by_hand(use: Written, adapter: Adapter, size: int) -> Adapter | None:
    """The adapter of a product with a weight of ``size`` rows, that ``adapter`` reads too, if there is one."""
    if use.transposed or not (adapter.tokens or type(adapter) is LinearAdapter):
        return None
    if adapter.tokens:
        return WrittenHead()
    return LinearPart("weight", "bias" if use.biased else None, size)


def tied(modules: Sequence[nn.Module], adapters: Sequence[Adapter]) -> list[Adapter] | None:
    """The adapters of modules that share their weight, such that all have one block; ``None`` if there is no such.

    Modules of one kind have one, and so have embeddings and linear heads.
    """
    if all(adapter.tokens or type(adapter) in (LinearAdapter, LinearPart, WrittenHead) for adapter in adapters):
        if any(adapter.tokens for adapter in adapters):
            return [HeadAdapter() if type(adapter) is LinearAdapter else adapter for adapter in adapters]
        return list(adapters)
    same = {(type(adapter), getattr(module, "groups", 1)) for module, adapter in zip(modules, adapters, strict=True)}
    return list(adapters) if len(same) == 1 else None


def with_biases(
    modules: Sequence[nn.Module], adapters: Sequence[Adapter], owners: Mapping[nn.Parameter, Sequence[nn.Module]]
) -> list[Adapter]:
    """The adapters, without a bias that not all of the modules have in common, or that is used elsewhere."""
    biases = {tuple(adapter.parameters(module)[1:]) for module, adapter in zip(modules, adapters, strict=True)}
    common = len(biases) == 1 and all(set(owners[bias]) == set(modules) for bias in next(iter(biases)))
    return list(adapters) if common else [adapter.without_bias() for adapter in adapters]
