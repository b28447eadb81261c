"""What becomes of every parameter under FNGD, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import nn

from natgrad.fngd.table import Table
from natgrad.layers import Coverage
from natgrad.optim.cost import Cost, size
from natgrad.optim.coverage import Report, Row, complete, row_of


def report(
    model: nn.Module, found: Coverage, tables: Mapping[str, Table], alike: Collection[str], others: Collection[str]
) -> Report:
    """The report on ``found``; a layer that the first phase has not seen is stepped by AdamW.

    The examples of the layers that are ``alike`` all have the mean coefficient; ``others`` another optimizer steps.
    """
    rows = []
    for name, layer in found.layers.items():
        remarks = ["all examples by the mean coefficient"] if name in alike else []
        row = row_of(model, layer, Cost("weighted sum", 0, 0, 0), remarks)
        rows.append(_as_it_stands(row, tables.get(name)))
    return complete(model, found, rows, "AdamW", others=others)


def _as_it_stands(row: Row, table: Table | None) -> Row:
    if table is None:
        return replace(row, why=f"{row.why}; not seen yet")
    if not table.known:
        return replace(row, rule="AdamW", structure="-", why=f"{row.why}; not seen: AdamW", cost=None)
    return replace(row, cost=Cost(row.structure, size((table.total, table.seen)), 0, 0))
