"""Language models of bytes, on the English text that every Python brings along: the topics of its `help()`."""

import math
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.race.data import Dataset, Pair
from natgrad.race.transformer import CausalTransformer

BYTES = 256
LENGTH = 64  # bytes of one example


def manual(folder: Path | None) -> Dataset:
    """The topics one after the other, the last tenth of the bytes for test; targets are the bytes that follow."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    cut = round(0.9 * len(text))
    return Dataset(f"help topics of Python {platform.python_version()}", windows(text[:cut]), windows(text[cut:]))


def windows(text: bytes) -> Pair:
    """Inputs and targets (n, LENGTH) without overlap; an incomplete last one is left out."""
    stream = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    n = (len(stream) - 1) // LENGTH
    return stream[: n * LENGTH].view(n, LENGTH), stream[1 : n * LENGTH + 1].view(n, LENGTH)


class LSTM(nn.Module):
    """An LSTM (Hochreiter & Schmidhuber 1997) of two dense layers, one of which is called at every byte."""

    def __init__(self, words: int = BYTES, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.input, self.state = nn.Linear(width, 4 * hidden), nn.Linear(hidden, 4 * hidden, bias=False)
        self.head = nn.Linear(hidden, words)
        nn.init.constant_(self.input.bias[hidden : 2 * hidden], 1.0)  # remember at first (Jozefowicz et al. 2015)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, t, words) of the byte after each of x (n, t)."""
        gates = self.input(self.embedding(x))
        h = c = gates.new_zeros(len(x), self.state.in_features)
        seen = []
        for driven in gates.unbind(1):
            i, f, g, o = (driven + self.state(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            seen.append(h)
        return self.head(torch.stack(seen, 1))


def lstm(data: Dataset) -> LSTM:
    """The recurrent model."""
    return LSTM()


def transformer(data: Dataset) -> CausalTransformer:
    """The attentive one."""
    return CausalTransformer(BYTES)


def token_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy in nats, mean over tokens."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


@torch.no_grad()
def mean_nats(model: nn.Module, data: Dataset) -> float:
    """Cross entropy of the test text, mean over tokens."""
    if data.test is None:
        return float("nan")
    parts = zip(data.test[0].split(100), data.test[1].split(100), strict=True)
    return sum(float(token_loss(model(x), y)) * y.numel() for x, y in parts) / data.test[1].numel()


def bits_per_byte(model: nn.Module, data: Dataset) -> float:
    """Cross entropy of the test text in bits, mean over bytes."""
    return mean_nats(model, data) / math.log(2)
