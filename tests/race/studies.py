"""Runs for the tests of reproductions."""

from natgrad.race.run import Epoch, Point, Run


def a_run(name: str, *losses: float, seed: int = 0, stopped: str = "", per_epoch: float = 2.0) -> Run:
    """One whose first epoch takes a second longer than the others."""
    first = [0.0, *(per_epoch * i + 1 for i in range(1, len(losses)))]
    points = [Point(i, 10 * i, first[i], loss, None, {}) for i, loss in enumerate(losses)]
    return Run(name, seed, {}, [Epoch(point) for point in points], stopped)


RUNS = [
    a_run("kfac", 1.0, 0.5, 0.2),
    a_run("kfac", 1.0, 0.6, 0.4, seed=1),
    a_run("sgd", 1.0, 0.8, 0.6, per_epoch=0.5),
    a_run("wild", 1.0, 50.0, stopped="diverged"),
]
