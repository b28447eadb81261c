"""Functions and operators: Fourier layers, coordinates, dynamics, networks of networks."""

# ruff: noqa: D102 - every method is `forward` or a step of it

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.nets.weights import parameter


class Spectral1d(nn.Module):
    """A product with complex weights of the lowest frequencies (Li et al. 2021)."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) / width)

    def forward(self, x: Tensor) -> Tensor:
        x_ft = torch.fft.rfft(x)
        out = torch.zeros_like(x_ft)
        out[..., : self.modes] = torch.einsum("bix,iox->box", x_ft[..., : self.modes], self.weight)
        return torch.fft.irfft(out, n=x.shape[-1])


class Spectral2d(nn.Module):
    """The same of two dimensions, of positive and of negative frequencies."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight1 = nn.Parameter(torch.randn(width, width, modes, modes, dtype=torch.cfloat) / width)
        self.weight2 = nn.Parameter(torch.randn(width, width, modes, modes, dtype=torch.cfloat) / width)

    def forward(self, x: Tensor) -> Tensor:
        x_ft, m = torch.fft.rfft2(x), self.modes
        out = torch.zeros_like(x_ft)
        out[..., :m, :m] = torch.einsum("bixy,ioxy->boxy", x_ft[..., :m, :m], self.weight1)
        out[..., -m:, :m] = torch.einsum("bixy,ioxy->boxy", x_ft[..., -m:, :m], self.weight2)
        return torch.fft.irfft2(out, s=x.shape[-2:])


class FNO(nn.Module):
    """Fourier neural operator of one or two dimensions: lift, two Fourier layers, project."""

    def __init__(self, dimensions: int, width: int = 8, modes: int = 3) -> None:
        super().__init__()
        spectral = Spectral1d if dimensions == 1 else Spectral2d
        conv: type[nn.Conv1d | nn.Conv2d] = nn.Conv1d if dimensions == 1 else nn.Conv2d
        self.lift, self.project = nn.Linear(2, width), nn.Linear(width, 1)
        self.spectral = nn.ModuleList(spectral(width, modes) for _ in range(2))
        self.pointwise = nn.ModuleList(conv(width, width, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x).movedim(-1, 1)
        for spectral, pointwise in zip(self.spectral, self.pointwise, strict=True):
            x = F.gelu(spectral(x) + pointwise(x))
        return self.project(x.movedim(1, -1))


class Siren(nn.Module):
    """Sine layers of coordinates (Sitzmann et al. 2020), written over a parameter of each layer in a list."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (2, 16, 16, 1)
        self.weights = nn.ParameterList(parameter(a, b) for a, b in itertools.pairwise(sizes))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(b)) for b in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.weights) - 1
        for number in range(last):
            x = torch.sin(3 * torch.addmm(self.biases[number], x, self.weights[number]))
        return x @ self.weights[last] + self.biases[last]


class Splines(nn.Module):
    """A Kolmogorov-Arnold layer: a linear layer of SiLU plus learned sums of bumps on every edge (Liu et al. 2024)."""

    grid: Tensor

    def __init__(self, width: int, out: int, bumps: int = 5) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, bumps))
        self.base, self.spline = parameter(width, out), parameter(width, out, bumps)

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.exp(-((x[..., None] - self.grid) ** 2))
        return F.silu(x) @ self.base + torch.einsum("nig,iog->no", basis, self.spline)


class OrdinaryEquation(nn.Module):
    """Euler steps of one network with the time as an input: its weights are used eight times."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.head = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for step in range(8):
            time = torch.full_like(x[:, :1], step / 8)
            x = x + self.rate(torch.cat([x, time], 1)) / 8
        return self.head(x)


class HyperNetwork(nn.Module):
    """A network that makes the weights of another for every example."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.head = nn.Linear(3, 4 * 6 + 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        made = self.maker(condition)
        weight, bias = made[:, :24].view(-1, 6, 4), made[:, 24:]
        return self.head(torch.tanh(torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1) + bias))


class Coupling(nn.Module):
    """Affine couplings of two halves (Dinh et al. 2017), with a learned mixing by a matrix and its determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = parameter(6, 6)
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.mix.t()
        volume = torch.linalg.slogdet(self.mix)[1].expand(len(x))
        for net in self.nets:
            a, b = x.chunk(2, 1)
            scale, shift = net(a).chunk(2, 1)
            x, volume = torch.cat([b * scale.tanh().exp() + shift, a], 1), volume + scale.tanh().sum(1)
        return torch.cat([x, volume[:, None]], 1)


class Ensemble(nn.Module):
    """Copies of one network, whose parameters are stacked and mapped over by `torch.func` (no modules are called)."""

    def __init__(self, members: int = 3) -> None:
        super().__init__()
        nets = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(members)]
        stacked, _ = torch.func.stack_module_state(nets)
        self.stacked = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(p.detach()) for k, p in stacked.items()})
        self.names = list(stacked)
        self.base = [copy.deepcopy(nets[0]).to("meta")]  # in a list: no submodule

    def forward(self, x: Tensor) -> Tensor:
        stacked = {name: self.stacked[name.replace(".", "_")] for name in self.names}
        one = lambda state: torch.func.functional_call(self.base[0], state, (x,))  # noqa: E731
        return torch.func.vmap(one)(stacked).movedim(0, 1)
