"""Models of public libraries at small size, with random weights: what `coverage_of_models.py` runs over.

Every entry builds ``(model, args, kwargs)`` for a call on a few examples and tells how one tensor of logits, examples
first, is read from what the model returns. A library is imported when an entry of it is built.
"""

from __future__ import annotations

from collections.abc import Callable

from zoo.entry import Entry, built
from zoo.of_hands import written_entries
from zoo.of_pyg import pyg_entries
from zoo.of_smp import smp_entries
from zoo.of_timm import timm_entries
from zoo.of_transformers import transformers_entries

__all__ = ["FAMILIES", "Entry", "built", "entries"]

FAMILIES: dict[str, Callable[[], list[Entry]]] = {
    "timm": timm_entries,
    "transformers": transformers_entries,
    "smp": smp_entries,
    "pyg": pyg_entries,
    "written": written_entries,
}


def entries() -> list[Entry]:
    """All of them."""
    return [entry for family in FAMILIES.values() for entry in family()]
