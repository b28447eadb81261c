"""FACES: small views of photographed faces, turned, cropped and subsampled (Hinton & Salakhutdinov 2006)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 25
CROPS = (40, 64)  # side of a crop in pixels; one of 64 fits into 92 columns however it is turned


def views(images: Tensor, n: int, seed: int) -> Tensor:
    """Draw `n` views of each image (m, h, w), uint8 (n m, 625), all images before the next view of any.

    A view is a square crop of random side and place, turned by up to 90 degrees either way, that lies within the
    image; two by two samples are averaged for each pixel.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = images[:, None].float()
    return torch.cat([_view(plain, generator) for _ in range(n)])


def _view(images: Tensor, generator: torch.Generator) -> Tensor:
    m, _, h, w = images.shape
    turn, zoom, across, down = torch.rand(4, m, generator=generator, dtype=torch.float32)
    angle, side = math.pi * (turn - 0.5), CROPS[0] + (CROPS[1] - CROPS[0]) * zoom
    cos, sin = side * angle.cos(), side * angle.sin()
    extent = cos.abs() + sin.abs()  # of the turned crop along either axis
    x, y = (2 * across - 1) * (w - extent), (2 * down - 1) * (h - extent)
    rows = torch.stack([torch.stack([cos, -sin, x], -1) / w, torch.stack([sin, cos, y], -1) / h], 1)
    grid = F.affine_grid(rows, [m, 1, 2 * SIDE, 2 * SIDE], align_corners=False)
    fine = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(fine, 2).round().to(torch.uint8).flatten(1)
