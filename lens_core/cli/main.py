"""The command line. Data goes to stdout, progress to stderr; exit codes: 0 ok, 1 runtime, 2 usage, 130 Ctrl-C."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import re
import sys
import time
import warnings
from functools import partial
from importlib.util import find_spec
from inspect import isfunction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from lens_core import __version__
from lens_core.catalog import Catalog, resolve
from lens_core.io import readers
from lens_core.types import ConfigError, LensError, NumericalError, PluginError

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

    from lens_core.inference.offload import Workload
    from lens_core.inference.pipeline import LensPipeline
    from lens_core.recipe import ComponentSpec


MOST_STEPS = 10_000  # of a sampler
MOST_PICTURES = 1_000_000  # of one run of `lens generate` or `lens bench`
app = App(name="lens", version=__version__, help="Text-to-image: generate, train, measure. Everything is a plugin.")


def _say(line: str) -> None:
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def _tell(start: int, note: str, _: Any, step: int, t: float, __: Any) -> None:
    if note and step == 0:  # now that all is checked: a mistake is told in one line of its own
        print(f"lens: {note}", file=sys.stderr)
    _say(f"pictures {start}+: step {step + 1}, t = {t:.3f}")


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise ConfigError("give one prompt, or a file of prompts with --prompts-file, one a line")
    if prompt is not None:
        if not prompt.strip():
            raise ConfigError("the prompt is empty; say what to draw")
        return [prompt]
    assert file is not None
    lines = [line.strip() for line in readers.lines(readers.read_text(file)) if line.strip()]
    if not lines:
        raise ConfigError(f"{file}: holds no prompt; write one a line")
    return lines


def _outputs(output: Path, count: int) -> list[Path]:
    """Where each picture goes; checked before anything is drawn."""
    if output.suffix.lower() != ".png":
        raise ConfigError(f"{output}: pictures are written as .png; use {output.with_suffix('.png')}")
    paths = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i:04d}") for i in range(count)]
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


def _lora(text: str) -> tuple[Path, float]:
    """PATH or PATH:WEIGHT."""
    path, colon, weight = text.rpartition(":")
    try:
        place, factor = (Path(path), float(weight)) if colon else (Path(text), 1.0)
    except ValueError:
        place, factor = Path(text), 1.0
    if not place.exists():
        raise ConfigError(f"{place}: there is no such LoRA; give a .safetensors file or its folder, then :WEIGHT")
    return place, factor


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"lens": __version__, "torch": version("torch"), "diffusers": version("diffusers")}


@app.command
def generate(
    prompt: str | None = None,
    *,
    prompts_file: Path | None = None,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    reproduce: Path | None = None,
    model: str | None = None,
    backbone: Path | None = None,
    text_encoder: Path | None = None,
    vae: Path | None = None,
    lora: Annotated[list[str] | None, Parameter(negative="")] = None,
    seed: int | None = None,
    size: str | None = None,
    aspect_ratio: str | None = None,
    base_resolution: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    guidance_scale: float | None = None,
    guidance_interval: str | None = None,
    negative_prompt: str | None = None,
    image: Path | None = None,
    strength: float | None = None,
    mask: Path | None = None,
    num_images: int = 1,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    offload: str = "auto",
    prompt_cache: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
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
        Draw prompts from a file again, over the pictures that are there.
    reproduce
        A PNG that Lens drew: draw it again from what it carries, and tell how far the two are apart.
    model
        A folder, a Hub id org/name[@revision], a backbone in one file, or tiny:, which is used if none is given.
    backbone
        A single .safetensors file with the backbone, in the place of the model's own.
    text_encoder
        The same for the text encoder, or a folder with GPT-OSS.
    vae
        The same for the VAE.
    lora
        A LoRA file or folder, with a weight if you like: PATH or PATH:0.8. May be given more than once.
    seed
        Picture i has the seed SEED + i. Random if not given, and printed.
    size
        Height x width in px, for example 128x160.
    aspect_ratio
        Width:height, for example 3:2, instead of a size.
    base_resolution
        Side in px of the square with the same area.
    steps
        Sampler steps; the checkpoint's preset if not given.
    sampler
        Another sampler than the checkpoint's: euler, heun, dpmpp, euler_ancestral.
    guidance_scale
        Strength of guidance; 1 runs no unconditional pass.
    guidance_interval
        LOW,HIGH: guidance at times t with LOW < t <= HIGH alone; 1 is noise, 0 the picture.
    negative_prompt
        What to keep away from.
    image
        A picture to begin at, in its size.
    strength
        How much of that picture goes, from 0 to 1; 0.6 if not given, 1 with a mask.
    mask
        A picture of the same size: white is drawn anew, black is kept.
    num_images
        Pictures a prompt.
    batch_size
        Pictures drawn at once; the pictures do not depend on it.
    device
        auto, cpu, cuda, cuda:1 …
    dtype
        auto (bfloat16 on GPUs, float32 on CPUs), bfloat16, float32.
    offload
        What leaves the GPU when: none, modulation, model, encoder-cpu, block; auto takes the fastest that fits.
    prompt_cache
        A folder that keeps features of prompts; with a prompt that is there the text encoder is not even read.
    json_
        Print one JSON object a picture.
    """
    from lens_core.inference import png_metadata
    from lens_core.io.images import read_raw, read_rgb
    from lens_core.recipe import ComponentSpec

    begin = read_rgb(image) if image is not None else None
    anew = read_raw(mask) if mask is not None else None  # its transparency counts
    files = {"backbone": backbone, "text_encoder": text_encoder, "vae": vae}
    if reproduce is not None:
        if prompt is not None or prompts_file is not None:
            raise ConfigError("--reproduce draws what the picture says; leave the prompt out")
        again = partial(
            _pipeline, model, lora, files=files, device=device, dtype=dtype, offload=offload, text_cache=prompt_cache
        )
        return _reproduce(reproduce, again, begin, anew, output)
    if num_images < 1 or batch_size < 1:
        raise ConfigError(f"--num-images and --batch-size must be at least 1, not {num_images} and {batch_size}")
    asked_for = _prompts(prompt, prompts_file)
    if num_images * len(asked_for) > MOST_PICTURES:
        raise ConfigError(
            f"{num_images} pictures a prompt are more than {MOST_PICTURES} in all; draw them in several runs"
        )
    texts = [text for text in asked_for for _ in range(num_images)]
    _check_steps(steps)
    paths = _outputs(output or Path("lens.png"), len(texts))
    height, width = _size(size)
    low, high = _interval(guidance_interval)
    if seed is None:
        import secrets

        seed = secrets.randbelow(2**32)
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed {seed} must be between 0 and 2^63 - 1")
    begun = time.perf_counter()

    def load(made: LensPipeline) -> Workload:
        from lens_core.inference.offload import Workload

        if made.vae is None:
            return Workload()  # which cannot be drawn, as will be said
        drawn = made.size(height, width, aspect_ratio, base_resolution)
        return Workload(
            drawn, made.vae.downscale, min(batch_size, len(texts)), steps=steps or int(made.presets["steps"])
        )

    pipeline = _pipeline(
        model,
        lora,
        ComponentSpec(sampler) if sampler else None,
        files=files,
        device=device,
        dtype=dtype,
        offload=offload,
        load=load,
        text_cache=prompt_cache,
    )
    for note in pipeline.notes:
        print(f"lens: {note}", file=sys.stderr)
    loaded = time.perf_counter() - begun
    asked = [
        pipeline.version, pipeline.loras, sampler, size, aspect_ratio, base_resolution, steps, guidance_scale,
        guidance_interval, negative_prompt, strength, _digest(image), _digest(mask),
    ]  # fmt: skip
    requests = [_request([*asked, text, seed + i]) for i, text in enumerate(texts)]
    left = list(range(len(texts)))
    if prompts_file is not None and not overwrite:
        left = [i for i in left if not _there(paths[i], requests[i])]
        if len(left) < len(texts):
            print(f"lens: {len(texts) - len(left)} of {len(texts)} pictures are there already", file=sys.stderr)
    for start in range(0, len(left), batch_size):
        part = left[start : start + batch_size]
        begun = time.perf_counter()
        result = pipeline(
            [texts[i] for i in part],
            negative_prompt,
            height=height,
            width=width,
            aspect_ratio=aspect_ratio,
            base_resolution=base_resolution,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            guidance_interval=(low, high),
            image=begin,
            mask_image=anew,
            strength=strength,
            seed=[seed + i for i in part],
            callback_on_step_end=partial(_tell, part[0], "" if start else _preset(pipeline, steps, guidance_scale)),
        )
        seconds = time.perf_counter() - begun
        for i, picture in zip(part, result.images, strict=True):
            facts = {"prompt": texts[i], "seed": seed + i, **result.settings, "versions": _versions()}
            png_metadata.save(picture, paths[i], facts | {"request": requests[i]})
            if json_:
                print(json.dumps({"file": str(paths[i]), "seconds": round(seconds, 3), **facts}, ensure_ascii=False))
            else:
                print(f"{texts[i]}\n  {paths[i]}  seed {seed + i}  {seconds:.2f} s (and {loaded:.1f} s to load)")
    return 0


