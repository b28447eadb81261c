"""The data of each task: what is read or drawn, split and scaled."""

from pathlib import Path

import torch
from torch import Tensor

from natgrad.race import curves, data, faces
from natgrad.race.data import Dataset, Pair

DIGITS = "MNIST, 5,000 digits"


def mnist_images(folder: Path | None) -> Dataset:
    """All 5,000 bundled digits as inputs and targets; full MNIST's test images where they are found."""
    x, _ = data.load_digits()
    if data.find_idx("MNIST", folder) is None:
        return Dataset(DIGITS, (x, x))
    test_x = data.load_idx("MNIST", folder)[1][0].flatten(1).float() / 255
    return Dataset(DIGITS, (x, x), (test_x, test_x))


def published_mnist_images(folder: Path | None) -> Dataset:
    """The first 50,000 images of full MNIST where it is found, and its test images; else the bundled digits."""
    if data.find_idx("MNIST", folder) is None:
        return mnist_images(folder)
    x, test_x = (images.flatten(1).float() / 255 for images, _ in data.load_idx("MNIST", folder))
    return Dataset("MNIST, 50,000 images", (x[:50_000], x[:50_000]), (test_x, test_x))


def curve_images(folder: Path | None) -> Dataset:
    """CURVES as inputs and targets: 20,000 images for training and 10,000 for test."""
    x = curves.cached_curves(30_000, 0, data.cache()).float() / 255
    return Dataset("CURVES", (x[:20_000], x[:20_000]), (x[20_000:], x[20_000:]))


def face_images(folder: Path | None) -> Dataset:
    """FACES as inputs and targets: 414 views of each image of 25 people, and for test 400 of 10 other people.

    That makes 103,500 and 40,000 images. Of the training images every pixel has mean 0 and all together variance 1.
    """
    images, person = data.load_faces(folder)
    people, others = images[person < 25], images[person >= 30]
    x = data.stored("faces-414-0", lambda: faces.views(people, 414, seed=0)).float()
    test_x = data.stored("faces-400-1", lambda: faces.views(others, 400, seed=1)).float()
    mean = x.mean(0)
    deviation = (x - mean).square().mean().sqrt()
    x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    return Dataset("FACES", (x, x), (test_x, test_x))


def digit_labels(folder: Path | None) -> Dataset:
    """The bundled digits with labels: 400 of each class for training, 100 for test."""
    x, y = data.load_digits()
    train, test = stratified(y, 0.8, seed=0)
    return Dataset(DIGITS, (x[train], y[train]), (x[test], y[test]))


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


def garments(folder: Path | None) -> Dataset:
    """Fashion-MNIST (n, 784) in [0, 1] where it is found, else the bundled digits, which come in order of class."""
    if data.find_idx("Fashion-MNIST", folder):
        (x, y), (test_x, test_y) = data.load_idx("Fashion-MNIST", folder)
        return Dataset("Fashion-MNIST", (x.flatten(1).float() / 255, y), (test_x.flatten(1).float() / 255, test_y))
    if data.find_digits():
        return digit_labels(folder)
    raise _neither("deep-linear", "Fashion-MNIST", DIGITS)


def photographs(folder: Path | None) -> Dataset:
    """CIFAR-10 where it is found, else Fashion-MNIST; channels normalised by the training images."""
    if data.find_cifar(folder):
        return cifar(folder)
    if data.find_idx("Fashion-MNIST", folder):
        (x, y), (test_x, test_y) = data.load_idx("Fashion-MNIST", folder)
        return normalised("Fashion-MNIST", (x[:, None], y), (test_x[:, None], test_y))
    raise _neither("convnet", "CIFAR-10", "Fashion-MNIST")


def cifar(folder: Path | None) -> Dataset:
    """CIFAR-10, channels normalised by the training images, no augmentation."""
    return normalised("CIFAR-10", *data.load_cifar(folder))


def normalised(name: str, train: Pair, test: Pair) -> Dataset:
    """Scale images (n, c, h, w) of bytes to mean 0 and deviation 1 per channel of the training set."""
    x = train[0].float() / 255
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    test_x = test[0].float() / 255
    return Dataset(name, ((x - mean) / deviation, train[1]), ((test_x - mean) / deviation, test[1]))


def _neither(task: str, *names: str) -> data.MissingData:
    hints = "; ".join(f"{name}: {data.HINTS[name]}" for name in names)
    return data.MissingData(f"task {task} found neither of its data sets. {hints}")
