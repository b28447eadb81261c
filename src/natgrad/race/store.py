"""`results.json` of a race: on disk after every run, and taken up again by a race that is resumed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from natgrad.race.race import Race
from natgrad.race.results import plain, record, restored, write_json
from natgrad.race.run import Run, steps_per_epoch


def size(race: Race) -> dict[str, Any]:
    """What has to be the same for runs to be compared: data, steps, budget and clock."""
    return {
        "data": race.data.name,
        "examples": len(race.data.train[0]),
        "batch": race.task.batch,
        "epochs": race.rules.epochs,
        "steps per epoch": steps_per_epoch(race.task, race.data),
        "budget": plain(race.rules.budget),
        "seconds": "of the processor" if race.rules.processor else "of the clock",
        "device": race.rules.device.type,
    }


@dataclass
class Store:
    """The runs of a race and the file that holds them with what they are `about`, their size among it."""

    path: Path
    about: Mapping[str, Any]
    runs: list[Run] = field(default_factory=list)

    def resume(self, race: Race) -> None:
        """Take the runs that the file holds, but those interrupted, and those by other settings than an entry has now.

        Runs of entries that do not race now are kept. ValueError where the file is of a race of another size.
        """
        if not self.path.is_file():
            return
        held = json.loads(self.path.read_text())
        if held.get("size") != self.about["size"]:
            raise ValueError(f"{self.path} is of another size or other data: leave out --resume, or give another --out")
        now = {entry.name: plain(race.settings_of(entry)) for entry in race.entries}
        found = [restored(run) for run in held["runs"] if run["stopped"] != "interrupted"]
        self.runs = [run for run in found if run.configuration == now.get(run.name, run.configuration)]

    def has(self, name: str, seed: int) -> bool:
        """Whether the run is there."""
        return any(run.name == name and run.seed == seed for run in self.runs)

    def add(self, run: Run) -> None:
        """Take a run and write everything."""
        self.runs.append(run)
        write_json(self.path, {**self.about, "runs": [record(run) for run in self.runs]})
