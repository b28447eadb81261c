"""Sequences: recurrences, convolutions in time, attention."""

# ruff: noqa: D102 - every method is `forward` or a step of it

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn, weight_norm

from zoo.nets.weights import parameter


class EinsumAttention(nn.Module):
    """Attention whose projections are parameters (width, heads, size) of einsums, as in JAX."""

    def __init__(self, width: int = 16, heads: int = 2, size: int = 8) -> None:
        super().__init__()
        self.query, self.key, self.value = (parameter(width, heads, size) for _ in range(3))
        self.out = nn.Parameter(torch.randn(heads, size, width) / 4)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhk->bhtk", x, w) for w in (self.query, self.key, self.value))
        weights = torch.einsum("bhtk,bhsk->bhts", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        mixed = torch.einsum("bhts,bhsk->bhtk", weights, v)
        return self.head(x + torch.einsum("bhtk,hkd->btd", mixed, self.out))


class TemporalBlock(nn.Module):
    """Two dilated causal convolutions with weight normalisation (Bai et al. 2018)."""

    def __init__(self, width: int, out: int, dilation: int, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.conv1 = norm(nn.Conv1d(width, out, 3, padding=self.padding, dilation=dilation))
        self.conv2 = norm(nn.Conv1d(out, out, 3, padding=self.padding, dilation=dilation))
        self.skip = nn.Conv1d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x)[..., : -self.padding])
        return F.relu(F.relu(self.conv2(y)[..., : -self.padding]) + self.skip(x))


class TCN(nn.Module):
    """Temporal convolutional network; ``old`` takes the weight norm of hooks, which most published code has."""

    def __init__(self, old: bool) -> None:
        super().__init__()
        norm = weight_norm if old else parametrizations.weight_norm
        self.blocks = nn.Sequential(TemporalBlock(3, 8, 1, norm), TemporalBlock(8, 8, 2, norm))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, :, -1])


class Recurrent(nn.Module):
    """Embedding, a recurrence of torch, the head at every position."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1, both: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.recurrence = kind(8, 12, num_layers=layers, bidirectional=both, batch_first=True)
        self.head = nn.Linear(24 if both else 12, 20)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.recurrence(self.embedding(ids))[0])


class PackedLSTM(nn.Module):
    """A classifier of sequences of several lengths by the last state of a packed LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 12, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 5)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        state = self.lstm(packed)[1][0]
        return self.head(torch.cat([state[0], state[1]], -1))


class CellLoop(nn.Module):
    """A loop over positions of two cells."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(4, 8), nn.GRUCell(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = s = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            h, c = self.lstm(x[:, t], (h, c))
            s = self.gru(h, s)
        return self.head(s)


class Translator(nn.Module):
    """`nn.Transformer` with positions first, as by default, and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(20, 16), nn.Embedding(20, 16)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0)
        self.head = nn.Linear(16, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(len(target), dtype=self.head.weight.dtype)
        return self.head(self.transformer(self.source(source), self.target(target), tgt_mask=mask))


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a padding mask; the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.embedding, self.encoder = nn.Embedding(20, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0).mean(1))


class AttentionClassifier(nn.Module):
    """`nn.MultiheadAttention` between norms, with a learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query = nn.Linear(6, 16), nn.Parameter(torch.randn(1, 1, 16))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        pooled, _ = self.attention(self.query.expand(len(x), -1, -1), x, x)
        return self.head(self.norm(pooled[:, 0]))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class LayerNorm(nn.Module):
    """(x - mean) / std * gain + shift, by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.shift


class Block(nn.Module):
    """Causal attention with one matrix for q, k, v, and a gated perceptron, each after a norm by hand."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(width), LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up, self.down = nn.Linear(width, 24), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LanguageModel(nn.Module):
    """Decoder with norms by hand, learned positions and the embedding's weight as head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 16), nn.Parameter(torch.randn(1, 8, 16) / 4)
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(2))
        self.norm, self.head = RMSNorm(16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[:, : ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class StateSpace(nn.Module):
    """A diagonal state-space layer (S4D, Gu et al. 2022): the kernel is made of the parameters, applied by FFT."""

    def __init__(self, width: int = 6, states: int = 4) -> None:
        super().__init__()
        self.log_step = nn.Parameter(torch.rand(width) - 3)
        self.C = nn.Parameter(torch.randn(width, states, 2))
        self.log_real = nn.Parameter(torch.log(0.5 * torch.ones(width, states)))
        self.imaginary = nn.Parameter(math.pi * torch.arange(states).repeat(width, 1).float())
        self.D, self.head = nn.Parameter(torch.randn(width)), nn.Linear(width, 3)

    def kernel(self, length: int) -> Tensor:
        step, A = self.log_step.exp(), torch.complex(-self.log_real.exp(), self.imaginary)
        powers = (A * step[:, None])[..., None] * torch.arange(length, device=A.device)
        weight = torch.view_as_complex(self.C) * ((A * step[:, None]).exp() - 1) / A
        return 2 * torch.einsum("hn,hnl->hl", weight, powers.exp()).real

    def forward(self, x: Tensor) -> Tensor:
        u, length = x.mT, x.shape[1]
        product = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(self.kernel(length), n=2 * length)
        y = torch.fft.irfft(product, n=2 * length)[..., :length] + u * self.D[:, None]
        return self.head(F.gelu(y).mT)


class Experts(nn.Module):
    """Experts as parameters (experts, in, out) of batched products, mixed by a dense gate."""

    def __init__(self, experts: int = 3, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / math.sqrt(hidden))
        self.bias = nn.Parameter(torch.zeros(experts, 1, hidden))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        hidden = F.gelu(torch.bmm(tokens.expand(len(self.up), -1, -1), self.up) + self.bias)
        mixed = torch.einsum("etd,te->td", torch.bmm(hidden, self.down), self.gate(tokens).softmax(-1))
        return x + mixed.view_as(x)


class SparseExperts(nn.Module):
    """Experts as modules; each token goes to its best one by an index."""

    def __init__(self, experts: int = 3, width: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        expert = lambda: nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))  # noqa: E731
        self.experts = nn.ModuleList(expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weight, choice = self.gate(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            (index,) = torch.where(choice == number)
            out.index_add_(0, index, expert(tokens[index]) * weight[index, None])
        return x + out.view_as(x)
