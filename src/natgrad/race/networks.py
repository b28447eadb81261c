"""The networks of the tasks, initialised from torch's global generator."""

from itertools import pairwise

from torch import Tensor, nn


def autoencoder(*widths: int) -> nn.Sequential:
    """Tanh auto-encoder through `widths` and back; the code is linear, the output logits."""
    sizes = [*widths, *reversed(widths[:-1])]
    code, last = len(widths) - 2, len(sizes) - 2
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(pairwise(sizes)):
        layers += [xavier(nn.Linear(n_in, n_out))] + ([] if i in (code, last) else [nn.Tanh()])
    return nn.Sequential(*layers)


def xavier(layer: nn.Linear) -> nn.Linear:
    """Initialise in place: Xavier-uniform weight, zero bias."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def perceptron(*widths: int) -> nn.Sequential:
    """ReLU classifier of dense layers, with torch's default initialisation."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """Pre-activation residual block (He et al. 2016), with a 1x1 shortcut where the shape changes."""

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


def resnet(channels: int, classes: int = 10) -> nn.Sequential:
    """Residual network of three stages, 16, 32 and 64 channels wide, one block each."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )
