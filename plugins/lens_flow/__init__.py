"""Rectified flow: straight paths between noise (t = 1) and data (t = 0).

`euler` (euler.py) is the published sampler and its schedule, on which `heun`, `dpmpp` and `euler_ancestral` walk too
(solvers.py); `flow_matching` (matching.py) is pre-training.
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_samplers() -> dict[str, type[Any]]:
    from lens_flow.euler import Euler
    from lens_flow.solvers import DPMpp, EulerAncestral, Heun

    return {"dpmpp": DPMpp, "euler": Euler, "euler_ancestral": EulerAncestral, "heun": Heun}


@hookimpl
def lens_methods() -> dict[str, type[Any]]:
    from lens_flow.matching import FlowMatching

    return {"flow_matching": FlowMatching}
