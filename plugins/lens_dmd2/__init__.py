"""Few-step distillation: a guided model of many steps becomes one of four, without guidance.

`dmd2` (method.py) is the method. It is put together from rollouts (rollout.py), the losses of distribution matching as
pure functions (losses.py), and a discriminator on the teacher's features (heads.py).
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_methods() -> dict[str, type[Any]]:
    from lens_dmd2.method import DMD2

    return {"dmd2": DMD2}
