"""`lens score`, as a plain function; what it needs is imported when it runs."""

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
