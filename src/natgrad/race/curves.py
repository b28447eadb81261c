"""CURVES: images of smooth random curves through three random points (Hinton & Salakhutdinov 2006)."""

from pathlib import Path

import torch
from torch import Tensor

from natgrad.race.data import stored

SIDE = 28
SAMPLES = 64  # points drawn on each curve: closer than one pixel even on the longest ones
HALF_WIDTH = 0.7


def curves(n: int, seed: int = 0) -> Tensor:
    """Draw `n` images (n, 784) of 256 grey levels, uint8; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    corners = 3 + (SIDE - 7) * torch.rand(n, 3, 2, generator=generator, dtype=torch.float32)
    return torch.cat([_draw(part) for part in corners.split(500)])


def cached_curves(n: int, seed: int, folder: Path) -> Tensor:
    """Read the images of `curves(n, seed)` from `folder`, drawing and storing them the first time."""
    return stored(f"curves-{n}-{seed}", lambda: curves(n, seed), folder)


def _draw(corners: Tensor) -> Tensor:
    """Stroke the parabola through three corners (n, 3, 2), each pixel shaded by its distance to it."""
    n = len(corners)
    axis = torch.arange(SIDE, dtype=torch.float32)
    pixels = torch.cartesian_prod(axis, axis).expand(n, -1, -1)
    distance = torch.cdist(pixels, _parabola(corners)).amin(-1)
    return ((HALF_WIDTH + 0.5 - distance).clamp(0, 1) * 255).round().to(torch.uint8)


def _parabola(corners: Tensor) -> Tensor:
    """Points (n, SAMPLES, 2) of the quadratic that meets the corners at times 0, 1/2 and 1."""
    t = torch.linspace(0, 1, SAMPLES, dtype=torch.float32)
    weights = torch.stack([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)])
    return torch.einsum("ks,nkc->nsc", weights, corners)
