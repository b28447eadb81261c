"""Whether weights have learnt something before: seen by the signs of their entries."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from natgrad.optim.step_size import StepSize

_ROWS, _COLUMNS = 256, 1024  # that are looked at, of every weight
_FEWEST = 8  # rows or columns, of which singular values tell anything
_MIXED = 0.25  # the least variance of the signs of a row or column: one of zeros, or with one sign, tells nothing


def ask(groups: Sequence[MutableMapping[str, Any]], policy: StepSize) -> None:
    """Find out of all groups that are about to move, and of which it is not known, whether they have learnt before.

    Their ``pretrained`` is then true or false for all of them alike; a warning says so where it is true.
    """
    new = [group for group in groups if group["pretrained"] is None and group["lr"]]
    if not new:
        return
    learnt = is_pretrained(p for group in new for p in group["params"])
    for group in new:
        group["pretrained"] = learnt
    share = policy.share_of_pretrained({})
    if learnt:
        warnings.warn(
            f"these weights have learnt something before: learning rates that were not given count {share:g} times "
            f"(the default as {share * policy.lr:g}), so as not to undo it; lr=... overrules that",
            stacklevel=3,
        )


def is_pretrained(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether most numbers in these parameters are in matrices whose signs are not random.

    An (m, n) matrix, m <= n, of independent signs has no singular value above sqrt(m) + sqrt(n), up to a relative
    m^(-2/3) (Marchenko and Pastur 1967). Training adds larger ones (Martin and Mahoney, arXiv 1810.01075). A weight
    counts as learnt where two singular values of its signs are beyond 1 + 2 m^(-2/3) times that. Rows and columns that
    repeat others are left out, and the signs of each brought to mean 0 and variance 1: independent entries stay below
    whatever their distribution and however the scales of rows, columns and blocks differ, and orthogonal matrices. Of
    large weights a part is read, in rows and columns at equal distances: some 10 ms each. Weights without data are not
    read.

    Wrong for fresh weights of low rank, tables of waves, filter banks and copies that differ a little, which count as
    learnt; and for weights that were trained for a few steps, or on little, which may not.
    """
    read = [(p.numel(), learnt) for p in parameters if (learnt := _is_learnt(p)) is not None]
    return 2 * sum(size for size, learnt in read if learnt) > sum(size for size, _ in read)


@torch.no_grad()
def _is_learnt(p: nn.Parameter) -> bool | None:
    """Whether a weight is not random; ``None`` if it cannot be told."""
    if is_lazy(p) or p.is_meta or type(p.data) is not Tensor or p.layout is not torch.strided:
        return None
    if p.ndim < 2 or not p.numel() or not p.is_floating_point():
        return None
    rows, columns = (-(-size // most) for size, most in zip((len(p), p[0].numel()), (_ROWS, _COLUMNS), strict=True))
    S = p.detach()[::rows].flatten(1)[:, ::columns].to("cpu", torch.float32)
    if not torch.isfinite(S).all():
        return None
    for dim in (0, 1):
        S = torch.unique(S, dim=dim)
    S = S.sign()
    for dim in (1, 0):
        S = S - S.mean(dim, keepdim=True)
        spread = S.square().mean(dim, keepdim=True)
        S = (S / spread.sqrt()).index_select(1 - dim, torch.where(spread.flatten() > _MIXED)[0])
        if min(S.shape) < _FEWEST:
            return None
    m, n = sorted(S.shape)
    return bool(torch.linalg.svdvals(S)[1] > (1 + 2 * m ** (-2 / 3)) * (m**0.5 + n**0.5))
