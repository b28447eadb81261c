from pathlib import Path

import pytest

from natgrad.race.entries import ENTRIES
from natgrad.race.settings import merge, parse_overrides, read_book, settle, tuned
from natgrad.race.tasks import TASKS


def test_overrides_are_read_as_json_and_else_as_text() -> None:
    read = parse_overrides(["kfac.lr=0.3", "kfac.step_size=kl", "muon.ends=true"])
    assert read == {"kfac": {"lr": 0.3, "step_size": "kl"}, "muon": {"ends": True}}


@pytest.mark.parametrize("text", ["kfac", "kfac.lr", "lr=3"])
def test_a_malformed_override_says_how_to_write_it(text: str) -> None:
    with pytest.raises(ValueError, match=r"entry\.setting=value"):
        parse_overrides([text])


def test_overrides_beat_what_is_known_and_that_beats_the_defaults() -> None:
    known, overrides = {"a": {"y": 2, "z": 2}}, {"a": {"z": 3}}
    assert settle("a", {"x": 1, "y": 1, "z": 1}, known, overrides) == {"x": 1, "y": 2, "z": 3}


def test_the_last_book_wins_entry_by_entry() -> None:
    merged = merge([{"t": {"a": {"lr": 1}, "b": {"lr": 1}}}, {"t": {"a": {"lr": 2}}}])
    assert merged == {"t": {"a": {"lr": 2}, "b": {"lr": 1}}}


def test_a_settings_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ValueError, match="should map"):
        read_book(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="cannot read"):
        read_book(tmp_path / "absent.json")


def test_the_packaged_settings_name_tasks_and_entries_that_exist() -> None:
    for task, entries in tuned().items():
        assert task in TASKS
        assert entries.keys() <= ENTRIES.keys()
