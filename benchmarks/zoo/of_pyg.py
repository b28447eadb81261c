"""torch_geometric: networks of graphs, as its tutorials write them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import Built, Entry


class TwoLayers(nn.Module):
    """Two convolutions of a graph; the examples are its nodes, or graphs where ``pool`` tells them."""

    def __init__(self, first: nn.Module, second: nn.Module, pool: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.second, self.pool = first, second, pool

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor | None = None) -> Tensor:
        """Logits (nodes or graphs, classes)."""
        y = self.second(torch.relu(self.first(x, edges)), edges)
        return self.pool(y, graph) if self.pool else y


def ring(nodes: int = 8) -> Tensor:
    """Edges (2, edges) of a ring with some chords, both ways."""
    start = torch.arange(nodes)
    one = torch.cat([torch.stack([start, (start + 1) % nodes]), torch.stack([start[::3], (start[::3] + 3) % nodes])], 1)
    return torch.cat([one, one.flip(0)], 1)


def perceptron(width: int, out: int) -> nn.Sequential:
    """Of a GIN convolution."""
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, out))


GRAPHS: dict[str, Callable[[Any], nn.Module]] = {
    "GCN": lambda gnn: TwoLayers(gnn.GCNConv(6, 16), gnn.GCNConv(16, 4)),
    "GAT": lambda gnn: TwoLayers(gnn.GATConv(6, 8, heads=2), gnn.GATConv(16, 4)),
    "GATv2": lambda gnn: TwoLayers(gnn.GATv2Conv(6, 8, heads=2), gnn.GATv2Conv(16, 4)),
    "GraphSAGE": lambda gnn: TwoLayers(gnn.SAGEConv(6, 16), gnn.SAGEConv(16, 4)),
    "GIN": lambda gnn: TwoLayers(gnn.GINConv(perceptron(6, 16), train_eps=True), gnn.GINConv(perceptron(16, 4))),
    "GIN of graphs": lambda gnn: TwoLayers(
        gnn.GINConv(perceptron(6, 16)), gnn.GINConv(perceptron(16, 4)), gnn.global_add_pool
    ),
    "Graph transformer": lambda gnn: TwoLayers(gnn.TransformerConv(6, 8, heads=2), gnn.TransformerConv(16, 4)),
}


def build_graph(name: str) -> Built:
    """A network on a ring, or on two of them."""
    import torch_geometric.nn as gnn

    if name.endswith("of graphs"):
        edges = torch.cat([ring(4), ring(4) + 4], 1)
        return GRAPHS[name](gnn), (torch.randn(8, 6), edges, torch.arange(2).repeat_interleave(4)), {}
    return GRAPHS[name](gnn), (torch.randn(8, 6), ring()), {}


def pyg_entries() -> list[Entry]:
    """Networks of graphs."""
    return [Entry("pyg", name, partial(build_graph, name), dim=None) for name in GRAPHS]
