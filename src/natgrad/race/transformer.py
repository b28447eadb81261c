"""Compact Transformers (Vaswani et al. 2017), encoder-decoder and causal, every weight matrix a dense layer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention with separate dense layers for queries, keys, values and the output."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """From x (n, t, width) to memory (n, s, width); `mask` (n, s) is true where there is a word, None is causal."""
        q, k, v = self._split(self.query(x)), self._split(self.key(memory)), self._split(self.value(memory))
        wide = None if mask is None else mask[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=wide, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Pre-norm layer: self-attention, then two dense layers, each added to its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.dense = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map (n, s, width) to the same shape; no `mask` is causal."""
        h = self.norm1(x)
        x = x + self.attention(h, h, mask)
        return x + self.dense(self.norm2(x))


class DecoderLayer(nn.Module):
    """Pre-norm layer: causal self-attention, attention to the source, two dense layers, each added to its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attention, self.cross = Attention(width, heads), Attention(width, heads)
        self.dense = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Map (n, t, width) to the same shape."""
        h = self.norm1(x)
        x = x + self.attention(h, h, None)
        x = x + self.cross(self.norm2(x), memory, mask)
        return x + self.dense(self.norm3(x))


class Transformer(nn.Module):
    """Sequence to sequence; input (n, 2, t) holds source and shifted target, output (n, t, words) logits."""

    def __init__(
        self, words: int, padding: int, width: int = 128, heads: int = 4, layers: int = 2, hidden: int = 256
    ) -> None:
        super().__init__()
        self.padding = padding
        self.source, self.target = nn.Embedding(words, width), nn.Embedding(words, width)
        for embedding in (self.source, self.target):
            nn.init.normal_(embedding.weight, std=width**-0.5)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, hidden) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, hidden) for _ in range(layers))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, t, words) of the word after each word of the target."""
        source, target = x.unbind(1)
        return self.head(self.decode(target, *self.encode(source)))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Read a source (n, s): its memory (n, s, width) and its mask (n, s)."""
        mask = source != self.padding
        x = _placed(self.source(source))
        for layer in self.encoder:
            x = layer(x, mask)
        return self.norm1(x), mask

    def decode(self, target: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Features (n, t, width) of a target (n, t), each from the words up to its own."""
        x = _placed(self.target(target))
        for layer in self.decoder:
            x = layer(x, memory, mask)
        return self.norm2(x)


class CausalTransformer(nn.Module):
    """A language model, decoder only: input (n, t) of words, output (n, t, words) logits of those that follow."""

    def __init__(self, words: int, width: int = 128, heads: int = 4, layers: int = 2, hidden: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, hidden) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, t, words), each from the words up to its own."""
        h = _placed(self.embedding(x))
        for layer in self.layers:
            h = layer(h, None)
        return self.head(self.norm(h))


def _placed(x: Tensor) -> Tensor:
    """Scale embeddings (n, t, width) to unit variance and add the sinusoids of their places."""
    t, width = x.shape[1:]
    rates = torch.exp(torch.arange(0, width, 2, device=x.device) * (-math.log(1e4) / width))
    angles = torch.arange(t, device=x.device)[:, None] * rates
    return x * width**0.5 + torch.stack([angles.sin(), angles.cos()], -1).flatten(1).to(x.dtype)
