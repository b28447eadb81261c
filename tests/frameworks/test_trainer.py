"""The ``Trainer`` of transformers: the loss inside the model, clipping, accumulation, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CHARACTERS, CLASS, NEXT, batches, bert, distance, gpt2, plain_loop, same, text, two_kinds

from natgrad import EKFAC, Categorical, NaturalGradient

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

ROUNDING = {gpt2: 1e-5, bert: 1e-10}  # the models are in float64, but language models compute their loss in float32
LIKELIHOOD = {gpt2: NEXT, bert: CLASS}
POSITIONS = {gpt2: ["transformer.wpe"], bert: ["bert.embeddings.position_embeddings"]}
DATA = {gpt2: text, bert: two_kinds}


def trainer_of(
    model: Any,
    folder: Path,
    data: list[Any],
    optimizer: NaturalGradient | None = None,
    how: Any = None,
    **settings: Any,
) -> Any:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    usual = {"per_device_train_batch_size": 32, "num_train_epochs": 1, "max_grad_norm": 0.0, "save_strategy": "no"}
    constant = {"lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    arguments = transformers.TrainingArguments(str(folder), **{**quiet, **usual, **constant, **settings})
    return transformers.Trainer(
        model, arguments, train_dataset=data, optimizers=(optimizer, None), optimizer_cls_and_kwargs=how
    )


def trained(make: Any, folder: Path, n: int, steps: dict[str, Any] | None = None, **settings: Any) -> Any:
    """The model after one epoch of n examples."""
    model = make()
    optimizer = NaturalGradient(model, likelihood=LIKELIHOOD[make], **(steps or {}))
    trainer_of(model, folder, DATA[make]()[:n], optimizer, **settings).train()
    return model


def plain_loss(model: Any, batch: Any) -> float:
    with torch.no_grad():
        return float(model(**batch).loss)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Training.


def test_a_language_model_learns_and_is_covered(tmp_path: Path) -> None:
    """From about log 32 to well below the entropy of the characters' frequencies: it uses what came before."""
    data, model = text(), gpt2()
    optimizer = NaturalGradient(model, EKFAC(), likelihood=NEXT)
    settings: Any = {"per_device_train_batch_size": 64, "num_train_epochs": 10, "logging_steps": 4}
    trainer = trainer_of(model, tmp_path, data, optimizer, **settings)
    trainer.train()
    p = torch.stack([example["labels"] for example in data]).flatten().bincount(minlength=CHARACTERS).double()
    p = p / p.sum()
    assert losses(trainer)[0] > 0.85 * math.log(CHARACTERS)
    assert losses(trainer)[-1] < -0.85 * float((p * p.clamp(min=1e-12).log()).sum())
    assert optimizer.steps == 40
    assert float(repr(optimizer).splitlines()[-1].split()[0]) >= 99


def test_a_classifier_learns_with_the_optimizer_that_the_trainer_makes(tmp_path: Path) -> None:
    model = bert()
    how = NaturalGradient, {"model": model, "approximation": EKFAC(), "likelihood": CLASS, "estimator": "exact"}
    settings: Any = {"per_device_train_batch_size": 64, "num_train_epochs": 20, "logging_steps": 4}
    trainer = trainer_of(model, tmp_path, two_kinds(n=256), how=how, **settings)
    trainer.train()
    optimizer = trainer.optimizer.optimizer  # Accelerate wraps it
    assert isinstance(optimizer, NaturalGradient)
    assert losses(trainer)[0] > 0.9 * math.log(2)
    assert losses(trainer)[-1] < 0.5 * math.log(2)
    assert float(repr(optimizer).splitlines()[-1].split()[0]) >= 99


@pytest.mark.parametrize("make", [gpt2, bert])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_trainer_is_a_plain_loop(tmp_path: Path, make: Any, clip: float) -> None:
    model, reference = trained(make, tmp_path, 128, max_grad_norm=clip), make()
    data = batches(DATA[make]()[:128], 32)
    optimizer = NaturalGradient(reference, likelihood=LIKELIHOOD[make])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # the Trainer has one too: steps do not settle
    plain_loop(reference, optimizer, data, clip or None)
    assert distance(model, reference) < ROUNDING[make]


# Accumulation.


