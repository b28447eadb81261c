"""The documentation runs, its links lead somewhere, and it leaves no public name out."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import natgrad

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.png"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return BLOCK.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The fragments that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_examples_of_a_page_run_in_order(page: Path) -> None:
    torch.manual_seed(0)
    text, namespace = page.read_text(), {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        if block[1] == "python":
            lines = "\n" * (text[: block.start()].count("\n") + 1)  # tracebacks then point into the page
            exec(compile(lines + block[2], page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith("http"):
            continue
        file, _, fragment = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link}: no such file"
        assert not fragment or fragment in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("picture", PICTURES, ids=name_of)
def test_every_picture_is_small_drawn_by_a_function_and_shown(picture: Path) -> None:
    assert picture.stat().st_size < 60_000
    assert f"def {picture.stem}()" in (ROOT / "docs" / "pictures.py").read_text()
    assert any(f"pictures/{picture.name})" in page.read_text() for page in PAGES)


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "pictures" / "races").iterdir()), ids=name_of)
def test_every_race_is_small_drawn_for_a_page_and_shown_on_it(picture: Path) -> None:
    assert picture.stat().st_size < 60_000
    assert f'"{picture.stem}": (' in (ROOT / "docs" / "races.py").read_text()
    assert f"pictures/races/{picture.name})" in (ROOT / "docs" / "approximations" / f"{picture.stem}.md").read_text()


@pytest.mark.parametrize("name", natgrad.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(natgrad, name))
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    assert any(re.search(rf"\b{name}\b", page.read_text()) for page in pages)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "approximations").iterdir()), ids=name_of)
def test_a_page_on_a_method_keeps_the_order(page: Path) -> None:
    order = ("Intuition", "When to use", "Cost", "Picture", "Formula", "Reference")
    places = [page.read_text().find(f"**{heading}") for heading in order]
    assert -1 not in places
    assert places == sorted(places)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 500