def _preset(pipeline: LensPipeline, steps: int | None, scale: float | None) -> str:
    """What the checkpoint decides, since nobody else did, and how to decide otherwise."""
    taken = [f"{pipeline.presets['steps']} steps"] if steps is None else []
    taken += [f"guidance {pipeline.presets['guidance_scale']:g}"] if scale is None else []
    if not taken:
        return ""
    why = pipeline.note or "the preset of this checkpoint"
    return f"{' at '.join(taken)}: {why}; --steps and --guidance-scale choose others"


def _pipeline(
    model: str | None,
    loras: list[str] | None,
    sampler: ComponentSpec | None,
    *,
    files: dict[str, Path | None],
    device: str,
    dtype: str,
    offload: str = "auto",
    load: Callable[[LensPipeline], Workload] | None = None,
    text_cache: Path | None = None,
) -> LensPipeline:
    """The pipeline that a command asks for; `model` None: tiny:. `files` take the place of parts, `load` tells what
    will be drawn, for the plan."""
    folds = [_lora(text) for text in loras or ()]
    from lens_core.inference.offload import describe
    from lens_core.inference.pipeline import LensPipeline

    pipeline = LensPipeline.from_pretrained(
        model or "tiny:", device=device, dtype=dtype, offload=offload, load=load, text_cache=text_cache,
        backbone=files["backbone"], text_encoder=files["text_encoder"], vae=files["vae"],
    )  # fmt: skip
    if pipeline.placement is not None and pipeline.placement.told.plan != "none":
        print(describe(pipeline.placement.told, str(pipeline.device), pipeline.placement.free), file=sys.stderr)
    for path, weight in folds:
        pipeline.load_lora_weights(path, weight)
    if sampler is not None:
        pipeline.use_sampler(sampler.use, **sampler.options)
    return pipeline


