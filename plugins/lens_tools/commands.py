"""`lens bench block`, `lens bench train`, `lens convert`, `lens curves`, `lens doctor` and `lens fit-preview`.

Whatever is heavy is imported when they run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lens_core.arguments import wrong_ending
from lens_core.catalog import Catalog
from lens_core.cli.terminal import json_text
from lens_core.types import ConfigError


def bench_train(
    recipe: Path,
    *,
    depth: int = 2,
    samples: int = 12,
    tokens: int = 164,
    shrink: int = 1,
    repeats: int = 5,
    compile: bool = True,
    device: str = "auto",
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Time a training step of a recipe's backbone, by part: packed against bucketed, compiled, checkpointed.

    Parameters
    ----------
    recipe
        The YAML file; its pipeline, its dataset's sizes and its precision count.
    depth
        How many blocks the backbone has; its other sizes are those of the recipe.
    samples
        Pictures a step, spread over three sizes of the dataset.
    tokens
        Text tokens a picture in the mean; they are spread from half to one and a half of it.
    shrink
        Divide the sides of every size by this.
    repeats
        Rounds that are timed, each of which times every variant once; at least 5.
    compile
        Time a compiled backbone too.
    device
        auto, cpu, cuda, cuda:1 …
    json_
        Print one JSON object instead of tables.
    """
    from attrs import asdict

    from lens_core.recipe import read_recipe
    from lens_tools import training_speed

    request = training_speed.SpeedRequest(depth, samples, tokens, shrink, repeats, compile, device)
    catalog = Catalog.installed()
    report = training_speed.measure(read_recipe(recipe, catalog), catalog, request)
    print(json.dumps(asdict(report)) if json_ else training_speed.table(report))
    return 1 if report.void else 0


