"""Muon as it races: torch's, on weight matrices and on convolution kernels flattened to matrices, AdamW beside it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from natgrad.race.tasks import Task


class Together:
    """Several optimizers over disjoint parameters, stepped as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all of them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """The state of all of them, by parameter."""
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Step each optimizer once."""
        for optimizer in self.optimizers:
            optimizer.step()


class FlatMuon(torch.optim.Muon):
    """Torch's Muon, which takes matrices alone, on kernels (out, in, ...) as matrices (out, in * ...) too.

    The matrices share the memory of the kernels, which are contiguous for that.
    """

    def __init__(self, parameters: Iterable[Tensor], **settings: Any) -> None:
        self.kernels = list(parameters)
        self.matrices = [p if p.ndim == 2 else nn.Parameter(p.detach().view(len(p), -1)) for p in self.kernels]
        super().__init__(self.matrices, **settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the kernels and of their matrices."""
        super().zero_grad(set_to_none)
        for kernel in self.kernels:
            kernel.grad = None

    def step(self, closure: Any = None) -> Any:
        """Step the matrices along the gradients of their kernels."""
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            if matrix is not kernel:
                matrix.grad = None if kernel.grad is None else kernel.grad.reshape(matrix.shape)
        return super().step(closure)


def muon(model: nn.Module, task: Task, settings: Mapping[str, Any]) -> Together:
    """Torch's Muon (Jordan et al. 2024) on weight matrices and convolution kernels, AdamW on everything else.

    Embeddings are AdamW's; with `ends` false the first and the last matrix are too, as language models do it.
    `adjust_lr_fn` is torch's: "match_rms_adamw" makes a step as long as AdamW's of the same rate (Liu et al. 2025).
    """
    rest = dict(settings)
    adam_lr, ends = rest.pop("adam_lr"), rest.pop("ends")
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, _ConvNd)}
    matrices = [p for p in model.parameters() if p.ndim == 2 or id(p) in kernels]
    matrices = matrices if ends or len(matrices) < 3 else matrices[1:-1]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    chosen = [p for p in matrices if id(p) not in tables]
    taken = {id(p) for p in chosen}
    others = [p for p in model.parameters() if id(p) not in taken]
    if not others:
        return Together(FlatMuon(chosen, **rest))
    return Together(FlatMuon(chosen, **rest), torch.optim.AdamW(others, lr=adam_lr, weight_decay=0))
