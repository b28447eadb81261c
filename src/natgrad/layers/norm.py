"""The affine part of norms: y_j = gamma_j z_j + beta_j of the normalised input z, one group a feature."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from natgrad.layers.base import Adapter, examples_first, with_ones


class NormAdapter(Adapter, ABC):
    """Every feature j is a group with the block [gamma_j | beta_j] of shape (1, 2), or (1, 1) without beta.

    What is kept of a call is z, computed anew as the call ends: as much memory as the input. Batch statistics are those
    of the whole batch, and their dependence on an example is left out, as in every Fisher of a network with them.
    Features are in the second dimension.
    """

    @abstractmethod
    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """z, by the statistics that the module has just used, which stay as they are."""

    def read(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """z."""
        return self.normalised(module, super().read(module, *args, **kwargs))

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """As it is: these norms are not called without examples."""
        return x

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(features, 1, 1)."""
        return weight.reshape(-1, 1, 1)

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """[z | 1] as (features, n, t, 2)."""
        return with_ones(self.outputs(module, x), self.has_bias(module))

    def outputs(self, module: nn.Module, y: Tensor) -> Tensor:
        """(features, n, t, 1)."""
        return y.flatten(2).unsqueeze(-1).movedim(1, 0) if y.ndim > 2 else y.mT[..., None, None]

    def forward(self, module: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        """gamma z + beta."""
        gamma, *beta = (tensor.view(-1, *(1,) * (x.ndim - 2)) for tensor in tensors)
        return x * gamma + beta[0] if beta else x * gamma


class BatchNormAdapter(NormAdapter):
    """BatchNorm: statistics of the batch while training, or for want of running ones."""

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """By batch or running statistics."""
        assert isinstance(module, _BatchNorm)
        if module.training or module.running_mean is None:
            return F.batch_norm(x, None, None, training=True, eps=module.eps)
        return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps)


class InstanceNormAdapter(NormAdapter):
    """InstanceNorm: statistics of each example while training, or for want of running ones."""

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """(n, C, *spatial)."""
        assert isinstance(module, _InstanceNorm)
        return x.unsqueeze(0) if x.ndim == module._get_no_batch_dim() else x

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """By the statistics of each example, or running ones."""
        assert isinstance(module, _InstanceNorm)
        x = self.batched(module, x)
        if module.training or not module.track_running_stats:
            return F.instance_norm(x, eps=module.eps)
        return F.instance_norm(x, module.running_mean, module.running_var, use_input_stats=False, eps=module.eps)


class GroupNormAdapter(NormAdapter):
    """GroupNorm."""

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """By the statistics of each group of channels of each example."""
        assert isinstance(module, nn.GroupNorm)
        return F.group_norm(x, module.num_groups, eps=module.eps)


class LayerNormAdapter(NormAdapter):
    """LayerNorm and RMSNorm: features are the last dimensions, those between are positions."""

    def normalised(self, module: nn.Module, x: Tensor) -> Tensor:
        """By the statistics of each position."""
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        normalise = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
        return normalise(x, module.normalized_shape, eps=module.eps)  # type: ignore[arg-type]

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """(n, ..., *features)."""
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        return x if x.ndim > len(module.normalized_shape) else x.unsqueeze(0)

    def outputs(self, module: nn.Module, y: Tensor) -> Tensor:
        """(features, n, t, 1)."""
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        features = y.shape[y.ndim - len(module.normalized_shape) :].numel()
        return y.reshape(y.shape[0], -1, features).movedim(-1, 0).unsqueeze(-1)

    def forward(self, module: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        """gamma z + beta."""
        gamma, *beta = tensors
        return x * gamma + beta[0] if beta else x * gamma


@dataclass(frozen=True)
class SequenceNorm(LayerNormAdapter):
    """A LayerNorm of the last dimension of sequences, (n, t, d) or (t, n, d) without ``batch_first``, or of one."""

    batch_first: bool

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """(n, t, d)."""
        return examples_first(x, self.batch_first)
