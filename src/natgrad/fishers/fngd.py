"""FNGD: the natural gradient as a weighted sum of gradients, with weights that are solved for in the first epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture import Capture, Examples, Weights
from natgrad.fishers.base import Weighted
from natgrad.fishers.statistics import Samples, Statistic, Stats, as_capture, as_samples, pool
from natgrad.matrix import Diagonal, Matrix

Coefficients = Literal["position_mean", "sample", "iteration", "quantile", "scalar", "recompute"]
Unit = Literal["trace/N^2", "trace/N", "absolute"]
Share = Literal["layer", "shape", "joint"]
_BINS = 32


@dataclass(frozen=True)
class FNGD(Weighted):
    """D = sum_n c_n DW_n with c = (K + N lambda I)^-1 1, K_nm = <DW_n, DW_m>: (E + lambda I)^-1 M for the empirical
    Fisher E of the batch, by an N x N system (Wu et al. 2024).

    The systems are solved in the first ``first_phase`` steps alone (one epoch: ``len(loader)``). After that c is looked
    up, and the user's backward pass sums gradients with these weights: an ordinary step, with a matrix that is a number
    a layer, the mean coefficient. ``.grad`` is sum_n w_n grad_n with w_n = c_n / mean c; the loss must be a mean over
    examples, of which an incomplete batch has the first. ``coefficients`` says how c is looked up:

    * ``"position_mean"``: by the position in the batch, averaged over the first phase; counted on over micro-batches.
      Where data are shuffled it tends to a constant, like 1/sqrt(batches);
    * ``"sample"``: by the id of the example, which ``optimizer.examples(ids)`` tells before every forward pass;
    * ``"iteration"``: by step of the epoch and position, for data in a frozen order;
    * ``"quantile"``: by the rank in the batch of the gradient's norm at the layer's output, in 32 bins;
    * ``"scalar"``: the mean of a layer: SGD with a learning rate a layer. The ablation of all others;
    * ``"recompute"``: solved for at every step, the first phase never ends.

    Whoever was not seen in the first phase weighs 1. ``mu`` is the damping lambda in ``unit``: ``"trace/N^2"`` (default)
    of tr(K)/N^2, so that N lambda is mu times the mean |DW_n|^2; ``"trace/N"``; or ``"absolute"``; the optimizer's
    damping plays no part. ``share``: one c a layer, one for the layers of the same shape, or one joint c, from the sum
    of their K. ``normalise`` divides c by its sum: steps in units of SGD. Groups of a convolution share c.

    Cost: in the first phase N^2 (in + out) and N^3 / 3 flops a layer and step, and the captured a and g; then one
    product of g with N numbers a layer and step. Memory: the table, twice, N numbers a layer (one an example of the data
    for ``"sample"``, one an example and step for ``"iteration"``). Raises ``ValueError`` for a setting out of range.

    Reference: Wu, Yu, Zhang and Wen, arXiv 2403.03473, which leaves open how c is looked up.
    """

    first_phase: int
    coefficients: Coefficients = "position_mean"
    mu: float = 1.0
    unit: Unit = "trace/N^2"
    share: Share = "layer"
    normalise: bool = False

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if not isinstance(self.first_phase, int) or self.first_phase < 1:
            raise ValueError(f"first_phase must be a number of steps >= 1, len(loader) is an epoch: {self.first_phase!r}")
        for name, known in (("coefficients", Coefficients), ("unit", Unit), ("share", Share)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} must be one of {get_args(known)}, got {getattr(self, name)!r}")
        if not 0 < self.mu < float("inf"):
            raise ValueError(f"mu must be a finite number > 0, got {self.mu!r}")

    @property
    def needs_ids(self) -> bool:
        """For ``"sample"``."""
        return self.coefficients == "sample"

    @property
    def together(self) -> bool:
        """If layers share coefficients."""
        return self.share != "layer"

    def learns(self, step: int) -> bool:
        """In the first phase."""
        return step < self.first_phase or self.coefficients == "recompute"

    def observe(self, seen: Capture) -> Stats:
        """The examples, and which they are."""
        ids = seen.examples.ids
        ids = torch.zeros(seen.a.shape[-3], dtype=torch.int64, device=seen.a.device) if ids is None else ids
        step = ids.new_full((1, 1, 1), seen.examples.step)
        return {**as_samples(seen), "ids": Samples(ids.view(-1, 1, 1)), "step": Samples(step)}

    def observe_together(self, seen: Mapping[str, Sequence[Capture]]) -> Mapping[str, Stats]:
        """The same, and K summed over the layers that share it."""
        stats = {name: pool(self.observe(capture) for capture in captures) for name, captures in seen.items()}
        shape = {name: captures[0].a.shape[:-3] + captures[0].g.shape[-1:] + captures[0].a.shape[-1:]
                 for name, captures in seen.items()}
        total: dict[object, Tensor] = {}
        keys = {name: None if self.share == "joint" else shape[name] for name in seen}
        for name in seen:
            K = _gram(as_capture(stats[name]))
            total[keys[name]] = total[keys[name]] + K if keys[name] in total else K
        return {name: {**stats[name], "K": Samples(total[keys[name]])} for name in seen}

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """``w`` = N c of this batch; sums ``total`` of w and numbers ``seen`` of examples in every slot of the table."""
        examples = as_capture(new)
        w, alive = self._solve(new["K"].value if "K" in new else _gram(examples))
        row, slots = self._slots(new, examples)
        shape = [self.first_phase if self.coefficients == "iteration" else 1, int(slots.max()) + 1]
        empty: dict[str, Statistic] = {name: Samples(w.new_zeros(shape)) for name in ("total", "seen")}
        kept = {}
        for name, value in (("total", w), ("seen", alive.expand_as(w))):
            table = (old or empty)[name].value
            table = F.pad(table, (0, max(0, shape[1] - table.shape[1])))
            kept[name] = table.index_put((row, slots), value, accumulate=True)
        mean = kept["total"].sum() / kept["seen"].sum()
        scale = torch.where(kept["seen"].sum() > 0, mean, torch.ones_like(mean))
        block = (*examples.a.shape[:-3], examples.g.shape[-1], examples.a.shape[-1])
        return {"w": Samples(w), **{name: Samples(x) for name, x in kept.items()}, "scale": Samples(scale.expand(block))}

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Diagonal:
        """I / (N mean c): what D = inverse @ gradient is left to do where examples weigh 1 on average."""
        return Diagonal(stats["scale"].value.reciprocal())

    def invert(self, matrix: Matrix, damping: float) -> Diagonal:
        """N mean c I, which is damped already."""
        return matrix.inverse(0.0)

    def direction(self, stats: Stats, seen: Sequence[Capture]) -> Tensor:
        """sum_n c_n DW_n."""
        w = stats["w"].value
        parts = w.split([capture.a.shape[-3] for capture in seen])
        D = [c.combine(part.expand(*c.a.shape[:-3], -1)) for c, part in zip(seen, parts, strict=True)]
        return torch.stack(D).sum(0) / len(w)

    def weights(self, stats: Stats) -> Weights | None:
        """c / mean c, looked up."""
        if self.coefficients in ("scalar", "recompute"):
            return None
        total, seen = stats["total"].value, stats["seen"].value
        table = torch.where(seen > 0, total / (seen * self.scale(stats)), torch.ones_like(total))
        return partial(self._look_up, F.pad(table, (0, 1), value=1.0))

    def scale(self, stats: Stats) -> Tensor:
        """N mean c."""
        return stats["scale"].value.flatten()[0]

    def _look_up(self, table: Tensor, examples: Examples, g: Tensor) -> Tensor:
        n, last = len(g), table.shape[1] - 1
        row = table[examples.step % self.first_phase if self.coefficients == "iteration" else 0]
        if self.coefficients == "sample" and examples.ids is not None:
            return row[examples.ids.clamp(max=last)]
        if self.coefficients == "quantile":
            return row[_quantiles(g.flatten(1).square().sum(1)).clamp(max=last)]
        w = row[:last][examples.start : examples.start + n]
        return F.pad(w, (0, n - len(w)), value=1.0)

    def _slots(self, new: Stats, examples: Capture) -> tuple[Tensor, Tensor]:
        """The row and the columns of the table that these examples stand in."""
        n, device = examples.a.shape[-3], examples.a.device
        row = new["step"].value[0, 0] if self.coefficients == "iteration" else torch.zeros_like(new["step"].value[0, 0])
        if self.coefficients == "sample":
            return row, new["ids"].value.flatten()
        if self.coefficients == "quantile":
            squares = examples.g.square().sum((-2, -1))
            return row, _quantiles(squares.reshape(-1, n).sum(0))
        return row, torch.arange(n, device=device)

    def _solve(self, K: Tensor) -> tuple[Tensor, Tensor]:
        """N c (n,), and 1, or 0 where all gradients are 0; NaN where K is not positive definite."""
        n, trace = len(K), K.diagonal().sum()
        shift = {"trace/N^2": self.mu * trace / n, "trace/N": self.mu * trace, "absolute": self.mu * n + 0 * trace}
        least = torch.finfo(K.dtype).eps * trace
        alive = (trace != 0).to(K.dtype)
        I = torch.eye(n, dtype=K.dtype, device=K.device)
        factor, info = torch.linalg.cholesky_ex(K + (shift[self.unit].clamp(min=least) + 1 - alive) * I)
        c = torch.cholesky_solve(torch.ones_like(K[:, :1]), factor).squeeze(-1)
        c = torch.where(info == 0, c, torch.nan) * alive
        return (c / c.mean() if self.normalise else n * c), alive


def _gram(examples: Capture) -> Tensor:
    """K (n, n), summed over groups."""
    n = examples.a.shape[-3]
    return examples.gram().reshape(-1, n, n).sum(0)


def _quantiles(squares: Tensor) -> Tensor:
    """The bin of each example's rank."""
    ranks = squares.argsort().argsort()
    return ranks * _BINS // len(squares)
