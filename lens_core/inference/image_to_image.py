"""A picture to begin at, whole or where a mask says so: img2img (SDEdit, Meng et al. 2021) and inpainting."""

from __future__ import annotations

import hashlib
import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from lens_core import flow
from lens_core.flow import Velocity
from lens_core.io import images
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


def to_tensor(image: Image) -> Tensor:
    """An RGB or L picture -> uint8 [1,C,H,W]."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)[None].contiguous()


def to_mask(mask: Image, like: Image) -> Tensor:
    """White is drawn anew, black and what is transparent is kept: bool [1,1,H,W], of the size of `like`."""
    mask = images.to_mask(mask)
    if mask.size != like.size:
        raise ConfigError(
            f"the mask is {mask.height}x{mask.width} px and the picture {like.height}x{like.width}; make them equal"
        )
    found = to_tensor(mask) >= 128
    if not found.any():
        raise ConfigError(
            "the mask is black all over, so nothing would be drawn; paint white, and opaque, what is to change"
        )
    return found


@frozen
class Source:
    """A picture, uint8 [1,3,H,W], its latents z float32 [1,C,h,w], and how much of it goes.

    `strength`: share of the steps that are made, from the time where they begin; 1 forgets the picture, 0 only encodes
    and decodes it. `mask` bool [1,1,H,W]: what is drawn anew; everything else stays, pixel by pixel.
    """

    picture: Tensor
    z: Tensor
    strength: float = 1.0
    mask: Tensor | None = None

    def enter(self, sampler: Any, noise: Tensor, steps: int, velocity: Velocity) -> tuple[Tensor, int, Velocity]:
        """(x, the step to begin with, the velocity): x is the picture with as much noise as that step's time asks."""
        start = steps - (max(1, round(self.strength * steps)) if self.strength else 0)
        if start == steps:
            return self.z.expand_as(noise), start, velocity
        if start and "start" not in inspect.signature(sampler.sample).parameters:
            raise ConfigError("this sampler can only begin at noise: use strength 1, or the sampler euler")
        x = noise
        if start:
            t = sampler.times((noise.shape[-2], noise.shape[-1]), steps)[start].to(noise.device)
            x = flow.mix(self.z.expand_as(noise), noise, t.expand(len(noise)))
        if self.mask is None:
            return x, start, velocity
        return x, start, self._holding(velocity)

    def _holding(self, velocity: Velocity) -> Velocity:
        """The velocity, and where nothing is drawn anew the one that points home, to which every sampler keeps."""
        anew = self._cells()

        def held(x: Tensor, t: Tensor) -> Tensor:
            home = (x - self.z) / t.to(x.dtype).view(-1, 1, 1, 1)
            return torch.where(anew, velocity(x, t), home)

        return held

    def _cells(self) -> Tensor:
        """bool [1,1,h,w]: the latent cells in which some pixel is drawn anew."""
        assert self.mask is not None
        size = self.mask.shape[-1] // self.z.shape[-1]
        return torch.nn.functional.max_pool2d(self.mask.float(), size).bool().to(self.z.device)

    def settle(self, z: Tensor) -> Tensor:
        """The finished latents [B,C,h,w]: exactly the picture's where nothing was drawn anew."""
        return z if self.mask is None else torch.where(self._cells(), z, self.z)

    def paste(self, images: Tensor) -> Tensor:
        """uint8 [B,3,H,W], with the picture's own pixels where nothing was drawn anew."""
        if self.mask is None:
            return images
        return torch.where(self.mask.to(images.device), images, self.picture.to(images.device))

    def facts(self) -> dict[str, Any]:
        """What a result tells of it: hashes of picture and mask, and the strength."""
        found: dict[str, Any] = {"image_hash": _hash(self.picture), "strength": self.strength}
        return found if self.mask is None else {**found, "mask_hash": _hash(self.mask)}


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(str(list(tensor.shape)).encode() + tensor.cpu().numpy().tobytes()).hexdigest()[:16]
