"""Verification: whether the operations seen give the whole gradient of a parameter. If not, there is another use."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from natgrad.layers import Inventory
from natgrad.operations import Watch
from natgrad.record import Record

_UNSEEN = "code that is not seen (a Function of one's own, a script, a transform)"


class Verification:
    """Of the gradients of the first seed of a pass, at the first pass of every kind; it costs one gradient."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._done: set[tuple[int, bool]] = set()

    def asked(self, watch: Watch, watched: Iterable[nn.Parameter], training: bool) -> list[nn.Parameter]:
        """The parameters whose whole gradient is asked for, at the first pass of so many operations; those with hooks
        of the user are left alone."""
        key = len(watch.calls), training
        if key in self._done:
            return []
        self._done.add(key)
        plain = (p for p in watched if p.requires_grad and id(p) not in watch.computed)
        return [p for p in plain if not p._backward_hooks and not p.is_complex()]

    def check(self, record: Record) -> None:
        """Leave parameters to AdamW whose gradient is not what the operations seen give, for the first seed: there is
        another use."""
        if not record.whole:
            return
        truth = {p: g if g.layout == torch.strided else g.to_dense() for p, g in record.whole.items()}
        record.whole = {}
        found = {p: torch.zeros(p.shape, dtype=g.dtype, device=g.device) for p, g in truth.items()}
        for layer in record.layers.values():
            try:
                total = record.total(layer)
            except ValueError:  # which a step will raise
                return
            if total is None or any(p not in found for p in layer.parameters):
                for p in layer.parameters:
                    found.pop(p, None)
                continue
            parts = layer.parts([found[p] for p in layer.parameters])
            for part, values in zip(parts, layer.unpack(total), strict=True):
                part += values.to(part.dtype)
        covered = {id(p) for layer in record.layers.values() for p in layer.parameters}
        coarse = any(torch.is_autocast_enabled(p.device.type) or p.dtype.itemsize < 4 for p in found)
        norms = {p: float(g.norm()) for p, g in truth.items()}
        noise = 1e-5 * max(norms.values())  # many gradients are zero but for rounding
        for p, total in found.items():
            bound = (0.1 if coarse else 0.01) * norms[p] + noise
            if id(p) in covered and float((total - truth[p]).norm()) > bound:
                self._inventory.add((), [(self._inventory.name(p), _UNSEEN, True)])
