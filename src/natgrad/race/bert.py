"""BERT's encoder (Devlin et al. 2019) with stored weights, every weight matrix a layer of torch's."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The names of a layer's parts here, and in the files of transformers.
PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "widen": "intermediate.dense",
    "narrow": "output.dense",
    "norm2": "output.LayerNorm",
}
EMBEDDINGS = {
    "words": "word_embeddings",
    "places": "position_embeddings",
    "types": "token_type_embeddings",
    "norm": "LayerNorm",
}


class Layer(nn.Module):
    """Post-norm layer: self-attention, then two dense layers, each added to its input and normalised."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (n, t, width) to the same shape; `mask` (n, t) is true where there is a word."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        rate = self.rate if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], dropout_p=rate)
        x = self.norm1(x + self.dropout(self.out(seen.transpose(1, 2).flatten(2))))
        return self.norm2(x + self.dropout(self.narrow(F.gelu(self.widen(x)))))


class Bert(nn.Module):
    """Input (n, t) of words, 0 where there is none; output (n, t, width) of states."""

    def __init__(
        self, words: int, length: int, width: int, heads: int, hidden: int, layers: int, *,
        types: int = 2, dropout: float = 0.1, eps: float = 1e-12,
    ) -> None:  # fmt: skip
        super().__init__()
        self.words, self.places, self.types = (nn.Embedding(n, width) for n in (words, length, types))
        self.norm, self.dropout = nn.LayerNorm(width, eps), nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, dropout, eps) for _ in range(layers))
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """States of words x (n, t), all of the first type."""
        h = self.words(x) + self.types(torch.zeros_like(x)) + self.places(torch.arange(x.shape[1], device=x.device))
        h = self.dropout(self.norm(h))
        for layer in self.layers:
            h = layer(h, x != 0)
        return h


def pretrained(folder: Path) -> Bert:
    """Read `config.json` and `model.safetensors` as transformers writes them."""
    from safetensors.torch import load_file

    told = json.loads((folder / "config.json").read_text())
    model = Bert(
        told["vocab_size"],
        told["max_position_embeddings"],
        told["hidden_size"],
        told["num_attention_heads"],
        told["intermediate_size"],
        told["num_hidden_layers"],
        types=told["type_vocab_size"],
        dropout=told["hidden_dropout_prob"],
        eps=told["layer_norm_eps"],
    )
    model.load_state_dict(renamed(load_file(folder / "model.safetensors"), model))
    return model


def renamed(stored: dict[str, Tensor], model: Bert) -> dict[str, Tensor]:
    """The weights of the embeddings and the layers under the names they have here."""
    pairs = {here: f"embeddings.{there}" for here, there in EMBEDDINGS.items()}
    for i in range(len(model.layers)):
        pairs |= {f"layers.{i}.{here}": f"encoder.layer.{i}.{there}" for here, there in PARTS.items()}
    return {f"{here}.{p}": stored[f"{pairs[here]}.{p}"] for here, p in (k.rsplit(".", 1) for k in model.state_dict())}
