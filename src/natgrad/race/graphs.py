"""A graph network on WordNet (Fellbaum 1998): the field of a verb, one of fifteen, from its gloss and relatives."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from natgrad.race.data import Dataset, load_bundle
from natgrad.race.datasets import stratified

FIELDS = (29, 43)  # the first and the last lexicographer file of verbs
WORDS = 1000  # of the vocabulary of the glosses


@dataclass(frozen=True)
class Graph(Dataset):
    """Inputs (n,) are nodes, targets their classes; `features` (nodes, d) and `edges` (2, e), both ways, are of all."""

    features: Tensor = torch.empty(0, 0)
    edges: Tensor = torch.empty(2, 0)


@dataclass(frozen=True)
class Synset:
    """A set of synonyms: its field, its words, those of its gloss, and where its relatives of the same kind are."""

    field: int
    words: Sequence[str]
    relatives: Sequence[str]


def verbs(folder: Path | None) -> Graph:
    """Load the 13,789 synsets of verbs: 70 % of every field for training, the others for test."""
    lines = (load_bundle("WordNet 3.1", folder) / "data.verb").read_text("utf-8").splitlines()
    return graph([line for line in lines if not line.startswith(" ")])


def graph(lines: Sequence[str]) -> Graph:
    """Nodes are the synsets of a data file of WordNet, edges their relations to others of the file."""
    synsets = {line.split(" ", 1)[0]: synset(line) for line in lines}
    number = {place: i for i, place in enumerate(synsets)}
    pairs = {(number[a], number[b]) for a, found in synsets.items() for b in found.relatives if b in number and a != b}
    edges = torch.tensor(sorted(pairs | {(b, a) for a, b in pairs})).T
    y = torch.tensor([found.field - FIELDS[0] for found in synsets.values()])
    train, test = stratified(y, 0.7, seed=0)
    features = word_features([found.words for found in synsets.values()], WORDS)
    return Graph("WordNet's verbs", (train, y[train]), (test, y[test]), features, edges)


def synset(line: str) -> Synset:
    """Read a line of a data file: place, field, type, words, relations, gloss (wndb(5WN))."""
    left, _, gloss = line.partition(" | ")
    cells = left.split()
    last = 4 + 2 * int(cells[3], 16)
    relations = cells[last + 1 : last + 1 + 4 * int(cells[last])]
    same = [place for place, kind in zip(relations[1::4], relations[2::4], strict=True) if kind == cells[2]]
    words = " ".join([*cells[4:last:2], gloss]).lower().replace("_", " ")
    return Synset(int(cells[1]), re.findall(r"[a-z]+", words), same)


def word_features(texts: Iterable[Sequence[str]], size: int) -> Tensor:
    """Which of the most frequent words occur in each text: rows (n, size) that sum to 1, or to 0 where none does."""
    sets = [set(text) for text in texts]
    counts = Counter(word for words in sets for word in sorted(words))
    column = {word: i for i, (word, _) in enumerate(counts.most_common(size))}
    x = torch.zeros(len(sets), size)
    for row, words in zip(x, sets, strict=True):
        row[[column[word] for word in words if word in column]] = 1
    return x / x.sum(1, keepdim=True).clamp(min=1)


class GCN(nn.Module):
    """Graph convolutional network (Kipf & Welling 2017): dense layers, each followed by D^-1/2 (A + I) D^-1/2.

    The features (nodes, d) and the edges (2, e) of the whole graph are buffers; an input (n,) says of which nodes the
    logits (n, classes) are wanted. Cost of a pass: that of all nodes, however few are asked for.
    """

    features: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor

    def __init__(self, features: Tensor, edges: Tensor, widths: Sequence[int], dropout: float = 0.5) -> None:
        super().__init__()
        loops = torch.arange(len(features))
        source, target = torch.cat([edges, loops.expand(2, -1)], 1)
        degree = target.bincount(minlength=len(features)).rsqrt()
        self.register_buffer("features", features)
        self.register_buffer("source", source)
        self.register_buffer("target", target)
        self.register_buffer("weight", (degree[source] * degree[target])[:, None])
        n_in = [features.shape[1], *widths]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(n_in, widths, strict=False))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of nodes x (n,)."""
        h = self.features
        for i, layer in enumerate(self.layers):
            h = self.spread(layer(h if i == 0 else self.dropout(h.relu())))
        return h[x]

    def spread(self, h: Tensor) -> Tensor:
        """Sum over the neighbours and the node itself, weighed: (nodes, d) to the same shape."""
        return torch.zeros_like(h).index_add(0, self.target, h[self.source] * self.weight)


def gcn(data: Dataset) -> GCN:
    """The network of the verbs: three layers."""
    found = cast(Graph, data)
    return GCN(found.features, found.edges, widths=(128, 128, 1 + FIELDS[1] - FIELDS[0]))
