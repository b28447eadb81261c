"""The coverage report: what becomes of every parameter of a model, why, and what it costs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from natgrad.fishers import KFAC, Approximation, check_layers, for_layer
from natgrad.layers import WIDE, Coverage, Layer, check_wide, expected
from natgrad.look import look
from natgrad.optim.budget import Plan
from natgrad.optim.cost import Cost, cost, size
from natgrad.optim.curvature import LayerCurvature
from natgrad.optim.geometry import Frobenius, Geometry
from natgrad.optim.shampoo import is_matrix
from natgrad.optim.step_size import Automatic

_FROBENIUS = Frobenius()
_HEADER = ("layer", "block", "structure", "parameters", "memory", "step", "refresh", "why")


@dataclass(frozen=True)
class Row:
    """One layer with curvature, or one parameter without: how many ``numbers`` it has, its ``structure``, and why.

    ``rule`` is what steps it. ``cost`` is ``None`` without curvature, and where it depends on the data.
    """

    name: str
    parameters: tuple[str, ...]
    numbers: int
    rule: str
    structure: str
    why: str
    block: str = ""
    cost: Cost | None = None
    operations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The rows of every parameter; its text is a table with the totals below."""

    rows: tuple[Row, ...]
    expected: bool = False
    planned: str = ""

    @property
    def covered(self) -> float:
        """The share of the trained parameters that have curvature."""
        natural = sum(row.numbers for row in self.rows if row.rule == "natural")
        return natural / max(1, sum(row.numbers for row in self.rows if row.rule != "none"))

    @property
    def operations(self) -> list[str]:
        """The operations that use weights."""
        return sorted({operation for row in self.rows for operation in row.operations})

    @property
    def fallbacks(self) -> dict[str, str]:
        """The trained parameters, or layers, that are without curvature though nobody excluded them, and why."""
        return {row.name: row.why for row in self.rows if row.rule not in ("natural", "none") and row.why != "excluded"}

    def __str__(self) -> str:
        costs = [row.cost for row in self.rows if row.cost]
        trained = sum(row.numbers for row in self.rows if row.rule != "none")
        memory, step, refresh = (sum(getattr(c, name) for c in costs) for name in ("memory", "step", "refresh"))
        total = f"curvature takes {memory / 1e6:.1f} MB, {_flops(step)} a step and {_flops(refresh)} a refresh"
        share = f"{100 * self.covered:.1f} % of {trained:,} trained parameters have curvature"
        if self.expected:
            share = f"expected before the first pass: {share}"
        lines = [_table([_HEADER, *map(_words, self.rows)]), self.planned, f"{share}; {total}"]
        return "\n".join(filter(None, lines))


def coverage(
    model: nn.Module,
    *inputs: Any,
    approximation: Approximation | None = None,
    exclude: Iterable[str] = (),
    wide: int | None = WIDE,
    shampoo: bool = False,
    examples: int = 1,
    method: str = "forward",
    **named: Any,
) -> Report:
    """What :class:`~natgrad.NaturalGradient` with these settings would do with every parameter, and at what cost.

    ``inputs`` and ``named`` are arguments of the model, or of its ``method``: one pass on tensors of their shapes,
    without data where the model does not read values, shows what every parameter is used for. Without any the report
    says what is expected by the classes of the modules. The model is left as it was.

    Flops are of products and factorisations, counted in a dry run of the approximation on shapes alone, as the default
    policy begins; what joins layers is not counted. Of methods that keep samples they hold for ``examples``, with one
    position each. Raises ``ValueError`` for an ``exclude`` or ``wide`` that is none, and for a layer that is too large
    for the approximation.
    """
    check_wide(wide)
    approximation, model = approximation or KFAC(), getattr(model, "_orig_mod", model)  # of torch.compile
    if any(isinstance(x, Approximation) for x in inputs):
        raise TypeError("the positional arguments of coverage are those of the model: write approximation=...")
    exclude = tuple(exclude)
    if inputs or named:
        found = look(model, inputs, named, exclude, wide, method).coverage()
    else:
        found = expected(model, exclude, wide)
    check_layers(approximation, found.layers.values())
    matrices = matrices_of(model, found, wide) if shampoo else {}
    geometry = Frobenius() if approximation.together else Automatic().geometry({})
    return report(model, found, approximation, matrices, examples=examples, geometry=geometry)


def matrices_of(model: nn.Module, found: Coverage, wide: int | None) -> dict[str, nn.Parameter]:
    """The parameters that no rule reads and that are matrices."""
    return {name: p for name, p in model.named_parameters() if name in found.uncovered and is_matrix(p, wide)}


