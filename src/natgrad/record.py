"""What one forward pass leaves behind: the uses of every layer, made into captures when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn

from natgrad.capture import Capture, Examples
from natgrad.layers import Layer
from natgrad.layers.convolution import Convolution
from natgrad.layers.patches import PatchCapture, Patches
from natgrad.operations import Call
from natgrad.rows import Rows
from natgrad.sparse import Sparse, SparseCapture, Together, joined, masked, summed

Sharing = Literal["expand", "reduce"]


@dataclass(frozen=True)
class Share:
    """What of a pass an observation reads: a ``fraction`` of the examples, and one in ``stride`` of their positions.

    ``turn`` counts the shares that differ: turns 0, 1, 2, ... read all positions, then go on to the next examples.
    Positions are left out only where they are samples, not parts of a sum (``"expand"``, a weight used in one role).
    """

    fraction: float = 1.0
    stride: int = 1
    turn: int = 0

    def examples(self, n: int) -> slice:
        """Those that are read, of n."""
        size = max(1, round(self.fraction * n))
        start = self.turn // self.stride % -(-n // size) * size
        return slice(start, min(start + size, n))


ALL = Share()


@dataclass
class Use:
    """A call as one of a layer, its examples first: x (n, ..., *inner); ``swapped`` if the layer's block is that of the
    transposed weight."""

    call: Call
    swapped: bool
    rows: Rows
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        """Bring the examples to the front."""
        self.how = self.rows.arrangement(self.call.sizes, self.call.first, self.call.shared)
        self.x = self.how(self.call.x)

    def gradient(self, seed: int) -> Tensor:
        """That of one seed, (n, ..., *outer)."""
        return self.how(self.call.gradient(seed))

    def operand(self, layer: Layer, tensor: Tensor) -> Tensor:
        """A tensor like the layer's operand as one like the operand of the call."""
        form, view = self.call.form, self.call.weight.view
        if view == layer.view and form.layout == layer.form.layout:
            return tensor
        matrix = layer.form.matrix(tensor)
        return form.operand(matrix.mT if self.swapped else matrix, torch.Size(view.size))

    @property
    def places(self) -> int:
        """The number of positions of an example."""
        return self.call.form.places(self.gradient(0))

    @property
    def thins(self) -> bool:
        """Whether positions may be left out."""
        return self.call.form.thins and not self.call.shared

    @property
    def kept(self) -> Tensor | None:
        """The positions (n, t) that exist, where not all do."""
        if self.call.kept is not None:
            return self.how(self.call.kept).flatten(1)
        return self.mask if self.mask is not None and self.mask.shape == self.how.positions else None


