"""What becomes of every parameter under FNGD, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from natgrad.fngd.table import Table
from natgrad.layers import Coverage
from natgrad.optim.cost import Cost, size
from natgrad.optim.coverage import Report, Row, complete, row_of


def report(
    model: nn.Module, found: Coverage, tables: Mapping[str, Table], unread: Mapping[str, str], rest: str
) -> Report:
    """The report on ``found``; a layer that the first phase has not seen is stepped by AdamW, all else by ``rest``."""
    rows = []
    for name, layer in found.layers.items():
        row = row_of(model, layer, Cost("weighted sum", 0, 0, 0))
        rows.append(_as_it_stands(row, tables.get(name), unread.get(name, "not seen")))
    return complete(model, found, rows, rest)


def _as_it_stands(row: Row, table: Table | None, unread: str) -> Row:
    if table is None:
        return replace(row, why=f"{row.why}; not seen yet")
    if not table.known:
        return replace(row, rule="AdamW", structure="-", why=f"{row.why}; {unread}: AdamW", cost=None)
    return replace(row, cost=Cost(row.structure, size((table.total, table.seen)), 0, 0))
