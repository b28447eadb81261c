"""nn.Embedding and nn.EmbeddingBag: linear layers on one-hot vectors, of which no more than the tokens is kept."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.layers.base import Adapter
from natgrad.sparse import Sparse


class TokensAdapter(Adapter):
    """s = W a on a = e(token), or a sum of such vectors; the block is the transposed weight, (out, number of tokens).

    The row of ``padding_idx`` has no gradient: that token is the vector 0.
    """

    tokens: ClassVar[bool] = True

    def has_bias(self, module: nn.Module) -> bool:
        """Never."""
        return False

    def refuses(self, module: nn.Module) -> str | None:
        """Gradients that are not those of the loss."""
        return "scale_grad_by_freq: not the gradient of the loss" if module.scale_grad_by_freq else None

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x: tokens have no precision."""
        return x

    @abstractmethod
    def sparse(self, module: nn.Module, x: Tensor) -> Sparse:
        """The inputs."""

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """The inputs written out, (n, t, number of tokens): for small cases."""
        return self.sparse(module, x).dense()

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """(out, number of tokens)."""
        return weight.mT

    def from_matrix(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """(number of tokens, out)."""
        return matrix.mT


class EmbeddingAdapter(TokensAdapter):
    """nn.Embedding: the first dimension of the ids is the example, those after it are positions."""

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """Ids (n, ...), or outputs (n, ..., out)."""
        return x if x.ndim > (1 if x.is_floating_point() else 0) else x.unsqueeze(0)

    def sparse(self, module: nn.Module, x: Tensor) -> Sparse:
        """One entry at every position but those of padding."""
        assert isinstance(module, nn.Embedding)
        ids = x.reshape(len(x), -1, 1).long()
        return Sparse(ids, _kept(module, ids).to(module.weight.dtype), module.num_embeddings)

    def forward(self, module: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        """The rows of the tokens, 0 for padding."""
        assert isinstance(module, nn.Embedding)
        return F.embedding(x, tensors[0]) * _kept(module, x).unsqueeze(-1)


class BagAdapter(TokensAdapter):
    """nn.EmbeddingBag with the modes ``"sum"`` and ``"mean"``, weights of its entries, offsets and padding.

    A call is kept as int64 (n, k, 2): the ids of every bag, padded to the largest, and the bits of their float64
    weights. Two tokens of one bag do meet, so that a diagonal input side is an approximation here.
    """

    def refuses(self, module: nn.Module) -> str | None:
        """The maximum, which is not linear."""
        return "mode 'max' is not linear in the weight" if module.mode == "max" else super().refuses(module)

    def batched(self, module: nn.Module, x: Tensor) -> Tensor:
        """(n, ...)."""
        return x

    def read(
        self,
        module: nn.Module,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Ids and weights of every bag."""
        assert isinstance(module, nn.EmbeddingBag)
        ids, weights = input, per_sample_weights
        w = torch.ones_like(ids, dtype=torch.float64) if weights is None else weights.detach().double()
        if ids.ndim == 1:
            assert offsets is not None
            ids, w = (_bags(x, offsets[:-1] if module.include_last_offset else offsets) for x in (ids, w))
        w = w * _kept(module, ids)
        if module.mode == "mean":
            w = w / (w != 0).sum(-1, keepdim=True).clamp(min=1)
        return torch.stack([ids.long(), w.contiguous().view(torch.int64)], -1)

    def sparse(self, module: nn.Module, x: Tensor) -> Sparse:
        """One position a bag."""
        assert isinstance(module, nn.EmbeddingBag)
        ids, w = _parts(x)
        return Sparse(ids.unsqueeze(1), w.to(module.weight.dtype).unsqueeze(1), module.num_embeddings)

    def forward(self, module: nn.Module, tensors: list[Tensor], x: Tensor) -> Tensor:
        """The weighted sum of every bag."""
        ids, w = _parts(x)
        return (F.embedding(ids, tensors[0]) * w.to(tensors[0].dtype).unsqueeze(-1)).sum(-2)


def _kept(module: nn.Embedding | nn.EmbeddingBag, ids: Tensor) -> Tensor:
    """Which tokens are not padding."""
    return torch.ones_like(ids, dtype=torch.bool) if module.padding_idx is None else ids != module.padding_idx


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 0], x[..., 1].contiguous().view(torch.float64)


def _bags(x: Tensor, offsets: Tensor) -> Tensor:
    """The entries x (m,) of bags that start at ``offsets`` (n,), one bag a row, filled up with zeros."""
    place = torch.arange(len(x), device=x.device)
    bag = torch.searchsorted(offsets.contiguous(), place.to(offsets.dtype), right=True) - 1
    slot = place - offsets[bag]
    k = int(slot.max()) + 1 if len(x) else 1
    return x.new_zeros(len(offsets), k).index_put((bag, slot), x)
