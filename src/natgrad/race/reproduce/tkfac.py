"""TKFAC and TEKFAC (Gao et al. 2020) against SGD with momentum, Adam, KFAC and EKFAC."""

from __future__ import annotations

import natgrad
from natgrad.race.networks import autoencoder
from natgrad.race.reproduce.claims import Claim, Measure, Results, final, least, over, until
from natgrad.race.reproduce.koroko import UnscaledKLLimit
from natgrad.race.reproduce.study import Experiment, Published, Row, Size, Study

NATURAL = ("kfac", "ekfac", "tkfac", "tekfac")
# The limit does not shrink with lr, so that tuning lr chooses the KL of a step: lr^2 nats, halved, at most.
RULE = {
    "step_size": UnscaledKLLimit(1.0),
    "momentum": 0.9,
    "decay": 0.95,
    "observe_every": 10,
    "refresh_every": 50,
}


def first_order(lr: float) -> tuple[Row, Row]:
    """SGD with momentum, tuned from a learning rate, and Adam."""
    return Row("sgd", "sgd", first={"lr": lr}), Row("adam", "adamw")


def natural(name: str, lr: float, damping: float) -> Row:
    """A natural entry under the same rule for all."""
    return Row(name, name, settings=RULE, first={"lr": lr, "damping": damping})


def by_trace(name: str, lr: float, beta: float = 1.0) -> Row:
    """The same with the papers' rule for convolutional networks: no damping to tune."""
    damping = natgrad.TraceDamping(beta)
    return Row(f"{name}-trace", name, settings={**RULE, "damping": damping}, first={"lr": lr})


DENSE = (*first_order(3e-3), *(natural(name, 0.3, 0.1) for name in NATURAL))
CONVOLUTIONS = (
    *first_order(0.03),
    *(natural(name, 0.03, 0.01) for name in NATURAL),
    *(by_trace(name, 0.03) for name in ("tkfac", "tekfac")),
)
AUTOENCODER, SMALL, LARGE = "mnist-ae", "convnet", "resnet18"
HALF = {"batch": 250, "model": lambda _: autoencoder(784, 500, 250, 125, 30)}

EXPERIMENTS = (
    Experiment(
        AUTOENCODER,
        rows=DENSE,
        sizes={
            "cpu": Size(examples=2500, test=2500, epochs=20, trials=2, changes=HALF),
            "paper": Size(epochs=100, trials=12, seeds=(0, 1, 2)),
        },
        reference="kfac",
        published=Published(
            "no table of the papers is known; seconds to the floor on an MNIST auto-encoder by a third party, untuned",
            {name: {"s to the floor": x} for name, x in zip(NATURAL, (8.6, 10.6, 4.6, 10.6), strict=True)},
        ),
    ),
    Experiment(
        SMALL,
        rows=CONVOLUTIONS,
        sizes={"cpu": Size(examples=1280, test=1000, epochs=4, trials=2)},
        reference="kfac",
    ),
    Experiment(
        LARGE,
        rows=CONVOLUTIONS,
        sizes={"paper": Size(epochs=50, trials=6, seeds=(0, 1, 2))},
        reference="kfac",
        published=Published(
            "the same group's LNGD paper, CIFAR-10, one A100: epochs to 91 %, best test accuracy",
            {
                "sgd": {"epochs to 91 %": 79, "accuracy %": 91.88},
                "adam": {"epochs to 91 %": 72, "accuracy %": 92.62},
                "kfac": {"epochs to 91 %": 45, "accuracy %": 93.34},
            },
        ),
    ),
)
EVERYWHERE = (AUTOENCODER, SMALL, LARGE)
WITH_TRACE = (SMALL, LARGE)


def against(name: str, *others: str) -> dict[str, Measure]:
    """The final loss of a row over the least of others, task by task."""
    return {task: over(final(task, name), least(*(final(task, other) for other in others))) for task in EVERYWHERE}


def nearly(task: str, row: str) -> Measure:
    """A mark for times: 1.1 times a final loss."""

    def measure(results: Results) -> float:
        return 1.1 * final(task, row)(results)

    return measure


STUDY = Study(
    name="tkfac",
    title="TKFAC and TEKFAC",
    paper="Gao, Liu, Huang, Wang, Wang, Xu and Yu, arXiv 2011.10741 (TKFAC, AAAI 2021) and 2011.13609 (TEKFAC).",
    experiments=EXPERIMENTS,
    claims=(
        Claim(
            "TKFAC is ahead of SGD with momentum and Adam",
            "final training loss over the lesser of theirs",
            against("tkfac", "sgd", "adam"),
            at_most=1.0,
        ),
        Claim(
            "TKFAC is ahead of KFAC and EKFAC",
            "final training loss over the lesser of theirs",
            against("tkfac", "kfac", "ekfac"),
            at_most=1.0,
        ),
        Claim(
            "TEKFAC is ahead of SGD with momentum, Adam, EKFAC and TKFAC",
            "final training loss over the least of theirs",
            against("tekfac", "sgd", "adam", "ekfac", "tkfac"),
            at_most=1.0,
        ),
        Claim(
            "On convolutional networks the damping by traces is the better one",
            "final training loss over that with one damping for all layers, tuned",
            {
                f"{name} on {task}": over(final(task, f"{name}-trace"), final(task, name))
                for task in WITH_TRACE
                for name in ("tkfac", "tekfac")
            },
            at_most=1.0,
        ),
        Claim(
            "TKFAC gets near KFAC's loss in half of KFAC's time (third party)",
            "seconds to 1.1 times KFAC's final loss, over KFAC's (published: .53)",
            {AUTOENCODER: over(*(until(AUTOENCODER, n, nearly(AUTOENCODER, "kfac")) for n in ("tkfac", "kfac")))},
            at_most=0.7,
        ),
    ),
    differs=(
        "The papers' tables, learning rates and cadences are not known: claims are judged, numbers are not compared.",
        "Natural rows share one rule: the KL of a step is at most lr^2 / 2 nats, lr being tuned; momentum .9, averages "
        "of .95, statistics every 10 steps, matrices every 50 (and at steps 0, 1, 2, 4, ... 32). The Fisher is "
        "sampled, in the papers empirical.",
        "Rows `-trace` have the damping of the papers for convolutions, our reading of its formula.",
        "Size cpu: the auto-encoder is 784-500-250-125-30 with batch 250, and the network of the images a small "
        "residual one; ResNet-18 needs a GPU and is left to size paper.",
    ),
)
