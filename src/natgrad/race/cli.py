"""The command line: `natgrad race`, `natgrad bench`, `natgrad reproduce`, `natgrad data`."""

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from natgrad.race import bench
from natgrad.race import race as racing
from natgrad.race.data import Dataset, MissingData, inventory
from natgrad.race.entries import ENTRIES, POLICIES, Entry, find, with_policies
from natgrad.race.progress import screen
from natgrad.race.report import show, write_report
from natgrad.race.reproduce import command as reproducing
from natgrad.race.results import machine, write_json
from natgrad.race.run import Rules, Run
from natgrad.race.settings import merge, parse_overrides, read_book, settle, tuned
from natgrad.race.several import write_summary
from natgrad.race.store import Store, size
from natgrad.race.tasks import TASKS, WIDE, Task

PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "task": "mnist-ae",
        "entries": "adamw,muon,kfac,ekfac",
        "seeds": "0",
        "epochs": 25,
        "out": Path("runs/demo"),
    },
    "wide": {"task": ",".join(WIDE), "entries": "adamw,muon,kfac", "seeds": "0,1", "out": Path("runs/wide")},
}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(words)
    arguments.line = shlex.join(["natgrad", *words])
    try:
        return arguments.command(arguments)
    except (MissingData, ValueError) as error:
        print(f"natgrad: {error}", file=sys.stderr)
        return 2


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the words of the command line; what a preset sets, the other options override."""
    parser = argparse.ArgumentParser(prog="natgrad", description="Race and time optimizers on small tasks.")
    commands = parser.add_subparsers(required=True, metavar="race | bench | reproduce | data")
    race = _race_options(commands)
    _bench_options(commands)
    reproducing.add_options(commands)
    _data_options(commands)
    arguments = parser.parse_args(words)
    if getattr(arguments, "preset", None):
        race.set_defaults(**PRESETS[arguments.preset])
        arguments = parser.parse_args(words)
    return arguments


def _race_options(commands: Any) -> argparse.ArgumentParser:
    race = commands.add_parser("race", help="train tasks with several optimizers side by side")
    race.set_defaults(command=_race)
    race.add_argument("--task", default="mnist-ae", metavar="NAMES", help=f"some of {','.join(TASKS)}")
    _common_options(race, "adamw,muon,kfac,ekfac")
    race.add_argument("--preset", choices=PRESETS, help="a named set of the options below")
    race.add_argument("--seeds", default="0", help="such as 0,1,2")
    race.add_argument("--epochs", type=int, help="default: as the task has it")
    race.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="of training per run")
    race.add_argument("--tune", type=int, default=0, metavar="N", help="trials for every entry before racing")
    race.add_argument("--tune-only", action="store_true", help="stop after tuning")
    race.add_argument("--resume", action="store_true", help="keep the runs and tuned settings that --out holds")
    race.add_argument("--out", type=Path, help="folder of the report; default: runs/TASK, or runs/several")
    race.add_argument("--cpu-seconds", action="store_true", help="count seconds of the processor, not of the clock")
    race.add_argument("--tensorboard", action="store_true", help="write event files under --out")
    return race


def _bench_options(commands: Any) -> None:
    bench = commands.add_parser("bench", help="time the step of every optimizer, as ratios to SGD")
    bench.set_defaults(command=_bench)
    bench.add_argument("--task", default="mnist-ae", choices=TASKS)
    _common_options(bench, "sgd,adamw,muon,kfac,ekfac")
    bench.add_argument("--steps", type=int, default=20, metavar="N", help="measured steps of each entry")
    bench.add_argument("--policy", default="default", help=f"some of default,{','.join(POLICIES)}")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    bench.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def _data_options(commands: Any) -> None:
    data = commands.add_parser("data", help="list the data sets and where they were found")
    data.set_defaults(command=_data)
    data.add_argument("--data", type=Path, metavar="DIR", help="look here first")


def _common_options(parser: argparse.ArgumentParser, entries: str) -> None:
    parser.add_argument("--entries", default=entries, help=f"some of {','.join(ENTRIES)}")
    parser.add_argument("--settings", type=Path, action="append", default=[], metavar="FILE", help="of a tuning")
    parser.add_argument("--set", action="append", default=[], metavar="ENTRY.KEY=VALUE", dest="overrides")
    parser.add_argument("--defaults", action="store_true", help="do not use the tuned settings of the package")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--data", type=Path, metavar="DIR", help="look for data sets here first")
    parser.add_argument("--examples", type=int, metavar="N", help="train on the first N examples only")


def _prepare(arguments: argparse.Namespace, task: str) -> tuple[tuple[Entry, ...], dict[str, dict[str, Any]]]:
    """Entries of the command line and the settings of each on a task."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no usable CUDA device")
    entries = tuple(find(name) for name in arguments.entries.split(","))
    overrides = parse_overrides(arguments.overrides)
    strangers = overrides.keys() - {entry.name for entry in entries}
    if strangers:
        raise ValueError(f"--set names {', '.join(sorted(strangers))}, which does not race")
    books = [{} if arguments.defaults else tuned(), *map(read_book, arguments.settings)]
    known = merge(books).get(task, {})
    return entries, {e.name: settle(e.name, e.defaults, known, overrides) for e in entries}


