"""Any convex loss, given as a function: its Hessian stands in for the likelihood's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from natgrad.likelihoods.elementwise import Reduced


@dataclass(frozen=True)
class ConvexLoss(Reduced):
    """The loss is the mean over terms of ``loss(f, y)``: F = 1/count sum J^T H J with H the Hessian of ``loss`` in f.

    That is the generalised Gauss-Newton matrix (Schraudolph 2002), and the Fisher where ``loss`` is the negative
    log-likelihood of an exponential family in its natural parameters. *Exact* labels are the columns of H^(1/2),
    *sampled* ones H^(1/2) z with random signs z, so that E[v v^T] = H (exactly H for one output a term).

    Args:
        loss: of one term: f has the last ``event_dims`` dimensions of the output, y what the targets have beyond the
            dimensions of the terms. A tensor of several numbers is summed. Losses of ``torch.nn.functional`` are taken
            as they are. It is vectorised by ``torch.func.vmap``.
        reads_targets: False where H does not depend on y (Poisson): 0 then stands in for targets of the shape of f.
            Otherwise training needs ``optimizer.targets(y)`` before the forward pass.
        reduction: ``"mean"`` where ``loss`` takes the mean over the outputs of a term; it changes nothing but the unit
            of damping and trust regions.

    Every term counts 1, so a loss that ignores some targets is smaller here than under a mean over the others.

    Cost: dim backward passes through ``loss`` alone and n terms dim^3 flops; memory n terms dim^2; one read from the
    device. Raises ``ValueError`` where H has a negative eigenvalue (beyond what rounding makes of 1, as of a softmax,
    or of the largest), and for unknown or unfit targets. Warns where H is 0 everywhere, as of absolute values.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    reads_targets: bool = True

    def __post_init__(self) -> None:
        """Refuse what is no function, and settings outside their range."""
        if not callable(self.loss):
            raise TypeError(f"loss must be a function of one term's output and target, got {self.loss!r}")
        super().__post_init__()

    def check_targets(self, output: Tensor, targets: Tensor) -> None:
        """The leading dimensions of the output, those of the terms."""
        terms = self._leading(output)
        if not isinstance(targets, Tensor):
            raise ValueError(f"ConvexLoss needs a tensor of targets, got {type(targets).__name__}")
        if targets.shape[: len(terms)] != terms:
            raise ValueError(
                f"ConvexLoss needs targets of shape ({', '.join(map(str, terms))}, ...), got {tuple(targets.shape)}"
            )

    def hessian(self, output: Tensor, targets: Tensor | None = None) -> Tensor:
        """H (n, terms, dim, dim) of ``loss``."""
        n, terms, dim = self.events(output).shape
        return vmap(jacrev(grad(self._loss)))(*self._terms(output, targets)).reshape(n, terms, dim, dim)

    def residual(self, output: Tensor, uniform: Tensor, targets: Tensor | None = None) -> Tensor:
        """H^(1/2) z, z the signs of ``uniform`` - 1/2."""
        return _with_signs(self._root(output, targets), uniform)

    def sampled(
        self, output: Tensor, draws: int, generator: torch.Generator, targets: Tensor | None = None
    ) -> Iterator[Tensor]:
        """``draws`` random vectors with covariance H, which is computed once."""
        root = self._root(output, targets)
        for uniform in self._uniform(output, draws, generator):
            yield self._seed(_with_signs(root, uniform), output, targets)

    def factor(self, output: Tensor, targets: Tensor | None = None) -> Tensor:
        """H^(1/2)."""
        return self._root(output, targets).movedim(-1, 0)

    def nll(self, output: Tensor, targets: Tensor) -> Tensor:
        """The sum of ``loss`` over the terms, over its scale."""
        return vmap(self._loss)(*self._terms(output, targets)).sum() / self.scale(output)

    def hessian_product(self, output: Tensor, V: Tensor, targets: Tensor | None = None) -> Tensor:
        """H v."""
        product = self.hessian(output, targets) @ self.events(V).unsqueeze(-1)
        return self.unevents(product.squeeze(-1), output)

    def _loss(self, f: Tensor, y: Tensor) -> Tensor:
        return self.loss(f, y).sum()

    def _leading(self, output: Tensor) -> torch.Size:
        return output.shape[: output.ndim - min(self.event_dims, output.ndim - 1)]

    def _terms(self, output: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs and targets with all terms in one dimension."""
        terms = self._leading(output)
        f = output.reshape(-1, *output.shape[len(terms) :])
        if targets is None:
            if self.reads_targets:
                raise ValueError(
                    "ConvexLoss needs to know the targets: call optimizer.targets(y) before the forward pass, or say "
                    "reads_targets=False if the second derivatives of the loss do not depend on them"
                )
            return f, torch.zeros_like(f)
        self.check_targets(output, targets)
        return f, targets.reshape(len(f), *targets.shape[len(terms) :])

    def _root(self, output: Tensor, targets: Tensor | None) -> Tensor:
        """The symmetric square root of H over the scale; not a number where H is none."""
        H = self.hessian(output, targets) / self.scale(output)
        finite = torch.isfinite(H).all(-1, keepdim=True).all(-2, keepdim=True)
        H = H.where(finite, torch.zeros_like(H))
        values, Q = (H.squeeze(-1), torch.ones_like(H)) if H.shape[-1] == 1 else torch.linalg.eigh(H)
        rounding = 100 * torch.finfo(H.dtype).eps * H.shape[-1]
        numbers = torch.stack([values.min(), values.max(), finite.all().to(H)]) if values.numel() else torch.ones(3)
        low, high, known = numbers.tolist()
        if low < -rounding * max(high, -low, 1.0):
            raise ValueError(
                f"the loss is not convex in the output: its Hessian has the eigenvalue {low:.3g} (the largest is "
                f"{high:.3g}); a natural gradient needs a convex loss of the network's output"
            )
        if low == high == 0 and known:
            warnings.warn(
                "the second derivatives of the loss are 0 at every output of this batch (is it piecewise linear?): "
                "damping is all that remains of the natural gradient",
                stacklevel=2,
            )
        root = (Q * values.clamp(min=0).sqrt().unsqueeze(-2)) @ Q.mT
        return root.where(finite, torch.full_like(root, torch.nan))


def _with_signs(root: Tensor, uniform: Tensor) -> Tensor:
    return (root @ (uniform - 0.5).sign().unsqueeze(-1)).squeeze(-1)
