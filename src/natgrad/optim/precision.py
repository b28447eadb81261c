"""Lower precision where the algebra forgives it: products with an inverse, and with directions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from natgrad.layers import Layer

_SMALL = 1 << 14  # blocks of fewer weights gain nothing
_GAIN = 1.5  # less is not worth the digits


@dataclass(frozen=True)
class Precision:
    """That of the products of a run: ``wanted`` is a dtype for every block, or ``"auto"``.

    ``chosen`` says, by kind of device, whether ``"auto"`` takes bfloat16 there: the choice of a run stays with it, on
    whatever machine it resumes.
    """

    wanted: torch.dtype | str = "auto"
    chosen: Mapping[str, bool] = field(default_factory=dict)

    @classmethod
    def measured(cls, wanted: torch.dtype | str, layers: Iterable[Layer]) -> Precision:
        """With the choice for the devices of those layers that could gain."""
        kinds = {layer.weight.device.type for layer in layers if _gains(layer)} if wanted == "auto" else set()
        return cls(wanted, {kind: fast_bfloat16(kind) for kind in sorted(kinds)})

    def fast(self, layer: Layer) -> torch.dtype | None:
        """The dtype of products with the block of a layer; ``None`` for its own.

        ``"auto"`` is bfloat16 for a float32 block that is large enough, on a device that multiplies it faster.
        """
        if isinstance(self.wanted, torch.dtype):
            return None if self.wanted == layer.weight.dtype else self.wanted
        if not _gains(layer):
            return None
        kind = layer.weight.device.type
        fast = self.chosen[kind] if kind in self.chosen else fast_bfloat16(kind)
        return torch.bfloat16 if fast else None


@cache
def fast_bfloat16(kind: str) -> bool:
    """Whether devices of this kind multiply bfloat16 matrices at least 1.5 times as fast as float32 ones.

    CUDA devices by their generation; a CPU by 5 products of 512 x 512 in each, once in a process.
    """
    if kind == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if kind != "cpu":
        return False
    seconds: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        X = torch.ones(512, 512, dtype=dtype)
        once = _seconds(X)  # the first product prepares the kernel
        slow = dtype == torch.bfloat16 and once > 20 * seconds[torch.float32]  # no kernel at all
        seconds[dtype] = once if slow else min(_seconds(X) for _ in range(5))
    return seconds[torch.float32] >= _GAIN * seconds[torch.bfloat16]


def _seconds(X: Tensor) -> float:
    start = time.perf_counter()
    X @ X
    return time.perf_counter() - start


def _gains(layer: Layer) -> bool:
    return layer.weight.dtype == torch.float32 and layer.shape[-2:].numel() >= _SMALL
