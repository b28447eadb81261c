"""Small networks of the common kinds, with the structure that the large ones have."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Patches(nn.Module):
    """A vision transformer: patches by a convolution, a class token, learned positions (Dosovitskiy et al. 2021)."""

    def __init__(self, channels: int, size: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.positions
        return self.head(self.norm(self.blocks(h))[:, 0])


class Tempered(nn.Module):
    """A classifier whose logits are scaled by a positive temperature that is learned (Radford et al. 2021)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.temperature = inner, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.temperature.exp()


class Block(nn.Module):
    """Attention and a dense block, each after its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.dense(self.norm2(x))


class LSTMLanguage(nn.Module):
    """An LSTM language model: embedding, two layers with dropout between them, head."""

    def __init__(self, tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.rnn = nn.LSTM(width, hidden, 2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(hidden, tokens)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


class DLRM(nn.Module):
    """A recommender: bags of categories and a network for numbers meet in inner products (Naumov et al. 2019)."""

    def __init__(self, tables: list[int], numbers: int, width: int) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(size, width, mode="sum") for size in tables)
        self.bottom = nn.Sequential(nn.Linear(numbers, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        pairs = len(tables) * (len(tables) + 1) // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """numbers (n, numbers) and categories (n, tables, entries of a bag) to one logit (n,)."""
        dense = self.bottom(numbers)
        vectors = [dense, *(bag(ids) for bag, ids in zip(self.bags, categories.unbind(1), strict=True))]
        z = torch.stack(vectors, 1)
        rows, columns = torch.tril_indices(len(vectors), len(vectors), -1)
        products = (z @ z.mT)[:, rows, columns]
        return self.top(torch.cat([dense, products], 1)).squeeze(-1)


class UNet(nn.Module):
    """A U-Net of two levels: norms of groups, skips, transposed convolutions (Ronneberger et al. 2015)."""

    def __init__(self, channels: int, width: int, classes: int) -> None:
        super().__init__()
        self.down1, self.down2 = convolved(channels, width), convolved(width, 2 * width)
        self.bottom = convolved(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.right2, self.right1 = convolved(4 * width, 2 * width), convolved(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        h = self.up2(self.bottom(self.pool(second)))
        h = self.up1(self.right2(torch.cat([second, h], 1)))
        return self.head(self.right1(torch.cat([first, h], 1)))


def convolved(n_in: int, n_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (n_in, n_out):
        layers += [nn.Conv2d(width, n_out, 3, padding=1), nn.GroupNorm(4, n_out), nn.SiLU()]
    return nn.Sequential(*layers)


class GraphConvolution(nn.Module):
    """s_i = sum over neighbours j of x_j W + b, written with plain tensors (Kipf and Welling 2017)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) / n_in**0.5)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ x @ self.weight + self.bias


class MessagePassing(nn.Module):
    """h_i = x_i W + sum over edges (j, i) of tanh([x_i, x_j] V + c)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(n_in, n_out) / n_in**0.5)
        self.message = nn.Parameter(torch.randn(n_out, 2 * n_in) / (2 * n_in) ** 0.5)
        self.shift = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        pairs = torch.cat([x[target], x[source]], -1)
        messages = torch.tanh(nn.functional.linear(pairs, self.message, self.shift))
        return torch.matmul(x, self.own).index_add(0, target, messages)


class GNN(nn.Module):
    """Classes of the nodes of one graph."""

    def __init__(self, n_in: int, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = GraphConvolution(n_in, width), MessagePassing(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, adjacency: Tensor, edges: Tensor) -> Tensor:
        h = self.first(x, adjacency).relu()
        return self.head(self.second(h, edges).relu())


class FunctionallyTied(nn.Module):
    """A language model whose head is the embedding's weight, written as a product."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.inner, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        h = self.norm(h + torch.tanh(self.inner(h)))
        return h @ self.embed.weight.T
