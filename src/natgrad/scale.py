"""In which unit a user's loss comes: measured in the first steps, by the gradients that it leaves at the outputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from natgrad.labels import Labels
from natgrad.likelihoods.forms import Reading
from natgrad.record import Record

ENOUGH = 3
"""Steps that are compared."""
_SCALED = 1 / 64  # what makes gradients smaller than this is not clipping alone
_NEAR, _WIDE = 1.25, 3.0  # factors taken as 1: where the weights of the terms are clear, and where they are not


@dataclass(frozen=True)
class Gauge:
    """What is known of the unit of the loss; plain numbers, for the clock.

    ``factor`` is the loss as a multiple of what the likelihood says; ``square`` the mean square of the gradient of an
    example's loss at the outputs, where there is no likelihood. Both are means over ``measured`` of ``compared`` steps.
    ``altered`` is what gradients were last multiplied by between backward and step; ``told`` whether a mistake has been
    named.
    """

    factor: float = 1.0
    square: float = 1.0
    altered: float = 1.0
    compared: int = 0
    measured: int = 0
    told: int = 0

    @property
    def open(self) -> bool:
        """Whether there is more to compare."""
        return self.compared < ENOUGH

    @property
    def unit(self) -> float:
        """That in which a loss without a likelihood is counted: the gradient of an example at the outputs is 1 then."""
        return self.square**0.5

    def numbers(self) -> dict[str, float]:
        """The names in a clock."""
        return {f"loss_{name}": value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, clock: Mapping[str, Any]) -> Gauge:
        """That of a clock."""
        return cls(**{name: clock[f"loss_{name}"] for name in cls.__dataclass_fields__})

    def with_factor(self, found: float | None) -> Gauge:
        """One more step compared, with a likelihood."""
        return replace(self._counted(found), factor=self._mean(self.factor, found))

    def with_square(self, found: float | None) -> Gauge:
        """One more step compared, without."""
        return replace(self._counted(found), square=self._mean(self.square, found))

    def _counted(self, found: float | None) -> Gauge:
        return replace(self, compared=self.compared + 1, measured=self.measured + (found is not None))

    def _mean(self, old: float, new: float | None) -> float:
        if new is None or new == old:
            return old
        return (self.measured * old + new) / (self.measured + 1)


def factor_of(
    records: Sequence[Record], readings: Sequence[Reading | None], labels: Labels, altered: float = 1.0
) -> float | None:
    """The user's loss as a multiple of what the likelihood says it is; ``None`` where that cannot be told.

    The weights c of the terms add up to the ``scale`` of the likelihood under a mean over terms; what they add up to
    tells sums from means, means over outputs too, and any factor. A factor near 1 is 1: smoothed labels, weights and
    auxiliary losses make such. Where labels are soft the weights have bounds, and the factor is the one of a reduction
    (numbers of terms, outputs, passes, and 2) within them. ``readings`` are those of the ``records``.
    """
    known = [reading for reading in readings if reading is not None]
    if not known or len(known) < len(readings):
        return None
    low, high = (altered / labels.scale * sum(bounds) for bounds in zip(*((r.low, r.high) for r in known), strict=True))
    if not 0 < low <= high < math.inf:
        return None
    if all(reading.clear for reading in known):
        return 1.0 if 1 / _NEAR < high < _NEAR else high
    if low / _WIDE < 1 < high * _WIDE:
        return 1.0
    fitting = [x for x in _reductions(records) if low / _WIDE < x < high * _WIDE]
    return min(fitting, key=lambda x: abs(math.log(x / high)), default=(low * high) ** 0.5)


def gauged(
    gauge: Gauge,
    records: Sequence[Record],
    labels: Labels | None,
    altered: Iterable[tuple[Tensor, Tensor]] = (),
    announced: float | None = None,
) -> Gauge:
    """What is known of the unit of the loss after the passes of a step; warns, once, of a likelihood that is not that
    of the loss.

    ``altered`` are gradients as backward left them and as they are now, ``announced`` is what they are known to have
    been multiplied by.
    """
    if not records or (labels is not None and not gauge.open):
        return gauge
    found = alteration(altered) if announced is None else announced
    gauge = replace(gauge, altered=unit_change(found, gauge.altered) if announced is None else announced)
    if not gauge.open:
        return gauge
    if labels is None:
        return gauge.with_square(square_of(records, gauge.altered))
    readings = [_reading(record, labels) for record in records]
    known = all(reading is not None and reading.clear for reading in readings)
    said = None if gauge.told else complaint_of(records, labels, known)
    if said is not None:
        warnings.warn(said, stacklevel=6)
        gauge = replace(gauge, told=1)
    factor = factor_of(records, readings, labels)
    if factor is not None and found is not None and found < _SCALED and _is_scale(factor) and factor * found < 1:
        return gauge.with_factor(1.0)  # of a GradScaler, before clipping
    return gauge.with_factor(factor_of(records, readings, labels, gauge.altered))


def complaint_of(records: Iterable[Record], labels: Labels, known: bool = False) -> str | None:
    """What is wrong with the likelihood for the loss of these passes, where that is sure; of gradients whose form is
    ``known`` nothing is."""
    for record in records:
        for output, gradient in _turned(record):
            found = labels.likelihood.misread(output)
            if found is None and not known:
                found = labels.likelihood.complaint(output, gradient)
            if found is not None:
                return f"{type(labels.likelihood).__name__} is not the likelihood of this loss: {found}"
    return None


def square_of(records: Sequence[Record], altered: float = 1.0) -> float | None:
    """The mean square over examples of the gradient of an example's loss at the outputs of a model, under a mean."""
    gradients = [g for record in records for g in (_at_outputs(record) or [])]
    if not gradients:
        return None
    n = sum(record.examples() for record in records)
    found = n * altered**2 * float(torch.stack([g.double().square().sum().cpu() for g in gradients]).sum())
    return found if 0 < found < math.inf else None


