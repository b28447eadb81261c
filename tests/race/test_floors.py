"""The floor of a step counts the products of the apply."""

import pytest
from torch import nn

from natgrad.race.entries import ENTRIES
from natgrad.race.floors import floor_flops


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("kfac", 2 * 5 * 3 * (5 + 3)),  # G (5, 5) M (5, 3), then A (3, 3)
        ("ekfac", 4 * 5 * 3 * (5 + 3)),
        ("sngd", 2 * 5 * 3 * 3),
        ("woodbury", 4 * 7 * 5 * 3),
        ("two-level-residual", 2 * 5 * 3 * (5 + 3) + 4 * 7 * 5 * 3),
        ("diagonal", 0),
        ("adamw", None),
    ],
)
def test_the_floor_of_a_dense_layer(name: str, flops: int | None) -> None:
    assert floor_flops(name, nn.Linear(3, 5, bias=False), examples=7) == flops


def test_methods_in_example_space_have_no_floor_on_convolutions() -> None:
    assert floor_flops("woodbury", nn.Conv2d(1, 2, 3), examples=7) is None
    assert floor_flops("kfac", nn.Conv2d(1, 2, 3), examples=7) == 2 * 2 * 9 * (2 + 9)


def test_every_natural_entry_has_a_floor() -> None:
    assert [
        name for name, entry in ENTRIES.items() if entry.natural and floor_flops(name, nn.Linear(3, 5), 7) is None
    ] == []
