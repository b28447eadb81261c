"""Graphs, images, tables and weights with a mask or a second use."""

# ruff: noqa: D102 - every method is `forward` or a step of it

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from zoo.nets.weights import parameter


class GraphConvolution(nn.Module):
    """adjacency x W + b, as in the released GCN (Kipf and Welling 2017)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = parameter(width, out), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        support = torch.mm(x, self.weight)
        return torch.spmm(adjacency, support) + self.bias


class GCN(nn.Module):
    """Two graph convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GraphConvolution(6, 16), GraphConvolution(16, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x, adjacency)), adjacency)


class GraphAttention(nn.Module):
    """One head of graph attention with W and a as parameters (Velickovic et al. 2018)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.W, self.a = parameter(width, out), parameter(2 * out, 1)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        Wh = torch.mm(x, self.W)
        out = Wh.shape[1]
        scores = F.leaky_relu(torch.matmul(Wh, self.a[:out]) + torch.matmul(Wh, self.a[out:]).T, 0.2)
        weights = F.softmax(scores.masked_fill(adjacency == 0, -1e9), dim=1)
        return torch.matmul(weights, Wh)


class GAT(nn.Module):
    """Two heads, then one."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(GraphAttention(6, 8) for _ in range(2))
        self.out = GraphAttention(16, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.out(F.elu(torch.cat([head(x, adjacency) for head in self.heads], 1)), adjacency)


class TiedAutoencoder(nn.Module):
    """W encodes and its transpose decodes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 20) / 4)
        self.encoder_bias, self.decoder_bias = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(20))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.sigmoid(F.linear(x, self.weight, self.encoder_bias))
        return F.linear(code, self.weight.t(), self.decoder_bias)


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is masked, as in MADE (Germain et al. 2015)."""

    mask: Tensor

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.register_buffer("mask", torch.ones(out, width).tril())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mask * self.weight, self.bias)


class MaskedConv(nn.Conv2d):
    """A convolution of the pixels before, as in PixelCNN (van den Oord et al. 2016)."""

    mask: Tensor

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, padding=1)
        mask = torch.ones_like(self.weight)
        mask[:, :, 1, 1:] = mask[:, :, 2:] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class LoRA(nn.Module):
    """A frozen linear layer plus a trained product of rank two (Hu et al. 2022)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, out).requires_grad_(False)
        self.A, self.B = parameter(width, 2), parameter(2, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + x @ self.A @ self.B * 0.5


class Ranking(nn.Module):
    """Sparse features in bags, dense ones in a perceptron, and their products (Naumov et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(12, 6, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(6 + 6, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        all_of = torch.stack([x, *(bag(sparse[:, place]) for place, bag in enumerate(self.bags))], 1)
        products = torch.bmm(all_of, all_of.mT)
        rows, columns = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([x, products[:, rows, columns]], 1))


class Factorization(nn.Module):
    """Ratings by products of embeddings of users and items, with their biases."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(10, 6), nn.Embedding(12, 6)
        self.user_bias, self.item_bias = nn.Embedding(10, 1), nn.Embedding(12, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        product = (self.users(user) * self.items(item)).sum(-1, keepdim=True)
        return product + self.user_bias(user) + self.item_bias(item)


class Diffusion(nn.Module):
    """A small U-Net with the time as scale and shift of the channels, group norm and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 16))
        self.enter, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 4, 2, 1)
        self.norm, self.up = nn.GroupNorm(4, 8), nn.ConvTranspose2d(8, 8, 4, 2, 1)
        self.leave = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, 1)
        first = F.silu(self.enter(x))
        middle = F.silu(self.norm(self.down(first)) * (1 + scale) + shift)
        return self.leave(torch.cat([first, F.silu(self.up(middle))], 1))


class Discriminator(nn.Module):
    """Spectrally normalised convolutions (Miyato et al. 2018) by the parametrization of torch."""

    def __init__(self) -> None:
        super().__init__()
        norm = parametrizations.spectral_norm
        self.body = nn.Sequential(norm(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.1), norm(nn.Conv2d(8, 8, 4, 2, 1)))
        self.head = norm(nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Generator(nn.Module):
    """Transposed convolutions with batch norm (Radford et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        up = [nn.ConvTranspose2d(6, 8, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1), nn.Tanh()]
        self.body = nn.Sequential(*up)

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z[:, :, None, None])


class PointNet(nn.Module):
    """One perceptron for all points, the greatest over them (Qi et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 16, 1))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.points(x).amax(-1))


class VAE(nn.Module):
    """Encoder to mean and log variance, decoder of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.log_variance = nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.encoder(x))
        mean, log_variance = self.mean(h), self.log_variance(h)
        return self.decoder(mean), mean, log_variance
