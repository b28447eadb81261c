"""The Fisher over all layers, held as the examples that they saw together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture import Capture
from natgrad.fishers.statistics import Samples, Stats, as_capture, as_samples, pool

Blocks = Mapping[str, Tensor]


@dataclass(frozen=True)
class ObservedFisher:
    """F_ij = E[vec(DW_i) vec(DW_j)^T] for all pairs of layers, from the latest examples of each.

    ``seen`` are the examples by layer; ``same`` (layers, layers) is 1 where two layers saw the same ones and 0 where
    not, for want of a correspondence F_ij counts as zero there. The groups of a convolution are joined as well.
    """

    seen: Mapping[str, Capture]
    same: Tensor

    @classmethod
    def of(cls, stats: Mapping[str, Stats]) -> ObservedFisher:
        """From the statistics that :func:`observe_examples` makes."""
        marks = torch.stack([one["batch"].value.sum() for one in stats.values()])
        seen = {name: as_capture(one) for name, one in stats.items()}
        return cls(seen, (marks == marks.unsqueeze(-1)).to(marks.dtype))

    def among(self, names: Sequence[str]) -> ObservedFisher:
        """The rows and columns of some of the layers."""
        order = list(self.seen)
        index = torch.tensor([order.index(name) for name in names], device=self.same.device)
        return ObservedFisher({name: self.seen[name] for name in names}, self.same[index][:, index])

    def along(self, V: Blocks) -> list[Tensor]:
        """<DW_n, V_l> / sqrt(count) by layer, (*lead, n) for V_l (*lead, *groups, out, in): 2 n t out in flops."""
        responses = []
        for name, seen in self.seen.items():
            u = seen.along(V[name]) * torch.as_tensor(seen.count).to(seen.a).clamp(min=1e-30).rsqrt()
            responses.append(u.sum(-2) if seen.a.ndim > 3 else u)
        longest = max(u.shape[-1] for u in responses)
        return [F.pad(u, (0, longest - u.shape[-1])) for u in responses]

    def __matmul__(self, V: Blocks) -> dict[str, Tensor]:
        """F V: 4 n t out in flops a layer, without per-example gradients."""
        weights = self.same @ torch.stack(self.along(V))
        product = {}
        for w, (name, seen) in zip(weights, self.seen.items(), strict=True):
            scale = torch.as_tensor(seen.count).to(seen.a).clamp(min=1e-30).rsqrt()
            product[name] = seen.combine((w * scale)[: seen.a.shape[-3]].expand(seen.a.shape[:-2]))
        return product

    def gram(self, V: Blocks) -> Tensor:
        """V F V^T for stacks V_l (k_l, *groups, out, in), over the m = sum k_l rows of all layers: (m, m)."""
        Y = torch.cat(self.along(V))
        owner = self.owner(V)
        return (Y @ Y.mT) * self.same[owner][:, owner]

    def owner(self, V: Blocks) -> Tensor:
        """The number of the layer that each row of the stacks belongs to: (m,)."""
        sizes = torch.tensor([len(V[name]) for name in self.seen], device=self.same.device)
        return torch.arange(len(sizes), device=sizes.device).repeat_interleave(
            sizes, output_size=sum(len(V[name]) for name in self.seen)
        )


def observe_examples(seen: Mapping[str, Sequence[Capture]]) -> dict[str, Stats]:
    """The examples of each layer, marked by what tells this observation from others: equal marks, equal examples."""
    stats: dict[str, Stats] = {}
    for group in companions(seen):
        mark = Samples(torch.stack([capture.g.square().sum() for capture in seen[group[0]]]).sum().reshape(1, 1, 1))
        stats |= {name: {**pool(as_samples(capture) for capture in seen[name]), "batch": mark} for name in group}
    return stats


def companions(seen: Mapping[str, Sequence[Capture]]) -> list[list[str]]:
    """The layers that saw the same examples, and each of the others alone; those that saw nothing are left out.

    A layer that a forward pass left out, or that was called with examples of its own, has other sizes than the rest.
    """
    sizes = {name: tuple(c.a.shape[-3] for c in captures) for name, captures in seen.items() if captures}
    if not sizes:
        return []
    most = max(map(len, sizes.values()))
    common = Counter(size for size in sizes.values() if len(size) == most).most_common(1)[0][0]
    together = [name for name, size in sizes.items() if size == common]
    return [together, *([name] for name, size in sizes.items() if size != common)]
