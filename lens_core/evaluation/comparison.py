"""Models side by side: the results of `lens bench`, several seeds each, with paired differences to the first model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from lens_core.attribution import LARGEST_SCORE
from lens_core.evaluation.statistics import ClusteredScores, Difference, Estimate, mean_of_tasks, paired_difference
from lens_core.io import markdown
from lens_core.io.atomic_files import read_json
from lens_core.io.readers import is_line, shown
from lens_core.types import CheckpointError, ConfigError, LensError

_MODEL = ("model", "model_hash")
_SETTINGS = ("steps", "guidance_scale", "size", "settings")
_MACHINE = ("dtype", "device")  # results of other arithmetic are other results; older files lack them


@frozen
class Row:
    """A model: its scores by task and overall over all its seeds, and how far it is above the first model.

    Intervals are of 95 %, by prompt (`statistics`): they say what other prompts would have given. The
    pictures of one prompt, one a seed, count as one draw, and so do the two models' pictures of it.
    """

    name: str
    seeds: int
    tasks: Mapping[str, float]  # NaN where a task has no score
    overall: Estimate
    difference: Difference | None  # None for the first model


def read(path: Path) -> dict[str, Any]:
    """A result.json, with all that `compare` reads of it in place."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such result; give the folder that lens bench wrote")
    result = read_json(path, finite=False)
    for name, (sound, what) in _FIELDS.items():
        if name not in result:
            raise CheckpointError(f"{path}: lacks {name!r}; run lens bench again with this version")
        if not sound(result[name]):
            raise CheckpointError(
                f"{path}: {name} is {shown(result[name])}, not {what}; run lens bench again with this version"
            )
    for name in (*_MACHINE, "group"):
        if not _is_text(result.get(name, "")):
            raise CheckpointError(f"{path}: {name} is {shown(result[name])}, not a line of text; run lens bench again")
    pictures = result["pictures"]
    if not set(result["headline"]) <= {p["task"] for p in pictures}:
        raise CheckpointError(f"{path}: names headline tasks that no picture has; run lens bench again")
    return result


def read_folders(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The results in folders of `lens bench`. Folders joined by commas are one group: models of one recipe, trained
    from different seeds."""
    results = []
    for joined in map(str, folders):
        several = [joined] if Path(joined).is_dir() else joined.split(",")
        for folder in several:
            result = read(Path(folder) / "result.json")
            results.append(result | {"group": joined} if len(several) > 1 else result)
    return results


def _is_picture(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("prompt"), str)
        and isinstance(entry.get("task"), str)
        and "value" in entry
        and (entry["value"] is None or _is_number(entry["value"]))
        and _is_number(entry.get("weight", 1))
        and entry.get("weight", 1) >= 0
    )


def _is_number(value: object) -> bool:
    """Whether it is a score or a setting."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= LARGEST_SCORE


def _is_optional(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _is_list(value: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(holds, value))


def _is_text(value: object) -> bool:
    """Whether it is text for a line of a table."""
    return isinstance(value, str) and len(value) <= 1000 and is_line(value)


def _is_whole(value: object) -> bool:
    return type(value) is int


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is_text, "a line of text"),
    "model_hash": (_is_text, "a line of text"),
    "benchmark": (_is_text, "a line of text"),
    "seed": (_is_whole, "a whole number"),
    "steps": (_is_optional(_is_whole), "a whole number"),
    "guidance_scale": (_is_optional(_is_number), "a number"),
    "size": (lambda v: _is_list(v, _is_whole) and len(v) == 2, "[height, width]"),
    "headline": (lambda v: _is_list(v, _is_text), "a list of tasks"),
    "pictures": (lambda v: _is_list(v, _is_picture), "a list of pictures, each with prompt, task and value"),
}
"""What `compare` reads of a result.json: how each field is known to be sound, and what it must be."""


