"""What the bench rests on: a clock, the machine's product rate, an optimizer's memory."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def product_rate(dtype: torch.dtype, device: torch.device, size: int = 1000, repeats: int = 10) -> float:
    """Floating-point operations per second of a (size, size) matrix product, the median of a few."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(repeats + 2):
        start = clock(device)
        a @ a
        times.append(clock(device) - start)
    return 2 * size**3 / median(times[2:])


def held_bytes(optimizer: Any, model: nn.Module) -> int:
    """Bytes of all tensors an optimizer keeps, the model's parameters and gradients left out."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(optimizer, set())}
    for p in model.parameters():
        for tensor in (p, p.grad):
            if tensor is not None:
                storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def _tensors(value: Any, seen: set[int]) -> Iterable[Tensor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    for part in _parts(value):
        yield from _tensors(part, seen)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, nn.Module):
        return []
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set):
        return list(value)
    if is_dataclass(value):
        return [getattr(value, f.name) for f in fields(value)]
    ours = type(value).__module__.startswith("natgrad") or isinstance(value, torch.optim.Optimizer)
    return list(vars(value).values()) if ours and hasattr(value, "__dict__") else []
