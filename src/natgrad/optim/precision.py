"""Lower precision where the algebra forgives it: products with an inverse, and with directions."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 1 << 14  # blocks of fewer weights gain nothing


def fast_dtype(precision: torch.dtype | str, like: Tensor) -> torch.dtype | None:
    """bfloat16 for a float32 block that is large enough, on a device whose matrix units have it; else ``None``.

    ``precision`` may be ``"auto"`` or a dtype, which is then taken for every block.
    """
    if isinstance(precision, torch.dtype):
        return None if precision == like.dtype else precision
    if like.dtype != torch.float32 or like.shape[-2:].numel() < _SMALL:
        return None
    return torch.bfloat16 if _has_bfloat16(like.device) else None


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return device.type == "cpu" and tiles is not None and tiles()