def alteration(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """What gradients (then, now) have been multiplied by since the backward pass; ``None`` if by no one number."""
    sums = [torch.stack([(a * b).sum() for a, b in ((x, x), (x, y), (y, y))]) for x, y in map(_double, pairs)]
    if not sums:
        return None
    then, both, now = torch.stack(sums).sum(0).tolist()
    if not (then > 0 and both > 0 and math.isfinite(now)):
        return None
    return both / then if 1 - both * both / (then * now) < 1e-5 else None


def unit_change(found: float | None, before: float) -> float:
    """Which part of an alteration is one of the unit, such as ``GradScaler.unscale_`` or a division by the number of
    passes: the rest is clipping, which is meant to shorten a step.

    A division by a whole number or a power of 2, and whatever makes gradients larger, is one of the unit. Any other
    alteration is as before times a clipping by less than 4; where it cannot be, and is below 1/64, the power of 2 is.
    """
    if found is None:
        return before
    if abs(found - 1) < 1e-6:
        return 1.0
    times = 1 / found
    whole = round(times) if times < 1024 else 2.0 ** round(math.log2(times))
    if times < 1 or abs(times / whole - 1) < 1e-6:
        return 1 / whole if whole and abs(times / whole - 1) < 1e-6 else found
    if before / 4 < found <= before * (1 + 1e-6):
        return before
    if found > before:
        return 2.0 ** math.ceil(math.log2(found))
    return 2.0 ** math.ceil(math.log2(found)) if found < _SCALED else before


def _is_scale(x: float) -> bool:
    """Whether this is a power of 2, as the scales of a ``GradScaler`` are."""
    return abs(x / 2.0 ** round(math.log2(x)) - 1) < 1e-3


def _reading(record: Record, labels: Labels) -> Reading | None:
    if len(record.left) != 1:
        return None
    ((output, gradient),) = _turned(record)
    return labels.likelihood.reading(output, gradient, record.known)


def _turned(record: Record) -> list[tuple[Tensor, Tensor]]:
    """Outputs and gradients with the examples first, as the likelihood reads them."""
    turned = record.rows.turned
    return [(turned(output), turned(gradient.to(output.dtype))) for output, gradient in record.left]


def _reductions(records: Sequence[Record]) -> set[float]:
    """The factors that other reductions make."""
    n, terms = sum(r.examples() for r in records), sum(float(r.count()) for r in records)
    outputs = records[0].left[0][0].numel() / max(1.0, float(records[0].count()))
    means = {1.0, outputs, 1 / outputs}
    sums = {1.0, terms, terms / max(1, n), float(n), float(len(records))}
    return {two * a * b for two in (0.5, 1.0, 2.0) for a in means for b in sums if a * b > 0}


def _at_outputs(record: Record) -> list[Tensor]:
    """The gradients at what a model returns, or if that is the loss, at its last operation."""
    found = [gradient for output, gradient in record.left if output.ndim > 0]
    return found or [g for g in record.last() if g is not None]


def _double(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    reals = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in pair)
    then, now = (x if x.device.type == "mps" else x.double() for x in reals)
    return then, now
