"""The networks of the tasks, initialised from torch's global generator."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def autoencoder(
    *widths: int, activation: type[nn.Module] = nn.Tanh, linear_code: bool = True, bias: float = 0.0
) -> nn.Sequential:
    """Auto-encoder through `widths` and back; the output is linear: logits or means."""
    sizes = [*widths, *reversed(widths[:-1])]
    code, last = len(widths) - 2, len(sizes) - 2
    bare = {code, last} if linear_code else {last}
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(pairwise(sizes)):
        layers += [xavier(nn.Linear(n_in, n_out), bias)] + ([] if i in bare else [activation()])
    return nn.Sequential(*layers)


def xavier(layer: nn.Linear, bias: float = 0.0) -> nn.Linear:
    """Initialise in place: Xavier-uniform weight, constant bias."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.constant_(layer.bias, bias)
    return layer


def perceptron(*widths: int) -> nn.Sequential:
    """ReLU classifier of dense layers, with torch's default initialisation."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def deep_linear(n_in: int, width: int, depth: int) -> nn.Sequential:
    """`depth` dense layers with batch normalisation between them and no activation."""
    layers: list[nn.Module] = [nn.Linear(n_in, width)]
    for _ in range(depth - 1):
        layers += [nn.BatchNorm1d(width), nn.Linear(width, width)]
    return nn.Sequential(*layers)


class PreActivation(nn.Module):
    """Pre-activation residual block (He et al. 2016b), with a 1x1 shortcut where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(n_in), nn.BatchNorm2d(n_out)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.shortcut = None if n_in == n_out else nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, n_in, h, w) to (n, n_out, h / stride, w / stride)."""
        h = self.norm1(x).relu()
        skip = x if self.shortcut is None else self.shortcut(h)
        return self.conv2(self.norm2(self.conv1(h)).relu()) + skip


class Basic(nn.Module):
    """Basic residual block (He et al. 2016a), with a normalised 1x1 shortcut where the shape changes."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(n_out), nn.BatchNorm2d(n_out)
        shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False)
        self.shortcut = None if n_in == n_out else nn.Sequential(shortcut, nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, n_in, h, w) to (n, n_out, h / stride, w / stride)."""
        h = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (h + (x if self.shortcut is None else self.shortcut(x))).relu()


def resnet(
    channels: int,
    widths: Sequence[int] = (16, 32, 64),
    depth: int = 1,
    block: type[PreActivation] | type[Basic] = PreActivation,
    classes: int = 10,
) -> nn.Sequential:
    """Residual network for small images: a 3x3 stem, `depth` blocks for each width, halving between widths."""
    stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
    blocks = []
    for n_in, n_out in pairwise([widths[0], *widths]):
        blocks += [block(n_in if i == 0 else n_out, n_out, 2 if n_in < n_out and i == 0 else 1) for i in range(depth)]
    first, last = ([], norm(widths[-1])) if block is PreActivation else (norm(widths[0]), [])
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(stem, *first, *blocks, *last, *pool, nn.Linear(widths[-1], classes))


def resnet18(channels: int, width: int = 64) -> nn.Sequential:
    """ResNet-18 (He et al. 2016a) for 32x32 images: no max-pooling, `width` channels and its doubles."""
    return resnet(channels, [width, 2 * width, 4 * width, 8 * width], depth=2, block=Basic)


def norm(channels: int) -> list[nn.Module]:
    """Batch normalisation and ReLU."""
    return [nn.BatchNorm2d(channels), nn.ReLU()]
