from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from natgrad.race import data, datasets, faces
from natgrad.race.tasks import FACES, TASKS, accuracy

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"


def sample(task: str) -> tuple[Tensor, Tensor]:
    """Outputs and targets of the shapes of a task."""
    generator = torch.Generator().manual_seed(0)
    if task == "multi30k":
        return torch.randn(5, 7, 12, generator=generator), torch.randint(0, 4, (5, 7), generator=generator)
    if task == "gpt" or task.endswith("-lm"):
        return torch.randn(5, 7, 12, generator=generator), torch.randint(12, (5, 7), generator=generator)
    if task == "pinn":
        return torch.randn(5, 1, generator=generator), torch.zeros(5, 1)
    if task == "unet":
        return torch.randn(5, 1, 4, 4, generator=generator), torch.randn(5, 1, 4, 4, generator=generator)
    if "-ae" in task:
        return torch.randn(5, 9, generator=generator), torch.rand(5, 9, generator=generator)
    return torch.randn(5, 10, generator=generator), torch.randint(0, 10, (5,), generator=generator)


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_of_a_task_is_the_negative_log_likelihood_in_the_scale_that_the_likelihood_knows(name: str) -> None:
    task, (output, target) = TASKS[name], sample(name)
    likelihood = task.likelihood()
    whole = likelihood.scale(output) * likelihood.nll(output, target)
    torch.testing.assert_close(task.loss(output, target), whole / task.terms(target))


@pytest.mark.parametrize("name", TASKS)
def test_the_page_of_the_tasks_names_every_one(name: str) -> None:
    assert f"| `{name}` |" in DOCS.read_text()


def test_accuracy_is_the_share_of_test_examples_in_per_cent() -> None:
    y = torch.arange(300) % 3
    x = torch.nn.functional.one_hot(y, 3).float()
    y[:75] = (y[:75] + 1) % 3
    assert accuracy(torch.nn.Identity(), data.Dataset("x", (x, y), (x, y))) == 75


def test_views_of_faces_are_the_same_for_a_seed_and_take_all_images_in_turn() -> None:
    images = (10 * torch.arange(4)[:, None, None]).expand(4, 112, 92).to(torch.uint8)
    x = faces.views(images, 3, seed=1)
    assert x.shape == (12, FACES[0]) and x.dtype == torch.uint8
    assert x.float().std(1).max() == 0 and x[:, 0].tolist() == [0, 10, 20, 30] * 3
    noise = torch.randint(256, (2, 112, 92)).to(torch.uint8)
    assert torch.equal(faces.views(noise, 2, seed=1), faces.views(noise, 2, seed=1))
    assert not torch.equal(faces.views(noise, 2, seed=1), faces.views(noise, 2, seed=2))


@pytest.mark.parametrize("across", [True, False])
def test_views_of_faces_are_turned_crops_that_lie_within_the_image(across: bool) -> None:
    h, w = 112, 92
    ramp = 2 * (torch.arange(w).expand(h, w) if across else torch.arange(h)[:, None].expand(h, w))
    x = faces.views(ramp.to(torch.uint8).expand(50, h, w), 4, seed=0).double()
    axis = torch.arange(25.0, dtype=torch.float64) - 12
    plane = torch.stack([torch.ones(625, dtype=torch.float64), axis.repeat(25), axis.repeat_interleave(25)], -1)
    fit = torch.linalg.lstsq(plane, x.T).solution
    assert (plane @ fit - x.T).abs().max() < 0.75, "rounding alone: an edge would bend the ramp"
    sides = 25 * fit[1:].norm(dim=0) / 2
    assert 39 < sides.min() < 45 and 60 < sides.max() < 65
    turned, upright = (fit[2], fit[1]) if across else (fit[1], fit[2])
    assert upright.min() > -0.1, "no more than 90 degrees"
    assert turned.min() < -2 and turned.max() > 2


def test_faces_of_the_test_are_of_other_people_and_pixels_have_mean_0_and_variance_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[int, Tensor] = {}

    def views(images: Tensor, n: int, seed: int) -> Tensor:
        seen[n] = images[:, 0, 0].unique()
        return (images.flatten(1)[:, :625] + torch.randint(9, (len(images), 625))).to(torch.uint8)

    person = torch.arange(40).repeat_interleave(10)
    images = person[:, None, None].expand(400, 112, 92).to(torch.uint8)
    monkeypatch.setattr(data, "load_faces", lambda folder: (images, person))
    monkeypatch.setattr(data, "cache", lambda: tmp_path)
    monkeypatch.setattr(faces, "views", views)
    found = datasets.face_images(None)
    assert len(seen[414]) == 25 and len(seen[400]) == 10 and not set(seen[414].tolist()) & set(seen[400].tolist())
    x = found.train[0]
    assert x is found.train[1] and x.mean(0).abs().max() < 1e-5
    assert x.var(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("packed", [True, False])
def test_faces_are_read_from_either_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packed: bool) -> None:
    monkeypatch.setattr(data, "places", lambda folder=None: [tmp_path])
    values = np.arange(400).reshape(400, 1, 1) % 256
    images = np.broadcast_to(values, (400, 112, 92)).astype(np.uint8)
    if packed:
        np.savez(tmp_path / "att_faces.npz", x=images, y=np.arange(400) // 10)
    for i, image in enumerate([] if packed else images):
        path = tmp_path / "att_faces" / f"s{i // 10 + 1}" / f"{i % 10 + 1}.pgm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"P5 92 112 255\n" + image.tobytes())
    x, person = data.load_faces()
    assert x.shape == (400, 112, 92) and x[:, 3, 4].tolist() == values.flatten().tolist()
    assert person.tolist() == [i // 10 for i in range(400)]


def images_and_labels(n: int, side: int = 28) -> Any:
    return torch.randint(256, (n, side, side)).to(torch.uint8), torch.arange(n) % 10


def test_deep_linear_takes_fashion_mnist_and_without_it_says_that_it_takes_the_digits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data, "load_digits", lambda: (torch.rand(50, 784), torch.arange(50) % 10))
    monkeypatch.setattr(data, "find_digits", lambda: Path("digits"))
    monkeypatch.setattr(data, "find_idx", lambda name, folder: None)
    assert datasets.garments(None).name == "MNIST, 5,000 digits"
    monkeypatch.setattr(data, "find_idx", lambda name, folder: [Path(name)])
    monkeypatch.setattr(data, "load_idx", lambda name, folder: (images_and_labels(20), images_and_labels(10)))
    found = datasets.garments(None)
    assert found.name == "Fashion-MNIST" and found.train[0].shape == (20, 784) and found.train[0].max() <= 1


def test_the_published_mnist_auto_encoder_trains_on_50_000_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "find_idx", lambda name, folder: [Path(name)])
    monkeypatch.setattr(data, "load_idx", lambda name, folder: (images_and_labels(50_003, 1), images_and_labels(4, 1)))
    found = datasets.published_mnist_images(None)
    assert len(found.train[0]) == 50_000 and found.test is not None and len(found.test[0]) == 4


def test_resnet18_reads_cifar_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "find_cifar", lambda folder: None)
    monkeypatch.setattr(data, "find_idx", lambda name, folder: [Path(name)])
    for name in ("resnet18", "resnet18-narrow"):
        with pytest.raises(data.MissingData, match="CIFAR-10 was not found"):
            TASKS[name].data(None)


def test_a_missing_package_is_one_line_that_says_what_to_install() -> None:
    data.require("torch")
    with pytest.raises(data.MissingData, match=r"needs no_such_package: pip install 'natgrad\[race\]'"):
        data.require("torch", "no_such_package")
