"""The curvature of one layer over time: statistics, matrix, damped inverse.

A :class:`LayerCurvature` is a value: every update returns a new one, so that a step that turns out to be bad is
undone by keeping the old one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from natgrad.capture import Capture
from natgrad.fishers import Approximation, Stats
from natgrad.layers import Layer
from natgrad.matrix import FactorisationError, LinearMap, Matrix, OneSided
from natgrad.matrix.factor import is_column
from natgrad.matrix.whitening import steepest, turned
from natgrad.optim.cost import Counting
from natgrad.optim.geometry import INVERSE, ROOT, Frobenius, Geometry, metric
from natgrad.sparse import SparseCapture

_COUNTERS = (
    "observations",
    "examples",
    "corrections",
    "failures",
    "retries",
    "refreshes",
    "since",
    "wide",
    "kind",
    "turns",
)

_FROBENIUS = Frobenius()

_LARGE = 768  # below, a dry run takes longer


@dataclass(frozen=True)
class LayerCurvature:
    """``stats`` and ``matrix`` of a layer, and the ``inverse`` that preconditions its gradient, or a root of one.

    Which of both is its ``kind`` (:mod:`~natgrad.optim.geometry`).

    ``matrix`` is kept where the approximation says so (:attr:`~natgrad.fishers.Approximation.keeps`), else ``None``.
    ``observations`` counts the batches in the statistics, and ``examples`` those in them; with 0 the others are
    placeholders of the right shape.
    ``corrections`` counts those in what is measured along the matrix, since it was made where that begins anew.
    ``failures`` counts refreshes that failed in a row, the first of them at the step ``since``, for the ``reason`` that
    is told; ``retries`` all that were repeated; ``refreshes`` those that succeeded since there is an inverse.
    ``inputs`` is the sum of min(E a_i^2, 1) over what the weight is applied to, 0 before anything was.
    ``wide`` is 1 where statistics and inverse are in float64 since rounding made a refresh fail. ``damping`` is that of
    the inverse, and ``applied`` the inverse in the precision in which it is applied.
    """

    stats: Stats
    matrix: Matrix | None
    inverse: LinearMap
    observations: int = 0
    examples: int = 0
    corrections: int = 0
    failures: int = 0
    retries: int = 0
    refreshes: int = 0
    since: int = 0
    wide: int = 0
    kind: int = INVERSE
    turns: int = 0
    damping: float = 1.0
    turn: Tensor | None = None
    inputs: Tensor | None = None
    applied: LinearMap | None = None
    reason: str = ""

    @classmethod
    def empty(cls, approximation: Approximation, layer: Layer, geometry: Geometry = _FROBENIUS) -> Self:
        """A placeholder: what one example of zeros would give; of a large layer zeros alone, where shapes do not depend
        on data, since an inverse of nothing costs what any other does."""
        if approximation.reads == "all" or max(layer.shape[-2:]) < _LARGE:
            return cls._blank(approximation, layer.blank(), geometry)
        with Counting():
            blank = cls._blank(approximation, layer.blank(device=torch.device("meta")), geometry)

        def zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.zeros_like(x, device=layer.weight.device) for name, x in tensors.items()}

        values = zeros({name: statistic.value for name, statistic in blank.stats.items()})
        stats = {name: statistic.restored(values[name]) for name, statistic in blank.stats.items()}
        matrix = None if blank.matrix is None else blank.matrix.with_tensors(zeros(blank.matrix.tensors()))
        inverse = blank.inverse.with_tensors(zeros(blank.inverse.tensors()))
        turn = None if blank.turn is None else torch.zeros_like(blank.turn, device=layer.weight.device)
        inputs = torch.zeros((), dtype=torch.float32, device=layer.weight.device)
        return replace(blank, stats=stats, matrix=matrix, inverse=inverse, turn=turn, inputs=inputs)

    @classmethod
    def _blank(cls, approximation: Approximation, seen: Capture, geometry: Geometry) -> Self:
        stats = approximation.merge(None, approximation.observe(seen), 0.0)
        matrix = approximation.assemble(stats)
        inverse, kind = geometry.prepare(approximation, matrix, 1.0)
        *groups, out, width = inverse.shape
        like, side = next(iter(inverse.tensors().values())), min(out, width)
        turn = like.new_zeros(*groups, side, side) if kind == ROOT else None
        kept, inputs = matrix if approximation.keeps else None, torch.zeros((), dtype=torch.float32, device=like.device)
        return cls(stats, kept, inverse, kind=kind, turn=turn, inputs=inputs)

    @property
    def ready(self) -> bool:
        """Whether there are statistics."""
        return self.observations > 0

    @property
    def dtype(self) -> torch.dtype:
        """That of the statistics."""
        return next(iter(self.stats.values())).value.dtype

    @property
    def refreshed(self) -> bool:
        """Whether there is an inverse of something that was seen."""
        return self.refreshes > 0

    @property
    def aside(self) -> bool:
        """Whether all refreshes of late have failed, and there is no inverse to go on with."""
        return self.failures > 0 and not self.refreshed

    def merge(
        self, approximation: Approximation, new: Stats, decay: float, n: int = 1, seen: Sequence[Capture] = ()
    ) -> Self:
        """Statistics with one more observation, of n examples; those of the first ones weigh equally until ``decay`` is
        the larger weight, that of a batch of the mean size."""
        examples = self.examples + n
        share = _lighter(decay, n, examples / (self.observations + 1))
        weight = min(1 - n / examples, share) if self.ready else 0.0
        stats = approximation.merge(self.stats if self.ready else None, new, weight)
        inputs = self.inputs if not seen or self.inputs is None else _inputs(new, seen, self.inputs, weight)
        return replace(self, stats=stats, observations=self.observations + 1, examples=examples, inputs=inputs)

    def correct(
        self,
        approximation: Approximation,
        seen: Sequence[Capture],
        decay: float,
        damping: float,
        n: int | None = None,
        geometry: Geometry = _FROBENIUS,
    ) -> Self:
        """The matrix with its cheap update by the same observation, of n examples, and its inverse; as it was where
        that has none."""
        assert self.matrix is not None
        sizes = {capture.examples.start: capture.size for capture in seen}  # draws are of the same examples
        seeded = approximation.seed / sum(sizes.values())
        weight = _decay(self.corrections + seeded, decay)
        if n is not None:
            weight = _lighter(weight, n, self.examples / self.observations)
        matrix = approximation.correct(self.matrix, seen, weight)
        try:
            inverse, kind = geometry.prepare(approximation, matrix, damping)
            corrected = replace(self, matrix=matrix, inverse=inverse, kind=kind, damping=damping, applied=None)
            return replace(corrected, corrections=self.corrections + 1)
        except FactorisationError:
            return self

    def prepared(self, dtype: torch.dtype | None) -> Self:
        """With ``applied``, which every change of the inverse has emptied."""
        if self.applied is not None:
            return self
        return replace(self, applied=self.inverse if dtype is None else self.inverse.to(dtype))

    def cast(self, dtype: torch.dtype) -> Self:
        """The same in another precision, that of statistics of a layer whose own has changed."""
        stats = {name: statistic.to(dtype) for name, statistic in self.stats.items()}
        matrix = None if self.matrix is None else self.matrix.to(dtype)
        turn = None if self.turn is None else self.turn.to(dtype)
        return replace(self, stats=stats, matrix=matrix, inverse=self.inverse.to(dtype), turn=turn, applied=None)

    def refresh(
        self,
        approximation: Approximation,
        damping: float,
        step: int = 0,
        patience: int = 0,
        geometry: Geometry = _FROBENIUS,
    ) -> Self:
        """A new matrix and inverse; where they fail, with a floor, then in float64 with a higher one; where that fails,
        the old ones, or none if it is ``patience`` steps since they first failed.

        The floor is eps times the trace, with the eps that the statistics were summed with: what rounding leaves of
        small eigenvalues beside large ones, or 32 times that for sums of a thousand terms (errors grow as the root of
        their number). Whatever was repeated is :meth:`widened`.
        """
        try:
            return self._assembled(approximation, damping, geometry)
        except FactorisationError as error:
            reason = str(error)
        eps, told = torch.finfo(self.dtype).eps, replace(self, retries=self.retries + 1)
        for attempt, floor in ((told, eps), (told.widened(), 32 * eps)):
            try:
                return attempt._assembled(approximation, damping, geometry, floor).widened()
            except FactorisationError as error:
                reason = str(error)
        since = self.since if self.failures else step
        refreshes = self.refreshes if step - since < patience else 0
        failed = replace(told, failures=self.failures + 1, since=since, refreshes=refreshes, reason=reason)
        return failed.widened()

    def widened(self) -> Self:
        """In float64 from now on, with statistics that begin anew: those at hand are rounded."""
        if self.wide or self.dtype == torch.float64:
            return self
        return replace(self.cast(torch.float64), wide=1, observations=0, examples=0)

    def mean_eigenvalue(self, approximation: Approximation) -> Tensor:
        """tr F / dim F, the mean over groups."""
        known = self.matrix if self.refreshed else None
        matrix = approximation.assemble(self.stats) if known is None else known
        return (matrix.trace() / (matrix.shape[-1] * matrix.shape[-2])).mean()

    def direction(self, M: Tensor, iterations: int | None, serves: int, step: int) -> tuple[Tensor, Self]:
        """D for M, inverse @ M or the steepest with a root; what turns a root is kept where it ``serves`` some steps,
        and made anew when their number divides ``step``."""
        applied = self.applied or self.inverse
        if self.kind != ROOT:
            return applied @ M, self
        if self.turn is not None and self.turns and step % serves:
            return turned(applied, self.turn, M), self
        D, turn = steepest(self.inverse, M, iterations)
        if serves == 1:
            return D, replace(self, turns=0) if self.turns else self
        return D, replace(self, turn=turn, turns=self.turns + 1)

    def bend(self, D: Tensor, along: Tensor) -> Tensor:
        """D^T F D for the direction of X: <X, D> = ``along`` by an inverse, the number of singular values by a root.

        0 of a matrix with one side alone, whose scale is not that of a Fisher: it bounds nothing.
        """
        if isinstance(self.inverse, OneSided):
            return torch.zeros_like(along)
        return along.new_full((), D.numel() // max(D.shape[-2:])) if self.kind == ROOT else along

    def metric(self, X: Tensor, Y: Tensor) -> Tensor:
        """<X, Y>, <X, X> and <Y, Y> in the metric of F^-1."""
        return metric(self.inverse, self.kind, X, Y)

    def _assembled(self, approximation: Approximation, damping: float, geometry: Geometry, floor: float = 0.0) -> Self:
        matrix = approximation.assemble(self.stats, self.matrix if self.refreshed else None)
        inverse, kind = geometry.prepare(approximation, matrix.floored(floor) if floor else matrix, damping)
        kept = matrix if approximation.keeps else None
        made = replace(self, matrix=kept, inverse=inverse, kind=kind, turns=0, damping=damping, applied=None)
        renewed = replace(made, failures=0, since=0)
        corrections = 0 if approximation.seed else self.corrections
        return replace(renewed, corrections=corrections, refreshes=self.refreshes + 1)

    # In and out of a checkpoint.

    def state(self) -> dict[str, Any]:
        """Its tensors and counters under flat names."""
        parts: dict[str, Any] = {f"stats.{name}": statistic.value for name, statistic in self.stats.items()}
        if self.matrix is not None:
            parts |= {f"matrix.{name}": value for name, value in self.matrix.tensors().items()}
        parts |= {f"inverse.{name}": value for name, value in self.inverse.tensors().items()}
        parts |= {name: x for name, x in (("turn", self.turn), ("inputs", self.inputs)) if x is not None}
        return parts | {name: getattr(self, name) for name in _COUNTERS} | {"damping": self.damping}

    def with_state(self, state: Mapping[str, Any], layer: str, spanning: bool = False) -> Self:
        """The inverse of :meth:`state`, on a placeholder of the same approximation and layer; statistics that are
        ``spanning`` several layers have shapes of those.

        Raises ``ValueError`` for the state of another approximation, or of a layer of another shape.
        """
        kinds = ("stats.", "matrix.", "inverse.")
        blank = self.state()
        own = blank.keys()
        foreign = own ^ {name for name in state if name.startswith(kinds) or name in own}
        if foreign:
            raise ValueError(
                f"layer {layer!r}: the checkpoint is of another approximation or version; only there or only here is "
                f"{', '.join(sorted(foreign))}"
            )
        compared = [name for name in own if name.startswith("stats.") and not spanning]
        misshapen = {name for name in compared if _differ(blank[name], state[name])}

        def tensors(kind: str) -> dict[str, Tensor]:
            start = f"{kind}."
            return {name.removeprefix(start): state[name] for name in state if name.startswith(start)}

        counters: dict[str, Any] = {name: int(state[name]) for name in _COUNTERS}
        inverse = self.inverse.with_tensors(tensors("inverse"))
        if inverse.shape != self.inverse.shape:
            misshapen.add("inverse")
        if misshapen:
            raise ValueError(
                f"layer {layer!r}: the checkpoint is of another model or approximation; of another shape is "
                f"{', '.join(sorted(misshapen))}"
            )
        return replace(
            self,
            turn=state.get("turn"),
            inputs=state.get("inputs"),
            stats={name: statistic.restored(state[f"stats.{name}"]) for name, statistic in self.stats.items()},
            matrix=None if self.matrix is None else self.matrix.with_tensors(tensors("matrix")),
            inverse=inverse,
            damping=float(state["damping"]),
            applied=None,
            **counters,
        )


def _inputs(new: Stats, seen: Sequence[Capture], old: Tensor, weight: float) -> Tensor:
    """The moving average of sum_i min(E a_i^2, 1), the mean over groups, in float32; as it was if nothing was seen.

    From the covariance of the inputs where that is taken, which spares patches from being written out.
    """
    rows = torch.as_tensor(sum(capture.rows for capture in seen), device=old.device)
    if "A" in new:
        A = new["A"].value
        squares = A.squeeze(-1) if is_column(A) else A.diagonal(dim1=-2, dim2=-1)
    else:
        squares = sum(_squares(capture) for capture in seen) / rows.clamp(min=1)
    now = squares.float().clamp(max=1).sum(-1).mean()
    return torch.where(rows > 0, torch.lerp(now, old.to(now), weight), old.to(now))


def _squares(capture: Capture) -> Tensor:
    """sum a^2 over positions (*groups, in)."""
    sparse = isinstance(capture, SparseCapture)
    return capture.moment_a().squeeze(-1) if sparse else capture.flat_a.square().sum(-2)


def _lighter(decay: float, n: int, mean: float) -> float:
    """``decay`` where n examples come in that are fewer than the ``mean``, and weigh by their number."""
    return decay if n >= mean else 1 - (1 - decay) * n / mean


def _decay(batches: float, decay: float) -> float:
    """The weight of an average of so many batches when one more comes in."""
    return min(1 - 1 / (batches + 1), decay)


def _differ(blank: Tensor, value: Any) -> bool:
    """Whether a value is no tensor like its placeholder, whose dimensions of one are those that depend on the data."""
    if not isinstance(value, Tensor) or value.ndim != blank.ndim:
        return True
    return any(size not in (1, own) for size, own in zip(blank.shape, value.shape, strict=True))
