"""Classifier-free guidance (Ho and Salimans, 2022) as a velocity field, and checks of what a sampler does with it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from lens_core import flow
from lens_core.attribution import calling, checked_tensor
from lens_core.flow import Velocity
from lens_core.protocols import dtype_of
from lens_core.types import NumericalError, TextFeatures

TOGETHER = 4096
"""Latent cells of a batch up to which a device that is no CPU computes both branches of guidance as one batch, where
there is no negative prompt."""


def guided_velocity(
    backbone: Any,
    text: TextFeatures,
    negative: TextFeatures | None,
    guidance_scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """(x, t) -> v, guided where low < t <= high. At scale 1, and outside, the unconditional pass is not run.

    Without a negative prompt, both branches of a small batch are one call of the backbone on an accelerator: there a
    small pass takes as long as the host needs to launch it.
    """
    dtype = dtype_of(backbone)

    def predict(x: Tensor, t: Tensor, words: TextFeatures) -> Tensor:
        with calling(backbone, "forward"):
            out = backbone(x.to(dtype), t, words)
        must = f"v must be a float tensor {list(x.shape)}, as x is"
        return checked_tensor(backbone, "forward", out, x.shape, must).float()

    # Reading t on the host waits for the device at every step; over the whole range nobody needs to know it.
    always = tuple(interval) == (0.0, 1.0)

    text = _with_mask_on_host(text)
    negative = None if negative is None else _with_mask_on_host(negative)
    nothing = TextFeatures.empty(len(text), text.features.shape[1], text.features.shape[3], text.features)

    @functools.cache
    def both() -> TextFeatures:
        return TextFeatures.cat([nothing, text])

    def guided(x: Tensor, t: Tensor) -> Tensor:
        if guidance_scale == 1.0 or not (always or interval[0] < flow.known(t)[0] <= interval[1]):
            return predict(x, t, text)
        if negative is None and x.device.type != "cpu" and branches_at_once(len(x), x[0, 0].numel()) == 2:
            uncond, cond = predict(torch.cat([x, x]), flow.twice(t), both()).chunk(2)
            return flow.guide(cond, uncond, guidance_scale)
        return flow.guide(predict(x, t, text), predict(x, t, negative or nothing), guidance_scale)

    return guided


class DataEstimate:
    """Where sampling is heading: the data that the last velocity points at, whatever the sampler."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # x, v, t

    def following(self, velocity: Velocity) -> Velocity:
        """The velocity, of which the last call is kept."""

        def kept(x: Tensor, t: Tensor) -> Tensor:
            v = velocity(x, t)
            self._last = x, v, t
            return v

        return kept

    def data(self, t: float, x: Tensor) -> Tensor:
        """The estimate after a step that ended with x at time t. At t = 0 it is x."""
        return x if self._last is None or t == 0 else flow.data_from(*self._last)


def branches_at_once(batch: int, cells: int) -> int:
    """How many branches of guidance without a negative prompt one call of the backbone computes on an accelerator, for
    `batch` pictures of `cells` latent cells each: both, or one."""
    return 2 if batch * cells <= TOGETHER else 1


def _with_mask_on_host(text: TextFeatures) -> TextFeatures:
    """Features that a caller brings may have a mask on a GPU alone: it is read once, and not in every step."""
    on_gpu = text.mask.device.type not in ("cpu", "meta")
    return evolve(text, host=text.known) if on_gpu and text.host is None else text


def check_finite(flags: Sequence[Tensor], last: int, steps: int, dtype: torch.dtype) -> None:
    """Raise NumericalError if a flag is false. There is one for each step up to `last`; `dtype` is the backbone's."""
    finite = torch.stack(list(flags)).tolist()
    if not all(finite):
        bad = last - len(finite) + 1 + finite.index(False)
        wide = dtype in (torch.float32, torch.float64)
        cure = "its weights, or what it was given, are broken: run lens check" if wide else "try float32"
        raise NumericalError(f"the latents left the finite numbers at step {bad} of {steps} in {dtype}; {cure}")
