"""Pictures as callers have them: PIL pictures, paths, arrays and tensors, as a PIL picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lens_core.io import images
from lens_core.io.readers import shown
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


def as_picture(name: str, value: Any) -> Image | None:
    """A PIL picture, a path, an array [H,W], [H,W,3] or [H,W,4], or a tensor [C,H,W] -> a PIL picture; None stays None.

    Arrays and tensors may have a batch of one in front, as [1,H,W,3] and [1,3,H,W]. uint8 is 0 to 255, floats are 0 to
    1, as in diffusers. Raises ConfigError, which calls it `name`.
    """
    if value is None or hasattr(value, "getbands"):
        return value  # type: ignore[no-any-return]  # a PIL picture
    if isinstance(value, str | Path):
        return images.read_raw(Path(value).expanduser())
    if not hasattr(value, "shape"):
        raise ConfigError(f"{name} must be a picture (PIL, path, array or tensor), not {type(value).__name__}")
    tensor = hasattr(value, "detach")
    array = value.detach().cpu().float().numpy() if tensor and value.is_floating_point() else np.asarray(value)
    shape = list(array.shape)
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if tensor and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or not array.size:
        layout = "[3,H,W] or [1,3,H,W]" if tensor else "[H,W,3] or [1,H,W,3]"
        raise ConfigError(f"{name} has the shape {shape}; it must be {layout}")
    return _from_array(name, array)


def _from_array(name: str, array: np.ndarray[Any, Any]) -> Image:
    from PIL import Image

    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ConfigError(f"{name} has floats outside of [0, 1]; divide by 255, or give uint8")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ConfigError(f"{name} is of {shown(str(array.dtype))[1:-1]}; give uint8, or floats in [0, 1]")
    return Image.fromarray(np.ascontiguousarray(array))
