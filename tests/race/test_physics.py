import math
from dataclasses import replace

import torch

from natgrad.race import physics
from natgrad.race.entries import ENTRIES
from natgrad.race.run import Rules, run
from natgrad.race.settings import tuned
from natgrad.race.tasks import TASKS

TASK = TASKS["pinn"]


def test_every_eighth_point_is_on_the_boundary_and_all_sides_are_met() -> None:
    x, y = physics.points(800, seed=3)
    boundary = ((x == 0) | (x == 1)).any(1)
    assert boundary.nonzero().flatten().tolist() == list(range(0, 800, 8))
    assert all((x[:, axis] == value).sum() > 10 for axis in (0, 1) for value in (0, 1))
    assert x.min() == 0 and x.max() == 1 and x.dtype == torch.float64 and y.shape == (800, 1)


def test_residuals_of_the_solution_vanish_and_its_error_is_0() -> None:
    class Solution(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (math.pi * x).sin().prod(-1, keepdim=True)

    model = TASK.model(TASK.data(None))
    assert isinstance(model, physics.Residuals)
    assert physics.relative_error(model, TASK.data(None)) > 0.1
    model.u.steps = torch.nn.ModuleList([Solution()])
    x, _ = physics.points(64, seed=0)
    assert model(x).abs().max() < 1e-12
    grid = torch.rand(9, 2, dtype=torch.float64)
    assert (model.u(grid).value - physics.exact(grid)).norm() < 1e-12


def test_the_energy_natural_gradient_is_far_ahead_of_adam() -> None:
    """80 steps of each: two orders of magnitude in the error, at the settings of the package and Adam's defaults."""
    data = TASK.data(None)
    data = replace(data, train=(data.train[0][:1024], data.train[1][:1024]))
    task = replace(TASK, batch=256)
    errors = {}
    for name in ("adamw", "woodbury-joint"):
        entry = ENTRIES[name]
        settings = {**entry.defaults, **tuned()["pinn"].get(name, {})}
        done = run(task, data, entry, settings=settings, seed=0, rules=Rules(20))
        errors[name] = done.curve[-1].metrics["relative L2 error"]
    assert errors["woodbury-joint"] < 1e-2 * errors["adamw"]
