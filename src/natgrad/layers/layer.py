"""A layer: a block of parameters with the uses of it that were seen; and what of a model is covered by such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from natgrad.capture import Capture, Kind
from natgrad.layers.form import Form
from natgrad.layers.view import View
from natgrad.sparse import Sparse, SparseCapture


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight, or a view of one, as one block (*groups, out, in), with the bias as its last column if it has one.

    ``name`` is that of the module which holds the weight, or of the weight where it is not called ``weight``, and says
    which part where the weight has several; ``names`` are all that the weight has in the model. ``view`` and ``form``
    say how the block lies in the weight. ``operations`` are the names of those that use it. ``mixed``: tokens, and
    another use the other way round. ``diagonal`` says of which sides (out, in) no covariance is formed.
    """

    name: str
    weight: nn.Parameter
    view: View
    form: Form
    bias: nn.Parameter | None = None
    bias_view: View | None = None
    slot: str = ""
    names: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    mixed: bool = False
    diagonal: tuple[bool, bool] = (False, False)

    @property
    def biased(self) -> bool:
        """Whether the block has a column for a bias."""
        return self.bias is not None

    @property
    def kind(self) -> Kind:
        """How it uses its weight."""
        if self.form.tokens:
            return "mixed" if self.mixed else "tokens"
        return "wide" if any(self.diagonal) else "plain"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the block, the weight first."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def has_gradient(self) -> bool:
        """Whether a backward pass has reached the weight."""
        return self.weight.grad is not None

    @property
    def whole(self) -> bool:
        """Whether the block is all of its parameters."""
        return all(view.entries == p.numel() for view, p in zip(self.views, self.parameters, strict=True))

    @cached_property
    def shape(self) -> torch.Size:
        """The shape of the block (*groups, out, in)."""
        *groups, out, width = self.form.matrix(torch.empty(self.view.size, device="meta")).shape
        return torch.Size((*groups, out, width + self.biased))

    def parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those entries of tensors like the parameters that are in the block, as views of what is contiguous."""
        return [view.of(tensor) for view, tensor in zip(self.views, tensors, strict=False)]

    def pack(self, tensors: list[Tensor]) -> Tensor:
        """Tensors like the parameters as one block."""
        weight, *bias = self.parts(tensors)
        matrix = self.form.matrix(weight)
        return torch.cat([matrix, *(b.reshape(*matrix.shape[:-1], 1) for b in bias)], -1) if bias else matrix

    def unpack(self, block: Tensor) -> list[Tensor]:
        """A block as tensors like the parts of the parameters; without its last column as that of the weight alone."""
        width = self.shape[-1] - self.biased
        size = torch.Size(self.view.size)
        tensors = [self.form.operand(block[..., :width] if block.shape[-1] > width else block, size)]
        if self.bias_view is not None and block.shape[-1] > width:
            tensors.append(block[..., -1].reshape(self.bias_view.size))
        return tensors

    def blank(self, examples: int = 1, device: torch.device | None = None) -> Capture:
        """What a few examples of zeros would give."""
        (*groups, out, width), n = self.shape, float(examples)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        g = torch.zeros((*groups, examples, 1, out), dtype=dtype, device=device or self.weight.device)
        if self.form.tokens:
            zero = g.new_zeros(examples, 1, 1)
            return SparseCapture(Sparse(zero.long(), zero, width), g, n, n, diagonal=self.diagonal)
        return Capture(g.new_zeros(*groups, examples, 1, width), g, n, n, diagonal=self.diagonal)

    @property
    def views(self) -> list[View]:
        """Where the block lies in the parameters."""
        return [self.view] if self.bias_view is None else [self.view, self.bias_view]


@dataclass(frozen=True)
class Coverage:
    """What of a model is covered: the layers, and the reason for every trained parameter that is not.

    ``expected``: by the classes of its modules, before a pass has been seen.
    """

    layers: Mapping[str, Layer]
    uncovered: Mapping[str, str]
    expected: bool = False
