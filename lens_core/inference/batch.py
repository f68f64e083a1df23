"""Many images into PNG files: which file gets which prompt and seed, what is there already, and the rest in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from lens_core.arguments import wrong_ending
from lens_core.inference import png_metadata
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.pipeline_parts import NO_PREVIEW
from lens_core.inference.pixels import to_pil
from lens_core.inference.requests import MAX_IMAGES, GenerateRequest
from lens_core.io.atomic_files import write_atomic
from lens_core.io.images import read_raw
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo


@frozen
class ImageTask:
    """One image to generate: its prompt, its seed, and the PNG file to write."""

    prompt: str
    seed: int
    path: Path


@frozen
class GeneratedFile:
    """One image that has been written: `facts` are those in the PNG, `seconds` those of its whole batch."""

    task: ImageTask
    facts: dict[str, Any]
    seconds: float


def output_paths(output: Path, count: int) -> list[Path]:
    """The PNG files for `count` images: `output` itself for one, else NAME-0000.png and so on.

    Raises ConfigError where they cannot be written, before the time for drawing is spent.
    """
    if output.suffix.lower() != ".png":
        raise wrong_ending(output, ".png", "pictures are")
    paths = _numbered(output, count)
    parent = output.parent
    if not parent.is_dir():
        raise ConfigError(f"{parent}: there is no such folder; make it first")
    try:
        probe = parent / f".{output.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror}); choose another --output") from error
    if any(p.is_dir() for p in paths):
        raise ConfigError(f"{output}: is a folder; name a .png file")
    return paths


def image_tasks(prompts: Sequence[str], output: Path, *, num_images: int = 1, seed: int) -> list[ImageTask]:
    """`num_images` tasks a prompt, in order; task i has the seed `seed` + i. Raises ConfigError as `output_paths`."""
    if num_images < 1:
        raise ConfigError(f"--num-images must be at least 1, not {num_images}")
    if num_images * len(prompts) > MAX_IMAGES:
        raise ConfigError(
            f"{num_images} pictures a prompt are more than {MAX_IMAGES} in all; draw them in several runs"
        )
    texts = [prompt for prompt in prompts for _ in range(num_images)]
    paths = output_paths(output, len(texts))
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed {seed} must be between 0 and 2^63 - 1")
    return [ImageTask(text, seed + i, path) for i, (text, path) in enumerate(zip(texts, paths, strict=True))]


def _numbered(output: Path, count: int) -> list[Path]:
    """The files of `count` images."""
    return [output] if count == 1 else [output.with_stem(f"{output.stem}-{i:04d}") for i in range(count)]


def unused_path(path: Path, count: int = 1) -> Path:
    """`path`, or the first of path-2, path-3 … under which none of `count` images has a file."""
    number, free = 1, path
    while any(file.exists() for file in _numbered(free, min(count, MAX_IMAGES))):  # more are refused later
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def earlier_seed(output: Path, count: int) -> int | None:
    """The first seed of a run that wrote some of these `count` images before; None where none of them is there. Raises
    ConfigError as `output_paths`."""
    for place, path in enumerate(output_paths(output, min(count, MAX_IMAGES))):  # more are refused later
        if path.exists() and read_raw(path).info.get("lens"):
            seed = int(png_metadata.facts(path)[1]["seed"]) - place
            return seed if seed >= 0 else None  # another run's: `pending` refuses it
    return None


def pending(pipeline: LensPipeline, request: GenerateRequest, tasks: Sequence[ImageTask]) -> list[ImageTask]:
    """The tasks whose files are not there yet. Raises ConfigError where a file was drawn by another request."""
    return [task for task in tasks if not _is_done(task, request.fingerprint(pipeline, task.prompt, task.seed))]


def _is_done(task: ImageTask, fingerprint: str) -> bool:
    if not task.path.exists():
        return False
    if read_raw(task.path).info.get("lens") and png_metadata.facts(task.path)[1].get("request") == fingerprint:
        return True
    raise ConfigError(f"{task.path}: is there, and was asked for differently; use --overwrite, or another --output")


def generate_files(
    pipeline: LensPipeline,
    request: GenerateRequest,
    tasks: Sequence[ImageTask],
    *,
    batch_size: int = 8,
    on_step: Callable[[int, int, float], None] = lambda first, step, t: None,
    preview: Path | None = None,
) -> Iterator[GeneratedFile]:
    """Generate the images of `tasks`, `batch_size` at once, and write each with the facts that draw it again.

    The images do not depend on `batch_size`. `on_step` gets the index of the batch's first task, the step and its time.
    A batch is written while the next one is drawn: compressing a picture of 1024 x 1024 takes longer than drawing it in
    four steps on a large GPU. Each file is yielded once it is written, also when a later batch fails.
    `preview` is a PNG that is written anew after every step. Raises ConfigError where the checkpoint has no map for it.
    """
    if preview is not None and pipeline.latent_preview is None:
        raise ConfigError(f"{preview}: {NO_PREVIEW}")
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {batch_size}")
    with ThreadPoolExecutor(png_metadata.WRITERS, "png") as writers:
        writing: list[Future[GeneratedFile]] = []
        for first in range(0, len(tasks), batch_size):
            batch = tasks[first : first + batch_size]
            start = time.perf_counter()
            try:
                result = pipeline(
                    [task.prompt for task in batch],
                    seed=[task.seed for task in batch],
                    callback_on_step_end=partial(_report_step, on_step, first, preview),
                    **request.arguments(),
                )
            except BaseException:
                yield from map(Future.result, writing)
                raise
            seconds = time.perf_counter() - start
            yield from map(Future.result, writing)
            writing = []
            for task, image, prompt in zip(batch, result.images, result.prompts, strict=True):
                facts = png_metadata.facts_of(prompt, task.seed, result.settings)
                fingerprint = request.fingerprint(pipeline, task.prompt, task.seed)
                writing.append(writers.submit(_write, image, GeneratedFile(task, facts, seconds), fingerprint))
        yield from map(Future.result, writing)


def _write(image: Any, file: GeneratedFile, fingerprint: str) -> GeneratedFile:
    png_metadata.save(image, file.task.path, file.facts | {"request": fingerprint})
    return file


def _report_step(
    on_step: Callable[[int, int, float], None],
    first: int,
    preview: Path | None,
    pipeline: LensPipeline,
    step: int,
    t: float,
    values: dict[str, Any],
) -> None:
    on_step(first, step, t)
    if preview is not None:
        (row,) = to_pil(torch.cat(list(pipeline.preview(values["denoised"])), dim=-1)[None])
        write_atomic(preview, lambda path: row.save(path, format="PNG", pnginfo=_preview_mark()))


PREVIEW_MARK = "lens_preview"
"""The text chunk by which a preview is known: it may be written over, a picture may not."""


def _preview_mark() -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    mark = PngInfo()
    mark.add_text(PREVIEW_MARK, "1")
    return mark


def is_preview(path: Path) -> bool:
    """Whether a file is a preview of an earlier run."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            return PREVIEW_MARK in image.info
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
