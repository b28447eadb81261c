"""The report of a race: results.json, report.md and one HTML page that needs no other file."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console

from natgrad.race.plots import plot
from natgrad.race.results import plain, record, write_json
from natgrad.race.run import Run
from natgrad.race.summary import Table, summarise

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{border-bottom:1px solid #ccc;padding:.3rem .7rem;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f4f4f4;padding:.7rem;overflow:auto}"""


def write_report(folder: Path, runs: Sequence[Run], about: Mapping[str, Any]) -> Table:
    """Write all files of a race into `folder`; `about` holds task, data, command and machine."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", {**about, "runs": [record(run) for run in runs]})
    table = summarise(runs)
    title = f"{about['task']} on {about['data']}"
    images = plot(runs, title, folder)
    (folder / "report.md").write_text(_markdown(title, table, images, runs, about))
    (folder / "report.html").write_text(_page(title, table, images, runs, about))
    return table


def show(table: Table, console: Console) -> None:
    """Print the table, in its full width where it does not go to a terminal."""
    console = console if console.is_terminal else Console(width=200)
    out = rich.table.Table()
    for i, header in enumerate(table.headers):
        out.add_column(header, justify="left" if i in (0, len(table.headers) - 1) else "right")
    for row in table.rows:
        out.add_row(*(cell.replace("[", "\\[") for cell in row))
    console.print(out)


def _markdown(title: str, table: Table, images: Sequence[Path], runs: Sequence[Run], about: Mapping[str, Any]) -> str:
    parts = [f"# {title}", table.markdown(), _legend(runs)]
    parts += [f"![{path.stem}]({path.name})" for path in images]
    for heading, text in _appendix(runs, about):
        parts += [f"## {heading}", f"```\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def _page(title: str, table: Table, images: Sequence[Path], runs: Sequence[Run], about: Mapping[str, Any]) -> str:
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    body = [f"<h1>{html.escape(title)}</h1>", _rows(table), f"<p>{html.escape(_legend(runs))}</p>"]
    body += [f"<img alt='{path.stem}' src='{_embedded(path)}'>" for path in images]
    for heading, text in _appendix(runs, about):
        body.append(f"<h2>{heading}</h2><pre>{html.escape(text)}</pre>")
    return f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _rows(table: Table) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in table.headers)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in table.rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _legend(runs: Sequence[Run]) -> str:
    seeds = sorted({run.seed for run in runs})
    return (
        f"Training loss over the whole training set at the end of an epoch, mean over seeds {seeds} "
        "± their standard deviation. Seconds count training steps alone. "
        "“To X's” is the first epoch end at or below the mean final loss of X."
    )


def _appendix(runs: Sequence[Run], about: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = {run.name: plain(dict(run.configuration)) for run in runs}
    return [
        ("Command", str(about["command"])),
        ("Settings", "\n".join(f"{name}: {json.dumps(chosen)}" for name, chosen in settings.items())),
        ("Machine", json.dumps(about["machine"], indent=1)),
    ]
