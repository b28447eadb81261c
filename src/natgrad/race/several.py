"""The report over several tasks: `report.md`, `summary.json` and the tuned settings of all of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from natgrad.race.compare import NEAR, Duel, duels, plain_summary, summary_table, task_table
from natgrad.race.results import write_json
from natgrad.race.run import Run
from natgrad.race.settings import merge, read_book
from natgrad.race.summary import Table

LEGEND = f"""Figures say how many times better an entry is than the opponent: above 1 it is ahead. **Steps** and
**seconds** are the opponent's over the entry's, to the opponent's final training loss and to its best held-out loss;
**held-out** is the opponent's held-out loss over the entry's after as many steps or seconds as the opponent took in
all (an entry that had ended by then counts with its end), **best held-out** the same with the least so far. Curves
are means over seeds, point by point (a seed that stopped early shortens them), and run straight between points. ≤
marks an entry that never came to the loss, or diverged: it counts with its whole run, which is more than it deserves,
and makes a mean over tasks a bound as well. Means are geometric. **step** is the cost of a step in the opponent's.
The last column has the tasks on which the training loss stayed above {NEAR} times the opponent's final one. Seconds
count training steps alone."""


def write_summary(
    out: Path, tasks: Mapping[str, Sequence[Run]], missing: Mapping[str, str], about: Mapping[str, Any]
) -> list[tuple[str, Table]]:
    """Write the files over all tasks so far; returns a table over tasks for every opponent, with its name."""
    found = duels(tasks)
    write_json(out / "summary.json", {**about, "missing": dict(missing), **plain_summary(found)})
    opponents = list(dict.fromkeys(d.opponent for d in found))
    tables = [(opponent, summary_table(found, opponent)) for opponent in opponents]
    (out / "report.md").write_text(_markdown(tables, found, tasks, missing, about))
    books = [read_book(path) for task in tasks if (path := out / task / "settings.json").is_file()]
    if books:
        write_json(out / "settings.json", merge(books))
    return tables


def _markdown(
    tables: Sequence[tuple[str, Table]],
    found: Sequence[Duel],
    tasks: Mapping[str, Sequence[Run]],
    missing: Mapping[str, str],
    about: Mapping[str, Any],
) -> str:
    parts = [f"# A race over {len(tasks)} task{'s' if len(tasks) != 1 else ''}"]
    for opponent, table in tables:
        parts += [f"## Against {opponent}", table.markdown(), task_table(found, opponent).markdown()]
    if not tables:
        parts.append("No opponent that others are measured against has raced to the end.")
    parts += [LEGEND, "## Tasks"]
    lines = [f"* [{task}]({task}/report.md), seeds {_seeds(runs)}" for task, runs in tasks.items()]
    lines += [f"* {task} was not run: {reason}" for task, reason in missing.items()]
    parts += ["\n".join(lines), "## Command", f"```\n{about['command']}\n```"]
    return "\n\n".join(parts) + "\n"


def _seeds(runs: Sequence[Run]) -> str:
    return ", ".join(str(seed) for seed in sorted({run.seed for run in runs})) or "none"
