"""FNGD (Ou et al. 2024): seconds per epoch on a residual network, BLEU of a translator at equal time."""

from __future__ import annotations

import natgrad
from natgrad.race.reproduce.claims import Claim, final, metric, minus, over, seconds, step
from natgrad.race.reproduce.study import Experiment, Published, Row, Size, Study

NARROW, FULL, WORDS = "resnet18-narrow", "resnet18", "multi30k"
KFAC = {"step_size": natgrad.KLLimit(1e-3), "observe_every": 10, "refresh_every": 100}
ROWS = (
    Row("sgd", "sgd", first={"lr": 0.03}),
    Row("adamw", "adamw"),
    Row("kfac", "kfac", settings=KFAC, first={"lr": 0.1, "damping": 0.01}),
    Row("fngd", "fngd"),
    Row("fngd[scalar]", "fngd[scalar]"),
)
NAMES = tuple(row.name for row in ROWS)
RATIO = Published("text of the paper, ResNet-18 on CIFAR-100", {"kfac": {"epoch over FNGD's": 2.07}})

EXPERIMENTS = (
    Experiment(
        NARROW,
        rows=ROWS,
        sizes={"cpu": Size(examples=1280, test=500, epochs=3, changes={"batch": 64})},
        reference="sgd",
        published=RATIO,
        timed=NAMES,
    ),
    Experiment(
        FULL,
        rows=ROWS,
        sizes={"paper": Size(epochs=20, trials=6, seeds=(0, 1, 2))},
        reference="sgd",
        published=RATIO,
        timed=NAMES,
    ),
    Experiment(
        WORDS,
        rows=(Row("adamw", "adamw"), Row("fngd", "fngd")),
        sizes={
            "cpu": Size(examples=3000, epochs=6, trials=2, budget=40, changes={"batch": 64}),
            "paper": Size(epochs=20, trials=12, seeds=(0, 1, 2), budget=300),
        },
        reference="adamw",
        published=Published("text of the paper", {"fngd": {"BLEU over AdamW's": "+24"}}),
    ),
)
IMAGES = (NARROW, FULL)

STUDY = Study(
    name="fngd",
    title="FNGD: coefficients of the first epoch, shared by all later ones",
    paper="Ou, Zhu, Huang and Liu, arXiv 2403.03473 (2024).",
    experiments=EXPERIMENTS,
    claims=(
        Claim(
            "After its first epoch FNGD is twice as fast as KFAC",
            "KFAC's mean step over FNGD's, timed in turn (published: 2.07)",
            {task: over(step(task, "kfac"), step(task, "fngd")) for task in IMAGES},
            at_least=2.07,
        ),
        Claim(
            "And costs what SGD costs",
            "mean step over SGD's, timed in turn",
            {task: step(task, "fngd") for task in IMAGES},
            at_most=1.1,
        ),
        Claim(
            "Also in seconds per epoch",
            "KFAC's seconds per epoch after the first over FNGD's (published: 2.07)",
            {task: over(seconds(task, "kfac"), seconds(task, "fngd")) for task in IMAGES},
            at_least=2.07,
        ),
        Claim(
            "FNGD gains 24 BLEU over AdamW at equal time",
            "BLEU less AdamW's",
            {WORDS: minus(metric(WORDS, "fngd", "BLEU"), metric(WORDS, "adamw", "BLEU"))},
            at_least=24,
        ),
        Claim(
            "FNGD is ahead of a tuned AdamW at all at equal time",
            "BLEU less AdamW's",
            {WORDS: minus(metric(WORDS, "fngd", "BLEU"), metric(WORDS, "adamw", "BLEU"))},
            at_least=0,
        ),
        Claim(
            "Ours: shared coefficients are no more than a learning rate for every layer",
            "final training loss of FNGD over that of its scalar variant",
            {task: over(final(task, "fngd"), final(task, "fngd[scalar]")) for task in IMAGES},
            at_least=0.97,
            at_most=1.03,
        ),
    ),
    differs=(
        "How coefficients carry over to later epochs is open in the paper: `fngd` averages them by position in the "
        "batch, `fngd[scalar]` by layer. Damping and learning rates are ours.",
        "KFAC observes every 10 steps and refreshes every 100, with a KL limit of .001.",
        "CIFAR-10 in place of CIFAR-100. Size cpu: a ResNet-18 of a quarter of the width with batch 64 and nothing "
        "tuned, for its times alone; ResNet-18 itself needs a GPU. The translator is trained for 40 s on 3,000 pairs, "
        "which is far from a good translation.",
    ),
)
