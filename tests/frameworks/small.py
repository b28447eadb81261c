"""Small models of transformers, and data that comes with Python and scikit-learn."""

from __future__ import annotations

import calendar
import inspect
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from natgrad import Categorical, NaturalGradient

Example = dict[str, Tensor]
NEXT = Categorical(output="logits", shift=1)  # every token predicts the next one
CLASS = Categorical(output="logits")
CHARACTERS = 32
INIT = {"initializer_range": 32**-0.5}  # the default suits a width of 768


@cache
def code_and_prose() -> tuple[str, str]:
    """A module of Python, and what its manual says about the language."""
    code, prose = inspect.getsource(calendar), " ".join(topics.values())
    return code.lower()[:8000], prose.lower()[:8000]


def tokens(source: str) -> Tensor:
    """One token a character; the rarer ones share the last."""
    known = "".join(code_and_prose())
    frequent = sorted(set(known), key=known.count, reverse=True)[: CHARACTERS - 1]
    return torch.tensor([frequent.index(c) if c in frequent else CHARACTERS - 1 for c in source])


def text(length: int = 16, n: int = 256) -> list[Example]:
    """Windows of code, of which every token is the label of the one before."""
    windows = tokens(code_and_prose()[0]).unfold(0, length, 29)[:n]
    return [{"input_ids": window, "labels": window} for window in windows]


def two_kinds(length: int = 16, n: int = 512) -> list[Example]:
    """Windows of code (0) and of prose (1), in turn."""
    windows = [tokens(source).unfold(0, length, 29) for source in code_and_prose()]
    return [{"input_ids": windows[k % 2][k // 2], "labels": torch.tensor(k % 2)} for k in range(n)]


def digits(n: int = 512) -> tuple[Tensor, Tensor]:
    """Images of digits (n, 64) with values from 0 to 1, and which they are."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:n] / 16, dtype=torch.get_default_dtype()), torch.tensor(y[:n])


def gpt2(dropout: float = 0.0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    rates = {"embd_pdrop": dropout, "attn_pdrop": dropout, "resid_pdrop": dropout}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"vocab_size": CHARACTERS, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2, **INIT}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, **rates))
    model.loss_type = "ForCausalLM"  # the Trainer then knows that the first label is no loss term
    return model


def bert(dropout: float = 0.0) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    sizes = {"vocab_size": CHARACTERS, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"intermediate_size": 64, "max_position_embeddings": 32, "num_labels": 2, **INIT}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = BertForSequenceClassification(BertConfig(**sizes, **more, **rates))
    model.accepts_loss_kwargs = False  # its loss is a mean over the micro-batch
    return model


def classifier() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def batches(data: list[Example], size: int) -> list[Example]:
    """The data in its order, stacked."""
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    return [{key: torch.stack([example[key] for example in part]) for key in part[0]} for part in parts]


def plain_loop(model: nn.Module, optimizer: NaturalGradient, data: list[Example], clip: float | None = None) -> Any:
    """What a framework is compared with: one step on every batch. The model."""
    model.train()
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


def plain_digits(
    model: nn.Module, optimizer: NaturalGradient, data: list[list[Tensor]], autocast: bool = False
) -> nn.Module:
    """The same for a classifier without a loss of its own."""
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(x)
        F.cross_entropy(output.float() if autocast else output, y).backward()
        optimizer.step()
    return model


def distance(model: nn.Module, other: nn.Module) -> float:
    """The largest relative distance of a parameter."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((p - q).detach().norm() / q.detach().norm().clamp(min=1e-12)) for p, q in pairs)


def same(model: nn.Module, other: nn.Module) -> bool:
    """Bit for bit."""
    return distance(model, other) == 0.0
