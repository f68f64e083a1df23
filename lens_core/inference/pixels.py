"""Convert between the three forms of a picture: uint8 tensors, pixels in [-1, 1], and PIL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def to_images(pixels: Tensor) -> Tensor:
    """Pixels [B,3,H,W] in [-1, 1] -> Images uint8."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pixels(images: Tensor) -> Tensor:
    """Images uint8 [B,3,H,W] -> Pixels float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image]:
    """Images uint8 [B,3,H,W] -> PIL pictures."""
    from PIL import Image as pil

    return [pil.fromarray(i.permute(1, 2, 0).cpu().numpy()) for i in images]
