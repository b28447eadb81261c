"""Multi30k, English to German (Elliott et al. 2016): pieces of words, padded sentences, greedy decoding, BLEU."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natgrad.race.data import Dataset, Pair, cache, load_multi30k, require
from natgrad.race.transformer import Transformer

PADDING, BEGIN, END = 0, 1, 2
PIECES = 2000  # of the vocabulary that both languages share; the head's factor is as large
LENGTH = 40  # longer pairs of sentences are left out of training
SMOOTHING = 0.1
PACKAGES = ("sentencepiece", "sacrebleu")


@dataclass(frozen=True)
class Translations(Dataset):
    """Inputs (n, 2, t), source and shifted target, targets (n, t); what turns pieces into text; test references."""

    pieces: Any = None
    references: Sequence[str] = ()


def translations(folder: Path | None) -> Translations:
    """Load training and test; the vocabulary is learned on the training sentences at first use."""
    require(*PACKAGES)
    english, german = load_multi30k("train", folder)
    test_english, references = load_multi30k("test_2016_flickr", folder)
    pieces = vocabulary([*english, *german], PIECES)
    train = [pair for pair in _encoded(pieces, english, german) if max(map(len, pair)) < LENGTH]
    test = _encoded(pieces, test_english, references)
    longest = 1 + max(len(side) for pair in test for side in pair)
    return Translations("Multi30k", padded(train, LENGTH), padded(test, longest), pieces, references)


def vocabulary(sentences: Sequence[str], size: int) -> Any:
    """Learn byte-pair pieces (Sennrich et al. 2016) of the sentences, or read them from the cache."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    path = cache() / f"pieces-{size}-{zlib.crc32(chr(10).join(sentences).encode()):08x}.model"
    if not path.is_file():
        learned = BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=learned,
            model_type="bpe",
            vocab_size=size,
            character_coverage=1.0,
            pad_id=PADDING,
            bos_id=BEGIN,
            eos_id=END,
            unk_id=3,
            minloglevel=2,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(learned.getvalue())
        unfinished.replace(path)
    return SentencePieceProcessor(model_file=str(path))


def _encoded(pieces: Any, english: Sequence[str], german: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    return list(zip(pieces.encode(list(english)), pieces.encode(list(german)), strict=True))


def padded(pairs: Iterable[tuple[list[int], list[int]]], length: int) -> Pair:
    """Sentences as inputs (n, 2, length) and targets (n, length); each holds one mark beside its pieces."""
    rows = [([*source, END], [BEGIN, *target], [*target, END]) for source, target in pairs]
    table = torch.full((len(rows), 3, length), PADDING)
    for row, sides in zip(table, rows, strict=True):
        for line, side in zip(row, sides, strict=True):
            line[: len(side)] = torch.tensor(side)
    return table[:, :2].clone(), table[:, 2].clone()


def translator(data: Dataset) -> Transformer:
    """The network, as large as the vocabulary asks."""
    return Transformer(cast(Translations, data).pieces.get_piece_size(), PADDING)


def word_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy with smoothed labels, mean over the words that are not padding."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=PADDING, label_smoothing=SMOOTHING)


def words(target: Tensor) -> int:
    """Loss terms of targets (n, t): all that is not padding."""
    return int((target != PADDING).sum())


@torch.no_grad()
def greedy(model: Transformer, source: Tensor, longest: int) -> list[list[int]]:
    """Translate sources (n, s) word by word, each time the likeliest, up to the end mark or `longest` words."""
    memory, mask = model.encode(source)
    target = torch.full((len(source), 1), BEGIN, device=source.device)
    for _ in range(longest):
        best = model.head(model.decode(target, memory, mask)[:, -1]).argmax(-1, keepdim=True)
        target = torch.cat([target, best], 1)
        if (target == END).any(1).all():
            break
    return [line[: line.index(END)] if END in line else line for line in target[:, 1:].tolist()]


def bleu(model: nn.Module, data: Dataset) -> float:
    """BLEU (Papineni et al. 2002; sacrebleu's defaults) of greedy translations of the test sentences."""
    from sacrebleu import corpus_bleu

    data, model = cast(Translations, data), cast(Transformer, model)
    sources = data.test[0][:, 0] if data.test else torch.empty(0, 0)
    found = [line for part in sources.split(250) for line in greedy(model, part, sources.shape[1])]
    return corpus_bleu([data.pieces.decode(line) for line in found], [list(data.references)]).score
