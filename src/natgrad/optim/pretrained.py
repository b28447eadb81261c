"""Whether the weights of a model have learnt something before: seen by their singular values."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from natgrad.optim.step_size import StepSize

_ROWS, _COLUMNS = 256, 1024  # that are looked at, of every weight
_FEWEST = 8  # rows or columns, of which singular values tell anything


def share_of(model: nn.Module, policy: StepSize) -> float:
    """What share of the default learning rates a policy takes for a model; says so where that is not all of them."""
    share = policy.share_of_pretrained
    if share == 1.0 or not is_pretrained(model):
        return 1.0
    warnings.warn(
        f"the weights of this model have learnt something before: lr is {share * policy.lr:g}, {share:g} of the "
        "default, so as not to undo it; lr=... overrules that",
        stacklevel=3,
    )
    return share


def is_pretrained(model: nn.Module) -> bool:
    """Whether most numbers in the weights of a model, frozen ones too, are in weights that are not random.

    An (m, n) matrix, m <= n, with independent entries of mean 0, one standard deviation s and light tails has no
    singular value above s (sqrt(m) + sqrt(n)), up to a relative m^(-2/3) (Marchenko and Pastur 1967). Orthogonal and
    constant matrices stay below; training adds larger ones (Martin and Mahoney, arXiv 1810.01075). A weight counts as
    learnt beyond 1 + 2 m^(-2/3) times that, without its mean. Of large ones a part is read, in rows and columns at
    equal distances: some 5 ms each. Weights without data are not read.

    Wrong for fresh weights whose rows, columns or blocks differ in scale or repeat each other, or whose entries have
    heavy tails: they count as learnt. Weights that were trained for a few steps may not.
    """
    read = [(p.numel(), learnt) for p in model.parameters() if (learnt := _is_learnt(p)) is not None]
    return 2 * sum(size for size, learnt in read if learnt) > sum(size for size, _ in read)


@torch.no_grad()
def _is_learnt(p: nn.Parameter) -> bool | None:
    """Whether a weight is not random; ``None`` if it cannot be told."""
    if is_lazy(p) or p.is_meta or p.ndim < 2 or not p.is_floating_point() or p.layout is not torch.strided:
        return None
    W = p.detach().flatten(1)
    if min(W.shape) < _FEWEST:
        return None
    W = W if W.shape[0] <= W.shape[1] else W.mT
    rows, columns = (-(-size // most) for size, most in zip(W.shape, (_ROWS, _COLUMNS), strict=True))
    W = W[::rows, ::columns].to(torch.float32)
    W = W - W.mean()
    (m, n), size = W.shape, W.square().mean()
    if not (size > 0 and torch.isfinite(size)):
        return None
    top = torch.linalg.eigvalsh(W @ W.mT)[-1]
    return bool(top > size * ((1 + 2 * m ** (-2 / 3)) * (m**0.5 + n**0.5)) ** 2)
