"""What a race leaves on disk: the machine, the command, every run."""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from natgrad.race.run import Epoch, Point, Run

PACKAGES = ("natgrad", "torch", "numpy", "heavyball", "pytorch_optimizer", "optuna", "sentencepiece", "sacrebleu")


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what the race ran on."""
    about: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "device": device.type,
    }
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
    return about


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def record(run: Run) -> dict[str, Any]:
    """Put a run into plain numbers; a loss that is not finite becomes null."""
    last = run.curve[-1] if run.curve else None
    return plain(
        {
            "name": run.name,
            "seed": run.seed,
            "configuration": dict(run.configuration),
            "steps": last.step if last else 0,
            "seconds": last.seconds if last else 0.0,
            "loss": last.loss if last else None,
            "test_loss": last.test_loss if last else None,
            "metrics": dict(last.metrics) if last else {},
            "diverged": run.diverged,
            "stopped": run.stopped,
            "curve": [_epoch(epoch) for epoch in run.epochs],
        }
    )


def restored(held: Mapping[str, Any]) -> Run:
    """The run that a record is of; numbers that were not finite come back as infinite."""
    epochs = [_restored(dict(point)) for point in held["curve"]]
    return Run(held["name"], held["seed"], held["configuration"], epochs, held["stopped"])


def _restored(point: dict[str, Any]) -> Epoch:
    losses, statistics = point.pop("batch_losses"), point.pop("statistics")
    return Epoch(Point(**{**point, "loss": math.inf if point["loss"] is None else point["loss"]}), losses, statistics)


def _epoch(epoch: Epoch) -> dict[str, Any]:
    return {
        **asdict(epoch.point),
        "batch_losses": [float(f"{loss:.6g}") for loss in epoch.batch_losses],
        "statistics": dict(epoch.statistics),
    }


def plain(value: Any) -> Any:
    """Make a value fit for JSON: numbers that are not finite become null, objects their repr."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else repr(value)


def write_json(path: Path, value: Any) -> None:
    """Write through a second file, so that an interruption never leaves half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(plain(value), indent=1) + "\n")
    unfinished.replace(path)
