import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from natgrad.layers import expected
from natgrad.look import look
from natgrad.race import data, gpt
from natgrad.race.entries import ENTRIES
from natgrad.race.gpt import END, GPT, UNKNOWN
from natgrad.race.run import Rules, run
from natgrad.race.tasks import TASKS

ANIMALS = ("dog", "cat", "horse", "bird")


def small() -> GPT:
    torch.manual_seed(0)
    return GPT(words=11, length=9, width=8, heads=2, layers=2)


def test_sentences_are_lower_case_words_and_marks() -> None:
    assert gpt.split(["Two men's dogs, asleep."]) == [["two", "men", "'", "s", "dogs", ",", "asleep", "."]]


def test_the_most_frequent_words_are_known_and_sentences_end() -> None:
    sentences = [["a", "dog"], ["a", "cat"], ["the", "dog"]]
    known = gpt.vocabulary(sentences, 4)
    assert known == {"a": 2, "dog": 3}
    x, y = gpt.windows(sentences, known, 3)
    assert x.tolist() == [[END, 2, 3], [END, 2, UNKNOWN], [END, UNKNOWN, 3]]
    assert y.tolist() == [[2, 3, END], [2, UNKNOWN, END], [UNKNOWN, 3, END]]


def test_the_captions_of_multi30k_are_split_as_they_come() -> None:
    if data.find_multi30k() is None:
        pytest.skip(f"Multi30k was not found: {data.HINTS['Multi30k']}")
    found = gpt.captions(None)
    assert found.test is not None
    assert found.train[0].shape == (12804, 32) and found.test[0].shape == (440, 32)
    words = found.train[0].unique()
    assert (len(words), int(words.max())) == (gpt.WORDS, gpt.WORDS - 1)
    assert (found.train[0] == UNKNOWN).float().mean() < 0.05


def test_a_model_sees_the_past_alone_and_its_places() -> None:
    model = small()
    x = torch.randint(11, (2, 9))
    y = x.clone()
    y[:, 5:] = (y[:, 5:] + 1) % 11
    before, after = model(x), model(y)
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert ((after - before)[:, 5:].abs().amax((1, 2)) > 1e-5).all()
    same = model(torch.full((1, 9), 3))[0]
    assert (same[1:] - same[:-1]).abs().amax(1).min() > 1e-5, "the places differ"


def test_a_block_is_the_pre_norm_layer_of_torch() -> None:
    torch.manual_seed(0)
    block = gpt.Block(width=8, heads=2)
    other = nn.TransformerEncoderLayer(8, 2, 32, 0.0, F.gelu, batch_first=True, norm_first=True)
    names = {
        "norm1": "norm1",
        "norm2": "norm2",
        "linear1": "widen",
        "linear2": "narrow",
        "self_attn.out_proj": "project",
    }
    for theirs, ours in names.items():
        other.get_submodule(theirs).load_state_dict(block.get_submodule(ours).state_dict())
    other.self_attn.in_proj_weight.data.copy_(block.attend.weight)
    assert other.self_attn.in_proj_bias is not None
    other.self_attn.in_proj_bias.data.copy_(block.attend.bias)
    x = torch.randn(3, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    torch.testing.assert_close(block(x), other(x, src_mask=mask, is_causal=True))


def test_the_head_is_the_embedding_and_everything_is_covered() -> None:
    model = small()
    assert model.head.weight is model.embedding.weight
    for found in (look(model, (torch.randint(11, (2, 9)),)).coverage(), expected(model)):
        covered = {id(p) for layer in found.layers.values() for p in layer.parameters}
        assert all(id(p) in covered for p in model.parameters() if p.ndim == 2)


def test_the_perplexity_of_a_model_that_knows_nothing_is_the_number_of_words() -> None:
    class Uniform(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*x.shape, 11)

    x = torch.randint(11, (120, 9))
    assert math.isclose(gpt.perplexity(Uniform(), data.Dataset("x", (x, x), (x, x))), 11, rel_tol=1e-5)


def test_a_natural_gradient_learns_the_order_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"a {first} sees the {second}." for first in ANIMALS for second in ANIMALS] * 6
    (tmp_path / "multi30k").mkdir()
    for part, some in (("train", lines), ("test_2016_flickr", lines[:16])):
        for language in ("en", "de"):
            (tmp_path / "multi30k" / f"{part}.{language}").write_text("".join(f"{line}\n" for line in some))
    monkeypatch.setattr(gpt, "LENGTH", 7)
    task = replace(TASKS["gpt"], batch=16, model=lambda _: GPT(words=12, length=7, width=8, heads=2, layers=1))
    done = run(
        task,
        task.data(tmp_path),
        ENTRIES["kfac"],
        settings={"step_size": "quadratic", "overhead": None},
        seed=0,
        rules=Rules(epochs=5),
    )
    assert not done.stopped
    last = done.curve[-1]
    assert last.loss < 0.6 * done.curve[0].loss and last.test_loss is not None
    assert last.metrics["perplexity"] == pytest.approx(math.exp(last.test_loss), rel=1e-4)
