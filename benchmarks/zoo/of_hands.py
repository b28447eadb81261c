"""Networks written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from zoo.entry import Built, Entry
from zoo.nets import functions, others, sequences
from zoo.of_pyg import ring

Made = Callable[[], nn.Module]
Arguments = Callable[[], tuple[Tensor, ...]]


def adjacency(normalized: bool, nodes: int = 8) -> Tensor:
    """Of the ring, with loops: (nodes, nodes)."""
    A = torch.eye(nodes)
    A[tuple(ring(nodes))] = 1
    return A / A.sum(1, keepdim=True) if normalized else A


def nodes(normalized: bool) -> tuple[Tensor, ...]:
    """Features and adjacency of a graph."""
    return torch.randn(8, 6), adjacency(normalized)


def small_ids(*size: int, high: int = 20) -> Tensor:
    """Tokens."""
    return torch.randint(1, high, size)


def all_of(value: tuple[Tensor, ...]) -> Tensor:
    """Several outputs as one."""
    return torch.cat(value, -1)


def examples_first(value: Tensor) -> Tensor:
    """Of an output with positions first."""
    return value.transpose(0, 1)


# name: (model, arguments)
# fmt: off
WRITTEN: dict[str, tuple[Made, Arguments]] = {
    "einsum attention": (sequences.EinsumAttention, lambda: (torch.randn(2, 5, 16),)),
    "FNO 1d": (partial(functions.FNO, 1), lambda: (torch.randn(2, 16, 2),)),
    "FNO 2d": (partial(functions.FNO, 2), lambda: (torch.randn(2, 8, 8, 2),)),
    "TCN, weight_norm": (partial(sequences.TCN, old=True), lambda: (torch.randn(2, 3, 12),)),
    "TCN, parametrized": (partial(sequences.TCN, old=False), lambda: (torch.randn(2, 3, 12),)),
    "nn.RNN": (partial(sequences.Recurrent, nn.RNN), lambda: (small_ids(2, 6),)),
    "nn.LSTM": (partial(sequences.Recurrent, nn.LSTM), lambda: (small_ids(2, 6),)),
    "nn.GRU, two layers, both ways": (partial(sequences.Recurrent, nn.GRU, 2, True), lambda: (small_ids(2, 6),)),
    "packed LSTM": (sequences.PackedLSTM, lambda: (small_ids(3, 6), torch.tensor([3, 6, 4]))),
    "loop of LSTMCell and GRUCell": (sequences.CellLoop, lambda: (torch.randn(2, 5, 4),)),
    "nn.TransformerEncoder, padded": (sequences.Encoder, lambda: (small_ids(2, 6) * (torch.arange(6) < 4),)),
    "nn.MultiheadAttention": (sequences.AttentionClassifier, lambda: (torch.randn(2, 5, 6),)),
    "decoder with norms by hand": (sequences.LanguageModel, lambda: (small_ids(2, 6),)),
    "auto-encoder of W and W.T": (others.TiedAutoencoder, lambda: (torch.rand(2, 20),)),
    "experts of bmm": (sequences.Experts, lambda: (torch.randn(2, 5, 8),)),
    "experts by index": (sequences.SparseExperts, lambda: (torch.randn(2, 5, 8),)),
    "MADE": (lambda: nn.Sequential(others.MaskedLinear(6, 12), nn.ReLU(), others.MaskedLinear(12, 6)),
        lambda: (torch.randn(2, 6),)),
    "PixelCNN": (lambda: nn.Sequential(others.MaskedConv(1, 8, 3), nn.ReLU(), others.MaskedConv(8, 4, 3)),
        lambda: (torch.randn(2, 1, 8, 8),)),
    "LoRA": (lambda: nn.Sequential(others.LoRA(6, 12), nn.ReLU(), others.LoRA(12, 4)), lambda: (torch.randn(2, 6),)),
    "DLRM": (others.Ranking, lambda: (torch.randn(2, 4), small_ids(2, 3, 4, high=12))),
    "matrix factorisation": (others.Factorization, lambda: (small_ids(2, high=10), small_ids(2, high=12))),
    "nn.Bilinear": (lambda: nn.Bilinear(4, 5, 3), lambda: (torch.randn(2, 4), torch.randn(2, 5))),
    "hypernetwork": (functions.HyperNetwork, lambda: (torch.randn(2, 4), torch.randn(2, 3))),
    "neural ODE": (functions.OrdinaryEquation, lambda: (torch.randn(2, 4),)),
    "diffusion U-Net": (others.Diffusion, lambda: (torch.randn(2, 3, 8, 8), torch.rand(2, 1))),
    "spectral_norm": (others.Discriminator, lambda: (torch.randn(2, 3, 16, 16),)),
    "DCGAN": (others.Generator, lambda: (torch.randn(2, 6),)),
    "SIREN of a ParameterList": (functions.Siren, lambda: (torch.rand(2, 2),)),
    "S4D": (sequences.StateSpace, lambda: (torch.randn(2, 12, 6),)),
    "KAN": (lambda: nn.Sequential(functions.Splines(4, 6), functions.Splines(6, 2)), lambda: (torch.randn(2, 4),)),
    "PointNet": (others.PointNet, lambda: (torch.randn(2, 3, 12),)),
    "normalizing flow": (functions.Coupling, lambda: (torch.randn(2, 6),)),
    "ensemble of vmap": (functions.Ensemble, lambda: (torch.randn(2, 4),)),
}
# fmt: on


def build_written(make: Made, arguments: Arguments) -> Built:
    """The model and what it is called with."""
    return make(), arguments(), {}


def written_entries() -> list[Entry]:
    """Networks by hand."""
    graphs = {"GCN of mm": (others.GCN, True), "GAT of mm": (others.GAT, False)}
    entries = [
        Entry("written", name, partial(build_written, make, partial(nodes, normalized)), dim=None)
        for name, (make, normalized) in graphs.items()
    ]
    entries += [Entry("written", name, partial(build_written, *row)) for name, row in WRITTEN.items()]
    translate = partial(build_written, sequences.Translator, lambda: (small_ids(6, 2), small_ids(5, 2)))
    encode = partial(build_written, others.VAE, lambda: (torch.randn(2, 12),))
    entries.append(Entry("written", "nn.Transformer", translate, examples_first, dim=1))
    return [*entries, Entry("written", "VAE", encode, all_of)]
