"""`lens fit-preview`: fits the linear map of step previews to a checkpoint's VAE, and measures its error."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from lens_core.catalog import Catalog
from lens_core.checkpoints.latent_preview import LatentPreview, PreviewFit, small
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.pixels import to_pixels
from lens_core.io import images
from lens_core.io.sources import is_picture
from lens_core.protocols import dtype_of
from lens_core.recipe import build, parse_use
from lens_core.types import ConfigError
from lens_core.validators import integer

HELD_OUT = 5
"""One batch of so many is kept from the fit, and measures its error."""


@frozen
class FitRequest:
    """What to fit: `pictures` are a folder of picture files, or a dataset by name or in a line of YAML."""

    pictures: str
    limit: int = field(default=320, validator=integer(at_least=HELD_OUT, at_most=1_000_000))
    side: int = 4  # px a latent cell, across and down
    size: int = field(default=256, validator=integer(at_least=16, at_most=4096))  # px, to which files are cropped


def fit(pipeline: LensPipeline, request: FitRequest, catalog: Catalog) -> LatentPreview:
    """The map of the pipeline's VAE. Raises ConfigError for pictures that cannot be had."""
    fitting = PreviewFit(pipeline.vae.channels, request.side)
    held_out: list[tuple[Tensor, Tensor]] = []
    for number, batch in enumerate(_batches(request, pipeline.vae.downscale, catalog)):
        pixels = to_pixels(batch).to(pipeline.device, dtype_of(pipeline.vae))
        with torch.no_grad():
            z = pipeline.vae.encode(pixels).float()
            decoded = pipeline.decode(z)
        if number % HELD_OUT == HELD_OUT - 1:
            held_out.append((z.cpu(), small(decoded, z, request.side).cpu()))
        else:
            fitting.add(z, decoded)
    return fitting.solve(iter(held_out))


def _batches(request: FitRequest, grid: int, catalog: Catalog) -> Iterator[Tensor]:
    """uint8 [B,3,H,W], `limit` pictures in all."""
    folder = Path(request.pictures).expanduser()
    if folder.is_dir():
        yield from _files(folder, request, grid)
        return
    if "/" in request.pictures:
        raise ConfigError(f"{folder}: there is no such folder; give a folder of pictures, or a dataset such as shapes")
    _, component, config = build(catalog, "dataset", parse_use(request.pictures), "--pictures")
    seen = 0
    for batch in component(config).batches(0, 1):
        pictures: Any = batch.even()
        if pictures is None:
            raise ConfigError(f"{request.pictures}: yields captions alone; name a dataset with pictures")
        yield pictures[: request.limit - seen]
        seen += len(pictures)
        if seen >= request.limit:
            return


def _files(folder: Path, request: FitRequest, grid: int) -> Iterator[Tensor]:
    """The pictures of a folder, one at a time: cropped to a square in their middle, and resized."""
    side = max(grid, request.size // grid * grid)
    paths = sorted(p for p in folder.rglob("*") if is_picture(p.name) and p.is_file())
    if len(paths) < HELD_OUT:
        raise ConfigError(f"{folder}: holds {len(paths)} pictures; give at least {HELD_OUT}")
    for path in islice(paths, request.limit):
        picture = images.read_rgb(path)
        edge = min(picture.size)
        left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
        square = picture.resize((side, side), box=(left, top, left + edge, top + edge))
        yield (
            torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(1, side, side, 3).permute(0, 3, 1, 2)
        )
