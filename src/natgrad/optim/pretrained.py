"""Whether the weights of a model have learnt something before: seen by the signs of their entries."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from natgrad.optim.step_size import StepSize

_ROWS, _COLUMNS = 256, 1024  # that are looked at, of every weight
_FEWEST = 8  # rows or columns, of which singular values tell anything
_MIXED = 0.25  # the least variance of the signs of a row or column: one of zeros, or with one sign, tells nothing
_ONE_SIGN = 0.5  # the mean of the signs beyond which they are those of the differences from the median


def share_of(model: nn.Module, policy: StepSize) -> float:
    """What share of the default learning rates a policy takes for a model; says so where that is not all of them."""
    share = policy.share_of_pretrained
    if share == 1.0 or not is_pretrained(model):
        return 1.0
    warnings.warn(
        f"the weights of this model have learnt something before: learning rates count {share:g} times (the default as "
        f"{share * policy.lr:g}), so as not to undo it; lr=... in the constructor overrules that",
        stacklevel=3,
    )
    return share


def is_pretrained(model: nn.Module) -> bool:
    """Whether most numbers in the trained weights of a model are in matrices whose signs are not random.

    An (m, n) matrix, m <= n, of independent signs has no singular value above sqrt(m) + sqrt(n), up to a relative
    m^(-2/3) (Marchenko and Pastur 1967). Training adds larger ones (Martin and Mahoney, arXiv 1810.01075). A weight
    counts as learnt where two singular values of its signs are beyond 1 + 2 m^(-2/3) times that. Its rows and columns
    are first stripped of repetitions, and their signs brought to mean 0 and variance 1: fresh weights of any
    distribution, however the scales or means of rows, columns and blocks differ, stay below, and orthogonal ones.
    Frozen weights are not trained further and do not count. Of large ones a part is read, in rows and columns at equal
    distances: some 10 ms each. Weights without data are not read.

    Weights that were trained for a few steps, or on little, may not be seen.
    """
    read = [(p.numel(), learnt) for p in model.parameters() if (learnt := _is_learnt(p)) is not None]
    return 2 * sum(size for size, learnt in read if learnt) > sum(size for size, _ in read)


@torch.no_grad()
def _is_learnt(p: nn.Parameter) -> bool | None:
    """Whether a weight is not random; ``None`` if it cannot be told."""
    if not p.requires_grad or is_lazy(p) or p.is_meta or type(p.data) is not Tensor:
        return None
    if p.ndim < 2 or not p.numel() or not p.is_floating_point() or p.layout is not torch.strided:
        return None
    rows, columns = (-(-size // most) for size, most in zip((len(p), p[0].numel()), (_ROWS, _COLUMNS), strict=True))
    W = p.detach()[::rows].flatten(1)[:, ::columns].to("cpu", torch.float32)
    if not torch.isfinite(W).all():
        return None
    for dim in (0, 1):
        W = torch.unique(W, dim=dim)
    S = W.sign()
    S = (W - W.median()).sign() if abs(S.mean()) > _ONE_SIGN else S
    for dim in (1, 0):
        S = S - S.mean(dim, keepdim=True)
        spread = S.square().mean(dim)
        S = (S / spread.clamp(min=_MIXED).sqrt().unsqueeze(dim)).index_select(1 - dim, torch.where(spread > _MIXED)[0])
        if min(S.shape) < _FEWEST:
            return None
    m, n = sorted(S.shape)
    second = torch.linalg.svdvals(S)[1]
    return bool(second > S.square().mean().sqrt() * (1 + 2 * m ** (-2 / 3)) * (m**0.5 + n**0.5))