def bench_block(
    *,
    size: tuple[int, int] = (512, 512),
    tokens: int = 200,
    compile: bool = True,
    small: Annotated[bool, Parameter(negative="")] = False,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Count what one block of the published backbone launches, copies and moves in a guided step. Runs on a CPU.

    Parameters
    ----------
    size
        Height and width of the picture, px.
    tokens
        Text tokens of the prompt.
    compile
        Count what torch.compile makes of it too, which takes a minute.
    small
        Take a narrow block, as a trial.
    json_
        Print one JSON object instead of a table.
    """
    from lens_tools import block_cost

    figures = block_cost.measure(block_cost.BlockRequest(size, tokens, compile, small), Catalog.installed())
    print(json.dumps(figures) if json_ else block_cost.table(figures))
    return 0


def convert(
    source: str, output: Path, *, layout: str | None = None, dtype: str | None = None, share: str | None = None
) -> int:
    """Write a checkpoint in another layout or dtype, a piece at a time: memory for the whole model is not needed.

    Parameters
    ----------
    source
        A folder of either layout, a Hub id org/name[@revision], or a single .safetensors or .gguf file with one part.
    output
        A new folder; for a source of one part also a new .safetensors file.
    layout
        diffusers (a sub-folder a part, which Lens and other tools read) or single (a file a part, as Comfy keeps them);
        if not given, single for a .safetensors file, else diffusers.
    dtype
        bf16 or fp32; floats stay as they are if not given. Experts in MXFP4 stay so, Comfy's nvfp4 and mxfp8 do not.
    share
        A checkpoint by its Hub name org/name@revision, or tiny: parts that are the same there, weight for weight, are
        named in the new one and read from there, so that they are kept once.
    """
    from lens_core.checkpoints import manifest
    from lens_core.io import atomic_files
    from lens_tools.convert import convert as run

    catalog = Catalog.installed()
    layout = layout or ("single" if output.suffix == ".safetensors" else "diffusers")
    for path in run(manifest.resolve_uri(source, catalog), output, layout, dtype, catalog, share):
        print(f"{path}  {path.stat().st_size / 1e9:.2f} GB")
    if share is not None:
        for part, use in atomic_files.read_json(output / "lens.json")["components"].items():
            print(f"{part}: that of {use['from']}, {use['hash']}") if "from" in use else None
    return 0


def fit_preview(
    model: str,
    *,
    pictures: str = "shapes",
    limit: int = 320,
    side: int = 4,
    size: int = 256,
    device: str = "auto",
) -> int:
    """Fit the linear map by which step previews are drawn, and store it in a checkpoint's folder as
    vae/latent_preview.json. What the checkpoint draws, and its hash, stay as they are.

    Parameters
    ----------
    model
        The folder of a checkpoint.
    pictures
        A folder of pictures, or a dataset by name or in a line of YAML. A fifth of them measures the error.
    limit
        How many pictures at most.
    side
        Pixels of a preview per latent cell, across and down: 1, 2, 4 or 8.
    size
        Side in px of the square that is cut from each picture of a folder.
    device
        auto, cpu, cuda, cuda:1 …
    """
    from lens_core.checkpoints import manifest
    from lens_core.inference.pipeline import LensPipeline
    from lens_tools.preview_fit import FitRequest, fit

    request, catalog = FitRequest(pictures, limit, side, size), Catalog.installed()
    folder = Path(model).expanduser()
    vae = manifest.read_manifest(folder, catalog)["components"].get("vae", {}) if folder.is_dir() else {}
    if not vae or "from" in vae or "file" in vae:
        raise ConfigError(
            f"{model}: is no folder of a checkpoint with a VAE in vae/; lens convert {model} FOLDER makes one"
        )
    pipeline = LensPipeline.from_pretrained(folder, catalog=catalog, device=device, parts=("vae",))
    preview = fit(pipeline, request, catalog)
    preview.write(folder)
    print(
        f"{folder / 'vae' / manifest.PREVIEW_FILE}: fitted to {preview.pictures} pictures; off by {preview.error:.1f} "
        f"of 255 (root mean square) from the VAE's at {preview.side} px a cell"
    )
    return 0


def curves(
    *runs: str,
    output: Path = Path("curves.png"),
    show: Annotated[list[str] | None, Parameter(negative="")] = None,
    table: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Draw what runs have logged, and their evaluations, over their steps. Needs the extra `plots`.

    Parameters
    ----------
    runs
        Folders of runs, one colour each. Those that are joined by commas, one recipe's from different seeds, share a
        colour, and their mean is drawn thick.
    output
        The PNG to write.
    show
        A value's name or a pattern, as "validation/*"; may be given more than once. Losses and scores if not given.
    table
        Print the same as tables too.
    """
    from lens_tools import curves as drawing

    if not runs:
        raise ConfigError("give the folder of a run, or of several")
    if output.suffix.lower() != ".png":
        raise wrong_ending(output, ".png", "pictures are")
    groups = drawing.read_groups(runs)
    drawing.save(drawing.draw(groups, show or ()), output)
    if table:
        print(drawing.table(groups, show or ()))
    print(output)
    return 0


def doctor(
    *,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
    table: Annotated[bool, Parameter(negative="")] = False,
    check: Annotated[bool, Parameter(negative="")] = False,
    minutes: float = 8.0,
    output: Path = Path("gpu-check"),
    stages: str = "correctness,latency,training",
    device: str = "cuda",
    small: Annotated[bool, Parameter(negative="")] = False,
    tests: str = "",
) -> int:
    """What this machine has, what would be used, and which offload plan the published model would take.

    Parameters
    ----------
    json_
        Print JSON.
    table
        Print the tables of docs/memory.md instead: the published model's memory by plan and by card.
    check
        Check instead that Lens is right and fast on this GPU, as docs/gpu.md describes. The options below are for this.
    minutes
        How long the check may take in all.
    output
        The folder for its results.
    stages
        Which stages, in this order: correctness, latency, training, embedded.
    device
        cuda, cuda:1 …, or cpu to rehearse.
    small
        Take sizes for a CPU, to rehearse.
    tests
        Of the stage correctness, only this file of tests/gpu, or what this pytest expression chooses.
    """
    if check:
        from lens_tools import gpu_check

        names = tuple(name.strip() for name in stages.split(",") if name.strip())
        summary = gpu_check.check(gpu_check.CheckRequest(output, minutes, names, device, small, tests))
        print((output / "report.md").read_text(encoding="utf-8"))
        return 0 if all(stage["state"] == "finished" for stage in summary["stages"].values()) else 1
    from lens_tools import doctor as practice

    catalog = Catalog.installed()
    if table:
        print(practice.table(practice.published(catalog)))
        return 0
    sections = practice.examine(catalog)
    print(json_text(sections, indent=2) if json_ else practice.describe(sections))
    return 0