def compare(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The contents of result.json files, of one benchmark and the same prompts; those of one model are its seeds.

    Those that have the same text under `group` are one row too: models that one recipe gave from several seeds.
    Raises ConfigError for results that cannot be compared: another benchmark, other prompts, a seed twice.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        one = ("group",) if "group" in result else _MODEL
        settings = [(key, result.get(key)) for key in (*one, *_SETTINGS, *_MACHINE)]
        groups.setdefault(repr(settings), []).append(result)
    check_comparable(results)
    first, naming = results[0], _differing(results)
    rows: list[Row] = []
    members_of_first: Sequence[Mapping[str, Any]] = ()
    for members in groups.values():
        _refuse_repeated_seed(members)
        here = members[0]
        members_of_first = members_of_first or members
        tasks = _by_task(_scored(members))
        try:
            rows.append(
                Row(
                    name=_name(here, naming, machines=len({_machine(r) for r in results}) > 1),
                    seeds=len(members),
                    tasks={name: task.mean for name, task in tasks.items()},
                    overall=mean_of_tasks(tasks, first["headline"]),
                    difference=_difference(members_of_first, members, first["headline"]) if rows else None,
                )
            )
        except LensError as error:
            raise ConfigError(f"{here['model']}: {error}") from error
    return rows


def check_comparable(results: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError unless the results are of one benchmark and of the same prompts."""
    first = results[0]
    prompts = [(p["task"], p["prompt"]) for p in first["pictures"]]
    for result in results:
        if not _same_benchmark(result, first):
            raise ConfigError(
                f"{result['benchmark']} and {first['benchmark']} are two benchmarks; compare one at a time"
            )
        if [(p["task"], p["prompt"]) for p in result["pictures"]] != prompts:
            raise ConfigError(
                f"{result['model']}: was measured on other prompts than {first['model']}; measure it again"
            )


def _same_benchmark(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether the results are of one benchmark: written alike, or with the same options, however these were written. Of
    an option that one of them does not name, an older file, nothing is known."""
    if a["benchmark"] == b["benchmark"]:
        return True
    ours, theirs = (r["run"] if isinstance(r.get("run"), Mapping) else {} for r in (a, b))
    options = [r.get("options") for r in (ours, theirs)]
    if not all(isinstance(o, Mapping) for o in options) or ours.get("benchmark") != theirs.get("benchmark"):
        return False
    return all(options[0][name] == options[1][name] for name in options[0].keys() & options[1].keys())


def _machine(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(result.get(key) for key in _MACHINE)


def _settings(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the system says of itself; nothing in older files."""
    settings = result.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _differing(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings of which the results have several values, beside those that every row's name has."""
    names = dict.fromkeys(name for result in results for name in _settings(result))
    several = [n for n in names if len({repr(_settings(r).get(n)) for r in results}) > 1]
    return [name for name in several if name not in (*_SETTINGS, *_MACHINE, "prompts")]


def steps_label(result: Mapping[str, Any]) -> str:
    """The steps in a result's name, behind a comma; "" for a system that has none."""
    steps = result["steps"]
    return "" if steps is None else f", {steps} step{'s' * (steps != 1)}"


def _name(result: Mapping[str, Any], naming: Sequence[str], *, machines: bool) -> str:
    """What a row is called; with the settings `naming`, and with dtype and device where the results have several."""
    name = str(result.get("group", result["model"]))
    name += steps_label(result)
    name += "" if result["guidance_scale"] is None else f", guidance {result['guidance_scale']:g}"
    name += ", refined prompts" if result.get("prompts") == "refined" else ""
    known = {n: v for n in naming if (v := _settings(result).get(n)) not in (None, "")}
    name += "".join(f", {n if is_line(n) else shown(n)} {shown(v)}" for n, v in known.items())
    return f"{name}, {' on '.join(map(str, _machine(result)))}" if machines else name


def _refuse_repeated_seed(members: Sequence[Mapping[str, Any]]) -> None:
    seeds = [(m["model_hash"], m["seed"]) for m in members]
    if len(set(seeds)) != len(seeds):
        twice = max(seeds, key=seeds.count)[1]
        raise ConfigError(f"{members[0]['model']}: the seed {twice} stands twice; give it once")


_Scored = tuple[str, str, float | None, float]  # task, cluster, score, weight


def _scored(members: Sequence[Mapping[str, Any]]) -> Iterator[_Scored]:
    for member in members:
        for picture in member["pictures"]:
            yield _with(picture, picture["value"])


def _with(picture: Mapping[str, Any], value: float | None) -> _Scored:
    return picture["task"], picture.get("cluster", picture["prompt"]), value, float(picture.get("weight", 1))


def _by_task(scored: Iterator[_Scored]) -> dict[str, ClusteredScores]:
    groups: dict[str, list[_Scored]] = {}
    for one in scored:
        groups.setdefault(one[0], []).append(one)
    tasks = {}
    for task, group in groups.items():
        known = [(float(value), cluster, weight) for _, cluster, value, weight in group if value is not None and weight]
        values, clusters, weights = (list(column) for column in zip(*known, strict=True)) if known else ([], [], [])
        missing = sum(value is None for _, _, value, _ in group)
        tasks[task] = ClusteredScores(values, clusters, missing, weights=weights)
    return tasks


def _difference(
    base: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], headline: Sequence[str]
) -> Difference:
    """How far `other` is above `base` on the pictures that both have a score for: of the same prompt, and of the same
    seed where the two were measured with the same seeds (else a prompt's scores are averaged over seeds first)."""
    seeds = [sorted(member["seed"] for member in members) for members in (base, other)]
    if seeds[0] == seeds[1] and len(set(seeds[0])) == len(seeds[0]):
        by_seed = {member["seed"]: member["pictures"] for member in base}
        pairs = [pair for m in other for pair in zip(by_seed[m["seed"]], m["pictures"], strict=True)]
        differences = [(new, _minus(new["value"], old["value"])) for old, new in pairs]
    else:
        differences = [
            (_scored_one(other, place), _minus(_mean_over_seeds(other, place), _mean_over_seeds(base, place)))
            for place in range(len(other[0]["pictures"]))
        ]
    return paired_difference(_by_task(_with(picture, value) for picture, value in differences), headline)


def _minus(new: float | None, old: float | None) -> float | None:
    return None if new is None or old is None else new - old


def _mean_over_seeds(members: Sequence[Mapping[str, Any]], place: int) -> float | None:
    """The mean score of one prompt over the seeds; None where none of its pictures has one."""
    values = [v for m in members if (v := m["pictures"][place]["value"]) is not None]
    return sum(values) / len(values) if values else None


def _scored_one(members: Sequence[Mapping[str, Any]], place: int) -> Mapping[str, Any]:
    """One prompt's picture of the first seed that has a score for it: a picture without one has no weight either."""
    pictures: list[Mapping[str, Any]] = [member["pictures"][place] for member in members]
    return next((picture for picture in pictures if picture["value"] is not None), pictures[0])


def _interval(of: Estimate | Difference, sign: str = "") -> str:
    """Its ends; a dash where nothing is known of them."""
    return "–" if math.isnan(of.low) else f"{of.low:{sign}.3f} to {of.high:{sign}.3f}"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table; differences are to the first row, on the pairs of pictures that both have a score for."""
    tasks = list(rows[0].tasks)
    ends = ("**overall**", "95 % interval", "without score", "difference", "95 % interval", "pairs")
    lines = markdown.header(["model", "seeds", *tasks, *ends])
    for row in rows:
        whole, apart = row.overall, row.difference
        cells = [row.name, row.seeds]
        cells += ["–" if math.isnan(row.tasks[name]) else f"{row.tasks[name]:.2f}" for name in tasks]
        cells += [f"**{whole.value:.3f}**", _interval(whole), whole.missing]
        cells += [f"{apart.value:+.3f}", _interval(apart, "+"), apart.pairs] if apart else ["", "", ""]
        lines.append(markdown.row(cells))
    return "\n".join(lines)
