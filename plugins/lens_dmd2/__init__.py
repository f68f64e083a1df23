"""Few-step distillation: a guided model of many steps becomes one of four, without guidance.

The method `trajectory_regression` (regression.py) learns the steps of the teacher, a few in one; `dmd2` (method.py)
matches the distribution of its pictures. That is put together from rollouts (rollout.py), the losses of distribution
matching as pure functions (losses.py), and a discriminator on the teacher's features (heads.py). What both need of
student and teacher is in student.py.
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_methods() -> dict[str, type[Any]]:
    from lens_dmd2.method import DMD2
    from lens_dmd2.regression import TrajectoryRegression

    return {"dmd2": DMD2, "trajectory_regression": TrajectoryRegression}
