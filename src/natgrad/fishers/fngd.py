"""FNGD: the natural gradient as a weighted sum of gradients, with weights that are solved for in the first epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from natgrad.capture import Capture, Examples, Kind, Weights
from natgrad.fishers.base import Approximation, Weighted
from natgrad.fishers.statistics import Samples, Stats, as_capture, as_samples
from natgrad.matrix import Diagonal, LinearMap, Matrix
from natgrad.matrix.factorise import shifted

Coefficients = Literal["position_mean", "sample", "iteration", "quantile", "scalar", "recompute"]
Unit = Literal["trace/N^2", "trace/N", "absolute"]
Share = Literal["layer", "shape", "joint"]
_BINS = 32


@dataclass(frozen=True)
class FNGD(Weighted):
    """D = sum_n c_n DW_n with c = (K + N lambda I)^-1 1, K_nm = <DW_n, DW_m>: (E + lambda I)^-1 M for the empirical
    Fisher E of the batch, by an N x N system.

    The systems are solved in the first ``first_phase`` steps alone (one epoch: ``len(loader)``). After that c is looked
    up, and the user's backward pass sums gradients with these weights: an ordinary step, and a number a layer in place
    of a matrix. ``.grad`` is then sum_n w_n grad_n with w_n = c_n / mean c, and D = N mean c ``.grad``. The loss must
    be a mean over examples; an incomplete batch has the first coefficients. How c is looked up (``coefficients``):

    * ``"position_mean"``: by the position in the batch, averaged over the first phase; counted on over micro-batches.
      Where data are shuffled it tends to a constant, like 1/sqrt(batches);
    * ``"sample"``: by the id of the example, which ``optimizer.examples(ids)`` tells before every forward pass;
    * ``"iteration"``: by step of the epoch and position, for data in a frozen order;
    * ``"quantile"``: by the rank in the batch of the gradient's norm at the layer's output, in 32 bins;
    * ``"scalar"``: the mean of a layer: SGD with a learning rate a layer, the ablation of all others;
    * ``"recompute"``: solved for at every step, the first phase never ends.

    An example that the first phase did not see weighs 1. ``mu`` is the damping lambda in units of tr(K)/N^2
    (``"trace/N^2"``, the default: N lambda is then mu times the mean |DW_n|^2), of tr(K)/N (``"trace/N"``), or of F
    (``"absolute"``); the optimizer's damping plays no part. Layers may ``share`` c, from the sum of their K: those of
    the same ``"shape"``, or all (``"joint"``). ``normalise`` divides c by its sum: steps then have the length of SGD's.
    The groups of a convolution share c.

    Cost: N^2 (in + out) and N^3 / 3 flops a layer in a step of the first phase, which also keeps a and g; after it a
    product of g or x with N numbers. Memory: two numbers a layer for every position; example for ``"sample"``; example
    and step for ``"iteration"``. Raises ``ValueError`` for a setting out of range.

    Reference: Ou, Zhu, Huang and Liu, arXiv 2403.03473, which leaves open how c is looked up.
    """

    first_phase: int
    coefficients: Coefficients = "position_mean"
    mu: float = 1.0
    unit: Unit = "trace/N^2"
    share: Share = "layer"
    normalise: bool = False

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if not isinstance(self.first_phase, int) or isinstance(self.first_phase, bool) or self.first_phase < 1:
            raise ValueError(
                f"first_phase must be a number of steps >= 1, such as len(loader), got {self.first_phase!r}"
            )
        for name, known in (("coefficients", Coefficients), ("unit", Unit), ("share", Share)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} must be one of {get_args(known)}, got {getattr(self, name)!r}")
        if not isinstance(self.mu, (int, float)) or not 0 < self.mu < float("inf"):
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

    # The first phase.

    def observe(self, seen: Capture) -> Stats:
        """The examples, and which they are."""
        which, n = seen.examples, seen.a.shape[-3]
        ids = torch.zeros(n, dtype=torch.int64, device=seen.a.device) if which.ids is None else which.ids
        step = ids.new_full((1, 1, 1), which.step)
        return {**as_samples(seen), "ids": Samples(ids.view(-1, 1, 1)), "step": Samples(step)}

    def observe_together(self, seen: Mapping[str, Sequence[Capture]]) -> Mapping[str, Stats]:
        """The same, and K summed over the layers that share it."""
        reached = {name: captures for name, captures in seen.items() if captures}
        stats = super().observe_together(reached)
        blocks = {name: _block(as_capture(stats[name])) if self.share == "shape" else () for name in reached}
        K: dict[tuple[int, ...], Tensor] = {}
        for name, block in blocks.items():
            own = as_capture(stats[name]).joint_gram()
            K[block] = K[block] + own if block in K else own
        return {name: {**stats[name], "K": Samples(K[block])} for name, block in blocks.items()}

    def merge(self, old: Stats | None, new: Stats, decay: float) -> Stats:
        """``w`` = N c of this batch; a table of the sums of w (``total``) and the number of examples (``seen``)."""
        examples = as_capture(new)
        w, alive = self._solve(new["K"].value if "K" in new else examples.joint_gram())
        row, slots, width = self._slots(new, examples)
        kept = {}
        for name, value in (("total", w), ("seen", alive.expand_as(w))):
            rows = self.first_phase if self.coefficients == "iteration" else 1
            table = w.new_zeros(rows, width) if old is None else old[name].value
            table = F.pad(table, (0, max(0, width - table.shape[1])))
            kept[name] = table.index_put((row, slots), value, accumulate=True)
        number = kept["seen"].sum()
        scale = torch.where(number > 0, kept["total"].sum() / number, torch.ones_like(number))
        stats = {**kept, "w": w, "scale": scale.expand(_block(examples))}
        return {name: Samples(value) for name, value in stats.items()}

    def direction(self, stats: Stats, seen: Sequence[Capture]) -> Tensor:
        """sum_n c_n DW_n."""
        w = stats["w"].value
        parts = w.split([capture.a.shape[-3] for capture in seen])
        D = [here.combine(part.expand(*here.a.shape[:-3], -1)) for here, part in zip(seen, parts, strict=True)]
        return torch.stack(D).sum(0) / len(w)

    def _solve(self, K: Tensor) -> tuple[Tensor, Tensor]:
        """N c (n,), NaN where K is not positive definite; and 1, or 0 with c = 0 where all gradients are 0."""
        n, trace = len(K), K.diagonal().sum()
        unit = {"trace/N^2": trace / n**2, "trace/N": trace / n, "absolute": torch.ones_like(trace)}[self.unit]
        shift = (n * self.mu * unit).clamp(min=torch.finfo(K.dtype).eps * trace)
        factor, info = torch.linalg.cholesky_ex(shifted(K, torch.where(trace == 0, 1.0, shift)))
        c = torch.cholesky_solve(torch.ones_like(K[:, :1]), factor).squeeze(-1)
        w = c / c.mean() if self.normalise else n * c
        alive = (trace != 0).to(K.dtype)
        return torch.where(info == 0, w, torch.nan) * alive, alive

    def _slots(self, new: Stats, examples: Capture) -> tuple[Tensor, Tensor, int]:
        """The row and the columns of the table that these examples stand in, and the width that it needs."""
        n, step = examples.a.shape[-3], new["step"].value[0, 0]
        row = step if self.coefficients == "iteration" else torch.zeros_like(step)
        if self.coefficients == "sample":
            ids = new["ids"].value.flatten()
            return row, ids, int(ids.max()) + 1
        if self.coefficients == "quantile":
            squares = examples.g.square().sum((-2, -1)).reshape(-1, n).sum(0)
            return row, _quantiles(squares), _BINS
        return row, torch.arange(n, device=examples.a.device), n

    # After it.

    def sided(self, kind: Kind) -> Approximation | None:
        """Itself, which forms no covariance, but not for tokens."""
        return self if kind == "wide" else None

    def assemble(self, stats: Stats, previous: Matrix | None = None) -> Diagonal:
        """I / (N mean c)."""
        return Diagonal(self.scale(stats).reciprocal().expand(stats["scale"].value.shape))

    def invert(self, matrix: Matrix, damping: float) -> LinearMap:
        """N mean c I, which is damped already."""
        assert isinstance(matrix, Diagonal)
        return Diagonal(_number(matrix.values).reciprocal().expand(matrix.shape))

    def scale(self, stats: Stats) -> Tensor:
        """N mean c."""
        return _number(stats["scale"].value)

    def weights(self, stats: Stats) -> Weights | None:
        """c / mean c, looked up."""
        if self.coefficients in ("scalar", "recompute"):
            return None
        total, seen = stats["total"].value, stats["seen"].value
        table = torch.where(seen > 0, total / (seen * self.scale(stats)), torch.ones_like(total))
        return partial(self._look_up, F.pad(table, (0, 1), value=1.0))  # the last column is for the unseen

    def _look_up(self, table: Tensor, which: Examples, g: Tensor) -> Tensor:
        n, last = len(g), table.shape[1] - 1
        row = table[which.step % self.first_phase if self.coefficients == "iteration" else 0]
        if self.coefficients == "sample":
            assert which.ids is not None
            return row[which.ids.clamp(max=last)]
        if self.coefficients == "quantile":
            return row[_quantiles(g.flatten(1).square().sum(1))]
        w = row[min(which.start, last) : min(which.start + n, last)]
        return w if len(w) == n else F.pad(w, (0, n - len(w)), value=1.0)


def _block(examples: Capture) -> tuple[int, ...]:
    """(*groups, out, in)."""
    return (*examples.a.shape[:-3], examples.g.shape[-1], examples.a.shape[-1])


def _number(expanded: Tensor) -> Tensor:
    """The one number that an expanded tensor holds."""
    return expanded[(0,) * expanded.ndim]


def _quantiles(squares: Tensor) -> Tensor:
    """The bin that the rank of each example falls in."""
    return squares.argsort().argsort() * _BINS // len(squares)