@pytest.mark.parametrize("make", [gpt2, bert])
def test_four_micro_batches_equal_the_one_batch(tmp_path: Path, make: Any) -> None:
    """But for positions, which all examples of a pass share: there only the mean is the same."""
    steps = {"exclude": POSITIONS[make]}
    whole = trained(make, tmp_path, 128, steps, per_device_train_batch_size=32)
    split = trained(make, tmp_path, 128, steps, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    assert distance(split, whole) < ROUNDING[make]


def padded(example: Any, k: int) -> dict[str, torch.Tensor]:
    """The last of the tokens taken away, and their labels ignored."""
    labels = example["labels"].clone()
    labels[16 - k % 8 :] = -100
    return {"input_ids": example["input_ids"].where(labels >= 0, 0), "labels": labels}


def test_padded_micro_batches_equal_the_one_batch(tmp_path: Path) -> None:
    """The numbers of tokens differ; ``Trainer`` divides by that of all micro-batches, and so does the curvature."""
    data = [padded(example, k) for k, example in enumerate(text()[:128])]
    found = []
    for size, parts in ((32, 1), (8, 4)):
        model = gpt2()
        likelihood = Categorical(output="logits", shift=1, ignore_index=-100)
        optimizer = NaturalGradient(model, EKFAC(), likelihood=likelihood, exclude=POSITIONS[gpt2])
        optimizer.targets(lambda *_, labels, **rest: labels)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        trainer_of(model, tmp_path, data, optimizer, **settings).train()
        found.append(model)
    assert distance(*found) < ROUNDING[gpt2]


# Checkpoints.


@pytest.mark.parametrize("make", [gpt2, bert])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, make: Any) -> None:
    """With dropout, whose random numbers the ``Trainer`` restores, and a schedule."""
    settings = {"save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "linear", "num_train_epochs": 2}
    settings["train_sampling_strategy"] = "random"
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-5")):
        model = make(dropout=0.1)
        optimizer = NaturalGradient(model, EKFAC(), likelihood=LIKELIHOOD[make], refresh_every=4)
        trainer_of(model, tmp_path, DATA[make]()[:128], optimizer, **settings).train(resume_from_checkpoint=checkpoint)
        runs.append((model, optimizer))
    (model, optimizer), (resumed, second) = runs
    assert optimizer.steps == second.steps == 8
    assert same(model, resumed)
    for state, other in zip(
        optimizer.state_dict()["state"].values(), second.state_dict()["state"].values(), strict=True
    ):
        assert state.keys() == other.keys()
        assert all(torch.equal(state[k], other[k]) for k in state if isinstance(state[k], torch.Tensor))


# What the arguments turn on.


def test_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    plain = trained(bert, tmp_path, 128)
    recomputed = trained(bert, tmp_path, 128, activation_checkpointing=True)
    assert distance(recomputed, plain) < ROUNDING[bert]


def test_bfloat16_trains(tmp_path: Path) -> None:
    """The first loss is that in single precision up to the rounding of bfloat16, and the last is lower."""
    model = gpt2().float()
    first = plain_loss(model, batches(text(n=32), 32)[0])
    optimizer = NaturalGradient(model, likelihood=NEXT)
    trainer = trainer_of(model, tmp_path, text(n=128), optimizer, num_train_epochs=4, logging_steps=1, bf16=True)
    trainer.train()
    assert 0 < abs(losses(trainer)[0] - first) < 0.01 * first
    assert losses(trainer)[-1] < 0.9 * first
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft 0.21 asks for it
def test_adapters_of_low_rank_are_covered_and_learn(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "init_lora_weights": False}
    model = peft.get_peft_model(gpt2(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    optimizer = NaturalGradient(model, likelihood=NEXT, strict=True)
    trainer = trainer_of(model, tmp_path, text(n=128), optimizer, num_train_epochs=12, logging_steps=1)
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    assert len(optimizer.layers) == 4
    assert not any("base_layer" in name for name in optimizer.layers)


def test_evaluation_leaves_no_record(tmp_path: Path) -> None:
    plain, model = trained(bert, tmp_path, 128), bert()
    optimizer = NaturalGradient(model, likelihood=CLASS)
    trainer = trainer_of(model, tmp_path, two_kinds(n=128), optimizer)
    trainer.evaluate(two_kinds(n=32))
    assert not optimizer._engine.pending
    trainer.train()
    trainer.evaluate(two_kinds(n=32))
    assert not optimizer._engine.pending
    assert same(model, plain)
