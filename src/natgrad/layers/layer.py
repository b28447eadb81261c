"""A layer of a model, and what of a model is covered by such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture import Capture, Kind
from natgrad.layers.base import Adapter
from natgrad.sparse import Sparse, SparseCapture


@dataclass(frozen=True)
class Layer:
    """A covered layer: its name in the model, the module that has its parameters, and the adapter that reads it.

    ``owner`` is the module whose forward uses the parameters, without calling ``module``, where there is one.
    ``others`` are further uses of the same parameters, with the same block; ``diagonal`` says of which sides (out, in)
    no covariance is formed.
    """

    name: str
    module: nn.Module
    adapter: Adapter
    owner: nn.Module | None = None
    others: tuple[Layer, ...] = ()
    diagonal: tuple[bool, bool] = (False, False)

    @property
    def uses(self) -> tuple[Layer, ...]:
        """Itself and the other uses."""
        return (self, *self.others)

    @property
    def kind(self) -> Kind:
        """How it uses its weight."""
        tokens = {use.adapter.tokens for use in self.uses}
        if len(tokens) == 2:
            return "mixed"
        return "tokens" if True in tokens else "wide" if any(self.diagonal) else "plain"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the block, the weight first."""
        return self.adapter.parameters(self.module)

    @property
    def has_gradient(self) -> bool:
        """Whether a backward pass has reached the weight."""
        return self.parameters[0].grad is not None

    @property
    def slot(self) -> str:
        """What the names of the block's state begin with."""
        return self.adapter.slot

    def parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those entries of tensors like the parameters that are in the block, as views."""
        return self.adapter.parts(tensors)

    @property
    def shape(self) -> torch.Size:
        """The shape of the block (*groups, out, in)."""
        return self.pack([p.detach() for p in self.parameters]).shape

    @torch.no_grad()
    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """What is kept of the arguments of a call, its examples first."""
        return self.adapter.batched(self.module, self.adapter.read(self.module, *args, **kwargs).detach())

    def pack(self, tensors: list[Tensor]) -> Tensor:
        """Tensors like the parameters as one block."""
        return self.adapter.pack(self.module, tensors)

    def unpack(self, block: Tensor) -> list[Tensor]:
        """A block as tensors like the parts of the parameters."""
        return self.adapter.unpack(self.module, block)

    def blank(self, examples: int = 1, device: torch.device | None = None) -> Capture:
        """What a few examples of zeros would give."""
        weight, (*groups, out, width), n = self.parameters[0], self.shape, float(examples)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        g = torch.zeros((*groups, examples, 1, out), dtype=dtype, device=device or weight.device)
        if self.kind in ("tokens", "mixed"):
            zero = g.new_zeros(examples, 1, 1)
            return SparseCapture(Sparse(zero.long(), zero, width), g, n, n, diagonal=self.diagonal)
        return Capture(g.new_zeros(*groups, examples, 1, width), g, n, n, diagonal=self.diagonal)


@dataclass(frozen=True)
class Coverage:
    """What of a model is covered: the layers, and the reason for every trained parameter that is not."""

    layers: dict[str, Layer]
    uncovered: dict[str, str]

    def only(self, model: nn.Module, kinds: Sequence[Kind], reason: str) -> Coverage:
        """Without layers of other kinds and without shared weights, for ``reason``."""
        kept = {key: layer for key, layer in self.layers.items() if layer.kind in kinds and not layer.others}
        lost = {id(p) for key, layer in self.layers.items() if key not in kept for p in layer.parameters}
        left = {name: reason for name, p in model.named_parameters() if id(p) in lost}
        return Coverage(kept, {**self.uncovered, **left})
