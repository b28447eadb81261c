"""What the tests of approximations that couple layers share: captures of small networks, and dense twins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from natgrad import Bernoulli, Likelihood
from natgrad.capture import Capture
from natgrad.engine import Engine
from natgrad.fishers import CoarseSpace, Coupled, Part
from natgrad.labels import Labels
from natgrad.matrix import NetworkMap

Seen = Mapping[str, Sequence[Capture]]
Tensors = Mapping[str, Tensor]


def perceptron() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3, bias=False))
    return model, torch.randn(30, 5)


def convolutions() -> tuple[nn.Module, Tensor]:
    """With a layer of two groups, and a different number of positions in each layer."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )
    return model, torch.randn(30, 2, 5, 5)


def sequences() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, torch.randn(20, 3, 4)


NETWORKS = (perceptron, convolutions, sequences)


def seen_by(model: nn.Module, *batches: Tensor, likelihood: Likelihood | None = None) -> dict[str, list[Capture]]:
    """What every layer saw of the batches, labels drawn from the model."""
    labels = Labels(likelihood or Bernoulli())
    labels.reseed(0)
    engine = Engine(model, labels)
    engine.armed = True
    for x in batches:
        model(x)
    records = engine.everything()
    engine.close()
    return {name: [c for record in records for c in record.captures(layer)] for name, layer in engine.layers.items()}


def parts_of(approximation: Coupled, seen: Seen, damping: float) -> dict[str, Part]:
    """As after one observation and refresh."""
    parts = {}
    for name, new in approximation.observe_together(seen).items():
        stats = approximation.merge(None, new, 0.0)
        matrix = approximation.correct(approximation.assemble(stats), seen[name], 0.0)
        parts[name] = Part(stats, approximation.invert(matrix, damping), damping)
    return parts


def map_of(approximation: Coupled, seen: Seen, damping: float) -> NetworkMap:
    return approximation.couple(parts_of(approximation, seen, damping))


def gradients(seen: Seen) -> dict[str, Tensor]:
    """The mean gradient of every layer, from drawn labels, and noise: a step that no structure favours."""
    return {name: torch.randn(*c[0].a.shape[:-3], c[0].g.shape[-1], c[0].a.shape[-1]) for name, c in seen.items()}


def flat(M: Tensors) -> Tensor:
    return torch.cat([block.flatten() for block in M.values()])


def like(x: Tensor, M: Tensors) -> dict[str, Tensor]:
    """A flat vector as blocks of the shapes of M."""
    parts = x.split([block.numel() for block in M.values()])
    return {name: part.view_as(M[name]) for name, part in zip(M, parts, strict=True)}


def dense_joint_fisher(seen: Seen) -> Tensor:
    """1/count sum_n d_n d_n^T, d_n the gradient of example n in all weights, by a loop over examples."""
    total, count = torch.zeros(()), 0.0
    for number in range(len(next(iter(seen.values())))):
        captures = [captures[number] for captures in seen.values()]
        count += float(captures[0].count)
        for n in range(captures[0].a.shape[-3]):
            d = torch.cat([(c.g[..., n, :, :].mT @ c.a[..., n, :, :]).flatten() for c in captures])
            total = total + torch.outer(d, d)
    return total / count


def dense_map(linear: NetworkMap, M: Tensors) -> Tensor:
    """The matrix of a linear map on blocks of the shapes of M."""
    size = sum(block.numel() for block in M.values())
    return torch.stack([flat(linear @ like(e, M)) for e in torch.eye(size)], -1)


def two_batches(network: Callable[[], tuple[nn.Module, Tensor]]) -> dict[str, list[Capture]]:
    model, x = network()
    return seen_by(model, x[:12], x[12:])


def dense_operator(seen: Seen, damping: float) -> Tensor:
    """B = F + damping I."""
    F = dense_joint_fisher(seen)
    return F + damping * torch.eye(len(F))


def rows_of(space: CoarseSpace, parts: dict[str, Part], r: Tensors) -> Tensor:
    """R0 (m, weights) of the raw, not orthonormalised, vectors."""
    rows = []
    for name, part in parts.items():
        for v in space.vectors(part.inverse, r[name]):
            rows.append(flat({key: v if key == name else torch.zeros_like(block) for key, block in r.items()}))
    return torch.stack(rows)


def fine_step(parts: dict[str, Part], M: Tensors) -> Tensor:
    return flat({name: parts[name].inverse @ M[name] for name in M})
