"""A small GPT (Radford et al. 2019) on words: the English captions of Multi30k, one after the other."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.race.data import Dataset, Pair, load_multi30k
from natgrad.race.language import mean_nats

UNKNOWN, END = 0, 1
WORDS = 3000  # of the vocabulary
LENGTH = 32  # words of one example


def captions(folder: Path | None) -> Dataset:
    """The captions of training and of the test of 2016 as two streams of words; targets are the words that follow."""
    train, test = (split(load_multi30k(part, folder)[0]) for part in ("train", "test_2016_flickr"))
    known = vocabulary(train, WORDS)
    return Dataset("captions of Multi30k", windows(train, known, LENGTH), windows(test, known, LENGTH))


def split(sentences: Iterable[str]) -> list[list[str]]:
    """Sentences as lower-case words and punctuation marks."""
    return [re.findall(r"\w+|[^\w\s]", sentence.lower()) for sentence in sentences]


def vocabulary(sentences: Iterable[Sequence[str]], size: int) -> dict[str, int]:
    """Number the most frequent words, the first of equals first; 0 and 1 are kept for unknown ones and the end."""
    counts = Counter(word for sentence in sentences for word in sentence)
    return {word: i + 2 for i, (word, _) in enumerate(counts.most_common(size - 2))}


def windows(sentences: Iterable[Sequence[str]], known: Mapping[str, int], length: int) -> Pair:
    """Inputs and targets (n, length) without overlap, an end after every sentence; an incomplete last is left out."""
    lines = ([*(known.get(word, UNKNOWN) for word in sentence), END] for sentence in sentences)
    stream = torch.tensor([END, *(word for line in lines for word in line)])
    n = (len(stream) - 1) // length
    return stream[: n * length].view(n, length), stream[1 : n * length + 1].view(n, length)


class Block(nn.Module):
    """Pre-norm block: causal self-attention, its three inputs from one dense layer, then two dense layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, t, width) to the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attend(self.norm1(x)).chunk(3, -1)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class GPT(nn.Module):
    """Input (n, t) of words, output (n, t, words) logits; places are learned, the head is the embedding."""

    def __init__(self, words: int = WORDS, length: int = LENGTH, width: int = 128, heads: int = 4, layers: int = 3):
        super().__init__()
        self.embedding, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:
                last = name.endswith(("project.weight", "narrow.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if last else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the word after each, from the words up to its own."""
        places = self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(self.embedding(x) + places)))


def gpt(data: Dataset) -> GPT:
    """The network of the captions."""
    return GPT()


def perplexity(model: nn.Module, data: Dataset) -> float:
    """Exponential of the mean cross entropy of the test words."""
    return math.exp(mean_nats(model, data))
