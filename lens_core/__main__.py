"""The command line. Data goes to stdout, progress to stderr; exit codes: 0 ok, 1 runtime, 2 usage, 130 Ctrl-C."""

from __future__ import annotations

import json
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from lens_core import __version__
from lens_core.catalog import Catalog
from lens_core.types import ConfigError, LensError, NumericalError

app = App(name="lens", version=__version__, help="Text-to-image: generate, train, measure. Everything is a plugin.")


def _say(line: str) -> None:
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def _tell(start: int, _: Any, step: int, t: float, __: Any) -> None:
    _say(f"pictures {start}+: step {step + 1}, t = {t:.3f}")


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if (prompt is None) == (file is None):
        raise ConfigError("give one prompt, or a file of prompts with --prompts, one a line")
    if prompt is not None:
        if not prompt.strip():
            raise ConfigError("the prompt is empty; say what to draw")
        return [prompt]
    assert file is not None
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); check the path") from error
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


def save_png(image: Any, path: Path, facts: dict[str, Any]) -> None:
    """Write a PIL picture whose text chunk `lens` holds the facts that drew it, as JSON."""
    from PIL.PngImagePlugin import PngInfo

    from lens_core.checkpoint import write_atomic

    info = PngInfo()
    info.add_itxt("lens", json.dumps(facts, ensure_ascii=False))
    write_atomic(path, lambda p: image.save(p, format="PNG", pnginfo=info))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"lens": __version__, "torch": version("torch"), "diffusers": version("diffusers")}


