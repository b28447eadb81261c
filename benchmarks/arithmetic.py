"""CPU seconds of the arithmetic of a step, one way and the other in turn in one process, on one thread: minima.

`python benchmarks/arithmetic.py [--repeats 6]`, two minutes: covariances of patches, symmetric products, bfloat16, two
directions in one product, equal shapes in one product. `python benchmarks/arithmetic.py --steps` has milliseconds of
whole steps; for another state of the library, put its `src` first in `PYTHONPATH`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad import Bernoulli, Categorical, Gaussian, KLLimit, NaturalGradient, QuadraticModel

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)


def milliseconds(repeats: int, *ways: Callable[[], Any]) -> list[float]:
    """The least of every way, taken in turn."""
    least = [float("inf")] * len(ways)
    for k in range(repeats + 1):  # the first time prepares kernels
        for number, way in enumerate(ways):
            start = time.process_time()
            way()
            if k:
                least[number] = min(least[number], 1e3 * (time.process_time() - start))
    return least


def covariances(repeats: int) -> None:
    """Of patches, written out and as the library has them; of dense layers, whole and by block rows."""
    from natgrad.capture import symmetric
    from natgrad.layers.convolution import Convolution
    from natgrad.layers.patches import Patches, correlates

    print("patches of n images, c channels, size, kernel, stride: written out, here")
    for n, c, size, k, stride in [
        (32, 1, 28, 3, 1), (32, 16, 28, 3, 1), (32, 32, 14, 3, 1), (32, 64, 7, 3, 1), (64, 3, 32, 3, 1),
        (64, 16, 32, 3, 1), (64, 64, 8, 3, 1), (64, 16, 12, 5, 1), (64, 16, 32, 3, 2),
    ]:  # fmt: skip
        form = Convolution((k, k), (stride, stride), ((k // 2, k // 2),) * 2, (1, 1))
        seen = Patches(form, torch.randn(n, c, size, size), True)

        def written(seen: Patches = seen) -> Tensor:
            a = seen.dense().flatten(0, 1)
            return a.mT @ a

        whole, here = milliseconds(repeats, written, lambda seen=seen: seen.moment(torch.float32))
        way = "correlations" if correlates(form, seen.x) else "patches"
        print(f"{n:5}{c:4}{size:4}{k:3}{stride:3}{whole:9.2f}{here:9.2f}  {way}")
    print("x^T x for x (n, d): whole, by block rows")
    for n, d in [(500, 512), (500, 785), (500, 1001), (500, 2048), (4096, 512)]:
        x = torch.randn(n, d)
        whole, rows = milliseconds(repeats, lambda x=x: x.mT @ x, lambda x=x: symmetric(x, x))
        print(f"{n:5}{d:5}{whole:9.2f}{rows:9.2f}")


def products(repeats: int) -> None:
    """With inverses and with directions."""
    print("G M A for M (out, in): float32, bfloat16")
    for out, width in [(128, 129), (256, 257), (500, 1001), (1000, 785)]:
        G, M, A = (torch.randn(shape) for shape in ((out, out), (out, width), (width, width)))
        low = G.bfloat16(), A.bfloat16()
        fast = milliseconds(
            repeats, lambda G=G, M=M, A=A: G @ M @ A, lambda M=M, low=low: (low[0] @ M.bfloat16() @ low[1]).float()
        )
        print(f"{out:5}{width:5}{fast[0]:9.2f}{fast[1]:9.2f}")
    print("two directions (out, in) at x (n, in): one after the other, side by side")
    for n, width, out in [(500, 784, 1000), (500, 250, 30), (1024, 64, 256), (1024, 256, 64)]:
        x, D, P, g = (torch.randn(shape) for shape in ((n, width), (out, width), (out, width), (n, out)))
        two, one = milliseconds(
            repeats,
            lambda x=x, D=D, P=P, g=g: [(F.linear(x, V) * g).sum(-1) for V in (D, P)],
            lambda x=x, D=D, P=P, g=g: (F.linear(x, torch.cat([D, P])).unflatten(-1, (2, -1)) * g[:, None]).sum(-1),
        )
        print(f"{n:5}{width:5}{out:5}{two:9.2f}{one:9.2f}")
    print("G M A of four layers (out, in): one by one, stacked")
    for out, width in [(192, 65), (64, 257), (128, 129), (512, 129)]:
        G, M, A = (torch.randn(4, *shape) for shape in ((out, out), (out, width), (width, width)))
        parts = list(zip(G.unbind(), M.unbind(), A.unbind(), strict=True))
        one, all_ = milliseconds(
            repeats,
            lambda parts=parts: [g @ m @ a for g, m, a in parts],
            lambda G=G, A=A, parts=parts: (G @ torch.stack([m for _, m, _ in parts]) @ A).unbind(),
        )
        print(f"{out:5}{width:5}{one:9.3f}{all_:9.3f}")


def autoencoder() -> nn.Module:
    """Of the sizes of the MNIST one."""
    return nn.Sequential(*[m for pair in pairwise(WIDTHS) for m in (nn.Linear(*pair), nn.Sigmoid())][:-1])


class Transformer(nn.Module):
    """Four layers of width 64."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.tokens, self.places, self.head = nn.Embedding(64, 64), nn.Embedding(32, 64), nn.Linear(64, 64)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, t)."""
        return self.head(self.layers(self.tokens(x) + self.places(torch.arange(x.shape[1])))).transpose(1, 2)


