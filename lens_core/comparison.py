"""Models side by side: the results of `lens bench`, several seeds each, with paired differences to the first model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lens_core.checkpoint import read_json
from lens_core.types import CheckpointError, ConfigError

RESAMPLES = 4000
_MODEL = ("model", "model_hash")
_SETTINGS = ("steps", "guidance_scale", "size")


@frozen
class Row:
    """A model: its scores by task and overall, and how far it is above the first one, each with a 95 % interval.

    The intervals are percentiles of a bootstrap over the prompts of each task (Efron 1979): they tell what other
    prompts would have given. The pictures of one prompt, one a seed, stay together, and so do the two models'.
    """

    name: str
    seeds: int
    tasks: Mapping[str, float]
    overall: tuple[float, float, float]  # value, low, high
    difference: tuple[float, float, float]


def read(path: Path) -> dict[str, Any]:
    """A result.json, with all that `compare` reads of it in place."""
    result = read_json(path)
    fields = (*_MODEL, *_SETTINGS, "benchmark", "seed", "headline", "pictures")
    missing = [name for name in fields if name not in result]
    pictures = result.get("pictures")
    if missing or not isinstance(pictures, list) or not all(_is_picture(p) for p in pictures):
        what = f"lacks {missing[0]!r}" if missing else "has no list of pictures, each with prompt, task and value"
        raise CheckpointError(f"{path}: {what}; run lens bench again with this version")
    if not result["headline"] or not set(result["headline"]) <= {p["task"] for p in pictures}:
        raise CheckpointError(f"{path}: names headline tasks that no picture has; run lens bench again")
    return result


def _is_picture(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("prompt"), str)
        and isinstance(entry.get("task"), str)
        and isinstance(entry.get("value", ""), float | int | None)
    )


def compare(results: Sequence[Mapping[str, Any]], resamples: int = RESAMPLES) -> list[Row]:
    """The contents of result.json files, of one benchmark and the same prompts; those of one model are its seeds.

    Those that have the same text under `group` are one row too: models that one recipe gave from several seeds.
    Raises ConfigError for results that cannot be compared: another benchmark, other prompts, a seed twice.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        one = ("group",) if "group" in result else _MODEL
        groups.setdefault(repr([(key, result[key]) for key in (*one, *_SETTINGS)]), []).append(result)
    first = results[0]
    asked = [(p["task"], p["prompt"]) for p in first["pictures"]]
    for result in results:
        if result["benchmark"] != first["benchmark"]:
            raise ConfigError(
                f"{result['benchmark']} and {first['benchmark']} are two benchmarks; compare one at a time"
            )
        if [(p["task"], p["prompt"]) for p in result["pictures"]] != asked:
            raise ConfigError(f"{result['model']}: was asked other prompts than {first['model']}; measure it again")
    every = {name: np.array([i for i, (task, _) in enumerate(asked) if task == name]) for name, _ in asked}
    tasks = {name: every[name] for name in first["headline"]}
    scores = {key: _by_prompt(members) for key, members in groups.items()}
    # one set of resamples for all: what makes two models' figures rise and fall together cancels in the difference
    rng = np.random.default_rng(0)
    drawn = {task: rng.integers(len(places), size=(resamples, len(places))) for task, places in tasks.items()}
    means = {key: _resampled(score, tasks, drawn) for key, score in scores.items()}
    base, *_ = means.values()
    rows = []
    for key, members in groups.items():
        value, spread = means[key]
        here = members[0]
        rows.append(
            Row(
                name=f"{here.get('group', here['model'])}, {here['steps']} steps, guidance {here['guidance_scale']:g}",
                seeds=len(members),
                tasks={task: float(np.nanmean(scores[key][places])) for task, places in every.items()},
                overall=(value, *_middle(spread)),
                difference=(value - base[0], *_middle(spread - base[1])),
            )
        )
    return rows


def _by_prompt(members: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """The mean verdict of each prompt over the seeds; NaN where none of its pictures has one."""
    seeds = [(m["model_hash"], m["seed"]) for m in members]
    if len(set(seeds)) != len(seeds):
        twice = max(seeds, key=seeds.count)[1]
        raise ConfigError(f"{members[0]['model']}: the seed {twice} stands twice; give it once")
    values = np.array([[p["value"] for p in m["pictures"]] for m in members], dtype=float)
    known = ~np.isnan(values)
    return np.where(known.any(0), np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def _resampled(
    scores: NDArray[np.float64], tasks: Mapping[str, NDArray[np.int64]], drawn: Mapping[str, NDArray[np.int64]]
) -> tuple[float, NDArray[np.float64]]:
    """The mean of the tasks' means, and the same over resampled prompts."""
    by_task = [scores[places] for places in tasks.values()]
    if any(np.isnan(s).all() for s in by_task):
        raise ConfigError("a headline task has no verdict at all; raise the number of prompts")
    again = [np.nanmean(s[drawn[task]], axis=1) for s, task in zip(by_task, tasks, strict=True)]
    return float(np.mean([np.nanmean(s) for s in by_task])), np.mean(again, axis=0)


def _middle(spread: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(spread, [0.025, 0.975])
    return float(low), float(high)


def table(rows: Sequence[Row]) -> str:
    """A Markdown table; differences are to the first row."""
    names = list(rows[0].tasks)
    lines = [
        "| model | seeds | " + " | ".join(names) + " | **overall** | 95 % interval | difference | 95 % interval |",
        "|" + "---|" * (len(names) + 6),
    ]
    for place, row in enumerate(rows):
        value, low, high = row.overall
        by, least, most = row.difference
        apart = f"{by:+.3f} | {least:+.3f} to {most:+.3f}" if place else " | "
        cells = " | ".join(f"{row.tasks[name]:.2f}" for name in names)
        lines.append(f"| {row.name} | {row.seeds} | {cells} | **{value:.3f}** | {low:.3f} to {high:.3f} | {apart} |")
    return "\n".join(lines)
