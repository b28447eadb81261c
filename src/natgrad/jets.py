"""Networks on jets: a network's output together with its derivatives in its input, by Taylor-mode propagation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp


class Jet(NamedTuple):
    """u(x) (n, out), and along every axis k of x the derivatives du/dx_k and d2u/dx_k^2, both (n, d, out)."""

    value: Tensor
    first: Tensor
    second: Tensor


class JetLinear(nn.Linear):
    """``nn.Linear`` on jets (n, t, in): position 0 is the value, whose derivatives follow and have no bias."""

    def forward(self, input: Tensor) -> Tensor:
        """W x at every position, plus b at the first."""
        y = F.linear(input, self.weight)
        if self.bias is None:
            return y
        first = torch.zeros(input.shape[-2], 1, dtype=y.dtype, device=y.device)
        first[0] = 1.0
        return y + first * self.bias


class Jets(nn.Module):
    """A network of dense layers and activations, with the weights of ``network``, that maps x (n, d) to a :class:`Jet`.

    Every layer is called once, on the t = 1 + 2 d positions (s, ds/dx_k, d2s/dx_k^2): s = W a + b, ds = W da and d2s =
    W d2a; an activation maps them by the chain rule. So a loss of derivatives, such as the residual of a differential
    equation, is one of a network whose weights are shared by t positions of an example, and its Fisher is what every
    approximation makes of those: JointWoodbury is the energy natural gradient, KFAC is KFAC for PINNs. Cost: t times a
    pass of ``network``, and no differentiation in x.

    ``network`` is an ``nn.Linear``, a module without parameters that treats all rows alike, or an ``nn.Sequential`` of
    such; ``TypeError`` for any other. References: Bettencourt et al. 2019 (Taylor mode); Dangel et al., arXiv
    2405.15603; Mueller and Zeinhofer, arXiv 2302.13163.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList(_on_jets(module) for module in _flat(network))

    def forward(self, x: Tensor) -> Jet:
        """The jet of the network at x (n, d)."""
        if x.ndim != 2:
            raise ValueError(f"Jets needs points x (n, d), got shape {tuple(x.shape)}")
        n, d = x.shape
        axes = torch.eye(d, dtype=x.dtype, device=x.device).expand(n, d, d)
        jet = torch.cat([x.unsqueeze(1), axes, torch.zeros_like(axes)], 1)
        for step in self.steps:
            jet = step(jet) if isinstance(step, JetLinear) else _chain(step, jet, d)
        return Jet(jet[:, 0], jet[:, 1 : d + 1], jet[:, d + 1 :])


def _chain(phi: nn.Module, jet: Tensor, d: int) -> Tensor:
    """phi(s), phi'(s) ds and phi''(s) ds^2 + phi'(s) d2s."""
    value, first, second = jet[:, :1], jet[:, 1 : d + 1], jet[:, d + 1 :]
    if isinstance(phi, nn.Tanh):
        z = value.tanh()
        slope = 1 - z * z
        return torch.cat([z, slope * first, slope * (second - 2 * z * first * first)], 1)
    here = value.expand_as(first).contiguous()

    def turned(s: Tensor) -> Tensor:
        return jvp(phi, (s,), (first,))[1]

    dz, bend = jvp(turned, (here,), (first,))[:2]
    z, turn = jvp(phi, (here,), (second,))[:2]
    return torch.cat([z[:, :1], dz, bend + turn], 1)


def _flat(network: nn.Module) -> Iterator[nn.Module]:
    if type(network) is nn.Sequential:
        for module in network:
            yield from _flat(module)
    elif not isinstance(network, nn.Identity):
        yield network


def _on_jets(module: nn.Module) -> nn.Module:
    if type(module) is nn.Linear:
        layer = JetLinear(1, 1, bias=module.bias is not None)
        layer.in_features, layer.out_features = module.in_features, module.out_features
        layer.weight, layer.bias = module.weight, module.bias
        return layer
    if next(module.parameters(), None) is not None:
        raise TypeError(
            f"Jets reads nn.Linear, nn.Sequential and modules without parameters, not {type(module).__name__}"
        )
    return module
