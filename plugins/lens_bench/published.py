"""The paper's table of systems, with published figures, beside what was measured here.

Published figures are secondary: quoted tables, not reruns, and of different protocols. Where sources disagree, both
values stand. Each system says how its prompts were treated, because a reasoner alone moves GenEval by several points:
compare raw with raw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from lens_bench.decisions import DIMENSIONS
from lens_core.evaluation.comparison import read
from lens_core.io import markdown
from lens_core.types import ConfigError

COLUMNS = ("GenEval", "OneIG-EN", "LongText-EN", "CVTG WA", "CVTG NED", "CVTG CLIP")


@frozen
class Row:
    """One system. `values` by column, as text; `prompts`: raw, refined or unknown; `source`: where figures stand."""

    system: str
    prompts: str
    values: Mapping[str, str]
    source: str


def _published(system: str, prompts: str, source: str, *values: str) -> Row:
    return Row(system, prompts, {c: v for c, v in zip(COLUMNS, values, strict=True) if v}, source)


_PAPERS = "tables quoted in papers"
PUBLISHED = (
    _published(
        "Lens, 20 steps", "refined", "reading note of the paper", "0.930", "0.557", "0.937", "0.869", "0.951", "0.814"
    ),
    _published("Lens-Turbo", "unknown", "others' run", "0.83", "0.520", "0.909", "0.882", "", ""),
    _published("Z-Image", "raw", _PAPERS, "0.84", "0.546", "0.935 or 0.943", "0.867", "0.937", ""),
    _published("Qwen-Image", "raw", _PAPERS, "0.868", "0.539", "0.943", "0.829", "0.912", "0.802"),
    _published("LongCat-Image", "raw", _PAPERS, "0.87", "0.516", "0.885", "0.866", "0.936", ""),
    _published("GPT Image 1 [High]", "raw", _PAPERS, "0.84", "0.533", "0.956", "0.857", "0.948", "0.798"),
    _published("Seedream 4.0", "raw", _PAPERS, "0.84", "0.573", "0.921 or 0.936", "0.892", "", ""),
    _published("Nano Banana 2.0", "raw", _PAPERS, "", "0.578", "0.981", "0.779", "0.875", ""),
)
"""What the paper compares. The figures called "Nano Banana 2.0" stand elsewhere under "Nano-Banana-Pro", so they may be
of Gemini 3 Pro Image."""
_METRICS = {
    "geneval": {"GenEval": "overall"},
    "longtext": {"LongText-EN": "text score"},
    "cvtg": {"CVTG WA": "word accuracy", "CVTG NED": "NED", "CVTG CLIP": "CLIPScore"},
}


def measured(folders: Sequence[Path]) -> list[Row]:
    """A row for each system and treatment of prompts in the results; figures with their intervals, and with their
    coverage where it is not 100 %. Raises ConfigError for a result of another benchmark, or two of one."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for folder in folders:
        result = read(folder / "result.json")
        name = str(result.get("run", {}).get("benchmark", "")).partition(":")[2]
        if name not in (*_METRICS, "oneig"):
            raise ConfigError(f"{folder}: is of {name or result['benchmark']}, which has no column here")
        options = result.get("run", {}).get("options", {})
        if options.get("language", "en") != "en":
            raise ConfigError(
                f"{folder}: is in {options['language']}; the table's columns are of the English benchmarks"
            )
        values = rows.setdefault((str(result["model"]), str(result["model_hash"]), str(result.get("prompts"))), {})
        figures = _oneig(result) if name == "oneig" else _figures(result, _METRICS[name])
        for column, value in figures.items():
            if column in values:
                raise ConfigError(f"{folder}: {result['model']} has two results for {column}; give one")
            values[column] = value + _part(result)
    return [
        Row(f"{model} ({digest[:8]})" if digest else model, prompts, values, "measured here")
        for (model, digest, prompts), values in rows.items()
    ]


def _figures(result: Mapping[str, Any], metrics: Mapping[str, str]) -> dict[str, str]:
    official = result.get("official", {})
    return {column: _shown(official[metric]) for column, metric in metrics.items() if metric in official}


def _oneig(result: Mapping[str, Any]) -> dict[str, str]:
    """The plain mean of the five dimensions, as papers have it, where all five were measured; else which were."""
    official = result.get("official", {})
    dimensions = [name for name in DIMENSIONS if name in official]
    if len(dimensions) < len(DIMENSIONS):
        return (
            {"OneIG-EN": ", ".join(f"{name} {official[name]['value']:.3f}" for name in dimensions)}
            if dimensions
            else {}
        )
    return {"OneIG-EN": f"{sum(official[name]['value'] for name in DIMENSIONS) / len(DIMENSIONS):.3f}"}


def _shown(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "–"
    interval = "" if estimate["low"] is None else f" [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return f"{estimate['value']:.3f}{interval}"


def _part(result: Mapping[str, Any]) -> str:
    """What is to be known of a figure that is not of the whole benchmark."""
    notes = []
    if result.get("coverage", 1) < 1:
        notes.append(f"coverage {result['coverage']:.1%}")
    options = result.get("run", {}).get("options", {})
    count = len({picture["prompt"] for picture in result["pictures"]})
    if options.get("file") is not None:
        notes.append(f"{count} prompts of {Path(str(options['file'])).name}")
    elif options.get("prompts") is not None:
        notes.append(f"{count} prompts")
    return f" ({', '.join(notes)})" if notes else ""


def table(rows: Sequence[Row]) -> str:
    """Markdown; every row says where its figures are from and which prompts the system got."""
    head = ["system", "prompts", *COLUMNS, "source"]
    lines = markdown.header(head)
    for row in rows:
        cells = [row.system, row.prompts, *(row.values.get(column, "–") for column in COLUMNS), row.source]
        lines.append(markdown.row(cells))
    return "\n".join(lines)
