"""The three stages of a benchmark run, with files between them, so that a later one never repeats an earlier one.

generate   a generator draws pictures: `manifest.jsonl` and `images/`
perceive   pictures are read: `perceptions.jsonl`, one JSON object a line, several lines a picture where it counts for
           several benchmarks; caches are in `cache/`
decide     perceptions become scores: pure functions on plain data, without any model

`run.json` says what decides the pictures. A folder takes the pictures of one such run alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from attrs import define

from lens_core.evaluation.generation import prompt_ids
from lens_core.evaluation.manifest import Key
from lens_core.evaluation.run import picture_seed
from lens_core.io import atomic_files, json_fields, readers
from lens_core.types import ConfigError, PictureRequest, Prompt, SystemInfo

STAGES = ("generate", "perceive", "decide")
RUN, PERCEPTIONS, CACHE = "run.json", "perceptions.jsonl", "cache"
MOST_FOLDERS = 1000  # that are tried where no output is named
LARGEST_RUN = 2**20  # bytes of run.json


@define(frozen=True, slots=False)  # cached_property needs a __dict__
class Plan:
    """What a run measures: every prompt of a benchmark, `images` pictures each, of `size` (height, width) px."""

    benchmark: str  # its qualified name
    options: Mapping[str, Any]
    prompts: Sequence[Prompt]
    images: int
    size: tuple[int, int] | None
    seed: int

    @cached_property
    def by_id(self) -> dict[str, Prompt]:
        """Prompt id -> prompt, in order."""
        return dict(zip(prompt_ids(self.prompts), self.prompts, strict=True))

    @property
    def texts(self) -> dict[str, str]:
        """Prompt id -> text, in order."""
        return {name: prompt.text for name, prompt in self.by_id.items()}

    def requests(self) -> dict[Key, PictureRequest]:
        """Every picture of the run; number i, counted over all prompts, has the seed `picture_seed(seed, i)`."""
        return {
            (name, index): PictureRequest(
                text, picture_seed(self.seed, place * self.images + index), self.size, name, index
            )
            for place, (name, text) in enumerate(self.texts.items())
            for index in range(self.images)
        }

    @cached_property
    def prompts_sha256(self) -> str:
        """A hash of all that is asked for. Raises TypeError or ValueError where data of a prompt is no JSON."""
        prompts = [[p.text, p.task, dict(p.data)] for p in self.prompts]
        return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()

    def facts(self, system: SystemInfo) -> dict[str, Any]:
        """What decides the pictures, as run.json has it."""
        return {
            "format": 1,
            "benchmark": self.benchmark,
            "prompts": len(self.prompts),
            "prompts_sha256": self.prompts_sha256,
            "images_per_prompt": self.images,
            "size": None if self.size is None else list(self.size),
            "seed": self.seed,
            "system": system.name,
            "revision": system.revision,
            "seeded": system.seeded,
            "settings": dict(system.settings),
        }


# ---- run.json -------------------------------------------------------------------------------------------------------


def begin(folder: Path, facts: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Write run.json, with `more` that decides nothing; where there is one, check that it says the same `facts`."""
    path = folder / RUN
    if not path.exists():
        atomic_files.write_json(path, {**facts, **more})
        return
    what = _other_run(folder, facts)
    if what is not None:
        raise ConfigError(f"{folder}: holds another run, {what}; choose another --output")


def _other_run(folder: Path, facts: Mapping[str, Any]) -> str | None:
    """What the run in a folder has that these facts have not, or None where it is the same run."""
    before = read_run(folder)
    for name, value in json.loads(json.dumps(facts)).items():  # as it comes back from JSON
        if before.get(name) != value:
            return _difference(name, before.get(name), value)
    return None


def default_folder(base: Path, facts: Mapping[str, Any]) -> Path:
    """`base`, or `base`-2 and so on: the first that holds this run, or none. Raises ConfigError where all are taken."""
    for number in range(1, MOST_FOLDERS + 1):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if not (folder / RUN).exists() or _other_run(folder, facts) is None:
            return folder
    raise ConfigError(f"{base}: there are {MOST_FOLDERS} runs beside it; name an --output")


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        key = next((k for k in {**before, **now} if before.get(k) != now.get(k)), "")
        return _difference(f"{name}.{key}", before.get(key), now.get(key))
    return f"with {name} {readers.shown(before)}, not {readers.shown(now)}"


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json says. Raises ConfigError where there is none, or it is damaged."""
    path = folder / RUN
    text = readers.read_text(path, LARGEST_RUN, missing="there is no run here; start with the stage generate")
    try:
        run = json_fields.mapping(readers.parse_json(text), "the file")
        for name in ("benchmark", "system", "revision", "prompts_sha256"):
            json_fields.text(json_fields.field(run, name), name)
        for name in ("images_per_prompt", "seed"):
            json_fields.whole(json_fields.field(run, name), name, low=0)
        json_fields.mapping(json_fields.field(run, "settings"), "settings")
    except ValueError as error:
        raise ConfigError(f"{path}: {readers.one_line(error)}; put the file back, or start anew") from error
    return run