def _race(arguments: argparse.Namespace) -> int:
    names = arguments.task.split(",")
    strangers = [name for name in names if name not in TASKS]
    if strangers:
        raise ValueError(f"no task {', '.join(map(repr, strangers))}: there are {', '.join(TASKS)}")
    if len(names) == 1:
        race = _described(arguments, names[0], arguments.out or Path("runs") / names[0])
        return _one_race(arguments, race)[1]
    out, console = arguments.out or Path("runs/several"), Console()
    done: dict[str, list[Run]] = {}
    missing: dict[str, str] = {}
    status = 0
    for name in names:
        try:
            race = _described(arguments, name, out / name)
        except MissingData as error:
            missing[name] = str(error)
            print(f"natgrad: {name} is left out: {error}", file=sys.stderr)
            continue
        console.print(f"[bold]{name}[/bold]")
        done[name], status = _one_race(arguments, race)
        about = {"command": arguments.line, "machine": machine(race.rules.device)}
        tables = write_summary(out, done, missing, about)
        if status:
            break
    if not done:
        raise MissingData(f"none of {', '.join(names)} has its data")
    for opponent, table in [] if arguments.tune_only else tables:
        console.print(f"against {opponent}:")
        show(table, console)
    console.print(f"over all tasks: {out / 'report.md'}", highlight=False)
    return status


def _one_race(arguments: argparse.Namespace, race: racing.Race) -> tuple[list[Run], int]:
    """Tune and race on one task, and write its report; the runs, and the exit status."""
    console = Console()
    about = {
        "task": race.task.name,
        "data": race.data.name,
        "command": arguments.line,
        "machine": machine(race.rules.device),
        "size": size(race),
    }
    store = Store(race.out / "results.json", about)
    interrupted = False
    try:
        with screen(console) as shown:
            if arguments.tune:
                found, interrupted = racing.tune(race, shown, count=arguments.tune, resume=arguments.resume)
                race = racing.with_settings(race, found)
            if arguments.resume:
                store.resume(race)
            if not (interrupted or arguments.tune_only):
                for run in racing.runs(race, shown, store.has):
                    store.add(run)
    except KeyboardInterrupt:
        interrupted = True
    if arguments.tune:
        console.print(f"tuned settings: {race.out / 'settings.json'}", highlight=False)
    if not arguments.tune_only:
        show(write_report(race.out, store.runs, about), console)
        console.print(f"report: {race.out / 'report.html'}", highlight=False)
    interrupted = interrupted or any(run.stopped == "interrupted" for run in store.runs)
    return store.runs, INTERRUPTED if interrupted else 0


def _described(arguments: argparse.Namespace, name: str, out: Path) -> racing.Race:
    task = TASKS[name]
    entries, settings = _prepare(arguments, name)
    device = torch.device(arguments.device)
    return racing.Race(
        task=task,
        data=_load(task, arguments),
        entries=entries,
        seeds=tuple(int(seed) for seed in arguments.seeds.split(",")),
        rules=Rules(arguments.epochs or task.epochs, arguments.budget, device, arguments.cpu_seconds),
        out=out,
        settings=settings,
        fixed=parse_overrides(arguments.overrides),
        log=arguments.tensorboard,
    )


def _load(task: Task, arguments: argparse.Namespace) -> Dataset:
    data = task.data(arguments.data)
    if arguments.examples:
        data = data.first(arguments.examples)
    if len(data.train[0]) < task.batch:
        raise ValueError(f"--examples {arguments.examples}: a batch of {task.name} takes {task.batch}")
    return data.to(torch.device(arguments.device))


def _bench(arguments: argparse.Namespace) -> int:
    policies = arguments.policy.split(",")
    names = arguments.entries.split(",")
    arguments.entries = ",".join(e.name for name in names for e in with_policies(name, policies))
    entries, settings = _prepare(arguments, arguments.task)
    task, device = TASKS[arguments.task], torch.device(arguments.device)
    found = bench.bench(task, _load(task, arguments), entries, settings, steps=arguments.steps, device=device)
    if arguments.json:
        write_json(arguments.json, [asdict(cost) for cost in found])
    if arguments.markdown:
        print(bench.table(found).markdown())
    else:
        show(bench.table(found), Console())
    return 0


def _data(arguments: argparse.Namespace) -> int:
    for name, place in inventory(arguments.data):
        print(f"{name:20s} {place}")
    return 0
