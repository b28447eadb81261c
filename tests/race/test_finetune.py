from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from natgrad.layers import expected
from natgrad.look import look
from natgrad.race import bert, data, finetune
from natgrad.race.bert import Bert
from natgrad.race.entries import ENTRIES
from natgrad.race.run import Rules, run
from natgrad.race.tasks import TASKS


def small() -> finetune.Classifier:
    torch.manual_seed(0)
    return finetune.Classifier(Bert(words=20, length=9, width=8, heads=2, hidden=12, layers=2), classes=3)


def words(n: int) -> torch.Tensor:
    """Sentences of 1 to 7 words of 20, padded with 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(1, 20, (n, 7), generator=generator)
    return x * (torch.arange(7) < torch.randint(1, 8, (n, 1), generator=generator))


@pytest.fixture
def stored(tmp_path: Path) -> Any:
    """A small encoder of transformers and the folder it was saved in."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=12, max_position_embeddings=9)
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path)
    return theirs, tmp_path


def test_the_encoder_is_the_one_of_transformers(stored: Any) -> None:
    theirs, folder = stored
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    theirs.save_pretrained(folder)
    x = words(6)
    mask = x != 0
    expected_states = theirs(input_ids=x, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(bert.pretrained(folder).eval()(x)[mask], expected_states[mask])


def test_padding_changes_nothing() -> None:
    model = small().eval()
    x = words(6)
    torch.testing.assert_close(model(torch.cat([x, torch.zeros(6, 2, dtype=torch.long)], 1)), model(x))


def test_every_weight_matrix_is_covered() -> None:
    model = small()
    for found in (look(model, (words(4),)).coverage(), expected(model)):
        covered = {id(p) for layer in found.layers.values() for p in layer.parameters}
        assert all(id(p) in covered for p in model.parameters() if p.ndim == 2)


def test_the_tweets_are_a_seeded_sample_cut_to_one_length() -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    for name in ("MiniLM", "the judged tweets"):
        if data.find_bundle(name) is None:
            pytest.skip(f"{name} was not found: {data.HINTS[name]}")
    found = finetune.tweets(None)
    x, y = found.train
    assert x.shape == (finetune.TRAINING, finetune.LENGTH) and y.unique().tolist() == [0, 1, 2]
    assert (x[:, 0] == 101).all() and ((x == 102).sum(1) == 1).all(), "one [CLS] and one [SEP]"
    model = finetune.classifier(found)
    assert sum(p.numel() for p in model.parameters()) == 22_566_531


def test_a_natural_gradient_fine_tunes_what_was_stored(stored: Any) -> None:
    """Which of two words a sentence begins with, from the stored weights."""
    x = words(64)
    y = torch.arange(64) % 2
    x[:, 0] = 1 + y
    task = replace(TASKS["minilm"], data=lambda _: finetune.Texts("x", (x, y), (x, y), stored[1]), batch=16)
    done = run(
        task,
        task.data(None),
        ENTRIES["kfac"],
        settings={"step_size": "model", "overhead": None},
        seed=0,
        rules=Rules(epochs=5),
    )
    assert not done.stopped
    assert done.curve[-1].loss < 0.5 * done.curve[0].loss


def test_the_mean_is_over_the_words_alone() -> None:
    class Same(nn.Module):
        width = 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x, torch.ones_like(x)], -1).float()

    model = finetune.Classifier(Same(), 2)  # type: ignore[arg-type]
    model.head = nn.Identity()  # type: ignore[assignment]
    assert model(torch.tensor([[3, 5, 0, 0], [1, 0, 0, 0]])).tolist() == [[4, 1], [1, 1]]
