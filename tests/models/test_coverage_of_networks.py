"""Networks of the common kinds: what share of their parameters has curvature, is seen in training, and trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import natgrad
from models import zoo
from natgrad import Bernoulli, Categorical, NaturalGradient, QuadraticModel
from natgrad.optim.coverage import Report
from natgrad.race.networks import resnet18

TOKENS, LENGTH = 20, 9
Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Example:
    """A network, a task that it can learn, and the parameters that are known to be left to AdamW."""

    model: Callable[[], nn.Module]
    task: Callable[[], Loss]
    likelihood: Any = Categorical()
    fallbacks: tuple[str, ...] = ()


def images(n: int = 64) -> Loss:
    x = torch.randn(n, 3, 16, 16)
    y = x.mean((2, 3)).argmax(1)
    return lambda model: F.cross_entropy(model(x), y)


def sequences(n: int = 32, length: int = LENGTH) -> Tensor:
    """Tokens that count on from one drawn at random."""
    return (torch.randint(TOKENS, (n, 1)) + torch.arange(length)) % TOKENS


def language() -> Loss:
    ids = sequences()
    return lambda model: F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def clicks() -> Loss:
    numbers, categories = torch.randn(128, 4), torch.randint(30, (128, 3, 2))
    y = (numbers[:, 0] + (categories[:, 0, 0] < 15) > 0.5).to(numbers)
    return lambda model: F.binary_cross_entropy_with_logits(model(numbers, categories), y)


def segments() -> Loss:
    x = torch.randn(8, 1, 16, 16)
    y = (F.avg_pool2d(x, 3, 1, 1)[:, 0] > 0).long()
    return lambda model: F.cross_entropy(model(x), y)


def nodes(n: int = 60) -> Loss:
    linked = torch.rand(n, n) < 0.04
    linked |= linked.mT | torch.eye(n, dtype=torch.bool)
    x, adjacency, edges = torch.randn(n, 6), linked / linked.sum(1, keepdim=True), linked.nonzero().T
    y = (adjacency @ x)[:, :3].argmax(1)
    return lambda model: F.cross_entropy(model(x, adjacency, edges), y)


EXAMPLES = {
    "ResNet-18": Example(lambda: resnet18(3, 4), images),
    "ViT": Example(lambda: zoo.Patches(3, 16, 4, 48, 4, 4, 3), images),
    "ViT with a temperature": Example(
        lambda: zoo.Tempered(zoo.Patches(3, 16, 4, 48, 4, 4, 3)), images, fallbacks=("temperature",)
    ),
    "LSTM": Example(lambda: zoo.LSTMLanguage(TOKENS, 16, 32), language),
    "DLRM": Example(lambda: zoo.DLRM([30, 30, 30], 4, 8), clicks, Bernoulli()),
    "U-Net": Example(lambda: zoo.UNet(1, 8, 2), segments, Categorical(class_dim=1)),
    "GNN": Example(lambda: zoo.GNN(6, 16, 3), nodes),
    "head by hand": Example(lambda: zoo.FunctionallyTied(TOKENS, 16), language),
}


def trained(model: nn.Module, loss: Loss, steps: int = 8, targets: Tensor | None = None, **settings: Any) -> Any:
    """The optimizer after these steps, and the losses."""
    optimizer, losses = NaturalGradient(model, **{"step_size": QuadraticModel(), "overhead": None, **settings}), []
    for _ in range(steps):
        optimizer.zero_grad()
        if targets is not None:
            optimizer.targets(targets)
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return optimizer, losses


def reported(model: nn.Module, loss: Loss) -> Report:
    """The report on a pass without data, with the arguments that the loss gives the model."""
    given: list[Any] = []
    hook = model.register_forward_pre_hook(lambda model, *arguments: given.append(arguments), with_kwargs=True)
    with torch.no_grad():
        loss(model)
    hook.remove()
    args, kwargs = given[0]
    return natgrad.coverage(model, *args, **kwargs)


def covered_by(report: Report) -> set[tuple[str, ...]]:
    """The parameters of every layer that has curvature."""
    return {row.parameters for row in report.rows if row.rule == "natural"}


def assert_covered(model: nn.Module, loss: Loss, fallbacks: tuple[str, ...] = (), **settings: Any) -> NaturalGradient:
    """At least 99 % have curvature and are seen, the rest are ``fallbacks``, and the loss falls."""
    before, guess = reported(model, loss), natgrad.coverage(model)
    assert before.covered >= 0.99 and tuple(before.fallbacks) == fallbacks
    assert guess.expected and not before.expected
    assert covered_by(guess) <= covered_by(before)  # what is expected by classes of modules turns out so
    if fallbacks:
        with pytest.raises(RuntimeError, match=rf"{fallbacks[0]} \(used by .*: no rule\)"):
            trained(model, loss, 1, strict=True, **settings)
    optimizer, losses = trained(model, loss, strict=not fallbacks, **settings)
    assert losses[-1] < 0.6 * losses[0]
    assert all(curvature.refreshed and not curvature.failures for curvature in optimizer._now.values())
    assert str(optimizer).splitlines()[-1].startswith(f"{100 * before.covered:.1f} % of")
    return optimizer


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_a_network_is_covered_and_seen_and_trains(example: Example) -> None:
    model = example.model()
    assert_covered(model, example.task(), example.fallbacks, likelihood=example.likelihood)


# transformers: the model computes its own loss from the labels that it is given.


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("transformers.models.bert.modeling_bert", exc_type=ImportError)
    import transformers

    return transformers


SMALL = {"vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SMALL, "intermediate_size": 64, "max_position_embeddings": LENGTH}


def gpt2(transformers: Any, **settings: Any) -> Any:
    sizes = {"n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=TOKENS, loss_type="ForCausalLM", **sizes, **settings)
    return transformers.GPT2LMHeadModel(config).to(torch.get_default_dtype()).train()


def test_gpt2_is_covered_and_seen_and_trains(transformers: Any) -> None:
    model, ids = gpt2(transformers), sequences()
    likelihood = Categorical(output="logits", shift=1)
    optimizer = assert_covered(model, lambda m: m(input_ids=ids, labels=ids).loss, likelihood=likelihood, steps=30)
    assert "transformer.wte = lm_head" in str(optimizer)


def test_the_loss_terms_of_a_causal_model_are_those_of_its_own_loss(transformers: Any) -> None:
    """Padding on the right, labels -100 there: what counts is the labels after the first that are not ignored."""
    from natgrad.engine import Engine
    from natgrad.labels import Labels

    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model, ids = gpt2(transformers, **dropout), sequences(6)
    mask = (torch.arange(LENGTH) < torch.tensor([9, 4, 5, 9, 2, 7])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    likelihood = Categorical(output="logits", shift=1, ignore_index=-100)
    engine = Engine(model, Labels(likelihood, "empirical", targets=labels))
    engine.armed = True
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs((loss - output.loss).item()) < 1e-6  # the model's own is in float32
    loss.backward()
    (record,) = engine.everything()
    count = float((labels[:, 1:] != -100).sum())
    assert float(record.count()) == count
    rows = {"transformer.wte": 2 * count, "transformer.wpe": LENGTH - 1}  # two uses, and positions that all share
    for name, layer in engine.layers.items():  # what was captured adds up to the gradient of the model's own loss
        (seen,) = record.captures(layer)
        total = layer.unpack(sum(DW.sum(-3) for DW in seen.weight_gradients()) / count + torch.zeros(layer.shape))
        gradients = [p.grad for p in layer.parameters if p.grad is not None]
        size = torch.cat([g.flatten() for g in gradients]).norm().clamp(min=1e-6)
        for found, gradient in zip(total, layer.parts(gradients), strict=True):
            assert float((found - gradient).norm() / size) < 1e-10, name
        assert float(seen.rows) == rows.get(name, count), name


def test_bert_with_its_tied_decoder_is_covered_and_seen_and_trains(transformers: Any) -> None:
    config = transformers.BertConfig(**BERT)
    model, ids = transformers.BertForMaskedLM(config).to(torch.get_default_dtype()).train(), sequences()
    masked = torch.arange(LENGTH) % 3 == 1
    padded = (torch.arange(LENGTH) < torch.randint(6, LENGTH + 1, (len(ids), 1))).long()
    labels = torch.where(masked & (padded == 1), ids, -100)
    inputs = torch.where(masked, (ids + 7) % TOKENS, ids)  # every third word is wrong
    assert_covered(
        model,
        lambda m: m(input_ids=inputs, attention_mask=padded, labels=labels).loss,
        likelihood=Categorical(output="logits", ignore_index=-100),
        targets=labels,
        steps=20,
    )


def test_bert_for_classes_with_its_pooler_is_covered_and_seen_and_trains(transformers: Any) -> None:
    config = transformers.BertConfig(**BERT, num_labels=2)
    model, ids = transformers.BertForSequenceClassification(config).to(torch.get_default_dtype()).train(), sequences()
    padded = (torch.arange(LENGTH) < torch.randint(6, LENGTH + 1, (len(ids), 1))).long()
    y = (ids[:, 0] < TOKENS // 2).long()
    assert_covered(
        model,
        lambda m: m(input_ids=ids, attention_mask=padded, labels=y).loss,
        likelihood=Categorical(output="logits"),
        steps=16,
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_adapters_of_lora_are_covered_and_the_frozen_base_is_left_as_it_is(transformers: Any) -> None:
    peft = pytest.importorskip("peft")
    base, ids = gpt2(transformers), sequences()
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, config)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    for report in (natgrad.coverage(model), reported(model, lambda m: m(input_ids=ids, labels=ids).loss)):
        assert report.covered == 1.0 and not report.fallbacks
    likelihood = Categorical(output="logits", shift=1)
    optimizer, losses = trained(
        model,
        lambda m: m(input_ids=ids, labels=ids).loss,
        80,
        likelihood=likelihood,
        strict=True,
        step_size=natgrad.Automatic(),
    )
    assert losses[-1] < 0.9 * losses[0]
    assert str(optimizer).splitlines()[-1].startswith("100.0 %")
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
