import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.race import data, translation
from natgrad.race.entries import ENTRIES
from natgrad.race.run import Rules, mean_loss, run, train_step
from natgrad.race.tasks import TASKS, Task
from natgrad.race.transformer import Transformer
from natgrad.race.translation import BEGIN, END, PADDING, Translations, bleu, greedy, padded

NOUNS, VERBS = ("man", "dog", "child", "bird", "woman", "horse"), ("eats", "sees", "likes", "carries", "paints")


@pytest.fixture
def sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Multi30k in which German is English backwards."""
    pytest.importorskip("sentencepiece")
    pytest.importorskip("sacrebleu")
    lines = [f"the {a} {verb} the {b}" for a in NOUNS for verb in VERBS for b in NOUNS]
    folder = tmp_path / "multi30k"
    folder.mkdir()
    for part, some in (("train", lines[:160]), ("test_2016_flickr", lines[160:])):
        (folder / f"{part}.en").write_text("".join(f"{line}\n" for line in some))
        (folder / f"{part}.de").write_text("".join(f"{' '.join(reversed(line.split()))}\n" for line in some))
    monkeypatch.setattr(translation, "PIECES", 60)
    monkeypatch.setattr(translation, "LENGTH", 16)
    monkeypatch.setattr(translation, "cache", lambda: tmp_path / "cache")
    return tmp_path


def small(found: data.Dataset) -> nn.Module:
    assert isinstance(found, Translations)
    return Transformer(found.pieces.get_piece_size(), PADDING, width=16, heads=2, layers=1, hidden=24)


def test_sentences_are_padded_and_the_target_is_shifted_by_one() -> None:
    x, y = padded([([5, 6], [7, 8, 9])], 5)
    assert x.tolist() == [[[5, 6, END, PADDING, PADDING], [BEGIN, 7, 8, 9, PADDING]]]
    assert y.tolist() == [[7, 8, 9, END, PADDING]]
    assert translation.words(y) == 4


def test_pieces_give_the_sentences_back_and_are_learned_once(sentences: Path) -> None:
    found = translation.translations(sentences)
    x, y = found.train
    assert x.shape == (len(x), 2, 16) and len(x) == 160 and y.shape == (160, 16)
    english, german = data.load_multi30k("train", sentences)
    assert [found.pieces.decode(line[line > END].tolist()) for line in x[:, 0]] == english
    assert [found.pieces.decode(line[line > END].tolist()) for line in y] == german
    (stored,) = (sentences / "cache").iterdir()
    written = stored.stat().st_mtime_ns
    translation.translations(sentences)
    assert stored.stat().st_mtime_ns == written


def test_long_sentences_are_left_out_of_training_but_not_of_the_test(sentences: Path) -> None:
    for part in ("train", "test_2016_flickr"):
        for language in ("en", "de"):
            with (sentences / "multi30k" / f"{part}.{language}").open("a") as file:
                file.write(" ".join(NOUNS * 4) + "\n")
    found = translation.translations(sentences)
    assert found.test is not None
    assert len(found.train[0]) == 160 and len(found.test[0]) == 21 == len(found.references)
    assert found.test[1].shape[1] > 16


class Parrot(nn.Module):
    """Says the words of the source, one after another."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words, self.head = words, nn.Identity()

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return F.one_hot(source, self.words).float(), source != PADDING

    def decode(self, target: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return memory[:, : target.shape[1]]


def test_greedy_decoding_stops_at_the_end_mark_or_at_the_longest() -> None:
    source = torch.tensor([[5, 6, END, 7, 8], [9, 9, 9, 9, 9]])
    parrot: Any = Parrot(12)
    assert greedy(parrot, source, 5) == [[5, 6], [9, 9, 9, 9, 9]]
    assert greedy(parrot, source, 3) == [[5, 6], [9, 9, 9]]


def test_bleu_is_100_for_the_references_and_less_for_others(sentences: Path) -> None:
    found = translation.translations(sentences)
    assert found.test is not None
    x, y = found.test
    german = torch.stack([y, x[:, 1]], 1)
    parrot = Parrot(found.pieces.get_piece_size())
    assert bleu(parrot, replace(found, test=(german, y))) == pytest.approx(100)
    assert bleu(parrot, found) < 50


@pytest.fixture
def tiny_task(sentences: Path) -> Task:
    return replace(TASKS["multi30k"], data=lambda _: translation.translations(sentences), model=small, batch=16)


@pytest.mark.parametrize("name", ["adamw", "kfac"])
def test_translation_trains_and_bleu_is_measured_at_the_end(tiny_task: Task, name: str) -> None:
    entry = ENTRIES[name]
    done = run(tiny_task, tiny_task.data(None), entry, settings=entry.defaults, seed=0, rules=Rules(3))
    assert done.stopped == "" and done.curve[-1].loss < 0.95 * done.curve[0].loss
    assert [list(point.metrics) for point in done.curve] == [[], [], [], ["BLEU"]]


def test_the_loss_over_a_set_is_a_mean_over_words_however_it_is_split(tiny_task: Task) -> None:
    found = tiny_task.data(None)
    model = small(found)
    found.train[1][:7, 3:] = PADDING
    whole = tiny_task.loss(model(found.train[0]), found.train[1]).item()
    assert mean_loss(replace(tiny_task, chunk=7), model, found.train) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("lengths", [(1, 2, 3, 3), (3, 1, 2, 1)], ids=["as long", "longer or shorter"])
def test_a_natural_step_does_not_depend_on_how_far_sentences_and_translations_are_padded(
    lengths: tuple[int, ...],
) -> None:
    generator = torch.Generator().manual_seed(1)
    sources = [torch.randint(4, 9, (n,), generator=generator).tolist() for n in (1, 2, 3, 3)]
    pairs = [(source, [4, 5, 6][:n]) for source, n in zip(sources, lengths, strict=True)]
    task, stepped = TASKS["multi30k"], []
    for length in (4, 6):
        torch.manual_seed(0)
        model = Transformer(9, PADDING, width=4, heads=2, layers=1, hidden=6).double()
        settings = {"estimator": "exact", "step_size": "constant", "lr": 0.1, "damping": 0.1}
        optimizer = ENTRIES["kfac"].build(model, task, settings)
        train_step(task, model, optimizer, *padded(pairs, length))
        stepped.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*stepped)


def test_the_task_of_the_library_on_the_whole_of_multi30k(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    pytest.importorskip("sacrebleu")
    monkeypatch.setattr(translation, "cache", lambda: tmp_path)
    if data.find_multi30k() is None:
        pytest.skip(f"Multi30k is missing: {data.HINTS['Multi30k']}")
    found = translation.translations(None)
    x, y = found.train
    assert 28_000 < len(x) < 29_000 and x.shape[1:] == (2, 40) and len(found.references) == 1000
    model = TASKS["multi30k"].model(found)
    loss = TASKS["multi30k"].loss(model(x[:8]), y[:8])
    assert loss.item() == pytest.approx(math.log(2000), abs=1)
