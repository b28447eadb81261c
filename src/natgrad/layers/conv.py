"""Convolutions, with stride, dilation, groups and every padding mode, and transposed ones."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from natgrad.layers.base import Adapter, split, with_ones


class ConvAdapter(Adapter):
    """A convolution as s_t = W a_t on the patches a_t; rows of a are (channel, kernel position), as in ``weight``.

    A grouped convolution has one block per group, in a leading dimension of every tensor.
    """

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """(n, C, *spatial)."""
        assert isinstance(module, _ConvNd)
        return x if x.ndim == len(module.kernel_size) + 2 else x.unsqueeze(0)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """Patches (n, t, C k), or (groups, n, t, C/groups k); costs k times the memory of x."""
        assert isinstance(module, _ConvNd)
        return with_ones(_patches(module, _padded(module, x), module.stride), self.has_bias(module))

    def outputs(self, module: nn.Module, y: Tensor) -> Tensor:
        """(n, t, C_out), or (groups, n, t, C_out/groups)."""
        assert isinstance(module, _ConvNd)
        return split(y.flatten(2).mT, module.groups)

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(C_out, C k), or (groups, C_out/groups, C/groups k)."""
        assert isinstance(module, _ConvNd)
        return weight.flatten(1) if module.groups == 1 else weight.flatten(1).unflatten(0, (module.groups, -1))


class ConvTransposeAdapter(ConvAdapter):
    """A transposed convolution as s_t = W a_t: a_t are patches of the input with stride - 1 zeros between its pixels.

    Columns of W are (input channel, kernel position), as in a convolution; torch has the channels of ``weight`` in the
    other order.
    """

    def read(self, module: nn.Module, input: Tensor, output_size: Any = None) -> Tensor:
        """The input; ``ValueError`` for an ``output_size`` other than that of the module's ``output_padding``."""
        assert isinstance(module, _ConvTransposeNd)
        if output_size is not None:
            sizes = (module.stride, module.padding, module.kernel_size, len(module.kernel_size), module.dilation)
            padding = module._output_padding(input, output_size, *sizes)  # type: ignore[arg-type]
            if tuple(padding) != tuple(module.output_padding):
                raise ValueError(
                    f"a {type(module).__name__} was called with output_size={output_size}: set its output_padding="
                    f"{tuple(padding)} instead, or exclude the layer from the natural gradient"
                )
        return input

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """Patches (n, t, C k), or (groups, n, t, C/groups k); costs k prod(stride) times the memory of x."""
        assert isinstance(module, _ConvTransposeNd)
        spatial = [(L - 1) * stride + 1 for L, stride in zip(x.shape[2:], module.stride, strict=True)]
        spread = x.new_zeros(*x.shape[:2], *spatial)
        spread[tuple(slice(None, None, step) for step in (1, 1, *module.stride))] = x
        sides: list[int] = []
        for kernel, dilation, padding, more in zip(
            module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True
        ):
            assert isinstance(padding, int)
            side = (kernel - 1) * dilation - padding
            sides = [side, side + more, *sides]
        a = _patches(module, F.pad(spread, sides), (1,) * len(spatial), flipped=True)
        return with_ones(a, self.has_bias(module))

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(C_out, C k), or (groups, C_out/groups, C/groups k)."""
        assert isinstance(module, _ConvNd)
        matrix = weight.flatten(2).unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(2)
        return matrix.squeeze(0) if module.groups == 1 else matrix

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """(groups, C/groups, C_out/groups, k), or without groups."""
        assert isinstance(module, _ConvNd)
        return matrix.unflatten(-1, (module.in_channels // module.groups, -1)).transpose(-3, -2)


def _patches(module: _ConvNd, x: Tensor, strides: tuple[int, ...], flipped: bool = False) -> Tensor:
    """(n, t, C k), or (groups, n, t, C/groups k), of an input that is padded already."""
    spatial = len(module.kernel_size)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, strides, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    if flipped:
        x = x.flip(tuple(range(-spatial, 0)))
    a = x.flatten(2 + spatial).flatten(2, 1 + spatial).movedim(1, 2)  # (n, t, C, k)
    return split(a.flatten(2), module.groups)


def _padded(module: _ConvNd, x: Tensor) -> Tensor:
    if not any(module._reversed_padding_repeated_twice):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
