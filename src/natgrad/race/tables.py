"""A table with categorical columns: the flights that left New York in 2013, the weather of their hour, their planes."""

import csv
import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from natgrad.race.data import Dataset, load_bundle, stored

Row = Mapping[str, str]

CATEGORIES = ("carrier", "origin", "dest", "month", "weekday", "hour", "model", "tailnum")
WEATHER = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")
LATE = (-15, 0, 15)  # minutes of delay on arrival between the four classes
TRAINING = 300_000  # the other 27,346 are for test


@dataclass(frozen=True)
class Table(Dataset):
    """Inputs (n, c + m): the codes of c categorical columns as floats, then m numbers; `levels` of each category."""

    levels: Sequence[int] = ()


def flights(folder: Path | None) -> Table:
    """Load the flights that landed, in a seeded order; targets are four classes of their delay on arrival."""
    path = load_bundle("the flights of 2013", folder)
    packed = stored("flights-2013", lambda: table(landed(path), TRAINING))
    return unpacked(packed, TRAINING)


def landed(path: Path) -> list[dict[str, str]]:
    """Read the flights, each with the weather of its hour and its plane."""
    with zipfile.ZipFile(path / "flights.csv.zip") as packed:
        rows = [row for row in _rows(packed.read("flights.csv").decode()) if row["arr_delay"] not in ("", "NA")]
    weather = {_when(row): row for row in _rows((path / "weather.csv").read_text())}
    planes = {row["tailnum"]: row for row in _rows((path / "planes.csv").read_text())}
    deal = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [joined(rows[i], weather, planes) for i in deal.tolist()]


def joined(row: Row, weather: Mapping[object, Row], planes: Mapping[str, Row]) -> dict[str, str]:
    """One flight with its weekday, the weather of its hour and its plane; what is unknown is left out."""
    day = date(int(row["year"]), int(row["month"]), int(row["day"]))
    plane = planes.get(row["tailnum"], {})
    found = {key: row[key] for key in (*CATEGORIES, "distance", "minute", "arr_delay") if key in row}
    found |= {"weekday": str(day.weekday()), "arrival": str(_minutes(row["sched_arr_time"]))}
    found |= {"model": plane.get("model", ""), "built": plane.get("year", "NA"), "seats": plane.get("seats", "NA")}
    sky = weather.get(_when(row), {})
    return found | {key: sky[key] for key in WEATHER if key in sky}


def table(rows: Sequence[Row], training: int) -> Tensor:
    """Codes, standardised numbers and the class of rows (n, c + m + 1), the first of which are for training.

    The levels of a category are those of the training rows, in order; others have code 0. Numbers have mean 0 and
    deviation 1 over the training rows, 0 where they are missing; a last number says how many of a row are missing.
    """
    codes = []
    for key in CATEGORIES:
        known = {value: i + 1 for i, value in enumerate(sorted({row[key] for row in rows[:training]}))}
        codes.append([known.get(row[key], 0) for row in rows])
    numbers = np.array([[_number(row.get(key, "NA")) for key in NUMBERS] for row in rows])
    missing = np.isnan(numbers)
    seen = np.ma.masked_array(numbers[:training], missing[:training])
    scaled = (numbers - seen.mean(0).filled(0)) / seen.std(0).filled(1).clip(1e-6)
    late = np.digitize([float(row["arr_delay"]) for row in rows], LATE, right=True)
    columns = [np.array(codes).T, np.where(missing, 0, scaled), missing.sum(1, keepdims=True), late[:, None]]
    return torch.from_numpy(np.concatenate(columns, 1).astype(np.float32))


def unpacked(packed: Tensor, training: int) -> Table:
    """The table of what `table` packs."""
    x, y = packed[:, :-1].contiguous(), packed[:, -1].long()
    levels = [1 + int(n) for n in x[:training, : len(CATEGORIES)].amax(0)]
    return Table("flights of 2013", (x[:training], y[:training]), (x[training:], y[training:]), levels)


NUMBERS = ("distance", "minute", "arrival", "built", "seats", *WEATHER)


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def _when(row: Row) -> object:
    return row["origin"], row["month"], row["day"], row["hour"]


def _minutes(clock: str) -> int:
    return 60 * (int(clock) // 100) + int(clock) % 100


def _number(value: str) -> float:
    return math.nan if value in ("", "NA") else float(value)


class TableNetwork(nn.Module):
    """An embedding for every categorical column beside the numbers, then a perceptron (Guo & Berkhahn 2016)."""

    def __init__(
        self, levels: Sequence[int], numbers: int, widths: Sequence[int], classes: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, min(16, (n + 1) // 2)) for n in levels)
        n_in = numbers + sum(min(16, (n + 1) // 2) for n in levels)
        layers: list[nn.Module] = []
        for n_out in widths:
            layers += [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(dropout)]
            n_in = n_out
        self.dense = nn.Sequential(*layers, nn.Linear(n_in, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of rows (n, c + m)."""
        codes = x[:, : len(self.embeddings)].long().unbind(1)
        parts = [embedding(code) for embedding, code in zip(self.embeddings, codes, strict=True)]
        return self.dense(torch.cat([*parts, x[:, len(self.embeddings) :]], 1))


def table_network(data: Dataset) -> TableNetwork:
    """The network, as large as the categories ask."""
    levels = cast(Table, data).levels
    return TableNetwork(
        levels, data.train[0].shape[1] - len(levels), widths=(256, 128), classes=len(LATE) + 1, dropout=0.2
    )