def pair(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    """Two convolutions of 3 x 3."""
    first = nn.Conv2d(n_in, n_out, 3, stride, 1)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(n_out, n_out, 3, padding=1), nn.ReLU())


class UNet(nn.Module):
    """Three scales of 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mid, self.low = pair(1, 16), pair(16, 32), pair(32, 64)
        self.up, self.wide = nn.ConvTranspose2d(64, 32, 2, 2), pair(64, 32)
        self.up2, self.wide2, self.head = nn.ConvTranspose2d(32, 16, 2, 2), pair(32, 16), nn.Conv2d(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 1, h, w)."""
        a = self.down(x)
        b = self.mid(F.max_pool2d(a, 2))
        y = self.wide(torch.cat([self.up(self.low(F.max_pool2d(b, 2))), b], 1))
        return self.head(self.wide2(torch.cat([self.up2(y), a], 1)))


def convnet() -> nn.Module:
    """Seven convolutions of 3 x 3, two of them with stride 2."""
    parts = nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), pair(16, 16), pair(16, 32, 2), pair(32, 64, 2)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def steps() -> None:
    """``step()`` alone, without forward and backward pass."""
    bits, tokens = torch.rand(500, 784), torch.randint(64, (32, 33))
    tasks: dict[str, Any] = {
        "auto-encoder": (autoencoder, bits, bits, Bernoulli(), F.binary_cross_entropy_with_logits),
        "transformer": (Transformer, tokens[:, :-1], tokens[:, 1:], Categorical(), F.cross_entropy),
        "U-Net": (UNet, torch.randn(32, 1, 28, 28), torch.zeros(32, 1, 28, 28), Gaussian(), F.mse_loss),
        "convnet": (convnet, torch.randn(64, 3, 32, 32), torch.randint(10, (64,)), Categorical(), F.cross_entropy),
    }
    print("plain step and step with an observation, and the sum of the first 13")
    for name, (make, x, y, likelihood, loss) in tasks.items():
        for policy in (QuadraticModel(), KLLimit()):
            torch.manual_seed(0)
            model = make()
            optimizer = NaturalGradient(model, likelihood=likelihood, step_size=policy)
            spent = []
            for _ in range(20):
                optimizer.zero_grad()
                loss(model(x), y).backward()
                start = time.process_time()
                optimizer.step()
                spent.append(1e3 * (time.process_time() - start))
            plain = min(spent[k] for k in range(9, 20) if k % 4 and k % 10)
            observing = min(spent[k] for k in (12, 16))
            print(f"{name:13}{type(policy).__name__:15}{plain:9.1f}{observing:9.1f}{sum(spent[:13]):9.0f}")


def main() -> None:
    """Parts, or whole steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--steps", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if chosen.steps:
        steps()
    else:
        covariances(chosen.repeats)
        products(chosen.repeats)


if __name__ == "__main__":
    main()
