import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from natgrad.race import data, datasets, vision
from natgrad.race.data import Dataset
from natgrad.race.entries import ENTRIES
from natgrad.race.run import Rules, mean_loss, run
from natgrad.race.tasks import TASKS


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 20, channels: int = 3, side: int = 32) -> Tensor:
    return torch.randn(n, channels, side, side, generator=seeded())


def small(name: str) -> Dataset:
    """A few drawn examples of the shape of a task."""
    if name == "unet":
        x = images(20, 1, 16).tanh()
        return Dataset("drawn", (x, x), (x[:8], x[:8]))
    y = torch.arange(20) % 10
    return Dataset("drawn", (images(), y), (images(8), y[:8]))


VISION = ("resnet-bn", "vit", "unet")


@pytest.mark.parametrize(("name", "parameters"), [("resnet-bn", 78_042), ("vit", 141_898), ("unet", 188_433)])
def test_networks_map_a_batch_to_what_the_loss_takes(name: str, parameters: int) -> None:
    task, found = TASKS[name], small(name)
    model = task.model(found)
    assert sum(p.numel() for p in model.parameters()) == parameters
    x, y = task.augment(*found.train, seeded()) if task.augment else found.train
    output = model(x)
    assert output.shape == ((20, 1, 16, 16) if name == "unet" else (20, 10))
    assert math.isfinite(task.loss(output, y).item())


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("entry", ["adamw", "muon", "kfac"])
def test_tasks_train_with_a_last_batch_that_is_smaller(name: str, entry: str) -> None:
    task, racer = TASKS[name], ENTRIES[entry]
    task = replace(task, batch=8, metrics={})
    done = run(task, small(name), racer, settings=racer.defaults, seed=0, rules=Rules(2))
    assert done.stopped == "" and [p.step for p in done.curve] == [0, 3, 6]
    assert all(p.test_loss is not None and math.isfinite(p.test_loss) for p in done.curve)


def test_every_crop_is_a_window_of_the_padded_image_or_its_mirror_image() -> None:
    x, y = images(200, 2, 6), torch.arange(200)
    found, labels = vision.crops(x, y, seeded())
    assert labels is y and found.shape == x.shape and found.is_contiguous()
    padded = torch.nn.functional.pad(x, 4 * [vision.MARGIN])
    seen = set()
    for image, crop in zip(padded, found, strict=True):
        places = [
            (i, j, flip)
            for i in range(9)
            for j in range(9)
            for flip in (False, True)
            if torch.equal(crop, image[:, i : i + 6, j : j + 6].flip(-1) if flip else image[:, i : i + 6, j : j + 6])
        ]
        assert places
        seen.add(places[0])
    assert {i for i, _, _ in seen} == {j for _, j, _ in seen} == set(range(9)) and {f for *_, f in seen} == {
        False,
        True,
    }


def test_draws_repeat_for_a_seed_and_change_from_batch_to_batch() -> None:
    for draw, x in ((vision.crops, images()), (vision.noisy, images(20, 1, 16))):
        generator = seeded()
        first, second = draw(x, x, generator)[0], draw(x, x, generator)[0]
        assert torch.equal(first, draw(x, x, seeded())[0]) and not torch.equal(first, second)


def test_the_denoiser_is_given_the_image_the_noise_and_the_time_in_the_shares_of_the_schedule() -> None:
    x = images(500, 1, 16)
    seen, noise = vision.noisy(x, x, seeded())
    t = seen[:, 1, 0, 0]
    assert seen.shape == (500, 2, 16, 16) and (seen[:, 1] == t[:, None, None]).all()
    assert 0 <= t.min() < 0.02 and 0.98 < t.max() < 1 and abs(float(t.mean()) - 0.5) < 0.05
    angle = math.pi / 2 * t[:, None, None, None]
    torch.testing.assert_close(seen[:, :1], angle.cos() * x + angle.sin() * noise)
    assert abs(float(noise.var()) - 1) < 0.01


def test_the_loss_of_the_denoiser_is_measured_on_the_same_noise_every_time() -> None:
    task, found = TASKS["unet"], small("unet")
    model = task.model(found)
    assert mean_loss(task, model, found.train) == mean_loss(task, model, found.train)

    class Zero(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x[:, :1])

    assert mean_loss(task, Zero(), found.train) == pytest.approx(1, abs=0.05), "noise has variance one"


def test_the_time_changes_what_the_denoiser_says() -> None:
    model = vision.UNet()
    x = torch.cat(
        [images(1, 1, 16).expand(2, -1, -1, -1), torch.tensor([0.2, 0.8]).reshape(2, 1, 1, 1).expand(-1, -1, 16, 16)], 1
    )
    first, second = model(x)
    assert (first - second).abs().max() > 1e-3


def test_few_photographs_are_the_first_of_cifar_normalised_by_those(monkeypatch: pytest.MonkeyPatch) -> None:
    def pair(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(256, (n, 3, 8, 8), generator=seeded()).to(torch.uint8), torch.arange(n) % 10

    monkeypatch.setattr(data, "load_cifar", lambda folder: (pair(4500), pair(1200)))
    found = vision.few_photographs(None)
    assert found.test is not None and (len(found.train[0]), len(found.test[0])) == (4000, 1000)
    assert found.train[0].mean((0, 2, 3)).abs().max() < 1e-4 and "4,000" in found.name


def test_digits_are_shrunk_to_16_by_16_between_minus_one_and_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(50, 784)
    x.reshape(50, 28, 28)[:, 2:4, 4:6] = 1
    x.reshape(50, 28, 28)[:, 20:22, 20:22] = (torch.arange(50) % 10)[:, None, None] / 10
    monkeypatch.setattr(data, "load_digits", lambda: (x, torch.arange(50) % 10))
    assert datasets.digit_labels(None).test is not None
    found = vision.clean_digits(None)
    assert found.test is not None and found.train[0].shape == (40, 1, 16, 16) and len(found.test[0]) == 10
    assert found.train[1] is found.train[0]
    image = found.train[0][0, 0]
    assert (image == 1).nonzero().tolist() == [[2, 3]] and (image == -1).sum() >= 254
    classes = found.train[0][:, 0, 11, 11]
    assert len(classes[:10].unique()) > 5 and len(classes.unique()) == 10, "all classes among the first few"
