"""The coverage table: what an optimizer does with every parameter of its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from natgrad.layers import Layer
from natgrad.optim.curvature import LayerCurvature

_HEADER = ("layer", "block", "matrix", "parameters", "memory", "remark")


def coverage_table(
    model: nn.Module,
    layers: Mapping[str, Layer],
    curvature: Mapping[str, LayerCurvature],
    uncovered: Mapping[str, str],
    unread: Mapping[str, str],
) -> str:
    """One row per covered layer and one per parameter that AdamW steps, with the reason, and the share covered.

    A layer that the steps so far have not seen counts as stepped by AdamW; ``unread`` says why, where that is known.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    rows = [_row(layer, curvature.get(name), unread.get(name, "not seen")) for name, layer in layers.items()]
    rows += [(name, "", "AdamW", str(sizes[name]), "", reason) for name, reason in uncovered.items()]
    blocks = {name: _size(layer) for name, layer in layers.items()}
    trained = sum(blocks.values()) + sum(sizes[name] for name in uncovered)
    covered = sum(size for name, size in blocks.items() if name not in curvature or curvature[name].refreshed)
    tensors = [value for c in curvature.values() for value in c.state().values() if isinstance(value, Tensor)]
    share = f"{100 * covered / max(1, trained):.1f} % of {trained} trained parameters have curvature"
    return f"{_table([_HEADER, *rows])}\n{share}; curvature takes {megabytes(tensors):.1f} MB"


def megabytes(tensors: Iterable[Tensor]) -> float:
    """The memory of the tensors in MB, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / 1e6


def _size(layer: Layer) -> int:
    return sum(part.numel() for part in layer.parts(list(layer.parameters)))


def _row(layer: Layer, curvature: LayerCurvature | None, unread: str) -> tuple[str, ...]:
    *groups, out, width = layer.shape
    block = " x ".join(map(str, [*groups, out, width]))
    parameters = str(_size(layer))
    if curvature is None or not curvature.refreshed:
        return layer.name, block, "-", parameters, "", "not seen yet" if curvature is None else f"{unread}: AdamW"
    memory = megabytes(value for value in curvature.state().values() if isinstance(value, torch.Tensor))
    remark = f"{curvature.failures} failed refreshes" if curvature.failures else ""
    return layer.name, block, type(curvature.inverse).__name__, parameters, f"{memory:.1f} MB", remark


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])