def report(
    model: nn.Module,
    found: Coverage,
    approximation: Approximation,
    matrices: Collection[str] = (),
    curvature: Mapping[str, LayerCurvature] | None = None,
    others: Collection[str] = (),
    examples: int = 1,
    plan: Plan | None = None,
    geometry: Geometry = _FROBENIUS,
) -> Report:
    """The report on ``found``; with the ``curvature`` of training as it stands, and the ``plan`` under a budget.

    ``matrices`` are those of the other parameters that Shampoo steps, and not AdamW; ``others`` another optimizer. A
    layer that the steps so far have not seen counts as stepped by AdamW. Costs are those under ``geometry``.
    """
    known: dict[object, Cost | None] = {}
    rows = []
    for name, layer in found.layers.items():
        key = (layer.shape, layer.weight.dtype, layer.kind, layer.diagonal)
        chosen = for_layer(approximation, layer.kind)
        if key not in known:
            known[key] = cost(chosen, layer, examples, geometry)
        row = row_of(model, layer, known[key], _structure(layer, approximation))
        row = row if curvature is None else _as_it_stands(row, curvature.get(name))
        turn = plan.turns.get(name) if plan is not None else None
        rows.append(row if turn is None else replace(row, why=f"{row.why}; {turn}"))
    return replace(complete(model, found, rows, "AdamW", matrices, others), planned=str(plan or ""))


def row_of(model: nn.Module, layer: Layer, what: Cost | None, remarks: Iterable[str] = ()) -> Row:
    """The row of a layer with curvature."""
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = tuple(names[id(p)] for p in layer.parameters)
    name = " = ".join([layer.name, *(other.removesuffix(".weight") for other in layer.names[1:])])
    why = "; ".join([", ".join(layer.operations), *remarks])
    total = sum(part.numel() for part in layer.parts(list(layer.parameters)))
    block = " x ".join(map(str, layer.shape))
    return Row(name, parameters, total, "natural", what.structure if what else "-", why, block, what, layer.operations)


def complete(
    model: nn.Module,
    found: Coverage,
    rows: Sequence[Row],
    rest: str,
    matrices: Collection[str] = (),
    others: Collection[str] = (),
) -> Report:
    """The rows of the layers, and those of all other parameters: ``matrices`` under Shampoo, ``others`` under another
    optimizer, and all else under ``rest``."""
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    rules = dict.fromkeys(found.uncovered, rest) | dict.fromkeys(matrices, "Shampoo")
    rules |= {name: "another optimizer" for name in found.uncovered if name in others}
    bare = [Row(name, (name,), numbers[name], rules[name], rules[name], why) for name, why in found.uncovered.items()]
    told = {name for row in (*rows, *bare) for name in row.parameters}
    frozen = [Row(n, (n,), size, "none", "frozen", "not trained") for n, size in numbers.items() if n not in told]
    return Report((*rows, *bare, *frozen), found.expected)


def _as_it_stands(row: Row, now: LayerCurvature | None) -> Row:
    """The row of a layer once training has begun, or is about to."""
    if now is None:
        return replace(row, why=f"{row.why}; not seen yet", cost=row.cost and replace(row.cost, memory=0))
    if now.aside:
        return replace(row, rule="AdamW", structure="-", why=f"{row.why}; {_failed(now)}: AdamW", cost=None)
    if not now.refreshed:
        return replace(row, rule="AdamW", structure="-", why=f"{row.why}; not seen: AdamW", cost=None)
    if now.failures:
        row = replace(row, why=f"{row.why}; {_failed(now)}")
    if now.wide:
        row = replace(row, why=f"{row.why}; in float64")
    memory = size(value for value in now.state().values() if isinstance(value, Tensor))
    return replace(row, cost=row.cost and replace(row.cost, memory=memory))


def _failed(now: LayerCurvature) -> str:
    return "1 failed refresh" if now.failures == 1 else f"{now.failures} failed refreshes"


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


def _words(row: Row) -> tuple[str, ...]:
    costs = ("", "", "")
    if row.cost is not None:
        costs = f"{row.cost.memory / 1e6:.1f} MB", _flops(row.cost.step), _flops(row.cost.refresh)
    return row.name, row.block, row.structure, f"{row.numbers:,}", *costs, row.why


def _flops(count: float) -> str:
    for unit, name in ((1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} FLOP"


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])
