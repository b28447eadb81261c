"""Matrices made of matrices: one per group of a layer, one per layer of a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from natgrad.matrix.base import LinearMap, Matrix


@dataclass(frozen=True)
class GroupedMap(LinearMap):
    """A map (groups, out, in) of the groups of a convolution, seen as one map on (groups * out, in)."""

    inner: LinearMap

    @property
    def shape(self) -> torch.Size:
        """(groups * out, in)."""
        groups, out, width = self.inner.shape
        return torch.Size((groups * out, width))

    def __matmul__(self, M: Tensor) -> Tensor:
        """Each group's rows by that group's matrix."""
        return (self.inner @ M.unflatten(-2, self.inner.shape[:-1])).flatten(-3, -2)

    def dense(self) -> Tensor:
        """The block-diagonal matrix of the groups."""
        return torch.block_diag(*self.inner.dense())

    def tensors(self) -> dict[str, Tensor]:
        """Those of the inner map."""
        return self.inner.tensors()

    def with_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """The inner map with other tensors, grouped the same way."""
        return replace(self, inner=self.inner.with_tensors(tensors))


@dataclass(frozen=True)
class Grouped(GroupedMap, Matrix):
    """A matrix (groups, out, in) of the groups of a convolution, seen as a block-diagonal one on (groups * out, in)."""

    inner: Matrix

    def inverse(self, damping: float) -> GroupedMap:
        """Each group's damped inverse."""
        return GroupedMap(self.inner.inverse(damping))

    def trace(self) -> Tensor:
        """The sum of the groups' traces."""
        return self.inner.trace().sum()

    def norm(self) -> Tensor:
        """The root of the sum of the groups' squared norms."""
        return torch.linalg.vector_norm(self.inner.norm())


class NetworkMap(Protocol):
    """A linear map on dicts of tensors: a block (*groups, out, in) per layer, by the layer's name."""

    def __matmul__(self, M: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The image of ``M``."""


@dataclass(frozen=True)
class BlockMap(Mapping[str, LinearMap]):
    """A block-diagonal map on dicts of tensors: one :class:`LinearMap` per layer, by the layer's name."""

    maps: Mapping[str, LinearMap]

    def __getitem__(self, name: str) -> LinearMap:
        """The map of one layer."""
        return self.maps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    def __matmul__(self, M: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer by layer; raises ``KeyError`` where ``M`` lacks a layer."""
        return {name: block @ M[name] for name, block in self.maps.items()}

    def dense(self) -> Tensor:
        """The block-diagonal matrix, layers in the order of the model."""
        return torch.block_diag(*(block.dense() for block in self.maps.values()))


@dataclass(frozen=True)
class Blocks(Mapping[str, Matrix]):
    """A block-diagonal matrix on dicts of tensors: one :class:`Matrix` per layer, by the layer's name.

    It is a mapping from layer names, as in ``named_modules``, to matrices, with the verbs of a matrix on top.
    """

    matrices: Mapping[str, Matrix]

    def __getitem__(self, name: str) -> Matrix:
        """The matrix of one layer."""
        return self.matrices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.matrices)

    def __len__(self) -> int:
        return len(self.matrices)

    def __matmul__(self, M: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer by layer; raises ``KeyError`` where ``M`` lacks a layer."""
        return BlockMap(self.matrices) @ M

    def dense(self) -> Tensor:
        """The block-diagonal matrix, layers in the order of the model."""
        return BlockMap(self.matrices).dense()

    def inverse(self, damping: float) -> BlockMap:
        """Each layer's damped inverse, by its own rule."""
        return BlockMap({name: block.inverse(damping) for name, block in self.matrices.items()})

    def trace(self) -> Tensor:
        """The sum of the layers' traces."""
        return torch.stack([block.trace().sum() for block in self.matrices.values()]).sum()
