"""`natgrad reproduce`: one paper, its table and ours side by side, its claims judged."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from natgrad.race.progress import screen
from natgrad.race.reproduce import STUDIES
from natgrad.race.reproduce.claims import Results
from natgrad.race.reproduce.perform import Plan, perform
from natgrad.race.reproduce.report import write_report
from natgrad.race.results import machine

INTERRUPTED = 130


def add_options(commands: Any) -> None:
    """Add the command to the parser of the command line."""
    parser = commands.add_parser("reproduce", help="run the study of a paper: its numbers and ours, claims judged")
    parser.set_defaults(command=run)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--size", default="cpu", help="cpu (default) or paper")
    parser.add_argument("--tasks", default="", help="some tasks of the study; default: all")
    parser.add_argument("--entries", default="", help="some entries of the study; default: all")
    parser.add_argument("--seeds", type=_numbers, help="such as 0,1,2")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--examples", type=int)
    parser.add_argument("--trials", type=int, help="of tuning, for every entry")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds of an earlier call")
    parser.add_argument("--out", type=Path, help="folder of the report; default: benchmarks/STUDY-SIZE")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--data", type=Path, metavar="DIR", help="look for data sets here first")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def run(arguments: argparse.Namespace) -> int:
    """Perform the study and report it; a report of what was done is also left by Ctrl-C."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no usable CUDA device")
    study, plan, console = STUDIES[arguments.study], _plan(arguments), Console()
    results, interrupted = Results(), False
    try:
        with screen(console) as shown:
            for so_far in perform(study, plan, shown):
                results = so_far
    except KeyboardInterrupt:
        interrupted = True
    about = {"size": plan.size, "command": arguments.line, "machine": machine(plan.device)}
    report = write_report(plan.out, study, results, about)
    for claim in study.claims:
        console.print(f"{claim.judge(results).verdict:15s} {claim.text}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {report}", highlight=False)
    return INTERRUPTED if interrupted else 0


def _plan(arguments: argparse.Namespace) -> Plan:
    changes = {name: getattr(arguments, name) for name in ("seeds", "epochs", "examples", "trials")}
    return Plan(
        out=arguments.out or Path("benchmarks") / f"{arguments.study}-{arguments.size}",
        size=arguments.size,
        changes={name: value for name, value in changes.items() if value is not None},
        tasks=[name for name in arguments.tasks.split(",") if name],
        entries=[name for name in arguments.entries.split(",") if name],
        resume=arguments.resume,
        device=torch.device(arguments.device),
        data=arguments.data,
    )
