"""`lens bench` and `lens compare`: measure models, and set their results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from lens_core.cli.options import DEFAULT_MODEL, ModelGroup, check_steps, parse_interval, parse_size, print_to_terminal
from lens_core.types import ConfigError


def bench(
    *benchmarks: str,
    model: ModelGroup = DEFAULT_MODEL,
    generator: Annotated[list[str] | None, Parameter(negative="")] = None,
    output: Path | None = None,
    stages: str = "generate,perceive,decide",
    prompts_file: Path | None = None,
    limit: int | None = None,
    num_images: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: str | None = None,
    size: str | None = None,
    batch_size: int | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Measure a model or another generator: writes images/, perceptions.jsonl, table.md, result.json and sheet.png.

    Killed and started again, it goes on. Several processes (accelerate launch) share the prompts.

    Parameters
    ----------
    benchmarks
        A benchmark's name, for example shapes, or as a recipe names one: '{use: shapes, split: train}', or a YAML file
        with that. Several with --dry-run alone.
    generator
        Another system than a model: a generator's name, '{use: diffusers, model: …}', or a YAML file with that.
        Several with --dry-run alone.
    output
        The folder to write; runs/bench-NAME if not given, or runs/bench-NAME-2 … where that holds another run.
    stages
        Which of generate, perceive and decide to run. Each goes on with what the one before it left in the folder.
    prompts_file
        The benchmark's prompts in their own format, for benchmarks that would fetch them.
    limit
        How many prompts; the benchmark's own number if not given.
    num_images
        How many pictures of each prompt; the benchmark's own number if not given.
    seed
        Picture i has the seed SEED * 1,000,000 + i, so that runs with other seeds share no noise.
    steps
        Sampler steps; the checkpoint's preset if not given.
    guidance_scale
        The checkpoint's preset if not given.
    guidance_interval
        LOW,HIGH in times: guidance is applied where LOW < t <= HIGH alone; t = 1 is noise.
    size
        Height x width in px; the benchmark's, or else the generator's own if not given.
    batch_size
        Pictures drawn at once; 50 if not given.
    dry_run
        Draw nothing: print how many pictures and calls there would be, and what they would cost.
    """
    from lens_core.evaluation import bench as running
    from lens_core.evaluation import cost

    height, width = parse_size(size)
    common: dict[str, Any] = {
        "limit": limit, "images": num_images, "seed": seed, "stages": running.parse_stages(stages),
        "size": None if height is None or width is None else (height, width),
        "options": {} if prompts_file is None else {"file": str(prompts_file)},
    }  # fmt: skip
    settings = {
        **model.generator_options(),
        "steps": check_steps(steps), "guidance_scale": guidance_scale, "batch_size": batch_size,
        "guidance_interval": None if guidance_interval is None else parse_interval(guidance_interval),
    }  # fmt: skip
    systems = [running.generator_spec(text, settings) for text in generator or [""]]
    if model.model is not None and generator:
        raise ConfigError("give --model or --generator, not both")
    names = [running.benchmark_line(text) for text in benchmarks]
    requests = [running.BenchmarkRequest(name, system, **common) for name in names for system in systems]
    if not requests:
        raise ConfigError("name a benchmark, for example: lens bench shapes --model tiny:")
    if dry_run:
        print(cost.table(requests))
        return 0
    if len(requests) > 1:
        raise ConfigError("measure one generator with one benchmark at a time; several are for --dry-run")
    (request,) = requests
    report = running.run_benchmark(request, output, log=print_to_terminal)
    if report is not None:
        files = "images, perceptions.jsonl, table.md, result.json, sheet.png"
        print(f"{report.text}\n{report.folder}: {files}")
    return 0


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
    text = comparison.table(comparison.compare(comparison.read_folders(folders)))
    if output is not None:
        atomic_files.write_text(output, f"{text}\n")
    print(text)
    return 0
