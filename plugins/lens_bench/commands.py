"""`lens score` and `lens bench ocr`, as plain functions; what they need is imported when they run."""

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
    """Decide stored perceptions by a public benchmark's rules, and print its scores with their intervals.

    Parameters
    ----------
    benchmark
        geneval, cvtg2k, longtext_en, longtext_zh, oneig_text_en or oneig_text_zh.
    file
        A .jsonl of perceptions, one picture a line; docs/benchmarks.md has the fields.
    output
        A .jsonl to write the verdicts to, one a line, in the same order.
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
    from lens_core.cli.options import progress
    from lens_core.io import atomic_files
    from lens_core.recipe import build, parse_use

    name, cls, config = build(Catalog.installed(), "perceiver", parse_use(perceiver), "perceiver")
    with building(name):
        engine = cls(config)
    if engine.perceives != "lines":
        raise ConfigError(f"perceiver: {perceiver} perceives {engine.perceives}; this table needs one of lines")
    described = dict(engine.describe())
    prove(engine)
    results = []
    for result in recall.measure(engine, drawn := recall.drawings()):
        results.append(result)
        progress(f"{len(results)} of {len(drawn)} pictures")
    text = f"{recall.table(results)}\n{', '.join(f'{key} {value}' for key, value in described.items())}"
    if output is not None:
        atomic_files.write_atomic(output, lambda p: p.write_text(f"{text}\n", encoding="utf-8"))
    print(text)
    return 0
