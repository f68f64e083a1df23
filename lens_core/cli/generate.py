"""`lens generate`: images from prompts, or one image drawn again from its own facts."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from cyclopts import Parameter

from lens_core.arguments import refuse_existing
from lens_core.cli.options import (
    DEFAULT_MODEL,
    INIT_IMAGE,
    PICTURE,
    PROMPTS,
    SAMPLING,
    ModelGroup,
    check_steps,
    parse_interval,
    parse_size,
    read_prompts,
)
from lens_core.cli.terminal import json_text, printable
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from lens_core.inference.batch import GeneratedFile
    from lens_core.inference.foreign_facts import ForeignFacts
    from lens_core.inference.pipeline import LensPipeline
    from lens_core.inference.requests import GenerateRequest, ModelRequest


def generate(
    prompt: Annotated[str | None, Parameter(group=PROMPTS)] = None,
    *,
    prompts_file: Annotated[Path | None, Parameter(group=PROMPTS)] = None,
    output: Annotated[Path | None, Parameter(alias="-o", group=PROMPTS)] = None,
    overwrite: Annotated[bool, Parameter(negative="", group=PROMPTS)] = False,
    reproduce: Annotated[Path | None, Parameter(group=PROMPTS)] = None,
    model: ModelGroup = DEFAULT_MODEL,
    seed: Annotated[int | None, Parameter(group=PICTURE)] = None,
    size: Annotated[str | None, Parameter(group=PICTURE)] = None,
    aspect_ratio: Annotated[str | None, Parameter(group=PICTURE)] = None,
    base_resolution: Annotated[int | None, Parameter(group=PICTURE)] = None,
    steps: Annotated[int | None, Parameter(group=SAMPLING)] = None,
    guidance_scale: Annotated[float | None, Parameter(group=SAMPLING)] = None,
    guidance_interval: Annotated[str | None, Parameter(group=SAMPLING)] = None,
    negative_prompt: Annotated[str | None, Parameter(group=SAMPLING)] = None,
    image: Annotated[Path | None, Parameter(group=INIT_IMAGE)] = None,
    strength: Annotated[float | None, Parameter(group=INIT_IMAGE)] = None,
    mask: Annotated[Path | None, Parameter(group=INIT_IMAGE)] = None,
    num_images: Annotated[int, Parameter(group=PICTURE)] = 1,
    batch_size: Annotated[int, Parameter(group=PICTURE)] = 8,
    preview: Annotated[Path | None, Parameter(group=PICTURE)] = None,
    show_prompt: Annotated[bool, Parameter(negative="", group=PROMPTS)] = False,
    json_: Annotated[bool, Parameter(name="--json", negative="", group=PROMPTS)] = False,
) -> int:
    """Draw pictures from a prompt.

    Parameters
    ----------
    prompt
        What to draw.
    prompts_file
        A UTF-8 file with one prompt a line, instead of a prompt. Run again, only what is missing is drawn.
    output
        The PNG to write, lens.png if not given; several pictures become NAME-0000.png, NAME-0001.png, …
    overwrite
        Draw over pictures that are there, and over a preview.
    reproduce
        A PNG that Lens drew: draw it again from the facts in it, and print how far the two are apart. Of a PNG of
        ComfyUI or A1111, draw what its facts name with --model, as far as no other option is given, and list what was
        taken from them and what was not.
    seed
        Picture i has the seed SEED + i. If not given, random, and printed; a run that goes on keeps its own.
    size
        Height x width in px, for example 128x160.
    aspect_ratio
        Width:height, for example 3:2, instead of a size.
    base_resolution
        Side in px of the square with the same area.
    steps
        Sampler steps; the checkpoint's preset if not given.
    guidance_scale
        Scale of classifier-free guidance; 1 runs no unconditional pass.
    guidance_interval
        LOW,HIGH: guidance at times t with LOW < t <= HIGH alone; 1 is noise, 0 the picture.
    negative_prompt
        What to keep away from.
    image
        The init image; the result has its size.
    strength
        How much of the init image is lost, from 0 to 1; 0.6 if not given, 1 with a mask.
    mask
        A picture of the same size: white is drawn anew, black is kept.
    num_images
        Pictures a prompt.
    batch_size
        Pictures drawn at once; the pictures do not depend on it.
    preview
        A PNG that shows after every step, small, what is being drawn; the pictures of a batch stand side by side.
    show_prompt
        Print the prompt that was drawn, if a reasoner rewrote it.
    json_
        Print one JSON object a picture.
    """
    from lens_core.inference import foreign_facts
    from lens_core.inference.batch import (
        earlier_seed,
        generate_files,
        image_tasks,
        output_paths,
        pending,
        unused_path,
    )
    from lens_core.inference.requests import GenerateRequest
    from lens_core.io.images import read_raw, read_rgb
    from lens_core.io.progress import progress_bar

    init_image = read_rgb(image) if image is not None else None
    mask_image = read_raw(mask) if mask is not None else None  # not read_rgb: its transparency counts
    model_request, foreign = model.request(), None
    if reproduce is not None:
        if prompt is not None or prompts_file is not None:
            raise ConfigError("--reproduce draws what the picture says; leave the prompt out")
        if model.reasoner is not None:
            raise ConfigError("--reproduce draws the prompt that is recorded and asks nobody; leave --reasoner out")
        foreign = foreign_facts.read(reproduce)
    if reproduce is not None and foreign is None:
        _refuse_unused({
            "seed": seed, "size": size, "aspect-ratio": aspect_ratio, "base-resolution": base_resolution,
            "steps": steps, "guidance-scale": guidance_scale, "guidance-interval": guidance_interval,
            "negative-prompt": negative_prompt, "strength": strength, "sampler": model.sampler,
            "lossy-vae-tile": model.lossy_vae_tile, "num-images": num_images if num_images != 1 else None,
            "batch-size": batch_size if batch_size != 8 else None, "preview": preview,
            "show-prompt": show_prompt or None, "json": json_ or None,
            "overwrite": overwrite or None if output is None else None,
        })  # fmt: skip
        if output is not None and not overwrite:
            refuse_existing([output])
        return _reproduce(reproduce, model_request, init_image, mask_image, output)
    if num_images < 1 or batch_size < 1:
        raise ConfigError(f"--num-images and --batch-size must be at least 1, not {num_images} and {batch_size}")
    height, width = parse_size(size)
    request = GenerateRequest(
        negative_prompt, height, width, aspect_ratio, base_resolution, check_steps(steps), guidance_scale,
        parse_interval(guidance_interval), init_image, mask_image, strength,
    )  # fmt: skip
    if foreign is None:
        prompts = read_prompts(prompt, prompts_file)
    else:
        foreign, request, model_request, seed = _complete(foreign, request, model_request, seed)
        prompts = [foreign.taken["prompt"]]
    # A run that goes on, and one that draws over pictures, have the names of the run before, the former its seeds too.
    goes_on, count, usual = prompts_file is not None and not overwrite, len(prompts) * num_images, Path("lens.png")
    chosen = output or (usual if goes_on or overwrite else unused_path(usual, count))
    seed = earlier_seed(chosen, count) if seed is None and goes_on else seed
    first_seed = secrets.randbelow(2**32) if seed is None else seed
    tasks = image_tasks(prompts, chosen, num_images=num_images, seed=first_seed)
    if prompts_file is None and not overwrite:
        refuse_existing(task.path for task in tasks)
    if preview is not None:
        output_paths(preview, 1)
        _check_preview(preview, (image, mask, reproduce, *(task.path for task in tasks)), overwrite=overwrite)
    if foreign is not None:
        _print_foreign(foreign, sys.stderr if json_ else sys.stdout)
    start = time.perf_counter()
    pipeline = model_request.load(lambda loaded: request.workload(loaded, min(batch_size, len(tasks))))
    for note in pipeline.notes:
        print(f"lens: {note}", file=sys.stderr)
    loading = time.perf_counter() - start
    todo = tasks
    if goes_on:
        todo = pending(pipeline, request, tasks)
        if len(todo) < len(tasks):
            print(f"lens: {len(tasks) - len(todo)} of {len(tasks)} pictures are there already", file=sys.stderr)
    on_step = partial(_on_step, _preset_note(pipeline, request.steps, request.guidance_scale))
    with progress_bar(len(todo), "image", disable=None if len(todo) > batch_size else True) as bar:
        for image_file in generate_files(
            pipeline, request, todo, batch_size=batch_size, on_step=on_step, preview=preview
        ):
            _print_file(image_file, loading, as_json=json_, show_prompt=show_prompt)
            bar.update()
    return 0


def _on_step(note: str, first: int, step: int, t: float) -> None:
    # Only now has everything been checked: before, the note would stand above an error that should be one line.
    if note and first == step == 0:
        print(f"lens: {note}", file=sys.stderr)


def _print_file(image_file: GeneratedFile, loading: float, *, as_json: bool, show_prompt: bool) -> None:
    task, seconds = image_file.task, image_file.seconds
    if as_json:
        line = {"file": str(task.path), "seconds": round(seconds, 3), **image_file.facts}
        print(json_text(line))
    else:
        # Prompts may come from files of others.
        drawn = f"\n  drawn as: {printable(image_file.facts['prompt'])}" if show_prompt else ""
        print(
            f"{printable(task.prompt)}{drawn}\n  {printable(task.path)}  seed {task.seed}  {seconds:.2f} s (and "
            f"{loading:.1f} s to load)"
        )


def _preset_note(pipeline: LensPipeline, steps: int | None, scale: float | None) -> str:
    """Which settings come from the checkpoint's preset, and the options that override them."""
    count = pipeline.presets["steps"]
    preset = [f"{count} step{'s' * (count != 1)}"] if steps is None else []
    preset += [f"guidance {pipeline.presets['guidance_scale']:g}"] if scale is None else []
    if not preset:
        return ""
    why = pipeline.note or "the preset of this checkpoint"
    return f"{' at '.join(preset)}: {why}; --steps and --guidance-scale choose others"


