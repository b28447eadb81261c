"""Lightning: the closures of automatic optimization, manual optimization, checkpoints."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import classifier, digits, distance, plain_digits, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from natgrad import EKFAC, Categorical, KLLimit, NaturalGradient

lightning = pytest.importorskip("lightning")
Module: Any = lightning.LightningModule


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


class Digits(Module):
    """A classifier, its losses, and its optimizer with the settings given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.net, self.settings = classifier(), settings
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.net, **self.settings)


def optimizer_of(model: nn.Module, **settings: Any) -> NaturalGradient:
    return NaturalGradient(model, EKFAC(), **{"likelihood": Categorical(), **settings})


def data(size: int = 64, n: int = 256) -> Any:
    return DataLoader(TensorDataset(*digits(n)), size)


def fitted(module: Any, epochs: int = 2, loader: Any = None, checkpoint: Path | None = None, **settings: Any) -> Any:
    """The module after training."""
    seen = settings.pop("validation", None)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"enable_checkpointing": False, **quiet, **settings}
    trainer = lightning.Trainer(max_epochs=epochs, **settings)
    trainer.fit(module, loader or data(), seen, ckpt_path=checkpoint)
    return module


def plainly(epochs: int = 2, size: int = 64, **settings: Any) -> nn.Module:
    model = classifier()
    return plain_digits(model, optimizer_of(model, **settings), [*data(size)] * epochs)


# Automatic optimization.


@pytest.mark.parametrize("settings", [{}, {"likelihood": None}, {"step_size": KLLimit()}], ids=str)
def test_training_inside_closures_is_a_plain_loop_and_learns(settings: dict[str, Any]) -> None:
    module = fitted(Digits(**settings), 30)
    assert module.losses[0] > 2.0
    assert sum(module.losses[-4:]) / 4 < 0.25
    assert same(module.net, plainly(30, **settings))


def test_four_micro_batches_equal_the_one_batch() -> None:
    split = fitted(Digits(), loader=data(16), accumulate_grad_batches=4)
    assert distance(split.net, plainly(size=64)) < 1e-10


def test_clipping_acts_on_the_gradient() -> None:
    clipped, model = fitted(Digits(), 1, gradient_clip_val=0.1), classifier()
    optimizer = optimizer_of(model)
    for x, y in data():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert distance(clipped.net, model) < 1e-12


def test_validation_leaves_no_record() -> None:
    class Validated(Digits):
        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.net(batch[0])

    module = fitted(Validated(), validation=data(n=64))
    assert not module.trainer.optimizers[0]._engine.pending
    assert same(module.net, plainly())


def test_bfloat16_trains() -> None:
    torch.set_default_dtype(torch.float32)
    module = fitted(Digits(), 14, precision="bf16-mixed")
    assert sum(module.losses[-4:]) / 4 < 0.1
    assert not same(module.net, plainly(14))


# Checkpoints.


@pytest.mark.parametrize("settings", [{}, {"likelihood": None}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    class Scheduled(Digits):
        def configure_optimizers(self) -> Any:
            optimizer = optimizer_of(self.net, refresh_every=3, **self.settings)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}

    fitted(Scheduled(**settings), 2).trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fitted(Scheduled(**settings), 4, checkpoint=tmp_path / "half.ckpt")
    whole = fitted(Scheduled(**settings), 4)
    assert len(resumed.losses) == len(whole.losses) / 2 == 8
    assert resumed.trainer.optimizers[0].steps == 16
    assert same(resumed.net, whole.net)


def test_fitting_again_takes_the_first_optimizer_off_the_model() -> None:
    module = fitted(Digits(), 1)
    hooks = len(module.net._forward_hooks)
    fitted(module, 1)
    gc.collect()
    assert len(module.net._forward_hooks) == hooks
    assert not module.trainer.optimizers[0]._engine.pending


# Manual optimization.


class Two(Digits):
    """Two classifiers, the second on images turned round, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = classifier()

    def training_step(self, batch: list[Tensor], index: int) -> Any:
        x, y = batch
        for model, images, optimizer in zip((self.net, self.other), (x, x.flip(1)), self.optimizers(), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(model(images), y))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [optimizer_of(self.net), optimizer_of(self.other)]


def test_manual_optimization_with_two_optimizers_is_two_plain_loops() -> None:
    module, other = fitted(Two()), classifier()
    plain_digits(other, optimizer_of(other), [[x.flip(1), y] for x, y in data()] * 2)
    assert same(module.net, plainly())
    assert same(module.other, other)


# What is called is what is observed.


def test_the_whole_module_is_observed_where_the_step_calls_it() -> None:
    class Whole(Digits):
        def forward(self, x: Tensor) -> Any:
            return self.net(x)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer_of(self)

    assert same(fitted(Whole()).net, plainly())


def test_a_module_around_the_one_that_is_called_is_named() -> None:
    class Around(Digits):
        def configure_optimizers(self) -> Any:
            return optimizer_of(self)

    with pytest.warns(UserWarning, match=r"net.0.weight, .* net.2.bias; AdamW steps them; observed is what the very"):
        fitted(Around())
