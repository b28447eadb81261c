"""Three tasks of vision sized for a minute on one core: a residual network, a vision Transformer, a denoising U-Net."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.race import data, datasets
from natgrad.race.data import Dataset, Pair
from natgrad.race.networks import Basic, resnet

TRAIN, TEST = 4000, 1000  # images of CIFAR-10
MARGIN = 4  # pixels that a crop may be moved by


def few_photographs(folder: Path | None) -> Dataset:
    """The first 4,000 training and 1,000 test images of CIFAR-10, channels normalised by the former."""
    train, test = data.load_cifar(folder)
    name = f"CIFAR-10, {TRAIN:,} images"
    return datasets.normalised(name, _first(train, TRAIN), _first(test, TEST))


def _first(pair: Pair, n: int) -> Pair:
    return pair[0][:n], pair[1][:n]


def crops(x: Tensor, y: Tensor, generator: torch.Generator) -> Pair:
    """Crop images (n, c, h, w) padded by 4 zeros at random and flip every other one, each by draws of its own."""
    n, h, w = len(x), *x.shape[2:]
    rows, columns = (torch.randint(2 * MARGIN + 1, (n, 1), generator=generator) for _ in range(2))
    flipped = torch.rand(n, 1, generator=generator) < 0.5
    across = torch.where(flipped, torch.arange(w - 1, -1, -1), torch.arange(w))
    i, j = (rows + torch.arange(h))[:, :, None].to(x.device), (columns + across)[:, None, :].to(x.device)
    padded = F.pad(x, 4 * [MARGIN]).permute(0, 2, 3, 1)
    return padded[torch.arange(n, device=x.device)[:, None, None], i, j].permute(0, 3, 1, 2).contiguous(), y


def residual(found: Dataset) -> nn.Sequential:
    """ResNet with batch normalisation: a stem and one basic block each of 16, 32 and 64 channels."""
    return resnet(found.train[0].shape[1], block=Basic)


class Block(nn.Module):
    """Pre-norm layer of a vision Transformer (Dosovitskiy et al. 2021): self-attention, then two dense layers, GELU."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dense = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, t, width) to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.dense(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches of 4x4 pixels embedded, learned positions, pre-norm blocks, the mean over patches, a dense layer."""

    def __init__(
        self, channels: int = 3, side: int = 32, width: int = 64, heads: int = 4, depth: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (side // 4) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, 2 * width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, channels, side, side)."""
        h = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(h)).mean(1))


def transformer(found: Dataset) -> VisionTransformer:
    """The vision Transformer of the task."""
    return VisionTransformer(*found.train[0].shape[1:3])


def clean_digits(folder: Path | None) -> Dataset:
    """The bundled digits as inputs and targets (n, 1, 16, 16) in [-1, 1]: 4,000 for training, 1,000 for test.

    They are padded to 32x32, and every four pixels are one, their mean; the first few have all classes.
    """
    found = datasets.digit_labels(folder)
    x, test_x = (_shrunk(pair[0]) for pair in (found.train, found.test) if pair)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return Dataset(found.name, (x, x), (test_x, test_x))


def _shrunk(x: Tensor) -> Tensor:
    return 2 * F.avg_pool2d(F.pad(x.reshape(-1, 1, 28, 28), 4 * [2]), 2) - 1


def noisy(x: Tensor, y: Tensor, generator: torch.Generator) -> Pair:
    """What a denoiser is given and what it is to find: images with noise and the time beside them, and the noise.

    A time t, uniform in [0, 1], is drawn for every image of x (n, c, h, w), and noise; the image counts
    cos(pi t / 2) and the noise sin(pi t / 2) (Ho et al. 2020, with the cosine schedule of Nichol & Dhariwal 2021).
    The input (n, c + 1, h, w) has a channel that is t everywhere.
    """
    t = torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device)
    noise = torch.randn(x.shape, generator=generator).to(x)
    seen = (math.pi / 2 * t).cos() * x + (math.pi / 2 * t).sin() * noise
    return torch.cat([seen, t.expand(-1, 1, *x.shape[2:])], 1), noise


class Stage(nn.Module):
    """Residual block told the time: norm, SiLU and convolution twice, the embedded time added between."""

    def __init__(self, n_in: int, n_out: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, n_in), nn.GroupNorm(4, n_out)
        self.conv1, self.conv2 = (nn.Conv2d(n, n_out, 3, padding=1) for n in (n_in, n_out))
        self.time = nn.Linear(width, n_out)
        self.shortcut = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map (n, n_in, h, w) and the time (n, width) to (n, n_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h))) + self.shortcut(x)


class UNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015) over three resolutions that finds the noise in its input (Ho et al. 2020)."""

    rates: Tensor

    def __init__(self, channels: int = 1, width: int = 16, embedding: int = 32) -> None:
        super().__init__()
        one, two, three = width, 2 * width, 4 * width
        self.register_buffer("rates", math.pi * 2.0 ** torch.arange(embedding // 4))
        self.time = nn.Sequential(
            nn.Linear(embedding // 2, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.first = nn.Conv2d(channels, one, 3, padding=1)
        self.down1, self.down2 = Stage(one, one, embedding), Stage(two, two, embedding)
        self.shrink1, self.shrink2 = (nn.Conv2d(n, 2 * n, 3, stride=2, padding=1) for n in (one, two))
        self.middle = Stage(three, three, embedding)
        self.grow2, self.grow1 = (nn.Conv2d(2 * n, n, 3, padding=1) for n in (two, one))
        self.up2, self.up1 = Stage(2 * two, two, embedding), Stage(2 * one, one, embedding)
        self.norm, self.last = nn.GroupNorm(4, one), nn.Conv2d(one, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The noise (n, c, h, w) in images with a channel of time (n, c + 1, h, w); h and w are multiples of 4."""
        angles = x[:, -1, :1, 0] * self.rates
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        a = self.down1(self.first(x[:, :-1]), time)
        b = self.down2(self.shrink1(a), time)
        h = _doubled(self.middle(self.shrink2(b), time))
        h = self.up2(torch.cat([self.grow2(h), b], 1), time)
        h = self.up1(torch.cat([self.grow1(_doubled(h)), a], 1), time)
        return self.last(F.silu(self.norm(h)))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def denoiser(found: Dataset) -> UNet:
    """The U-Net of the task."""
    return UNet(found.train[0].shape[1])
