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

from natgrad.race.data import Dataset, load_bundle

Row = Mapping[str, str]

CATEGORIES = ("carrier", "origin", "dest", "month", "weekday", "hour", "model", "tailnum")
WEATHER = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")
LATE = (-15, 0, 15)  # minutes of delay on arrival between the four classes
TRAINING, TEST = 100_000, 20_000


@dataclass(frozen=True)
class Table(Dataset):
    """Inputs (n, c + m): the codes of c categorical columns as floats, then m numbers; `levels` of each category."""

    levels: Sequence[int] = ()


def flights(folder: Path | None) -> Table:
    """Load a seeded sample of the flights that landed; targets are four classes of their delay on arrival."""
    path = load_bundle("the flights of 2013", folder)
    with zipfile.ZipFile(path / "flights.csv.zip") as packed:
        name = next(name for name in packed.namelist() if name.endswith("flights.csv") and "/." not in name)
        rows = [row for row in _rows(packed.read(name).decode()) if row["arr_delay"] not in ("", "NA")]
    deal = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: TRAINING + TEST]
    chosen = [rows[i] for i in deal.tolist()]
    weather = {_when(row): row for row in _rows((path / "weather.csv").read_text())}
    planes = {row["tailnum"]: row for row in _rows((path / "planes.csv").read_text())}
    return table([joined(row, weather, planes) for row in chosen], TRAINING)


def joined(row: Row, weather: Mapping[object, Row], planes: Mapping[str, Row]) -> dict[str, str]:
    """One flight with its weekday, the weather of its hour and its plane; what is unknown is left out."""
    day = date(int(row["year"]), int(row["month"]), int(row["day"]))
    plane = planes.get(row["tailnum"], {})
    found = {key: row[key] for key in (*CATEGORIES, "distance", "minute", "arr_delay") if key in row}
    found |= {"weekday": str(day.weekday()), "arrival": str(_minutes(row["sched_arr_time"]))}
    found |= {"model": plane.get("model", ""), "built": plane.get("year", "NA"), "seats": plane.get("seats", "NA")}
    sky = weather.get(_when(row), {})
    return found | {key: sky[key] for key in WEATHER if key in sky}


def table(rows: Sequence[Row], training: int) -> Table:
    """Codes and standardised numbers of rows, the first of which are for training.

    The levels of a category are those of the training rows, in order; others have code 0. Numbers have mean 0 and
    deviation 1 over the training rows, 0 where they are missing; a last number says how many of a row are missing.
    """
    codes, levels = [], []
    for key in CATEGORIES:
        known = {value: i + 1 for i, value in enumerate(sorted({row[key] for row in rows[:training]}))}
        codes.append([known.get(row[key], 0) for row in rows])
        levels.append(1 + len(known))
    numbers = np.array([[_number(row.get(key, "NA")) for key in NUMBERS] for row in rows], np.float32)
    missing = np.isnan(numbers)
    scaled = (numbers - np.nanmean(numbers[:training], 0)) / np.nanstd(numbers[:training], 0).clip(1e-6)
    packed = [np.array(codes, np.float32).T, np.where(missing, 0, scaled), missing.sum(1, keepdims=True)]
    x = torch.from_numpy(np.concatenate(packed, 1).astype(np.float32))
    y = torch.from_numpy(np.digitize([float(row["arr_delay"]) for row in rows], LATE, right=True))
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

    def __init__(self, levels: Sequence[int], numbers: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, min(16, (n + 1) // 2)) for n in levels)
        n_in = numbers + sum(min(16, (n + 1) // 2) for n in levels)
        layers: list[nn.Module] = []
        for n_out in widths:
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
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
    return TableNetwork(levels, data.train[0].shape[1] - len(levels), widths=(256, 128), classes=len(LATE) + 1)
