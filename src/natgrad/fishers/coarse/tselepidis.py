"""The coarse level of Tselepidis et al. (2011.00573): sums of all entries, averaged over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture import Capture
from natgrad.fishers.base import Part
from natgrad.fishers.coarse.base import CoarseLevel, Form
from natgrad.fishers.coarse.observed import Blocks, companions
from natgrad.fishers.statistics import Mean, Samples, Stats
from natgrad.matrix import LinearMap, NetworkMap


@dataclass(frozen=True)
class Tselepidis(CoarseLevel):
    """F_c,ij = (sum of the entries of E[a_i a_j^T]) (sum of the entries of E[g_i g_j^T]), (layers, layers).

    The constants as coarse space, and Kronecker products for F there too. The coarse step solves (F_c + damping I) v =
    (sums of the entries of M_i), and adds v_i to every weight of layer i: the additive form only. F_c is positive
    semi-definite where all layers have as many positions; of two with different numbers the larger map is averaged down
    to the smaller, as a square image if both can be one. It needs no examples, only two numbers a pair of layers, which
    are averaged over time. Cost: n t (in + out) an observation and layers^3 a step.
    Reference: Tselepidis, Kohler and Orvieto, arXiv 2011.00573.
    """

    forms: ClassVar[tuple[Form, ...]] = ("additive",)

    def observe_together(self, seen: Mapping[str, Sequence[Capture]]) -> dict[str, Stats]:
        """Row by row the two tables of sums, with weight 0 for layers that did not see the same examples."""
        names = list(seen)
        stats: dict[str, Stats] = {}
        for group in companions(seen):
            a = _pair_sums([_inputs(seen[name]) for name in group], mean=True)
            sums = torch.stack([a, _pair_sums([_outputs(seen[name]) for name in group], mean=False)])
            index = torch.tensor([names.index(name) for name in group], device=sums.device)
            for number, name in enumerate(group):
                row, weight = (sums.new_zeros(2, len(names)) for _ in range(2))
                row[:, index], weight[:, index] = sums[:, number], 1.0
                stats[name] = {"pairs": Mean(row, weight), "place": Samples(index[number].reshape(1, 1, 1).to(row))}
        return stats

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """Moving averages, pair by pair; of a pair that was not seen now, the old value."""
        row = new["pairs"]
        assert isinstance(row, Mean) and isinstance(row.weight, Tensor)
        if old is None:
            return {**new, "pairs": Mean(row.value)}
        before = old["pairs"].value
        return {**new, "pairs": Mean(torch.where(row.weight > 0, torch.lerp(row.value, before, decay), before))}

    def couple(self, parts: Mapping[str, Part], form: Form, omega: float) -> NetworkMap:
        """z_i + omega v_i."""
        places = torch.cat([part.stats["place"].value.flatten() for part in parts.values()]).long()
        a, g = torch.stack([part.stats["pairs"].value for part in parts.values()], 1)[..., places]
        product = (a + a.mT) * (g + g.mT) / 4
        shift = product.new_tensor([part.damping for part in parts.values()])
        return ConstantsMap({name: part.inverse for name, part in parts.items()}, product + shift.diag(), omega)


@dataclass(frozen=True)
class ConstantsMap:
    """z_i + omega v_i with z the fine step and v = ``coarse``^-1 (sums of the entries of M_i)."""

    fine: Mapping[str, LinearMap]
    coarse: Tensor
    omega: float

    def __matmul__(self, M: Blocks) -> dict[str, Tensor]:
        """The image of M; the fine one where the other is not a direction of descent."""
        names = [name for name in self.fine if name in M]
        if not names:
            return {}
        order = list(self.fine)
        index = torch.tensor([order.index(name) for name in names], device=self.coarse.device)
        sums = torch.stack([M[name].sum() for name in names]).to(self.coarse.dtype)
        v, _ = torch.linalg.solve_ex(self.coarse[index][:, index], sums)
        z = {name: self.fine[name] @ M[name] for name in names}
        step = {name: z[name] + (self.omega * share).to(z[name].dtype) for name, share in zip(names, v, strict=True)}
        descends = torch.stack([(step[name] * M[name]).sum() for name in names]).sum() > 0
        return {name: torch.where(descends, step[name], z[name]) for name in names}


def _inputs(seen: Sequence[Capture]) -> Tensor:
    """Sums of the entries of a, (n, t), over the root of the number of examples."""
    x = _sums([capture.a for capture in seen])
    rows = torch.stack([torch.as_tensor(capture.rows).to(x) for capture in seen]).sum()
    return x * (x.shape[1] / rows.clamp(min=1e-30)).sqrt()


def _outputs(seen: Sequence[Capture]) -> Tensor:
    """Sums of the entries of g, (n, t), over the root of ``count``."""
    x = _sums([capture.g for capture in seen])
    count = torch.stack([torch.as_tensor(capture.count).to(x) for capture in seen]).sum()
    return x / count.clamp(min=1e-30).sqrt()


def _sums(parts: list[Tensor]) -> Tensor:
    alone = [x.sum(-1) if x.ndim == 3 else x.sum((0, -1)) for x in parts]
    longest = max(x.shape[-1] for x in alone)
    return torch.cat([F.pad(x, (0, longest - x.shape[-1])) for x in alone])


def _pair_sums(maps: list[Tensor], mean: bool) -> Tensor:
    """The sums (or means over t) of x_i x_j for maps x_l (n, t_l), the larger one averaged down: (layers, layers)."""
    table = maps[0].new_zeros(len(maps), len(maps))
    for t in sorted({x.shape[1] for x in maps}):  # the smaller of a pair comes last
        large = [number for number, x in enumerate(maps) if x.shape[1] >= t]
        X = torch.stack([_shrunk(maps[number], t).flatten() for number in large])
        index = torch.tensor(large, device=X.device)
        table[index.unsqueeze(-1), index] = X @ X.mT / (t if mean else 1)
    return table


def _shrunk(x: Tensor, t: int) -> Tensor:
    side, new = math.isqrt(x.shape[1]), math.isqrt(t)
    if x.shape[1] == t:
        return x
    if side**2 == x.shape[1] and new**2 == t:
        return F.adaptive_avg_pool2d(x.unflatten(1, (side, side)).unsqueeze(1), new).flatten(1)
    return F.adaptive_avg_pool1d(x.unsqueeze(1), t).squeeze(1)
