"""The tasks of a race: data, network, loss, batch and length, in one table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad
from natgrad.race import datasets, finetune, gpt, graphs, language, networks, physics, tables, translation, vision
from natgrad.race.data import Dataset, Pair
from natgrad.race.networks import autoencoder

Metric = Callable[[nn.Module, Dataset], float]
Draw = Callable[[Tensor, Tensor, torch.Generator], Pair]


@dataclass(frozen=True)
class Task:
    """What is trained: `data(folder)`, `model(dataset)`, `loss(output, target)` and its likelihood.

    The loss is a mean over `terms(target)` loss terms, as many as examples where nothing is said. Losses over a whole
    set are measured `chunk` examples at a time, `points` times an epoch; `metrics` are measured once, after training.

    With `keep_last` an epoch ends with the batch of what is left over, as torch's DataLoader has it by default.
    `augment(x, y, generator)` makes of every batch what is trained on; the generator is seeded by the run's seed alone,
    so that all entries see the same draws. `measured` does so for the sets that losses are measured on, with the same
    draws at every measurement; without it they are measured as they are.
    """

    name: str
    data: Callable[[Path | None], Dataset]
    model: Callable[[Dataset], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    likelihood: Callable[[], Any]
    batch: int
    epochs: int
    terms: Callable[[Tensor], int] = len
    chunk: int = 1000
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    points: int = 1
    keep_last: bool = False
    augment: Draw | None = None
    measured: Draw | None = None


def pixel_loss(output: Tensor, target: Tensor) -> Tensor:
    """Bernoulli negative log-likelihood: summed over the pixels of an image, mean over images."""
    return F.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(target)


def square_loss(output: Tensor, target: Tensor) -> Tensor:
    """Gaussian negative log-likelihood: half the squared error, summed over pixels, mean over images."""
    return F.mse_loss(output, target, reduction="sum") / (2 * len(target))


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """Per cent of the test examples whose likeliest class is theirs."""
    if data.test is None:
        return float("nan")
    parts = zip(data.test[0].split(250), data.test[1].split(250), strict=True)
    return 100 * sum(int((model(x).argmax(-1) == y).sum()) for x, y in parts) / len(data.test[0])


def bernoulli() -> Any:
    """Likelihood of the auto-encoders on grey levels from 0 to 1."""
    return natgrad.Bernoulli()


def categorical() -> Any:
    """Likelihood of the classifiers."""
    return natgrad.Categorical()


MNIST = (784, 1000, 500, 250, 30)
CURVES = (784, 400, 200, 100, 50, 25, 6)
FACES = (625, 2000, 1000, 500, 30)
# The form of arXiv 2201.10285: ReLU after the code too, and losses that are means over pixels, likelihoods told so.
RELU = partial(autoencoder, activation=nn.ReLU, linear_code=False, bias=0.01)
MEAN_BERNOULLI = partial(natgrad.Bernoulli, reduction="mean")
MEAN_GAUSSIAN = partial(natgrad.Gaussian, reduction="mean")
BYTES: dict[str, Any] = {
    "data": language.manual,
    "loss": language.token_loss,
    "likelihood": categorical,
    "batch": 64,
    "epochs": 5,
    "terms": Tensor.numel,
    "chunk": 100,
    "metrics": {"bits per byte": language.bits_per_byte},
}
CLASSES: dict[str, Any] = {
    "loss": F.cross_entropy,
    "likelihood": categorical,
    "metrics": {"test accuracy %": accuracy},
}
BINARY: dict[str, Any] = {"loss": pixel_loss, "likelihood": bernoulli}
MEAN_BINARY: dict[str, Any] = {"loss": F.binary_cross_entropy_with_logits, "likelihood": MEAN_BERNOULLI}

TASKS = {
    task.name: task
    for task in (
        Task("mnist-ae", datasets.mnist_images, lambda _: autoencoder(*MNIST), batch=500, epochs=40, **BINARY),
        Task("curves-ae", datasets.curve_images, lambda _: autoencoder(*CURVES), batch=500, epochs=20, **BINARY),
        Task(
            name="faces-ae",
            data=datasets.face_images,
            model=lambda _: autoencoder(*FACES),
            loss=square_loss,
            likelihood=natgrad.Gaussian,
            batch=500,
            epochs=10,
        ),
        Task(
            name="mnist-ae-relu",
            data=datasets.published_mnist_images,
            model=lambda _: RELU(*MNIST),
            batch=512,
            epochs=50,
            **MEAN_BINARY,
        ),
        Task("curves-ae-relu", datasets.curve_images, lambda _: RELU(*CURVES), batch=256, epochs=50, **MEAN_BINARY),
        Task(
            name="faces-ae-relu",
            data=datasets.face_images,
            model=lambda _: RELU(*FACES),
            loss=F.mse_loss,
            likelihood=MEAN_GAUSSIAN,
            batch=1024,
            epochs=10,
        ),
        Task(
            name="digits",
            data=datasets.digit_labels,
            model=lambda _: networks.perceptron(784, 500, 300, 10),
            batch=128,
            epochs=12,
            **CLASSES,
        ),
        Task(
            name="deep-linear",
            data=datasets.garments,
            model=lambda _: networks.deep_linear(784, 10, depth=64),
            batch=512,
            epochs=20,
            **CLASSES,
        ),
        Task(
            name="convnet",
            data=datasets.photographs,
            model=lambda found: networks.resnet(channels=found.train[0].shape[1]),
            batch=128,
            epochs=5,
            **CLASSES,
        ),
        Task(
            name="resnet18",
            data=datasets.cifar,
            model=lambda _: networks.resnet18(channels=3),
            batch=128,
            epochs=20,
            chunk=250,
            **CLASSES,
        ),
        Task(
            name="resnet18-narrow",
            data=datasets.cifar,
            model=lambda _: networks.resnet18(channels=3, width=16),
            batch=128,
            epochs=5,
            chunk=250,
            **CLASSES,
        ),
        Task(
            name="multi30k",
            data=translation.translations,
            model=translation.translator,
            loss=translation.word_loss,
            likelihood=partial(
                natgrad.Categorical, label_smoothing=translation.SMOOTHING, ignore_index=translation.PADDING
            ),
            batch=128,
            epochs=10,
            terms=translation.words,
            chunk=250,
            metrics={"BLEU": translation.bleu},
        ),
        Task("lstm-lm", model=language.lstm, **BYTES),
        Task("transformer-lm", model=language.transformer, **BYTES),
        Task("table", tables.flights, tables.table_network, batch=512, epochs=12, keep_last=True, **CLASSES),
        Task(
            name="gpt",
            data=gpt.captions,
            model=gpt.gpt,
            loss=language.token_loss,
            likelihood=categorical,
            batch=32,
            epochs=2,
            terms=Tensor.numel,
            chunk=100,
            points=4,
            keep_last=True,
            metrics={"perplexity": gpt.perplexity},
        ),
        Task("graph", graphs.verbs, graphs.gcn, batch=1024, epochs=30, keep_last=True, chunk=100_000, **CLASSES),
        Task("minilm", finetune.tweets, finetune.classifier, batch=16, epochs=2, keep_last=True, chunk=100, **CLASSES),
        Task(
            name="pinn",
            data=physics.square,
            model=physics.residuals,
            loss=square_loss,
            likelihood=natgrad.Gaussian,
            batch=512,
            epochs=25,
            metrics={"relative L2 error": physics.relative_error},
        ),
        Task(
            name="resnet-bn",
            data=vision.few_photographs,
            model=vision.residual,
            batch=64,
            epochs=8,
            chunk=500,
            keep_last=True,
            augment=vision.crops,
            **CLASSES,
        ),
        Task(
            name="vit",
            data=vision.few_photographs,
            model=vision.transformer,
            batch=64,
            epochs=8,
            chunk=500,
            keep_last=True,
            **CLASSES,
        ),
        Task(
            name="unet",
            data=vision.clean_digits,
            model=vision.denoiser,
            loss=F.mse_loss,
            likelihood=partial(MEAN_GAUSSIAN, event_dims=3),
            batch=64,
            epochs=10,
            chunk=500,
            keep_last=True,
            augment=vision.noisy,
            measured=vision.noisy,
        ),
    )
}

WIDE = ("resnet-bn", "vit", "unet", "table", "gpt", "graph", "minilm")  # the tasks of `natgrad race --preset wide`