def _reproduce(
    picture: Path, model: ModelRequest, image: Image | None, mask: Image | None, output: Path | None
) -> int:  # fmt: skip
    """Draw a picture again, print what differs, and return 0 if no pixel differs beyond rounding."""
    from lens_core.inference import png_metadata
    from lens_core.inference.batch import output_paths
    from lens_core.inference.reproduce import reproduce

    paths = output_paths(output, 1) if output is not None else []
    again = reproduce(picture, model, image, mask)
    for path in paths:
        png_metadata.save(again.image, path, again.facts)
    for name, (stored, now) in again.changes.items():
        print(f"{name}: was {json.dumps(stored)}, is {json.dumps(now)}")
    if not again.max_difference:
        print("identical")
        return 0
    print(f"differs by {again.max_difference} of 255 at most, {again.mean_difference:.4f} in the mean")
    return 0 if again.max_difference <= 1 else 1


def _refuse_unused(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for options that change nothing when a picture of Lens is drawn again."""
    names = [f"--{name}" for name, value in options.items() if value is not None]
    if names:
        raise ConfigError(f"--reproduce draws what the picture says; leave out {', '.join(names)}")


def _check_preview(preview: Path, pictures: Iterable[Path | None], *, overwrite: bool) -> None:
    """Raise ConfigError for a preview that would be written over a picture of the run, or over a file that is there and
    no earlier preview."""
    from lens_core.inference.batch import is_preview

    if any(path is not None and path.resolve() == preview.resolve() for path in pictures):
        raise ConfigError(f"{preview}: is a picture that the run reads or writes; choose another --preview")
    if not overwrite and not is_preview(preview):
        refuse_existing([preview], "--preview")


def _complete(
    foreign: ForeignFacts, request: GenerateRequest, model: ModelRequest, seed: int | None
) -> tuple[ForeignFacts, GenerateRequest, ModelRequest, int | None]:
    """Add what another tool's picture names to what the options ask for -> what was taken, and all that was asked."""
    from attrs import evolve

    from lens_core.recipe import ComponentSpec

    options = {"seed": seed, "sampler": model.sampler, "steps": request.steps, "guidance_scale": request.guidance_scale,
               "negative_prompt": request.negative_prompt}  # fmt: skip
    replaced = {name for name, value in options.items() if value is not None}
    if any(value is not None for value in (request.height, request.aspect_ratio, request.base_resolution)):
        replaced |= {"height", "width"}
    foreign = foreign.without(replaced)
    if "sampler" in foreign.taken:
        model = evolve(model, sampler=ComponentSpec(foreign.taken["sampler"]))
    return foreign, foreign.complete(request), model, foreign.taken.get("seed", seed)


def _print_foreign(foreign: ForeignFacts, stream: TextIO) -> None:
    """List what was taken from another tool's picture, and what was not."""
    for name, value in foreign.taken.items():
        text = printable(json.dumps(value, ensure_ascii=False))
        print(f"taken from {foreign.tool}: {name} {text}", file=stream)
    for line in foreign.left:
        print(f"not taken: {printable(line)}", file=stream)