def _reproduce(
    picture: Path, load: Callable[[ComponentSpec | None], LensPipeline], image: Image | None, mask: Image | None,
    output: Path | None,
) -> int:  # fmt: skip
    """Draw a picture again from the facts that it carries, and compare. 0 if no pixel differs beyond rounding."""
    from lens_core.inference import png_metadata
    from lens_core.recipe import ComponentSpec

    paths = _outputs(output, 1) if output is not None else []
    old, told = png_metadata.facts(picture)
    for name, given in (("image", image), ("mask", mask)):
        if (f"{name}_hash" in told) != (given is not None):
            need = "was drawn from one: give it" if given is None else "was drawn without: leave out"
            raise ConfigError(f"{picture}: {need}, --{name}")
    how = told.get("sampler")
    pipeline = load(ComponentSpec(how["use"], {k: v for k, v in how.items() if k != "use"}) if how else None)
    if (pipeline.version, pipeline.loras) != (told["model_hash"], told.get("loras", [])):
        raise ConfigError(
            f"{picture}: was drawn by {told['model']} of hash {told['model_hash']} with the LoRAs "
            f"{told.get('loras', [])}; this is hash {pipeline.version} with {pipeline.loras}: give --model and --lora"
        )
    low, high = told.get("guidance_interval", (0.0, 1.0))
    result = pipeline(
        told["prompt"],
        told["negative_prompt"] or None,
        height=told["height"],
        width=told["width"],
        num_inference_steps=told["steps"],
        guidance_scale=told["guidance_scale"],
        guidance_interval=(low, high),
        image=image,
        mask_image=mask,
        strength=told.get("strength"),
        seed=told["seed"],
    )
    (new,) = result.images
    facts = {"prompt": told["prompt"], "seed": told["seed"], **result.settings, "versions": _versions()}
    facts = json.loads(json.dumps(facts))
    for path in paths:
        png_metadata.save(new, path, facts)
    for name in sorted((told.keys() | facts.keys()) - {"request"}):
        if told.get(name) != facts.get(name):
            print(f"{name}: was {json.dumps(told.get(name))}, is {json.dumps(facts.get(name))}")
    return _apart(old, new)


