"""Classifier-free guidance (Ho and Salimans, 2022) as a velocity field, and checks of what a sampler does with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lens_core import flow
from lens_core.attribution import calling, checked_tensor
from lens_core.flow import Velocity
from lens_core.protocols import dtype_of
from lens_core.types import NumericalError, TextFeatures


def guided_velocity(
    backbone: Any,
    text: TextFeatures,
    negative: TextFeatures | None,
    guidance_scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """(x, t) -> v, guided where low < t <= high. At scale 1, and outside, the unconditional pass is not run."""
    dtype = dtype_of(backbone)

    def predict(x: Tensor, t: Tensor, words: TextFeatures) -> Tensor:
        with calling(backbone, "forward"):
            out = backbone(x.to(dtype), t, words)
        must = f"v must be a float tensor {list(x.shape)}, as x is"
        return checked_tensor(backbone, "forward", out, x.shape, must).float()

    # Reading t on the host waits for the device at every step; over the whole range nobody needs to know it.
    always = tuple(interval) == (0.0, 1.0)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        cond = predict(x, t, text)
        if guidance_scale == 1.0 or not (always or interval[0] < flow.known(t)[0] <= interval[1]):
            return cond
        unwanted = negative or TextFeatures.empty(
            len(text), text.features.shape[1], text.features.shape[3], text.features
        )
        return flow.guide(cond, predict(x, t, unwanted), guidance_scale)

    return guided


def check_finite(flags: Sequence[Tensor], last: int, steps: int, dtype: torch.dtype) -> None:
    """Raise NumericalError if a flag is false. There is one for each step up to `last`; `dtype` is the backbone's."""
    finite = torch.stack(list(flags)).tolist()
    if not all(finite):
        bad = last - len(finite) + 1 + finite.index(False)
        wide = dtype in (torch.float32, torch.float64)
        cure = "its weights, or what it was given, are broken: run lens check" if wide else "try float32"
        raise NumericalError(f"the latents left the finite numbers at step {bad} of {steps} in {dtype}; {cure}")
