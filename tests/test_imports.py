"""Imports run downwards only, and the core imports nothing but torch and the standard library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import natgrad

ROOT = Path(natgrad.__file__).parent
# What each part may import of natgrad, itself included. To add a part, add its row.
BELOW: dict[str, set[str]] = {
    "capture": set(),
    "hooks": set(),
    "matrix": {"capture"},
    "likelihoods": set(),
    "jets": set(),
    "sparse": {"capture"},
    "layers": {"capture", "jets", "sparse"},
    "operations": {"hooks", "jets", "layers", "sparse"},
    "labels": {"likelihoods"},
    "fishers": {"matrix", "capture"},
    "calls": set(),
    "rows": {"labels", "operations"},
    "masks": set(),
    "record": {"capture", "layers", "operations", "rows", "sparse"},
    "sorting": {"layers", "operations", "record"},
    "verification": {"layers", "operations", "record"},
    "scale": {"labels", "likelihoods", "record"},
    "engine": {
        "calls", "capture", "hooks", "labels", "layers", "masks", "operations", "record", "rows", "sorting",
        "verification",
    },
    "look": {"hooks", "layers", "operations", "sorting"},
    "fisher": {"engine", "masks", "record", "capture", "fishers", "labels", "layers", "likelihoods", "matrix"},
    "reconstruction": {
        "engine", "rows", "capture", "fisher", "fishers", "labels", "layers", "likelihoods", "look", "matrix",
        "operations",
    },
    "optim": {
        "engine", "masks", "record", "capture", "fishers", "labels", "layers", "likelihoods", "look", "matrix", "scale",
        "sparse",
    },
    "fngd": {
        "calls", "engine", "record", "rows", "capture", "fishers", "hooks", "layers", "matrix", "operations", "optim",
    },
}  # fmt: skip
FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "race")
CORE = [path for path in FILES if path.relative_to(ROOT).parts[0] not in ("__init__.py", "__main__.py")]


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The full names of the modules that a file imports, type-checking blocks and functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_imports_run_downwards_only(path: Path) -> None:
    part = part_of(path)
    assert part in BELOW, f"say in BELOW what natgrad.{part} may import"
    parts = {name.split(".")[1] for name in imported(path) if name.startswith("natgrad.")}
    above = parts - BELOW[part] - {part}
    assert not above, f"natgrad.{part} must not import natgrad.{', natgrad.'.join(sorted(above))}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_core_imports_torch_and_the_standard_library_alone(path: Path) -> None:
    foreign = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"torch", "natgrad"}
    assert not foreign


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_does_not_import_the_race(path: Path) -> None:
    assert not any(name.startswith("natgrad.race") for name in imported(path))


def test_the_order_of_the_parts_has_no_cycle() -> None:
    placed: set[str] = set()
    for part, below in BELOW.items():
        assert below <= placed, f"{part} imports parts that come after it"
        placed.add(part)


def test_every_public_name_is_there() -> None:
    assert sorted(set(natgrad.__all__)) == sorted(natgrad.__all__)
    assert all(hasattr(natgrad, name) for name in natgrad.__all__)


HEAVY = ("torch._dynamo", "torch._inductor", "torch.utils.flop_counter", "torch.distributed.tensor", "sympy", "numpy")


def test_importing_natgrad_loads_nothing_heavy_that_torch_has_not_loaded() -> None:
    """``natgrad.race`` and its libraries are as far away as torch's compiler."""
    script = "import sys, torch; own = {*sys.modules}; import natgrad; print(*({*sys.modules} - own))"
    loaded = set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "natgrad.optim" in loaded
    assert not loaded & {*HEAVY, "natgrad.race"}