def _apart(old: Image, new: Image) -> int:
    import numpy as np

    from lens_core.io.images import to_rgb

    if old.size != new.size:
        raise ConfigError(f"the picture is {old.height}x{old.width} px, but its facts say {new.height}x{new.width}")
    apart = np.abs(np.asarray(to_rgb(old), np.int16) - np.asarray(new, np.int16))
    if not apart.any():
        print("identical")
        return 0
    print(f"differs by {apart.max()} of 255 at most, {apart.mean():.4f} in the mean")
    return 0 if apart.max() <= 1 else 1


def _interval(text: str | None) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in (text or "0,1").split(","))
    except ValueError as error:
        raise ConfigError(
            f"guidance interval {readers.shown(text)} must be LOW,HIGH in times, for example 0.2,0.9"
        ) from error
    return low, high


def _digest(path: Path | None) -> str:
    import hashlib

    return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def _request(asked: list[Any]) -> str:
    """A short hash of everything that was asked for and decides a picture."""
    import hashlib

    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _there(path: Path, request: str) -> bool:
    """Whether a picture has been drawn by this very request. Another one in its place is refused."""
    from lens_core.inference import png_metadata
    from lens_core.io.images import read_raw

    if not path.exists():
        return False
    if read_raw(path).info.get("lens") and png_metadata.facts(path)[1].get("request") == request:
        return True
    raise ConfigError(f"{path}: is there, and was asked for differently; use --overwrite, or another --output")


def _check_steps(steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}")
    if steps is not None and steps > MOST_STEPS:
        raise ConfigError(f"steps must be at most {MOST_STEPS}, not {steps}")


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    parts = size.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() and len(p) <= 5 and 0 < int(p) <= 16384 for p in parts):
        raise ConfigError(f"size {readers.shown(size)} must be HEIGHTxWIDTH in px, for example 128x160")
    return int(parts[0]), int(parts[1])


