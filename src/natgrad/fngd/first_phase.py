"""A step of the first phase: the coefficients of its batch, the direction they give, and what is kept of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.fishers import as_capture, as_samples, pool
from natgrad.fngd.coefficients import Coefficients, Examples
from natgrad.fngd.system import System
from natgrad.fngd.table import Table
from natgrad.layers import Layer
from natgrad.record import Record

Share = Literal["layer", "shape", "joint"]


@dataclass(frozen=True)
class Learnt:
    """What a step finds out about a layer: its direction D (*groups, out, in), and its table."""

    D: Tensor
    table: Table


@dataclass(frozen=True)
class FirstPhase:
    """D = sum_n c_n DW_n of every layer, c solved for and entered in its table.

    Layers may ``share`` c, from the sum of their K: those of the same ``"shape"``, or all (``"joint"``).
    """

    system: System
    coefficients: Coefficients
    share: Share = "layer"

    def __post_init__(self) -> None:
        """Refuse another share."""
        if self.share not in get_args(Share):
            raise ValueError(f"share must be one of {get_args(Share)}, got {self.share!r}")

    def learn(
        self,
        layers: Mapping[str, Layer],
        tables: Mapping[str, Table],
        records: Sequence[Record],
        step: int,
        ids: Mapping[int, Tensor],
    ) -> dict[str, Learnt]:
        """What the passes of a step say of the layers that they reached; ``ids`` by where the examples start."""
        found: dict[str, Learnt] = {}
        for names in self._sharing(layers):
            seen = {name: [one for record in records for one in record.captures(layers[name])] for name in names}
            found |= self.learn_from(seen, tables, step, ids)
        return found

    def learn_from(
        self, seen: Mapping[str, Sequence[Capture]], tables: Mapping[str, Table], step: int, ids: Mapping[int, Tensor]
    ) -> dict[str, Learnt]:
        """The same of layers that share c, from what they saw."""
        seen = {name: captures for name, captures in seen.items() if captures}
        if not seen:
            return {}
        joined = {name: as_capture(pool(map(as_samples, captures))) for name, captures in seen.items()}
        w, alive = self.system.solve(reduce(torch.add, (examples.joint_gram() for examples in joined.values())))
        found = {}
        for name, examples in joined.items():
            told = [ids[one.examples.start] for one in seen[name] if one.examples.start in ids]
            which = Examples(step, 0, torch.cat(told) if told else None)
            table = tables[name].entered(self.coefficients, which, examples.g.movedim(-3, 0), w, alive)
            found[name] = Learnt(_direction(seen[name], w), table)
        return found

    def _sharing(self, layers: Mapping[str, Layer]) -> Iterable[list[str]]:
        groups: dict[object, list[str]] = {}
        for name, layer in layers.items():
            key = {"layer": name, "shape": layer.shape, "joint": ""}[self.share]
            groups.setdefault(key, []).append(name)
        return groups.values()


def _direction(seen: Sequence[Capture], w: Tensor) -> Tensor:
    """1/N sum_n w_n DW_n."""
    parts = w.split([capture.a.shape[-3] for capture in seen])
    D = [here.combine(part.expand(*here.a.shape[:-3], -1)) for here, part in zip(seen, parts, strict=True)]
    return torch.stack(D).sum(0) / len(w)