@dataclass(frozen=True)
class Left:
    """An output, and the gradients that the user's backward passes leave there, by the pass."""

    output: Tensor
    by_task: dict[int, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Record:
    """One forward pass: the uses of every layer, and its loss terms.

    ``terms``: weights (n, terms) of the loss terms, or the number of terms of one example. ``scale``: what the recorded
    gradients must be multiplied by. ``which``: the examples. ``rows``: how many there are, and where. ``mask``: which
    positions (n, t) of the examples exist, where it was told. ``tasks``: the backward passes that have reached this
    forward pass. ``left``: outputs and the gradients that the user's loss left there, ``known`` the targets that they
    have, where this was asked for.
    """

    calls: dict[str, list[Use]] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    terms: Tensor | float = 1.0
    scale: float = 1.0
    which: Examples = Examples()
    rows: Rows = Rows()
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    targets: Any = None
    mask: Tensor | None = None
    random: Tensor | None = None
    tasks: set[int] = field(default_factory=set)
    whole: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    strays: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    known: Any = None
    left: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _by_task: list[tuple[Call, dict[int, Tensor]]] = field(default_factory=list)
    _left: list[Left] = field(default_factory=list)

    def add(self, call: Call, layer: Layer, swapped: bool) -> None:
        """One more use of a layer."""
        self.layers[layer.name] = layer
        self.calls.setdefault(layer.name, []).append(Use(call, swapped, self.rows, self.mask))

    def collect(self, call: Call) -> dict[int, Tensor]:
        """Where the gradients of a call in the user's own backward passes are to be put."""
        self._by_task.append((call, {}))
        return self._by_task[-1][1]

    def await_gradient(self, output: Tensor) -> Left:
        """Where the gradients at an output in the user's own backward passes are to be put."""
        self._left.append(Left(output.detach() if output.dtype.itemsize >= 4 else output.detach().float()))
        return self._left[-1]

    def last(self) -> list[Tensor | None]:
        """The gradients of the last call that any reached."""
        return next((call.gradients for call, _ in reversed(self._by_task) if call.reached), [])

    def settle(self, filled: Mapping[int, set[int]] | None) -> None:
        """Let the gradients be those of the backward passes that ``filled`` the weight's; of all if it is ``None``."""
        for call, by_task in self._by_task:
            parameter = id(call.weight.parameter)
            chosen = [g for task, g in by_task.items() if filled is None or parameter in filled.get(task, ())]
            call.gradients[:] = [reduce(torch.add, chosen) if chosen else None]
        self.left = [
            (left.output, reduce(torch.add, chosen))
            for left in self._left
            if (chosen := [g for task, g in left.by_task.items() if filled is None or task in filled])
        ]

    def captures(self, layer: Layer, sharing: Sharing = "expand", share: Share = ALL) -> Iterator[Capture]:
        """What ``layer`` saw of a ``share`` of the examples: one :class:`Capture` per seed.

        The seeds share the count, as gradients share their sum of squares, so that passes with different numbers of
        seeds pool as their examples do.
        """
        for number, uses in enumerate(self._reached(layer)):
            n = share.examples(len(uses[0].x))
            roles = [[use for use in uses if use.swapped == swapped] for swapped in (False, True)]
            roles = [role for role in roles if role]
            thins = len(roles) == 1 and sharing == "expand" and all(use.thins for use in uses)
            how = share if thins else replace(share, stride=1)
            inputs = [_inputs(role, n, layer.biased, how) for role in roles]
            kept = [self._kept(role, a, n) for role, a in zip(roles, inputs, strict=True)]
            for seed in range(len(uses[0].call.gradients)):
                all_parts = zip(roles, inputs, kept, strict=True)
                parts = [self._capture(layer, *part, seed, n, how, sharing, number == 0) for part in all_parts]
                yield parts[0] if len(parts) == 1 else Together(parts)

    def total(self, layer: Layer) -> Tensor | None:
        """The gradient of the first seed in the block, summed over all examples, as the uses give it; ``None`` where
        parts of it are not matched."""
        groups = [uses[:1] for uses in self._reached(layer)]
        seen, total = list(self.captures(layer)), None
        start = 0
        for (use,) in groups:
            capture, start = seen[start], start + len(use.call.gradients)
            if isinstance(capture, Together):
                return None
            own = capture.combine(torch.ones((), device=capture.g.device).expand(*capture.g.shape[:-2]))
            total = own if total is None else total + own
        return None if total is None else total / self.scale

    def positions(self, layer: Layer) -> tuple[int, int]:
        """The number of examples, and of positions of each, where the layer uses its weight."""
        groups = [(len(uses[0].x), sum(use.places for use in uses)) for uses in self._reached(layer)]
        n = max((n for n, _ in groups), default=0)
        return n, -(-sum(own * places for own, places in groups) // max(1, n))

    def absent(self, layer: Layer, share: Share = ALL) -> Capture:
        """What a layer saw that this pass did not reach: gradients of zero, of as many loss terms as there are."""
        n = share.examples(self.examples())
        blank = layer.blank(n.stop - n.start)
        count = self.count(n) / share.stride
        if isinstance(blank, SparseCapture):
            return SparseCapture(blank.inputs, blank.g, count, 0.0, self.which, layer.diagonal)
        return Capture(blank.a, blank.g, count, 0.0, self.which, layer.diagonal)

    def directional(self, layer: Layer, tensors: list[Tensor]) -> Tensor | None:
        """u (seeds, n): sum_t g_nt^T V a_nt along V, ``tensors`` like the parts of the layer; products run in the dtype
        of V."""
        groups = [self._along(layer, uses, tensors) for uses in self._reached(layer)]
        return torch.cat(groups, 1) * self.scale if groups else None

    def _along(self, layer: Layer, uses: list[Use], tensors: list[Tensor]) -> Tensor:
        """u (seeds, n) of uses that have the same examples."""
        total = None
        for use in uses:
            form, (operand, *bias) = use.call.form, tensors
            x = form.cast(use.x, operand.dtype)
            y = form.product(use.operand(layer, operand), bias[0] if bias else None, x).flatten(1)
            gradients = [use.gradient(seed).flatten(1).to(y.dtype) for seed in range(len(use.call.gradients))]
            u = torch.stack([(y * g).sum(-1, dtype=torch.promote_types(y.dtype, torch.float32)) for g in gradients])
            total = u if total is None else total + u
        assert total is not None
        return total

    def examples(self) -> int:
        """The number of examples, of the output or by the first layer that recorded any."""
        if self.rows.count is not None:
            return self.rows.count
        return next((len(use.x) for uses in self.calls.values() for use in uses), 0)

    def count(self, n: slice | None = None) -> float | Tensor:
        """The number of loss terms, of some of the examples."""
        if isinstance(self.terms, Tensor):
            return (self.terms if n is None else self.terms[n]).sum()
        return self.terms * (self.examples() if n is None else n.stop - n.start)

    def size(self) -> float:
        """The number of loss terms, those that are ignored too: known without a wait for the device."""
        return float(self.terms.numel()) if isinstance(self.terms, Tensor) else self.terms * self.examples()

    def check(self) -> None:
        """Raise ``RuntimeError`` if an input has been overwritten since the pass."""
        for name, uses in self.calls.items():
            for call in (use.call for use in uses):
                if call.x._version != call.version:
                    raise RuntimeError(
                        f"layer {name!r}: the input of its {call.operation} was changed in place between the pass "
                        "and step(): change a copy, or change it after step()"
                    )

    def _counted(self, n: slice, of: int) -> float | Tensor:
        """The number of loss terms behind these examples of a layer that saw ``of`` of them."""
        return self.count(n) if of == self.examples() else self.count() * ((n.stop - n.start) / of)

    def _reached(self, layer: Layer) -> list[list[Use]]:
        """The uses that a seed reaches: those on the examples, and apart from them those on what all examples share."""
        uses = [use for use in self.calls.get(layer.name, ()) if use.call.reached and len(use.x)]
        groups = [[use for use in uses if use.call.shared == shared] for shared in (False, True)]
        if len({len(use.x) for use in groups[0]}) > 1:
            raise ValueError(
                f"layer {layer.name!r} was called with batches of different sizes in one forward pass; its examples "
                "cannot be matched: call it once on all of them, make one forward pass for each batch, or exclude it"
            )
        return [group for group in groups if group]

    def _capture(
        self,
        layer: Layer,
        uses: list[Use],
        a: Tensor | Sparse | Patches,
        kept: Tensor | None,
        seed: int,
        examples: slice,
        share: Share,
        sharing: Sharing,
        counts: bool,
    ) -> Capture:
        """What these uses, all in one role, saw at the positions (n, t) that are kept, or at all; the loss terms count
        once, with the first of several groups of uses."""
        g = _outputs(uses, seed, examples)
        n, places = g.shape[-3], g.shape[-2]
        if isinstance(a, Patches) and (kept is not None or sharing == "reduce" or uses[0].swapped):
            a = a.dense()
        if share.stride > 1:
            chosen = _index(uses, share)
            g = g[..., chosen, :]
            a = Sparse(a.ids[:, chosen], a.values[:, chosen], a.width) if isinstance(a, Sparse) else a
            kept = None if kept is None else kept[:, chosen]
        dtype = torch.promote_types(g.dtype if isinstance(a, Sparse) else a.dtype, torch.float32)
        a, g = (
            a if isinstance(a, Patches) else a.to(dtype),
            g.to(dtype) if self.scale == 1.0 else g.to(dtype) * self.scale,
        )
        t, swapped, of = g.shape[-2], uses[0].swapped, len(uses[0].x)
        rows: float | Tensor = float(n * t)
        used: float | Tensor = float(t)  # positions of each example
        reached: float | Tensor = float(n)
        if kept is not None and not isinstance(a, Patches):
            kept = kept.to(g.dtype)
            a, g = masked(a, g, kept)
            rows, reached, used = kept.sum(), kept.amax(1).sum(), kept.sum(1).clamp(min=1).view(n, 1, 1)
        if sharing == "reduce" and t > 1 and not isinstance(a, Patches):
            a, g, rows = summed(a), g.sum(-2, keepdim=True) / used, reached
        count = self._counted(examples, of) / len(uses[0].call.gradients) if counts else 0.0
        count = count if t == places else count * (t / places)
        diagonal = layer.diagonal[::-1] if swapped else layer.diagonal
        if isinstance(a, Patches):
            return PatchCapture(a, g, count, rows, self.which, diagonal)
        if isinstance(a, Sparse):
            return SparseCapture(a, g, count, rows, self.which, diagonal)
        seen = Capture(a, g, count, rows, self.which, diagonal)
        return seen.swapped() if swapped else seen

    def _kept(self, uses: list[Use], a: Tensor | Sparse | Patches, n: slice) -> Tensor | None:
        """The positions (n, t) that count; ``None`` for all: those with an input that act on a loss term."""
        kept = a.used if isinstance(a, Sparse) else None
        masks = [use.kept for use in uses]
        if any(mask is not None for mask in masks):
            sizes = [use.how.positions for use in uses]
            full = [m if m is not None else torch.ones(s, dtype=torch.bool) for m, s in zip(masks, sizes, strict=True)]
            exist = torch.cat(full, 1)[n]
            kept = exist if kept is None else exist & kept
        if isinstance(self.terms, Tensor):
            seeds = ((_outputs(uses, seed, n) != 0).any(-1) for seed in range(len(uses[0].call.gradients)))
            acts = reduce(torch.logical_or, seeds)
            acts = acts.reshape(-1, *acts.shape[-2:]).any(0)
            if len(uses[0].x) == self.examples():
                acts = _counting(acts, self.terms[n] > 0)
            kept = acts if kept is None else acts & kept
        return kept


def _inputs(uses: list[Use], n: slice, biased: bool, share: Share) -> Tensor | Sparse | Patches:
    """The inputs of some examples of all these uses, as positions of one layer: a share of them, or all tokens."""
    form = uses[0].call.form
    if len(uses) == 1 and share.stride == 1 and isinstance(form, Convolution):
        return Patches(form, uses[0].x[n], biased)
    chosen = ((use.call.form, use.x[n]) for use in uses)
    if share.stride == 1:
        return joined([form.sparse(x) or form.inputs(x, biased) for form, x in chosen])
    return joined([form.sparse(x) or form.some(x, biased, share.stride, share.turn) for form, x in chosen])


def _outputs(uses: list[Use], seed: int, n: slice) -> Tensor:
    """The output gradients of some examples of all these uses."""
    return torch.cat([use.call.form.outputs(use.gradient(seed)[n]) for use in uses], -2)


def _index(uses: list[Use], share: Share) -> Tensor:
    """The positions that are read, of all that these uses have."""
    parts, before = [], 0
    for use in uses:
        parts.append(before + use.call.form.index(use.gradient(0), share.stride, share.turn))
        before += use.places
    return torch.cat(parts)


def _counting(acts: Tensor, term: Tensor) -> Tensor:
    """The positions (n, t) that count: those that act on a loss term, and those that have no gradient by chance.

    The latter come before one that acts (beyond the last there is padding), and are loss terms themselves where the
    layer has as many positions as there are terms. If no term is ignored, all positions count.
    """
    before = acts.flip(1).cumsum(1).flip(1) > 0
    theirs = term if term.shape == acts.shape else term.any(1, keepdim=True)
    return acts | (theirs & (before | ~acts.any(1, keepdim=True))) | term.all()