@app.command
def train(
    recipe: Path,
    *,
    output: Path | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="")] = (),
    allow_changed: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train what a recipe describes, or go on where the run in --output stopped.

    Parameters
    ----------
    recipe
        The YAML file.
    output
        The run's folder; runs/NAME-OF-RECIPE if not given.
    set_
        PATH=VALUE, in the place of what the recipe says, as in --set method.gan=0; can be given more than once.
    allow_changed
        Go on with a recipe that is not the one the run was begun with; the differences are told.
    dry_run
        Print the recipe with all its defaults and the memory that the run needs, by part, and start nothing.
    """
    from lens_core.recipe import read_recipe

    catalog = Catalog.installed()
    plan = read_recipe(recipe, catalog, set_)
    if dry_run:
        from lens_core.training.memory_estimate import describe

        print(describe(plan, catalog))
        return 0
    from lens_core.training.trainer import Trainer

    report = Trainer(plan, catalog, output or Path("runs") / recipe.stem, allow_changed=allow_changed).train()
    if report.model is None:
        return 130
    print(f"{report.model}  {report.steps} steps, {report.seconds / 60:.1f} minutes this time")
    return 0


@app.command
def bench(
    benchmark: str,
    *,
    model: str = "tiny:",
    lora: Annotated[list[str] | None, Parameter(negative="")] = None,
    output: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    size: str | None = None,
    batch_size: int = 50,
    device: str = "auto",
    dtype: str = "auto",
) -> int:
    """Measure a model: writes pictures/, table.md, result.json and sheet.png.

    Parameters
    ----------
    benchmark
        A benchmark's name, for example shapes, or as a recipe names one: '{use: shapes, split: train}'.
    model
        A folder, a Hub id org/name[@revision], or tiny:
    lora
        A LoRA, PATH or PATH:WEIGHT, folded into the backbone; may be given more than once.
    output
        The folder to write; runs/bench-NAME if not given.
    limit
        How many prompts; the benchmark's own number if not given.
    seed
        Picture i has the seed SEED * 1,000,000 + i, so that runs with other seeds share no noise.
    steps
        Sampler steps; the checkpoint's preset if not given.
    guidance_scale
        The checkpoint's preset if not given.
    size
        Height x width in px.
    batch_size
        Pictures drawn at once.
    device
        auto, cpu, cuda, cuda:1 …
    dtype
        auto (bfloat16 on GPUs, float32 on CPUs), bfloat16, float32.
    """
    from lens_core.recipe import ComponentSpec, build, parse_use

    _check_steps(steps)
    if batch_size < 1 or not 1 <= (1 if limit is None else limit) <= MOST_PICTURES:
        raise ConfigError(
            f"--batch-size must be at least 1, and --limit from 1 to {MOST_PICTURES}, not {batch_size} and {limit}"
        )
    catalog = Catalog.installed()
    named = parse_use(benchmark)
    use = ComponentSpec(named.use, named.options if limit is None else {**named.options, "prompts": limit})
    _, cls, config = build(catalog, "benchmark", use, "$")
    height, width = _size(size)
    folds = [_lora(text) for text in lora or ()]
    from lens_core.evaluation import report as reports
    from lens_core.evaluation import run
    from lens_core.inference.pipeline import LensPipeline
    from lens_core.io import atomic_files

    folder = output or Path("runs") / f"bench-{use.use.replace(':', '-')}"
    pipeline = LensPipeline.from_pretrained(model, catalog=catalog, device=device, dtype=dtype)
    for path, weight in folds:
        pipeline.load_lora_weights(path, weight)
    judge = cls(config)
    begun = time.perf_counter()
    pictures = folder / "pictures"
    try:
        outcome = run.evaluate(
            pipeline, judge, seed=seed, batch=batch_size, log=_say, keep=partial(reports.save_pictures, pictures),
            ceiling=True,
            height=height, width=width, num_inference_steps=steps, guidance_scale=guidance_scale,
        )  # fmt: skip
    except LensError as error:
        if not pictures.is_dir():
            raise
        raise type(error)(f"{error}; what was drawn is in {pictures}") from error
    seconds = time.perf_counter() - begun
    asked = judge.prompts()
    settings = {
        "benchmark": benchmark, "model": " + ".join([model, *(f"{path}:{weight:g}" for path, weight in folds)]),
        "model_hash": "+".join([pipeline.version, *pipeline.loras]), "seed": seed,
        "steps": steps or pipeline.presets["steps"],
        "guidance_scale": pipeline.presets["guidance_scale"] if guidance_scale is None else guidance_scale,
        "size": list(outcome.images.shape[-2:]), "dtype": pipeline.dtype, "device": pipeline.device.type,
        "versions": _versions(),
    }  # fmt: skip
    text = reports.table(outcome)
    said = ", ".join(f"{k} {v}" for k, v in settings.items() if k != "versions")
    atomic_files.write_atomic(folder / "table.md", lambda p: p.write_text(f"{text}\n\n{said}\n", encoding="utf-8"))
    measured = reports.as_result(outcome, asked, seed)
    atomic_files.write_json(folder / "result.json", {**settings, "seconds": round(seconds, 1), **measured})
    shown = min(56, len(asked))
    passed = [None if s.value is None else s.value >= 0.5 for s in outcome.scores[:shown]]
    sheet = reports.contact_sheet(outcome.images[:shown], [p.text for p in asked[:shown]], passed)
    atomic_files.write_atomic(folder / "sheet.png", lambda p: sheet.save(p, format="PNG"))
    print(f"{text}\n\n{said}\n{folder}: pictures, table.md, result.json, sheet.png  ({seconds:.0f} s)")
    return 0


@app.command
def compare(*folders: str, output: Path | None = None) -> int:
    """Set results of `lens bench` side by side: the first folder's model is what the others are measured against.

    Parameters
    ----------
    folders
        Folders that `lens bench` wrote; several of one model, with different seeds, become one row, and so do those
        that are joined by commas: models of one recipe, trained from different seeds.
    output
        A Markdown file to write the table to, besides printing it.
    """
    from lens_core.evaluation import comparison
    from lens_core.io import atomic_files

    if not folders:
        raise ConfigError("give the folders that lens bench wrote, the model to measure against first")
    results = []
    for joined in folders:
        several = [joined] if Path(joined).is_dir() else joined.split(",")
        for folder in several:
            result = comparison.read(Path(folder) / "result.json")
            results.append(result | {"group": joined} if len(several) > 1 else result)
    text = comparison.table(comparison.compare(results))
    if output is not None:
        atomic_files.write_atomic(output, lambda p: p.write_text(f"{text}\n", encoding="utf-8"))
    print(text)
    return 0


@app.command
def check(model: str) -> int:
    """Read every file of a checkpoint, and say which differs from what was written, is missing, or is extra.

    Parameters
    ----------
    model
        A folder, a Hub id org/name[@revision], or tiny:
    """
    from lens_core.checkpoints import integrity, manifest

    catalog = Catalog.installed()
    folder = manifest.resolve_uri(model, catalog)
    described = manifest.read_manifest(folder, catalog)
    found = integrity.check(folder, described)
    problems = found.problems
    for part, component in described["components"].items():
        if "from" in component:
            try:
                manifest.resolve_shared_part(part, component, folder, catalog)
                print(f"{part}: that of {component['from']}, unchanged")
            except LensError as error:
                problems.append(str(error))
    for line in problems:
        print(line)
    if problems:
        print(f"{model}: {len(problems)} of its files are not as they should be; fetch it again")
        return 1
    digest = manifest.digest(folder)
    if found.named is None:
        print(
            f"{model}: {found.whole} files are whole, as far as their formats say (hash {digest}); its lens.json holds "
            "no hashes, so a changed bit would not be seen: save or convert it anew to have them"
        )
    else:
        print(f"{model}: {found.named} files are as they were written (hash {digest})")
    return 0


@app.command
def push(
    model: str,
    repo: str,
    *,
    private: Annotated[bool, Parameter(negative="")] = False,
    message: str | None = None,
) -> int:
    """Put a checkpoint on the Hugging Face Hub, in one commit. Log in first: hf auth login, or HF_TOKEN.

    Parameters
    ----------
    model
        A folder, a Hub id org/name[@revision], or tiny:
    repo
        The repository, org/name; made if it is not there. A README.md that a person wrote there stays.
    private
        Make it private; one that is there and public is refused.
    message
        The commit's message.
    """
    from lens_core.checkpoints import hub, manifest
    from lens_core.io import atomic_files

    catalog = Catalog.installed()
    folder = manifest.resolve_uri(model, catalog)
    described = manifest.read_manifest(folder, catalog)
    atomic_files.read_json(folder / "model_index.json")  # the layout that others read; before anything is made there
    if "files" not in described:  # from now on it has them
        ours = {*hub.named(folder, described)} - {"lens.json"}
        described["files"] = {n: h for n, h in manifest.hashes(folder).items() if n in ours}
    hub.create(repo, private=private)
    print(hub.upload(folder, described, repo, message=message))
    return 0


lora_app = App(name="lora", help="LoRA files: convert between the key formats of tools.")
app.command(lora_app)


@lora_app.command(name="convert")
def convert_lora(
    source: Path,
    output: Path,
    *,
    to: Literal["diffusers", "comfy", "sd-scripts"],
    model: str | None = None,
) -> int:
    """Write a LoRA in another tool's key format; its numbers stay bit for bit.

    Parameters
    ----------
    source
        A LoRA file, or a folder with pytorch_lora_weights.safetensors.
    output
        The .safetensors file to write.
    to
        diffusers (PEFT), comfy or sd-scripts.
    model
        The model that it is for, against which its layers are checked; needed where names have underscores for dots.
    """
    from lens_core.checkpoints import lora_keys

    if output.suffix != ".safetensors":
        raise ConfigError(f"{output}: a LoRA is written as .safetensors; use {output.with_suffix('.safetensors')}")
    if model is None:
        pairs = lora_keys.read(source)
    else:
        from lens_core.inference import lora as lora_module
        from lens_core.inference.pipeline import LensPipeline

        net = LensPipeline.from_pretrained(model, device="cpu", parts=("backbone",)).backbone
        pairs = lora_keys.read(source, list(lora_module.read(source, net)))
    lora_keys.write(output, pairs, to)
    print(f"{output}  {len(pairs)} layers, as {to}")
    return 0


@app.command
def plugins(
    *,
    check: Annotated[bool, Parameter(negative="")] = False,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """What is installed, what each plugin offers, and what was set aside and why.

    Parameters
    ----------
    check
        Ask each plugin for all that it offers, commands included, and list what is wrong; exit 1 if anything is.
    json_
        Print JSON instead of a table.
    """
    from lens_core.protocols import KINDS

    catalog = Catalog.installed()
    problems = catalog.check(OWN) if check else {p.name: [p.error] if p.error else [] for p in catalog.plugins}
    code = 1 if check and any(problems.values()) else 0
    offers: dict[str, list[str]] = {p.name: [] for p in catalog.plugins}
    for plugin in catalog.plugins:
        # Asking a hook would import models; its presence tells enough, and `--json` keeps to it too.
        hooks = [k for k, (hook, _) in KINDS.items() if hasattr(plugin.module, hook)]
        hooks += [r for r in ("lens_commands", "lens_fetch", "lens_describe") if hasattr(plugin.module, r)]
        offers[plugin.name] = hooks
    if json_:
        rows = [
            {
                "name": p.name,
                "distribution": p.distribution,
                "version": p.version,
                "offers": offers[p.name],
                "error": p.error,
                **({"problems": problems[p.name]} if check else {}),
            }
            for p in catalog.plugins
        ]
        print(json.dumps(rows, indent=2))
        return code
    for p in catalog.plugins:
        what = f"set aside: {p.error}" if p.error else ", ".join(offers[p.name])
        print(f"{p.name:16} {p.distribution} {p.version:10} {what}")
        for problem in problems[p.name]:
            if problem != p.error:
                print(f"{'':16} wrong: {problem}")
    if check:
        count = sum(map(len, problems.values()))
        print(f"{count} problem{'s' * (count != 1)}" if count else "every plugin keeps its contract")
    return code


OWN = tuple(name for name in app if not name.startswith("-"))


def mount(catalog: Catalog) -> dict[str, str]:
    """Make the plugins' commands part of `app`; what they run is imported when it is called. The commands."""
    commands = catalog.commands(taken=OWN)
    for name, place in commands.items():
        if not _exists(place.partition(":")[0]):
            continue  # cyclopts would raise, whatever else is asked; `main` says what is missing
        group, _, last = name.rpartition(" ")  # "bench train" stands under a command that is here already
        parent = app[group] if group in OWN else app
        if last not in parent:
            module, _, attribute = place.partition(":")
            ready = getattr(sys.modules.get(module), attribute, None)  # if imported already, help can tell what it does
            parent.command(ready if isfunction(ready) else place, name=last)
    return commands


