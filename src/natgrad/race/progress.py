"""What is seen while a race runs: bars on a terminal, lines elsewhere, TensorBoard on request."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from natgrad.race.run import Epoch, Watch


class Screen(Protocol):
    """Shows a run; `follow` returns what is to be called at the end of every epoch."""

    def follow(self, title: str, epochs: int) -> Watch:
        """Begin to show a run called `title`."""
        ...


class Lines:
    """A line for the first epoch, every few and the last, for logs and pipes."""

    def follow(self, title: str, epochs: int) -> Watch:
        """Begin to show a run called `title`."""
        every = max(1, epochs // 8)

        def watch(epoch: Epoch) -> None:
            if epoch.point.epoch % every == 0 or epoch.point.epoch == epochs:
                print(f"{title:24s} epoch {epoch.point.epoch:3d}/{epochs}  {_state(epoch)}", flush=True)

        return watch


class Bars:
    """A live bar for every run, with its loss and its seconds of training."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def follow(self, title: str, epochs: int) -> Watch:
        """Begin to show a run called `title`."""
        bar = self.progress.add_task(title, total=epochs, state="")

        def watch(epoch: Epoch) -> None:
            self.progress.update(bar, completed=epoch.point.epoch, state=_state(epoch))

        return watch


@contextmanager
def screen(console: Console) -> Iterator[Screen]:
    """Bars where the output is a terminal, lines where it is not."""
    if not console.is_terminal or not sys.stdout.isatty():
        yield Lines()
        return
    columns = (TextColumn("{task.description:24s}"), BarColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console) as progress:
        yield Bars(progress)


def _state(epoch: Epoch) -> str:
    point = epoch.point
    test = "" if point.test_loss is None else f"  test {point.test_loss:9.4f}"
    metrics = "".join(f"  {name} {value:.4g}" for name, value in point.metrics.items())
    return f"loss {point.loss:9.4f}{test}  {point.seconds:7.1f} s{metrics}"


@contextmanager
def tensorboard(folder: Path | None) -> Iterator[Watch]:
    """Write scalars of a run under `folder`; nothing without one."""
    if folder is None:
        yield lambda _: None
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    try:
        yield lambda epoch: _write(writer, epoch)
    finally:
        writer.close()


def _write(writer: object, epoch: Epoch) -> None:
    add = writer.add_scalar  # type: ignore[attr-defined]
    point = epoch.point
    add("loss/train", point.loss, point.step)
    add("time/seconds", point.seconds, point.step)
    if point.test_loss is not None:
        add("loss/test", point.test_loss, point.step)
    for name, value in point.metrics.items():
        add(f"metric/{name}", value, point.step)
    first = point.step - len(epoch.batch_losses)
    for i, loss in enumerate(epoch.batch_losses, first + 1):
        add("loss/batch", loss, i)
    for name, value in epoch.statistics.items():
        add(f"optimizer/{name}", value, point.step)
