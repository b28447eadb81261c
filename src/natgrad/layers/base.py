"""The adapter interface: how to read a layer's inputs, output gradients and weight as (in), (out) and (out, in)."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from natgrad.sparse import Sparse


class Adapter:
    """How one kind of layer computes s = W a, by default as ``nn.Linear`` does.

    The *block* of a layer is its weight as (*groups, out, in), with the bias as the last column if it is trained. To
    write an adapter, override what differs: mostly :meth:`inputs`, and :meth:`to_matrix` where the weight is not a
    matrix yet. Adapters keep nothing of a layer; every method gets the module.
    """

    names: ClassVar[tuple[str, str]] = ("weight", "bias")
    """The names of the two parameters in the module; it need not have the second."""

    behind: tuple[str, ...] = ()
    """Those of them that stand behind a parametrization, in a reconstructed layer."""

    slot = ""
    """What the names of a block's state begin with, where several blocks are parts of one parameter."""

    tokens: ClassVar[bool] = False
    """Whether the inputs are tokens, which :meth:`sparse` reads: their covariance is diagonal."""

    swapped: ClassVar[bool] = False
    """Whether the block is the transposed weight, so that inputs and output gradients change places."""

    weight_only = False
    """Whether the bias is left out of the block, trained or not."""

    def without_bias(self) -> Self:
        """The same for the weight alone."""
        mine = copy.copy(self)
        object.__setattr__(mine, "weight_only", True)  # it may be a frozen dataclass
        return mine

    def refuses(self, module: nn.Module) -> str | None:
        """Why this module is left to AdamW, if it is."""
        return None

    # Parameters.

    def trained(self, module: nn.Module) -> bool:
        """Whether the block's weight is a plain parameter, and trained."""
        return is_trained(module, self.names[0])

    def has_bias(self, module: nn.Module) -> bool:
        """Whether the block has a bias column."""
        if self.weight_only:
            return False
        if self.behind:
            return self.names[1] in self.behind
        bias = getattr(module, self.names[1], None)
        return isinstance(bias, nn.Parameter) and bias.requires_grad

    def parameters(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters of the block: the weight, and the bias if it is trained."""
        names = self.names if self.has_bias(module) else self.names[:1]
        holders = module.parametrizations if self.behind else module
        return [getattr(holders, n).original if n in self.behind else getattr(module, n) for n in names]

    def parts(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those entries of tensors like ``parameters(module)`` that are in the block, as views."""
        return tensors

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """A tensor like the weight as (*groups, out, in)."""
        return weight.flatten(1)

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`: any tensor with its entries in the order of the weight's."""
        return matrix

    def pack(self, module: nn.Module, tensors: list[Tensor]) -> Tensor:
        """Tensors like ``parameters(module)`` as one block (*groups, out, in)."""
        matrix = self.to_matrix(module, tensors[0])
        return torch.cat([matrix, *(bias.reshape(*matrix.shape[:-1], 1) for bias in tensors[1:])], -1)

    def unpack(self, module: nn.Module, block: Tensor) -> list[Tensor]:
        """A block as tensors like ``parts(parameters(module))``; without its last column as the weight alone."""
        weight, *biases = (p.shape for p in self.parts(list(self.parameters(module))))
        width = weight.numel() // block.shape[:-1].numel()
        tensors = [self.from_matrix(module, block[..., :width]).reshape(weight)]
        return tensors + [block[..., -1].reshape(bias) for bias in biases if block.shape[-1] > width]

    # Inputs and outputs.

    def read(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """What is kept of the arguments of a call, as one tensor: by default the first. It is read as the call ends."""
        return args[0] if args else next(iter(kwargs.values()))

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """What was read, or an output, with its example dimension first; added where the layer was called without."""
        return x if x.ndim > 1 else x.unsqueeze(0)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """What was read as a (*groups, n, t, in), the 1 of the bias included."""
        return with_ones(positions(x), self.has_bias(module))

    def sparse(self, module: nn.Module, x: Tensor) -> Sparse | None:
        """The same of ``tokens``, of which few entries are not zero, and which are never written out in training."""
        return None

    def outputs(self, module: nn.Module, y: Tensor) -> Tensor:
        """A tensor y like the layer's output as (*groups, n, t, out)."""
        return positions(y)

    # Products.

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What was read, for products in another precision."""
        return x.to(dtype)

    def forward(self, module: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        """The layer's output for what was read, with other weights (and no bias where ``tensors`` has none).

        By default the module's own ``forward`` on a shell of it, so that no hook runs.
        """
        bias = getattr(module, self.names[1], None)
        other = dict(zip(self.names, tensors, strict=False))
        if len(tensors) == 1 and bias is not None:
            other[self.names[1]] = torch.zeros_like(bias, dtype=tensors[0].dtype)
        shell = object.__new__(type(module))
        shell.__dict__.update(module.__dict__, _parameters={**module._parameters, **other})
        return shell.forward(x)


def is_trained(module: nn.Module, name: str | None) -> bool:
    """Whether a module has a plain parameter of this name, and trains it."""
    parameter = module._parameters.get(name) if name else None
    return parameter is not None and parameter.requires_grad


def with_ones(a: Tensor, bias: bool) -> Tensor:
    """``a`` with a last column of ones, if there is a bias."""
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1) if bias else a


def positions(x: Tensor) -> Tensor:
    """(n, ..., d) as (n, t, d)."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def examples_first(x: Tensor, batch_first: bool) -> Tensor:
    """Sequences (n, t, d), or (t, n, d) without ``batch_first``, or the one sequence (t, d), as (n, t, d)."""
    if x.ndim != 3:
        return x.unsqueeze(0)
    return x if batch_first else x.transpose(0, 1)


def split(a: Tensor, groups: int) -> Tensor:
    """The last dimension (groups d) of ``a`` as groups in front."""
    return a if groups == 1 else a.unflatten(-1, (groups, -1)).movedim(-2, 0)