def _exists(module: str) -> bool:
    """Whether there is such a module; it is not imported."""
    try:
        return module in sys.modules or find_spec(module) is not None
    except (ImportError, ValueError):  # its package is missing, or fails
        return False


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code. Whatever goes wrong is one line on stderr, after its traceback
    with LENS_DEBUG=1 in the environment."""
    words = sys.argv[1:] if arguments is None else arguments
    _write_anywhere()
    warnings.showwarning = lambda message, *_: _complain(readers.one_line(message, 1000))
    try:
        _check_words(words)
        if not words or words[0] not in OWN or words[0] == "bench":  # a plugin's command, or help, which lists them
            commands = mount(Catalog.installed())
            place = commands.get(" ".join(words[:2])) or commands.get(words[0] if words else "")
            if place is not None:
                resolve(place)  # before cyclopts does, which would not say whose it is
        code = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # whoever reads has read enough, as `head` does
        _discard_output()
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else _failed(stop, 1)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:  # a panic of a Rust library is no Exception
        usage = isinstance(error, LensError) and not isinstance(error, NumericalError | PluginError)
        return _failed(error, 2 if usage else 1)


def _check_words(words: list[str]) -> None:
    """Refuse arguments that are no text: no tokenizer, no file and no terminal could take them."""
    for place, word in enumerate(words, 1):
        if "\0" in word:
            raise ConfigError(f"argument {place}, {readers.shown(word)}, holds a NUL character; leave it out")
        try:
            readers.check_text(word)
        except ValueError as error:
            raise ConfigError(
                f"argument {place}, {readers.shown(word)}, is not UTF-8; write it anew, or rename the file"
            ) from error


def _failed(error: BaseException, code: int) -> int:
    """Tell what went wrong, in one line a problem -> `code`, or 2 for arguments that no command takes."""
    from cyclopts import CycloptsError

    if os.environ.get("LENS_DEBUG", "") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, ConfigError):
        lines = error.problems
    elif isinstance(error, LensError | SystemExit):
        lines = (str(error),)
    elif isinstance(error, CycloptsError):
        lines, code = (f"{readers.one_line(error)} See lens --help.",), 2
    elif isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):  # torch's words
        lines = ("there is not enough memory; ask for smaller or fewer pictures, or a smaller model",)
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        lines = (f"{where}{error.strerror or readers.one_line(error)}; check the path, its permissions and its disk",)
        try:
            sys.stdout.flush()
        except OSError:  # it was stdout itself
            _discard_output()
    else:
        what = f"{type(error).__name__}: {readers.one_line(error)}"
        lines = (f"{what}; this is a fault of Lens or of a plugin: LENS_DEBUG=1 shows where, please report it",)
    _complain(*lines)
    return code


def _complain(*lines: str) -> None:
    """Each on a line of its own to stderr, with whatever would break the line or command a terminal spelled out."""
    text = "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)
    with contextlib.suppress(OSError, ValueError):  # stderr is full, broken or closed: there is nobody to tell
        print(f"lens: {text}", file=sys.stderr, flush=True)


def _write_anywhere() -> None:
    """Let stdout and stderr spell out, as JSON does, what a terminal that is not UTF-8 has no character for."""
    codecs.register_error("lens", _spelled_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lens")


def _spelled_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(json.dumps(c)[1:-1] for c in error.object[error.start : error.end]), error.end


def _discard_output() -> None:
    """Send what is left of stdout nowhere, so that Python does not fail to write it once more when it exits."""
    with contextlib.suppress(OSError, ValueError):  # not a file of the operating system
        number = sys.stdout.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
