"""The coverage table: what an optimizer does with every parameter of its model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from natgrad.fishers import KFAC, Approximation, Weighted, for_layer
from natgrad.layers import WIDE, Coverage, Layer, check_wide, cover
from natgrad.optim.curvature import LayerCurvature
from natgrad.optim.shampoo import is_matrix

_HEADER = ("layer", "block", "matrix", "parameters", "memory", "remark")


def coverage(
    model: nn.Module,
    approximation: Approximation | None = None,
    *,
    exclude: Iterable[str] = (),
    wide: int | None = WIDE,
    shampoo: bool = False,
) -> str:
    """What :class:`~natgrad.NaturalGradient` with these settings would do with every parameter of ``model``: a table.

    Raises ``ValueError`` for an ``exclude`` or ``wide`` that is none.
    """
    check_wide(wide)
    approximation = approximation or KFAC()
    found = covered_by(model, approximation, exclude, wide)
    return coverage_table(model, found, approximation, matrices_of(model, found, wide) if shampoo else {})


def covered_by(model: nn.Module, approximation: Approximation, exclude: Iterable[str], wide: int | None) -> Coverage:
    """The layers that the approximation, or one that stands in for it, can be used on."""
    if not isinstance(approximation, Weighted):
        return cover(model, exclude, wide=wide)
    reason = f"{type(approximation).__name__} has no form for tokens and shared weights"
    return cover(model, exclude, functional=False, wide=wide).only(model, ["plain", "wide"], reason)


def matrices_of(model: nn.Module, found: Coverage, wide: int | None) -> dict[str, nn.Parameter]:
    """The parameters that no adapter covers and that are matrices."""
    return {name: p for name, p in model.named_parameters() if name in found.uncovered and is_matrix(p, wide)}


def coverage_table(
    model: nn.Module,
    found: Coverage,
    approximation: Approximation,
    matrices: Collection[str] = (),
    curvature: Mapping[str, LayerCurvature] | None = None,
    unread: Mapping[str, str] | None = None,
) -> str:
    """One row per covered layer and one per other parameter, with the reason, and the share covered.

    ``matrices`` are those of the others that Shampoo steps, and not AdamW. A layer that the steps so far have not seen
    counts as stepped by AdamW; ``unread`` says why, where that is known.
    """
    layers, uncovered, curvature, unread = found.layers, found.uncovered, curvature or {}, unread or {}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    rows = [
        _row(layer, approximation, curvature.get(name), unread.get(name, "not seen")) for name, layer in layers.items()
    ]
    rules = {name: "Shampoo" if name in matrices else "AdamW" for name in uncovered}
    rows += [(name, "", rules[name], str(sizes[name]), "", reason) for name, reason in uncovered.items()]
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


def _row(layer: Layer, approximation: Approximation, curvature: LayerCurvature | None, unread: str) -> tuple[str, ...]:
    name = " = ".join(use.name for use in layer.uses)
    *groups, out, width = layer.shape
    block = " x ".join(map(str, [*groups, out, width]))
    parameters = str(_size(layer))
    remarks = _structure(layer, approximation)
    if curvature is None or not curvature.refreshed:
        remarks.insert(0, "not seen yet" if curvature is None else f"{unread}: AdamW")
        return name, block, "-", parameters, "", "; ".join(remarks)
    memory = megabytes(value for value in curvature.state().values() if isinstance(value, torch.Tensor))
    if curvature.failures:
        remarks.append(f"{curvature.failures} failed refreshes")
    return name, block, type(curvature.inverse).__name__, parameters, f"{memory:.1f} MB", "; ".join(remarks)


def _structure(layer: Layer, approximation: Approximation) -> list[str]:
    """What is simpler about the matrix of a layer than the approximation says, and why."""
    chosen, (out, width) = for_layer(approximation, layer.kind), layer.shape[-2:]
    tokens = layer.kind in ("tokens", "mixed")
    sides = [
        (0, f"G diagonal: {out:,} outputs"),
        (1, f"A diagonal: {width:,} {'tokens' if tokens else 'inputs'}"),
    ]
    remarks = [words for side, words in sides if layer.diagonal[side] and chosen.sides[side]]
    if layer.kind == "mixed":
        remarks.append("one factor for both uses")
    if type(chosen) is not type(approximation):
        remarks.append(f"{type(chosen).__name__} in place of {type(approximation).__name__}")
    return remarks


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])
