"""Start from an init image: image to image (SDEdit, Meng et al. 2021), and inpainting where there is a mask."""

from __future__ import annotations

import hashlib
import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from lens_core import flow
from lens_core.arguments import number
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
    """Mask -> bool [1,1,H,W] of the size of `like`: white is repainted, black and transparent is kept."""
    mask = images.to_mask(mask)
    if mask.size != like.size:
        raise ConfigError(
            f"the mask is {mask.height}x{mask.width} px and the picture {like.height}x{like.width}; make them equal"
        )
    repainted = to_tensor(mask) >= 128
    if not repainted.any():
        raise ConfigError(
            "the mask is black all over, so nothing would be drawn; paint white, and opaque, what is to change"
        )
    return repainted


def read_init_image(
    image: Image | None, mask: Image | None, strength: float | None, size: tuple[int, int]
) -> tuple[Tensor, float, Tensor | None] | None:
    """(picture uint8 [1,3,H,W], strength, mask bool [1,1,H,W] or None), resized to `size`; None without an image.

    Strength defaults to 0.6, and to 1 with a mask. Raises ConfigError.
    """
    if image is None:
        if mask is not None or strength is not None:
            alone = "a mask" if mask is not None else "a strength"
            raise ConfigError(f"{alone} without a picture has no effect; give an image too")
        return None
    share = number("strength", strength, finite=False) if strength is not None else 0.6 if mask is None else 1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"strength is {share}; it must be in [0, 1]")
    rgb = images.to_rgb(image)
    repainted = to_mask(mask, rgb) if mask is not None else None
    height, width = size
    picture = to_tensor(rgb if rgb.size == (width, height) else rgb.resize((width, height)))
    if repainted is not None and tuple(repainted.shape[-2:]) != size:
        # Larger, every pixel stays as wide as the others. Smaller, of a thin stroke every pixel counts: nearest
        # neighbours could lose it, and nothing would be drawn.
        rows, columns = repainted.shape[-2:]
        larger = max(rows, height), max(columns, width)
        enlarged = torch.nn.functional.interpolate(repainted.float(), larger, mode="nearest-exact")
        repainted = torch.nn.functional.adaptive_max_pool2d(enlarged, size).bool()
    return picture, share, repainted


@frozen
class InitImage:
    """An init image, uint8 [1,3,H,W], with its latents z float32 [1,C,h,w].

    `strength`: the share of the steps that is run; 1 ignores the image, 0 only encodes and decodes it.
    `mask` bool [1,1,H,W]: what is repainted; everything else stays, pixel by pixel.
    """

    picture: Tensor
    z: Tensor
    strength: float = 1.0
    mask: Tensor | None = None

    def start(self, sampler: Any, noise: Tensor, steps: int, velocity: Velocity) -> tuple[Tensor, int, Velocity]:
        """(x, the first step, the velocity): x is the init image with the noise of that step's time added."""
        start = steps - (max(1, round(self.strength * steps)) if self.strength else 0)
        if start == steps:
            return self.z.expand_as(noise).clone(), start, velocity  # a callback may write into each row
        if start and "start" not in inspect.signature(sampler.sample).parameters:
            raise ConfigError("this sampler can only begin at noise: use strength 1, or the sampler euler")
        x = noise
        if start:
            t = sampler.times((noise.shape[-2], noise.shape[-1]), steps)[start].to(noise.device)
            x = flow.mix(self.z.expand_as(noise), noise, t.expand(len(noise)))
        if self.mask is None:
            return x, start, velocity
        return x, start, self._keep_unmasked(velocity)

    def _keep_unmasked(self, velocity: Velocity) -> Velocity:
        """The velocity, replaced outside the mask by the one that leads straight back to the image."""
        repainted = self._repainted_cells()

        def masked(x: Tensor, t: Tensor) -> Tensor:
            # On a straight path x = z + t (noise - z), so v = (x - z) / t; a sampler of any order follows it exactly.
            back = (x - self.z) / t.to(x.dtype).view(-1, 1, 1, 1)
            return torch.where(repainted, velocity(x, t), back)

        return masked

    def _repainted_cells(self) -> Tensor:
        """bool [1,1,h,w]: the latent cells in which some pixel is repainted."""
        assert self.mask is not None
        size = self.mask.shape[-1] // self.z.shape[-1]
        return torch.nn.functional.max_pool2d(self.mask.float(), size).bool().to(self.z.device)

    def restore_latents(self, z: Tensor) -> Tensor:
        """Finished latents [B,C,h,w] -> the same, with the image's own outside the mask."""
        return z if self.mask is None else torch.where(self._repainted_cells(), z, self.z)

    def restore_pixels(self, images: Tensor) -> Tensor:
        """Images uint8 [B,3,H,W] -> the same, with the image's own pixels outside the mask."""
        if self.mask is None:
            return images
        return torch.where(self.mask.to(images.device), images, self.picture.to(images.device))

    def metadata(self) -> dict[str, Any]:
        """What a result records: hashes of image and mask, and the strength."""
        recorded: dict[str, Any] = {"image_hash": _hash(self.picture), "strength": self.strength}
        return recorded if self.mask is None else {**recorded, "mask_hash": _hash(self.mask)}


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(str(list(tensor.shape)).encode() + tensor.cpu().numpy().tobytes()).hexdigest()[:16]
