"""`lens bench` and `lens compare`: measure models, and set their results side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lens_core.cli.options import check_steps, parse_loras, parse_size, progress
from lens_core.types import ConfigError


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
    from lens_core.evaluation.bench import BenchmarkRequest, run_benchmark
    from lens_core.inference.requests import GenerateRequest, ModelRequest

    height, width = parse_size(size)
    request = BenchmarkRequest(
        benchmark,
        ModelRequest(model, loras=parse_loras(lora), device=device, dtype=dtype, offload=None),
        GenerateRequest(height=height, width=width, steps=check_steps(steps), guidance_scale=guidance_scale),
        limit,
        seed,
        batch_size,
    )
    report = run_benchmark(request, output, log=progress)
    files = "pictures, table.md, result.json, sheet.png"
    print(f"{report.text}\n{report.folder}: {files}  ({report.seconds:.0f} s)")
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
        atomic_files.write_atomic(output, lambda p: p.write_text(f"{text}\n", encoding="utf-8"))
    print(text)
    return 0
