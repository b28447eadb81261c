"""Settings of the entries, by task and entry, and the order in which they override one another."""

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

Book = dict[str, dict[str, dict[str, Any]]]  # task -> entry -> settings


def tuned() -> Book:
    """Read the settings that ship with the package."""
    return json.loads(files("natgrad.race").joinpath("tuned.json").read_text())


def read_book(path: Path) -> Book:
    """Read a settings file, task -> entry -> settings."""
    try:
        book = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read settings from {path}: {error}") from error
    levels = isinstance(book, dict) and all(isinstance(entries, dict) for entries in book.values())
    if not levels:
        raise ValueError(f"{path} should map tasks to entries to settings")
    return book


def merge(books: Iterable[Book]) -> Book:
    """Merge books; the settings of an entry come from the last book that has it."""
    merged: Book = {}
    for book in books:
        for task, entries in book.items():
            merged.setdefault(task, {}).update(entries)
    return merged


def parse_overrides(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Parse "kfac.lr=0.3" into {"kfac": {"lr": 0.3}}; a value that is not JSON is a string."""
    overrides: dict[str, dict[str, Any]] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        entry, dot, key = path.partition(".")
        if not (entry and dot and key and equals):
            raise ValueError(f"--set {text!r}: write it as entry.setting=value, such as kfac.lr=0.3")
        overrides.setdefault(entry, {})[key] = _value(value)
    return overrides


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def settle(
    name: str,
    defaults: Mapping[str, Any],
    known: Mapping[str, Mapping[str, Any]],
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """Settings of one entry: its defaults, then what is known for it on this task, then the overrides."""
    return {**defaults, **known.get(name, {}), **overrides.get(name, {})}
