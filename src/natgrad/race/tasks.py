"""The tasks of a race: data, network, loss, batch and length, in one table."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad
from natgrad.race import curves, data, networks
from natgrad.race.data import Dataset, Pair


@dataclass(frozen=True)
class Task:
    """What is trained: `data(folder)`, `model(dataset)`, `loss(output, target)` and its likelihood."""

    name: str
    data: Callable[[Path | None], Dataset]
    model: Callable[[Dataset], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    likelihood: Callable[[], Any]
    batch: int
    epochs: int


def pixel_loss(output: Tensor, target: Tensor) -> Tensor:
    """Bernoulli negative log-likelihood: summed over the pixels of an image, mean over images."""
    return F.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(target)


def mnist_images(folder: Path | None) -> Dataset:
    """All 5,000 bundled digits as inputs and targets; full MNIST's test images where they are found."""
    x, _ = data.load_digits()
    if data.find_idx("MNIST", folder) is None:
        return Dataset("MNIST, 5,000 digits", (x, x))
    test_x = data.load_idx("MNIST", folder)[1][0].flatten(1).float() / 255
    return Dataset("MNIST, 5,000 digits", (x, x), (test_x, test_x))


def curve_images(folder: Path | None) -> Dataset:
    """CURVES as inputs and targets: 20,000 images for training and 10,000 for test."""
    x = curves.cached_curves(30_000, 0, data.cache()).float() / 255
    return Dataset("CURVES", (x[:20_000], x[:20_000]), (x[20_000:], x[20_000:]))


def digit_labels(folder: Path | None) -> Dataset:
    """The bundled digits with labels: 400 of each class for training, 100 for test."""
    x, y = data.load_digits()
    train, test = stratified(y, 0.8, seed=0)
    return Dataset("MNIST, 5,000 digits", (x[train], y[train]), (x[test], y[test]))


def stratified(y: Tensor, share: float, seed: int) -> Pair:
    """Split the positions of labels `y` (n,) in two, with `share` of every class in the first."""
    generator = torch.Generator().manual_seed(seed)
    first, second = [], []
    for label in y.unique():
        members = (y == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        cut = round(share * len(members))
        first.append(members[:cut])
        second.append(members[cut:])
    return torch.cat(first), torch.cat(second)


def photographs(folder: Path | None) -> Dataset:
    """CIFAR-10 where it is found, else Fashion-MNIST; channels normalised by the training images."""
    if data.find_cifar(folder):
        return normalised("CIFAR-10", *data.load_cifar(folder))
    if data.find_idx("Fashion-MNIST", folder):
        (x, y), (test_x, test_y) = data.load_idx("Fashion-MNIST", folder)
        return normalised("Fashion-MNIST", (x[:, None], y), (test_x[:, None], test_y))
    hints = f"CIFAR-10: {data.HINTS['CIFAR-10']}; Fashion-MNIST: {data.HINTS['Fashion-MNIST']}"
    raise data.MissingData(f"task convnet found neither of its data sets. {hints}")


def normalised(name: str, train: Pair, test: Pair) -> Dataset:
    """Scale images (n, c, h, w) of bytes to mean 0 and deviation 1 per channel of the training set."""
    x = train[0].float() / 255
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    test_x = test[0].float() / 255
    return Dataset(name, ((x - mean) / deviation, train[1]), ((test_x - mean) / deviation, test[1]))


def bernoulli() -> Any:
    """Likelihood of the auto-encoders."""
    return natgrad.Bernoulli()


def categorical() -> Any:
    """Likelihood of the classifiers."""
    return natgrad.Categorical()


TASKS = {
    task.name: task
    for task in (
        Task(
            name="mnist-ae",
            data=mnist_images,
            model=lambda _: networks.autoencoder(784, 1000, 500, 250, 30),
            loss=pixel_loss,
            likelihood=bernoulli,
            batch=500,
            epochs=40,
        ),
        Task(
            name="curves-ae",
            data=curve_images,
            model=lambda _: networks.autoencoder(784, 400, 200, 100, 50, 25, 6),
            loss=pixel_loss,
            likelihood=bernoulli,
            batch=500,
            epochs=20,
        ),
        Task(
            name="digits",
            data=digit_labels,
            model=lambda _: networks.perceptron(784, 500, 300, 10),
            loss=F.cross_entropy,
            likelihood=categorical,
            batch=128,
            epochs=12,
        ),
        Task(
            name="convnet",
            data=photographs,
            model=lambda found: networks.resnet(channels=found.train[0].shape[1]),
            loss=F.cross_entropy,
            likelihood=categorical,
            batch=128,
            epochs=5,
        ),
    )
}