@app.command
def generate(
    prompt: str | None = None,
    *,
    prompts: Path | None = None,
    output: Annotated[Path, Parameter(alias="-o")] = Path("lens.png"),
    model: str = "tiny:",
    lora: Annotated[list[str] | None, Parameter(negative="")] = None,
    seed: int | None = None,
    size: str | None = None,
    aspect_ratio: str | None = None,
    base_resolution: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    images: int = 1,
    batch: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Draw pictures from a prompt.

    Parameters
    ----------
    prompt
        What to draw.
    prompts
        A UTF-8 file with one prompt a line, instead of a prompt.
    output
        The PNG to write; several pictures become NAME-0000.png, NAME-0001.png, …
    model
        A folder, a Hub id org/name[@revision], or tiny:
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
    guidance_scale
        Strength of guidance; 1 runs no unconditional pass.
    negative_prompt
        What to keep away from.
    images
        Pictures a prompt.
    batch
        Pictures drawn at once; the pictures do not depend on it.
    device
        auto, cpu, cuda, cuda:1 …
    dtype
        auto (bfloat16 on GPUs, float32 on CPUs), bfloat16, float32.
    json_
        Print one JSON object a picture.
    """
    texts = [t for t in _prompts(prompt, prompts) for _ in range(images)]
    if images < 1 or batch < 1:
        raise ConfigError(f"images and batch must be at least 1, not {images} and {batch}")
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be at least 1, not {steps}")
    paths, loras = _outputs(output, len(texts)), [_lora(text) for text in lora or ()]
    height, width = _size(size)
    if seed is None:
        import secrets

        seed = secrets.randbelow(2**32)
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed {seed} must be between 0 and 2^63 - 1")
    from lens_core.pipeline import LensPipeline

    begun = time.perf_counter()
    pipeline = LensPipeline.from_pretrained(model, device=device, dtype=dtype)
    for path, weight in loras:
        pipeline.load_lora_weights(path, weight)
    loaded = time.perf_counter() - begun
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        begun = time.perf_counter()
        result = pipeline(
            part,
            negative_prompt,
            height=height,
            width=width,
            aspect_ratio=aspect_ratio,
            base_resolution=base_resolution,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            seed=seed + start,
            callback_on_step_end=partial(_tell, start),
        )
        seconds = time.perf_counter() - begun
        for i, image in enumerate(result.images):
            facts = {"prompt": part[i], "seed": result.seeds[i], **result.settings, "versions": _versions()}
            path = paths[start + i]
            save_png(image, path, facts)
            if json_:
                print(json.dumps({"file": str(path), "seconds": round(seconds, 3), **facts}, ensure_ascii=False))
            else:
                print(f"{part[i]}\n  {path}  seed {result.seeds[i]}  {seconds:.2f} s (and {loaded:.1f} s to load)")
    return 0


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    parts = size.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() and 0 < int(p) <= 16384 for p in parts):
        raise ConfigError(f"size {size!r} must be HEIGHTxWIDTH in px, for example 128x160")
    return int(parts[0]), int(parts[1])


@app.command
def train(recipe: Path, *, out: Path | None = None) -> int:
    """Train what a recipe describes, or go on where the run in --out stopped.

    Parameters
    ----------
    recipe
        The YAML file.
    out
        The run's folder; runs/NAME-OF-RECIPE if not given.
    """
    from lens_core.config import read_recipe

    catalog = Catalog.installed()
    plan = read_recipe(recipe, catalog)
    from lens_core.loop import Run

    report = Run(plan, catalog, out or Path("runs") / recipe.stem).train()
    if report.model is None:
        return 130
    print(f"{report.model}  {report.steps} steps, {report.seconds / 60:.1f} minutes this time")
    return 0


@app.command
def bench(
    benchmark: str,
    *,
    model: str = "tiny:",
    out: Path | None = None,
    prompts: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    size: str | None = None,
    batch: int = 50,
    device: str = "auto",
    dtype: str = "auto",
) -> int:
    """Measure a model: writes table.md, result.json and sheet.png.

    Parameters
    ----------
    benchmark
        A benchmark's name, for example shapes.
    model
        A folder, a Hub id org/name[@revision], or tiny:
    out
        The folder to write; runs/bench-NAME if not given.
    prompts
        How many prompts; the benchmark's own number if not given.
    seed
        Picture i has the seed SEED + i.
    steps
        Sampler steps; the checkpoint's preset if not given.
    guidance_scale
        The checkpoint's preset if not given.
    size
        Height x width in px.
    batch
        Pictures drawn at once.
    device
        auto, cpu, cuda, cuda:1 …
    dtype
        auto (bfloat16 on GPUs, float32 on CPUs), bfloat16, float32.
    """
    from lens_core.config import Use, build

    catalog = Catalog.installed()
    options = {} if prompts is None else {"prompts": prompts}
    _, cls, config = build(catalog, "benchmark", Use(benchmark, options), "$")
    height, width = _size(size)
    from attrs import asdict

    from lens_core import checkpoint, evaluation
    from lens_core.pipeline import LensPipeline

    folder = out or Path("runs") / f"bench-{benchmark.replace(':', '-')}"
    pipeline = LensPipeline.from_pretrained(model, catalog=catalog, device=device, dtype=dtype)
    judge = cls(config)
    begun = time.perf_counter()
    outcome = evaluation.evaluate(
        pipeline, judge, seed=seed, batch=batch, say=_say, height=height, width=width,
        num_inference_steps=steps, guidance_scale=guidance_scale,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    asked = judge.prompts()
    settings = {
        "benchmark": benchmark, "model": model, "model_hash": pipeline.version, "seed": seed,
        "steps": steps or pipeline.presets["steps"],
        "guidance_scale": pipeline.presets["guidance_scale"] if guidance_scale is None else guidance_scale,
        "size": list(outcome.images.shape[-2:]), "versions": _versions(),
    }  # fmt: skip
    text = evaluation.table(outcome)
    said = ", ".join(f"{k} {v}" for k, v in settings.items() if k != "versions")
    checkpoint.write_atomic(folder / "table.md", lambda p: p.write_text(f"{text}\n\n{said}\n", encoding="utf-8"))
    checkpoint.write_json(
        folder / "result.json",
        {
            **settings,
            "seconds": round(seconds, 1),
            "headline": [task for task in outcome.rates if task in outcome.headline],
            "overall": asdict(outcome.overall),
            "tasks": {k: asdict(v) for k, v in outcome.rates.items()},
            "pictures": [
                {"prompt": p.text, "task": p.task, "seed": seed + i, "status": s.status, "value": s.value}
                for i, (p, s) in enumerate(zip(asked, outcome.scores, strict=True))
            ],
        },
    )
    shown = min(56, len(asked))
    passed = [None if s.value is None else s.value >= 0.5 for s in outcome.scores[:shown]]
    sheet = evaluation.contact_sheet(outcome.images[:shown], [p.text for p in asked[:shown]], passed)
    checkpoint.write_atomic(folder / "sheet.png", lambda p: sheet.save(p, format="PNG"))
    print(f"{text}\n\n{said}\n{folder}: table.md, result.json, sheet.png  ({seconds:.0f} s)")
    return 0


@app.command
def compare(*folders: Path, out: Path | None = None) -> int:
    """Set results of `lens bench` side by side: the first folder's model is what the others are measured against.

    Parameters
    ----------
    folders
        Folders that `lens bench` wrote; several of one model, with different seeds, become one row.
    out
        A Markdown file to write the table to, besides printing it.
    """
    from lens_core import checkpoint, comparison

    if not folders:
        raise ConfigError("give the folders that lens bench wrote, the model to measure against first")
    text = comparison.table(comparison.compare([comparison.read(folder / "result.json") for folder in folders]))
    if out is not None:
        checkpoint.write_atomic(out, lambda p: p.write_text(f"{text}\n", encoding="utf-8"))
    print(text)
    return 0


@app.command
def plugins(*, json_: Annotated[bool, Parameter(name="--json", negative="")] = False) -> int:
    """What is installed, what each plugin offers, and what was set aside and why.

    Parameters
    ----------
    json_
        Print JSON instead of a table.
    """
    from lens_core.protocols import KINDS

    catalog = Catalog.installed()
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
            }
            for p in catalog.plugins
        ]
        print(json.dumps(rows, indent=2))
        return 0
    for p in catalog.plugins:
        what = f"set aside: {p.error}" if p.error else ", ".join(offers[p.name])
        print(f"{p.name:16} {p.distribution} {p.version:10} {what}")
    return 0


OWN = tuple(name for name in app if not name.startswith("-"))


def mount(catalog: Catalog) -> None:
    """Make the plugins' commands part of `app`; what they run is imported when it is called."""
    for name, place in catalog.commands(taken=OWN).items():
        if name not in app:
            app.command(place, name=name)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] not in OWN:  # a plugin's command, or help, which lists them
        mount(Catalog.installed())
    warnings.showwarning = lambda message, *_: print(f"lens: {message}", file=sys.stderr)
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return code if isinstance(code, int) else 0
    except NumericalError as error:
        print(f"lens: {error}", file=sys.stderr)
        return 1
    except LensError as error:
        print(f"lens: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception as error:
        from cyclopts import CycloptsError

        if isinstance(error, CycloptsError):
            print(f"lens: {' '.join(str(error).split())} See lens --help.", file=sys.stderr)
            return 2
        raise


if __name__ == "__main__":
    sys.exit(main())
