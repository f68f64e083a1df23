"""`lens score` and `lens bench csd`, `latency`, `ocr` and `table`, as functions; imports wait until they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lens_core.types import ConfigError


def score(
    benchmark: str,
    file: Path,
    *,
    output: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Compute a public benchmark's scores from what detectors, OCR or language models read in the pictures.

    Draws nothing and loads no model: perceptions.jsonl, which `lens bench` writes, is enough.

    Parameters
    ----------
    benchmark
        geneval, cvtg2k, longtext_en, oneig_text_en, oneig_alignment_en, oneig_diversity_en, oneig_style_en,
        oneig_reasoning_en; for pictures of Chinese prompts, the last six with _zh.
    file
        A .jsonl file with one picture a line; docs/benchmarks.md lists the fields.
    output
        A .jsonl file to write each picture's verdict to, in the same order.
    json_
        Print JSON instead of a table.
    """
    from lens_bench import report as scoring

    if output is not None and output.resolve() == file.resolve():
        raise ConfigError(f"{output}: holds the perceptions; choose another output")
    report = scoring.score(benchmark, file)
    if output is not None:
        scoring.write(output, report.verdicts)
    print(json.dumps(scoring.as_json(report), indent=2) if json_ else scoring.table(report))
    return 0


def ocr(*, perceiver: str = "rapidocr", output: Path | None = None) -> int:
    """Measure how many words an OCR engine reads of sentences drawn with four fonts, at several sizes and angles.

    Parameters
    ----------
    perceiver
        One that perceives lines: rapidocr, or '{use: paddle_ocr, folder: …}'.
    output
        A Markdown file for the table, which is printed too.
    """
    from lens_bench.perceive import recall
    from lens_bench.perceive.run import prove
    from lens_core.attribution import building
    from lens_core.catalog import Catalog
    from lens_core.io import atomic_files
    from lens_core.io.progress import progress
    from lens_core.recipe import build, parse_use

    name, cls, config = build(Catalog.installed(), "perceiver", parse_use(perceiver), "perceiver")
    with building(name):
        engine = cls(config)
    if engine.perceives != "lines":
        raise ConfigError(f"perceiver: {perceiver} perceives {engine.perceives}; this table needs one of lines")
    described = dict(engine.describe())
    prove(engine)
    drawn = recall.drawings()
    results = list(progress(recall.measure(engine, drawn), "picture", len(drawn), desc="read"))
    text = f"{recall.table(results)}\n{', '.join(f'{key} {value}' for key, value in described.items())}"
    if output is not None:
        atomic_files.write_text(output, f"{text}\n")
    print(text)
    return 0


def latency(
    *,
    model: str | None = None,
    generator: str | None = None,
    steps: int | None = None,
    size: str | None = None,
    pictures: int = 5,
    device: str | None = None,
    dtype: str | None = None,
    output: Path | None = None,
) -> int:
    """Time one picture at a time: encode, denoise, decode, save; the first, cold, and the following ones, warm.

    Parameters
    ----------
    model
        A folder, a Hub id org/name[@revision], or tiny:, which is the default.
    generator
        Another system: a generator's name, '{use: diffusers, model: …}', or a YAML file with that.
    steps
        Sampler steps; the checkpoint's preset if not given.
    size
        Height x width in px; the generator's own if not given.
    pictures
        How many are drawn after the first one.
    device
        auto, cpu, cuda, cuda:1 …
    dtype
        auto, bfloat16, float32.
    output
        A .json file for everything that was measured.
    """
    from lens_bench import latency as timing
    from lens_core.catalog import Catalog
    from lens_core.cli.options import check_steps, parse_size
    from lens_core.evaluation.bench import generator_spec, make_generator
    from lens_core.io import atomic_files

    settings = {"model": model, "steps": check_steps(steps), "device": device, "dtype": dtype}
    spec = generator_spec(generator or "", settings)
    height, width = parse_size(size)
    wanted = None if height is None or width is None else (height, width)
    measured = timing.measure(make_generator(spec, Catalog.installed()), wanted, pictures)
    machine = timing.machine()
    if output is not None:
        atomic_files.write_json(output, timing.as_json(measured, machine))
    print(f"{timing.table(measured)}\n{measured.description['system']} on {machine}")
    return 0


def table(*results: Path, output: Path | None = None) -> int:
    """Print the paper's table of systems with published figures, and below them what was measured here.

    Parameters
    ----------
    results
        Folders that `lens bench` wrote, of geneval, oneig, longtext and cvtg; those of one system become one row.
    output
        A Markdown file to write the table to, besides printing it.
    """
    from lens_bench import published
    from lens_core.io import atomic_files

    text = published.table([*published.PUBLISHED, *published.measured(results)])
    text += "\n\nPublished figures are quoted, of other machines and protocols; compare raw prompts with raw."
    if output is not None:
        atomic_files.write_text(output, f"{text}\n")
    print(text)
    return 0


def csd(source: Path, *, output: Path) -> int:
    """Convert CSD's weights, for OneIG's style dimension, to a folder that the perceiver clip_style reads.

    Parameters
    ----------
    source
        A safetensors file of the model_state_dict in CSD's checkpoint; docs/benchmarks.md says how to make it.
    output
        The folder to write.
    """
    from lens_bench.perceive import csd as conversion

    conversion.convert(source, output)
    print(f"{output}: CSD's style encoder, for style_csd: {{use: clip_style, model: {output}, references: …}}")
    return 0
