"""Networks on jets: a network's output together with its derivatives in its input, by Taylor-mode propagation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp
from torch.overrides import handle_torch_function, has_torch_function

_NO_FUNCTIONS_OF_ROWS = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.modules.batchnorm._NormBase)
_WITHOUT_SECOND = (nn.LayerNorm, nn.Threshold)  # torch 2.13 differentiates them twice to a wrong number


class Jet(NamedTuple):
    """u(x) (n, out), and along every direction v_k the derivatives du/dv_k and d2u/dv_k^2, both (n, m, out)."""

    value: Tensor
    first: Tensor
    second: Tensor


class JetLinear(nn.Linear):
    """``nn.Linear`` on jets (n, t, in): position 0 is the value, whose derivatives follow and have no bias."""

    def forward(self, input: Tensor) -> Tensor:
        """W x at every position, plus b at the first."""
        return jet_linear(input, self.weight, self.bias)


def jet_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x at every position, plus b at the first."""
    if has_torch_function((input, weight)):
        return handle_torch_function(jet_linear, (input, weight), input, weight, bias)
    y = F.linear(input, weight)
    if bias is None:
        return y
    first = torch.zeros(input.shape[-2], 1, dtype=y.dtype, device=y.device)
    first[0] = 1.0
    return y + first * bias


class Jets(nn.Module):
    """A network of dense layers and activations, with the weights of ``network``, that maps x (n, d) to a :class:`Jet`.

    Every layer is called once, on the t = 1 + 2 m positions (s, ds/dv_k, d2s/dv_k^2): s = W a + b, ds = W da and d2s =
    W d2a; an activation maps them by the chain rule. So a loss of derivatives, such as the residual of a differential
    equation, is one of a network whose weights are shared by t positions of an example, and its Fisher is what every
    approximation makes of those: JointWoodbury is the energy natural gradient, KFAC is KFAC for PINNs. Cost: t times a
    pass of ``network``, and no differentiation in x.

    Args:
        network: an ``nn.Linear``, a module without parameters that treats all rows alike, or an ``nn.Sequential`` of
            such; ``TypeError`` for any other.
        directions: v_k (m, d), by default the d axes. Mixed derivatives come by polarisation: 2 d2u/dxdy is d2u along
            (1, 1) less those along both axes.
        ansatz: a function of rows x and u(x), such as ``lambda x, u: x * (1 - x) * u``, that stands for u: for
            conditions that hold exactly.

    References: Bettencourt et al. 2019 (Taylor mode); Dangel et al., arXiv 2405.15603; Mueller and Zeinhofer, arXiv
    2302.13163.
    """

    directions: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        directions: Tensor | None = None,
        ansatz: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if directions is not None and (directions.ndim != 2 or not directions.is_floating_point()):
            raise ValueError(
                f"directions must be vectors (m, d), got {directions.dtype} of shape {tuple(directions.shape)}"
            )
        self.steps = nn.ModuleList(_on_jets(module) for module in _flat(network))
        self.register_buffer("directions", directions, persistent=False)
        self.ansatz = ansatz

    def forward(self, x: Tensor) -> Jet:
        """The jet of the network at x (n, d)."""
        if x.ndim != 2:
            raise ValueError(f"Jets needs points x (n, d), got shape {tuple(x.shape)}")
        n, d = x.shape
        along = torch.eye(d, dtype=x.dtype, device=x.device) if self.directions is None else self.directions.to(x)
        if along.shape[1] != d:
            raise ValueError(f"Jets has directions of {along.shape[1]} entries, and got points of {d}")
        first = along.expand(n, -1, d)
        jet = points = torch.cat([x.unsqueeze(1), first, torch.zeros_like(first)], 1)
        for step in self.steps:
            jet = step(jet) if isinstance(step, JetLinear) else _chain(step, jet)
        if self.ansatz is not None:
            ansatz, both = self.ansatz, torch.cat([points, jet], -1)
            jet = _chain(lambda rows: ansatz(rows[:, :d], rows[:, d:]), both)
        value, first, second = jet.split([1, len(along), len(along)], 1)
        return Jet(value[:, 0], first, second)


def _chain(phi: Callable[[Tensor], Tensor], jet: Tensor) -> Tensor:
    """phi(s), phi'(s) ds and phi''(s) ds^2 + phi'(s) d2s."""
    n, m = len(jet), jet.shape[1] // 2
    value, first, second = jet.split([1, m, m], 1)
    if isinstance(phi, nn.Tanh):
        z = value.tanh()
        slope = 1 - z * z
        return torch.cat([z, slope * first, slope * (second - 2 * z * first * first)], 1)
    here, once, twice = (part.reshape(n * m, -1) for part in (value.expand_as(first), first, second))

    def turned(s: Tensor) -> Tensor:
        return jvp(phi, (s,), (once,))[1]

    with torch.enable_grad():  # without, torch takes formulas that have no forward derivative
        dz, bend = jvp(turned, (here,), (once,))[:2]
        z, turn = jvp(phi, (here,), (twice,))[:2]
    z, dz, d2z = (part.reshape(n, m, -1) for part in (z, dz, bend + turn))
    return torch.cat([z[:, :1], dz, d2z], 1)


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
    if not isinstance(module, nn.Module) or next(module.parameters(), None) is not None:
        raise TypeError(
            f"Jets reads nn.Linear, nn.Sequential and modules without parameters, not {type(module).__name__}"
        )
    for part in module.modules():
        if isinstance(part, _NO_FUNCTIONS_OF_ROWS):
            raise TypeError(f"Jets needs modules that treat all rows alike at every call, not {type(part).__name__}")
        if isinstance(part, _WITHOUT_SECOND):
            raise TypeError(f"Jets cannot differentiate {type(part).__name__} twice in forward mode")
    if any(getattr(part, "inplace", False) for part in module.modules()):
        module = copy.deepcopy(module)  # what it overwrites is read again
        for part in module.modules():
            if hasattr(part, "inplace"):
                part.inplace = False  # type: ignore[assignment]
    return module
