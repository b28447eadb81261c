from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from natgrad.layers import expected
from natgrad.look import look
from natgrad.race import data, graphs
from natgrad.race.entries import ENTRIES
from natgrad.race.graphs import GCN
from natgrad.race.run import Rules, run
from natgrad.race.tasks import TASKS

LINE = "00001740 29 v 04 breathe 0 take_a_breath 0 respire 0 suspire 3 003 @ 00002500 v 0000 + 00831191 n 0103 $ 00001740 v 0000 02 + 02 00 + 08 00 | draw air into, and expel out of, the lungs"  # noqa: E501


def lines(n: int) -> list[str]:
    """Nodes in two fields of n each, chained within a field; their glosses name the field every other time."""
    found = []
    for i in range(2 * n):
        field, word = 29 + i // n, f"{'red' if i // n else 'blue'}" if i % 2 else "grey"
        known = f"001 @ {i - 1:08} v 0000" if i % n else "000"
        found.append(f"{i:08} {field} v 01 some_word 0 {known} 01 + 02 00 | a {word} thing")
    return found


def dense(model: GCN) -> Tensor:
    """The matrix D^-1/2 (A + I) D^-1/2 of the model's graph, as it is defined."""
    n = len(model.features)
    a = torch.zeros(n, n)
    a[model.target, model.source] = 1
    root = a.sum(1).rsqrt().diag()
    return root @ a @ root


def small() -> GCN:
    torch.manual_seed(0)
    return GCN(torch.rand(5, 3), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), widths=(6, 2))


def test_a_line_of_wordnet_is_read() -> None:
    found = graphs.synset(LINE)
    assert found.field == 29
    assert found.words[:6] == ["breathe", "take", "a", "breath", "respire", "suspire"] and found.words[-1] == "lungs"
    assert found.relatives == ["00002500", "00001740"], "a noun is none"


def test_the_graph_goes_both_ways_and_has_no_loops() -> None:
    found = graphs.graph(lines(4))
    assert found.edges.tolist() == [[0, 1, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7], [1, 0, 2, 1, 3, 2, 5, 4, 6, 5, 7, 6]]
    nodes = torch.cat([found.train[0], found.test[0] if found.test else found.train[0]])
    assert sorted(nodes.tolist()) == list(range(8))
    assert torch.equal(found.train[1], (found.train[0] >= 4).long())
    torch.testing.assert_close(found.features.sum(1), torch.ones(8))


def test_wordnet_has_the_verbs_it_is_known_to_have() -> None:
    if data.find_bundle("WordNet 3.1") is None:
        pytest.skip(f"WordNet 3.1 was not found: {data.HINTS['WordNet 3.1']}")
    found = graphs.verbs(None)
    assert found.features.shape == (13_789, graphs.WORDS) and found.test is not None
    assert len(found.train[1]) + len(found.test[1]) == 13_789
    counts = torch.cat([found.train[1], found.test[1]]).bincount()
    assert (len(counts), int(counts.min()), int(counts.max())) == (15, 81, 2388)


def test_the_layers_are_those_of_the_paper() -> None:
    model = small().eval()
    s, (first, second) = dense(model), model.layers
    torch.testing.assert_close(model(torch.tensor([4, 1])), (s @ second((s @ first(model.features)).relu()))[[4, 1]])


def test_every_layer_is_covered() -> None:
    model = small()
    for found in (look(model, (torch.tensor([0, 3, 2]),)).coverage(), expected(model)):
        covered = {id(p) for layer in found.layers.values() for p in layer.parameters}
        assert {id(p) for p in model.parameters()} == covered


def test_a_natural_gradient_learns_a_field_from_the_neighbours_too(tmp_path: Path) -> None:
    """Every other gloss says nothing: without the neighbours half of the nodes would be guessed."""
    (tmp_path / "wordnet").mkdir()
    (tmp_path / "wordnet" / "data.verb").write_text("\n".join(["  1 This is the licence", *lines(40)]))
    task = replace(
        TASKS["graph"], batch=28, model=lambda d: GCN(d.features, d.edges, widths=(8, 2), dropout=0.0)  # type: ignore[attr-defined]
    )  # fmt: skip
    done = run(
        task,
        task.data(tmp_path),
        ENTRIES["kfac"],
        settings={"step_size": "quadratic", "overhead": None},
        seed=0,
        rules=Rules(epochs=15),
    )
    assert not done.stopped
    assert done.curve[-1].metrics["test accuracy %"] > 85
    assert done.curve[-1].loss < 0.4 * done.curve[0].loss
