"""nn.Conv1d, Conv2d and Conv3d, with stride, dilation, groups and every padding mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from natgrad.layers.base import Adapter, weigh, with_ones


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
        patches = _padded(module, x)
        for axis, (kernel, stride, dilation) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
        ):
            patches = patches.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
        spatial = len(module.kernel_size)
        a = patches.flatten(2 + spatial).flatten(2, 1 + spatial).movedim(1, 2)  # (n, t, C, k)
        return with_ones(_split(a.flatten(2), module.groups), self.has_bias(module))

    def outputs(self, module: nn.Module, y: Tensor) -> Tensor:
        """(n, t, C_out), or (groups, n, t, C_out/groups)."""
        assert isinstance(module, _ConvNd)
        return _split(y.flatten(2).mT, module.groups)

    def pack(self, module: nn.Module, tensors: list[Tensor]) -> Tensor:
        """(out, in), or (groups, out, in)."""
        assert isinstance(module, _ConvNd)
        block = tensors[0].flatten(1)
        if len(tensors) == 2:
            block = torch.cat([block, tensors[1].unsqueeze(-1)], -1)
        return block if module.groups == 1 else block.unflatten(0, (module.groups, -1))

    def unpack(self, module: nn.Module, block: Tensor) -> list[Tensor]:
        """Weight (C_out, C/groups, *kernel), and bias."""
        assert isinstance(module, _ConvNd)
        flat = block if module.groups == 1 else block.flatten(0, 1)
        weight = flat[:, :-1] if self.has_bias(module) else flat
        weight = weight.unflatten(1, (module.in_channels // module.groups, *module.kernel_size))
        return [weight, flat[:, -1]] if self.has_bias(module) else [weight]

    def forward(self, module: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        """The convolution with these weights."""
        assert isinstance(module, _ConvNd)
        bias = tensors[1] if len(tensors) == 2 else None
        return module._conv_forward(x, tensors[0], bias)

    def gradient(self, module: nn.Module, x: Tensor, g: Tensor, w: Tensor) -> list[Tensor]:
        """The backward pass of the convolution in its weight, and the weighted sum of g."""
        assert isinstance(module, _ConvNd)
        padding = module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros":
            x, padding = _padded(module, x), (0,) * len(module.kernel_size)
        y, h = weigh(x, g, w)
        weight = torch.ops.aten.convolution_backward(
            h, y, module.weight.to(g.dtype), None, module.stride, padding, module.dilation, False,
            [0] * len(padding), module.groups, [False, True, False],
        )[1]  # fmt: skip
        return [weight, (w @ g.flatten(1)).view(module.out_channels, -1).sum(1)] if self.has_bias(module) else [weight]


def _padded(module: _ConvNd, x: Tensor) -> Tensor:
    if not any(module._reversed_padding_repeated_twice):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode)


def _split(a: Tensor, groups: int) -> Tensor:
    return a if groups == 1 else a.unflatten(-1, (groups, -1)).movedim(-2, 0)
