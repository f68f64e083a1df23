"""Stage 2 of a benchmark run: pictures are read, a few prompts at a time, and what is read goes to perceptions.jsonl.

A benchmark that has `perceive` reads its pictures by rules of its own, and keeps its caches below `cache/`. Of any
other one the perception is its score; scores are kept in `cache/` too, so that a run that is killed pays for no picture
twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import asdict, evolve

from lens_core.attribution import calling, checked_scores
from lens_core.evaluation.contracts import checked_lines, references_of
from lens_core.evaluation.manifest import Entry, Key, Manifest
from lens_core.evaluation.processes import Processes
from lens_core.evaluation.stages import CACHE, PERCEPTIONS, Plan
from lens_core.io import atomic_files, json_fields, readers
from lens_core.io.images import read_raw, read_rgb
from lens_core.io.json_fields import FieldError
from lens_core.io.progress import progress_bar
from lens_core.io.redaction import replace_surrogates
from lens_core.types import ConfigError, Picture, Prompt, Score

if TYPE_CHECKING:
    from torch import Tensor

Line = dict[str, Any]
MOST_PICTURES = 256  # that are read at once
MOST_PIXELS = 2**26  # of these


def perceive(
    folder: Path, plan: Plan, benchmark: Any, manifest: Manifest, processes: Processes,
    log: Callable[[str], None] = lambda line: None,
) -> None:  # fmt: skip
    """Read every picture and write perceptions.jsonl, whole or not at all.

    Raises ConfigError, before anything is read, for pictures that are missing or changed. Several processes each read
    their share into the caches, from which the first one then gathers all.
    """
    manifest.check_pictures()
    reading = _Reading(folder, plan, benchmark, manifest, processes.rank, log)
    chunks = list(reading.chunks(processes.world))
    if processes.world > 1:
        for names in processes.share(chunks):
            reading.lines(names)
        processes.wait()
    if processes.rank == 0:
        reading = _Reading(folder, plan, benchmark, manifest, processes.rank, log)  # with what the others have read
        lines: list[Line] = []
        with progress_bar(len(plan.prompts), "prompt", desc="perceive") as bar:
            for names in chunks:
                lines += reading.lines(names)
                bar.update(len(names))
        text = "".join(f"{_one_line(line)}\n" for line in lines)
        atomic_files.write_text(folder / PERCEPTIONS, text)
    processes.wait()


def _one_line(line: Line) -> str:
    text = replace_surrogates(json.dumps(line, ensure_ascii=False, allow_nan=False))
    for end in "\x85\u2028\u2029":  # many readers of lines take these for line ends
        text = text.replace(end, f"\\u{ord(end):04x}")
    return text


class _Reading:
    """Reads the pictures of some prompts at a time."""

    def __init__(
        self, folder: Path, plan: Plan, benchmark: Any, manifest: Manifest, process: int, log: Callable[[str], None]
    ) -> None:
        self.folder, self.plan, self.benchmark, self.manifest, self.log = folder, plan, benchmark, manifest, log
        self.scores = (
            None
            if hasattr(benchmark, "perceive")
            else _StoredScores(folder / CACHE, plan, process, _code_of(benchmark))
        )

    def chunks(self, processes: int) -> Iterator[list[str]]:
        """Prompt ids, some at a time. Pictures of one prompt stay together, and so do prompts that follow each other
        with an equal `data["group"]`. A benchmark with `perceive` gets as many as fall to a process, since it loads
        models at each call; it reads a few pictures at a time itself."""
        if self.scores is None:
            names = list(self.plan.by_id)
            share = -(-len(names) // processes)
            yield from (names[start : start + share] for start in range(0, len(names), share or 1))
            return
        first = next((e for e in self.manifest.entries.values() if e.status == "ok"), None)
        width, height = read_raw(self.folder / first.file).size if first is not None else (1024, 1024)
        most = max(1, min(MOST_PICTURES, MOST_PIXELS // (width * height)) // self.plan.images)
        chunk: list[str] = []
        group: object = None
        for name, prompt in self.plan.by_id.items():
            here = prompt.data.get("group")
            if len(chunk) >= most and (here is None or here != group):
                yield chunk
                chunk = []
            chunk.append(name)
            group = here
        if chunk:
            yield chunk

    def lines(self, names: Sequence[str]) -> list[Line]:
        """The lines of the pictures of these prompts."""
        keys = [(name, index) for name in names for index in range(self.plan.images)]
        entries = {key: self.manifest.entries.get(key) for key in keys}
        ok = {key: entry for key, entry in entries.items() if entry is not None and entry.status == "ok"}
        pictures = [
            Picture(self.folder / entry.file, entry.sha256, self.plan.by_id[key[0]], key[1])
            for key, entry in ok.items()
        ]
        perceived = dict(zip(ok, self._perceive(pictures), strict=True))
        return [line for key, entry in entries.items() for line in self._lines(key, entry, perceived.get(key))]

    def _perceive(self, pictures: Sequence[Picture]) -> Sequence[Sequence[Mapping[str, Any]]]:
        """For each picture the fields of its lines."""
        if not pictures:
            return []
        if self.scores is not None:
            return [[{"score": asdict(score)}] for score in self.scores.of(self.benchmark, pictures)]
        with calling(self.benchmark, "perceive"):
            lines = self.benchmark.perceive(pictures, self.folder / CACHE, self.log)
        return checked_lines(self.benchmark, lines, len(pictures))

    def _lines(self, key: Key, entry: Entry | None, fields: Sequence[Mapping[str, Any]] | None) -> Iterator[Line]:
        """The lines of one picture: where it was not perceived, one for each benchmark that it counts for."""
        prompt = self.plan.by_id[key[0]]
        base: Line = {"id": f"{key[0]}_{key[1]}", "prompt_id": key[0], "index": key[1]}
        base["status"] = "missing" if entry is None else entry.status
        if entry is not None and entry.status == "ok":
            base["sha256"] = entry.sha256
        references: Sequence[Mapping[str, Any]] = [{}]
        if self.scores is None:
            references = references_of(self.benchmark, prompt)
        by_bench = {reference.get("bench"): reference for reference in references}
        if fields is None:
            yield from ({**base, **reference} for reference in references)
        else:
            for line in fields:
                yield {**base, **by_bench.get(line.get("bench"), references[0] if references else {}), **line}


# ---- benchmarks that score ------------------------------------------------------------------------------------------


class _StoredScores:
    """What a benchmark's `score` gave for chunks of pictures, in append-only files, one a process.

    `code` identifies the code that scores: what other code gave is not used.
    """

    def __init__(self, folder: Path, plan: Plan, process: int, code: str) -> None:
        options = json.dumps([plan.benchmark, dict(plan.options), code], default=str, sort_keys=True)
        stem = f"scores-{hashlib.sha256(options.encode()).hexdigest()[:12]}"
        self.path = folder / f"{stem}-{process}.jsonl"
        self.known: dict[str, list[Score]] = {}
        for path in sorted(folder.glob(f"{stem}-*.jsonl")):
            for line in readers.json_lines(path):
                if (stored := _stored(line)) is not None:
                    self.known[stored[0]] = stored[1]

    def of(self, benchmark: Any, pictures: Sequence[Picture]) -> list[Score]:
        """One score a picture; of pictures that are known, without a call."""
        parts = [[p.sha256, p.prompt.text, p.index] for p in pictures]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        scores = self.known.get(key)
        if scores is None or len(scores) != len(pictures):
            with calling(benchmark, "score"):  # components that are no numbers
                scores = [_plain(score) for score in _scored(benchmark, pictures)]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.append(self.path, {"pictures": key, "scores": [asdict(score) for score in scores]})
            self.known[key] = scores
        return scores


def _code_of(component: Any) -> str:
    """A hash of the source that a component is written in: all files of its package, or its one file; "" without any.
    A version would not do: who writes a scorer does not raise one at each trial."""
    name = type(component).__module__
    for module in (sys.modules.get(name.partition(".")[0]), sys.modules.get(name)):
        if (file := getattr(module, "__file__", None)) is not None:
            break
    else:
        return ""
    path = Path(file)
    files = sorted(f for f in path.parent.rglob("*.py") if f.is_file()) if path.name == "__init__.py" else [path]
    parts = [[str(f.relative_to(path.parent)), hashlib.sha256(f.read_bytes()).hexdigest()] for f in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _plain(score: Score) -> Score:
    """The score with components that JSON can hold."""
    components = {replace_surrogates(str(name)): float(part) for name, part in score.components.items()}
    return evolve(score, components={name: part for name, part in components.items() if math.isfinite(part)})


def _stored(line: Any) -> tuple[str, list[Score]] | None:
    """The key and the scores in a line of the cache; None where it is torn or foreign."""
    try:
        return str(line["pictures"]), [read_score(score) for score in line["scores"]]
    except (KeyError, TypeError, ValueError):
        return None


def read_score(value: Any) -> Score:
    """A score as JSON has it. Raises ValueError, TypeError or KeyError for anything else."""
    if not isinstance(value, Mapping):
        raise TypeError("a score must be an object")
    return Score(value["status"], value["value"], value.get("components", {}), str(value.get("evidence", "")))


def _scored(benchmark: Any, pictures: Sequence[Picture]) -> Iterator[Score]:
    """Scores of pictures in their order, those of one size at a time."""
    start = 0
    images = [_pixels(picture.path) for picture in pictures]
    while start < len(images):
        size = images[start].shape
        end = next((i for i in range(start, len(images)) if images[i].shape != size), len(images))
        prompts = [picture.prompt for picture in pictures[start:end]]
        yield from _score(benchmark, images[start:end], prompts)
        start = end


def _score(benchmark: Any, images: Sequence[Tensor], prompts: Sequence[Any]) -> tuple[Score, ...]:
    import torch

    with calling(benchmark, "score"):
        scores = benchmark.score(torch.stack(list(images)), prompts)
    return checked_scores(benchmark, scores, len(prompts))


def _pixels(path: Path) -> Tensor:
    """uint8 [3,H,W]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(read_rgb(path))).permute(2, 0, 1).contiguous()


def read_lines(folder: Path, plan: Plan, benchmark: Any, manifest: Manifest) -> Iterator[Line]:
    """The lines of perceptions.jsonl. Raises ConfigError where one is of another picture than the manifest's, and, at
    the end, where a picture has none."""
    path = folder / PERCEPTIONS
    again = "run the stage perceive again"
    wanted = plan.requests()
    seen: set[Key] = set()
    for number, line in json_fields.numbered(path):
        try:
            if isinstance(line, FieldError):
                raise line
            name = json_fields.text(json_fields.field(line, "prompt_id"), "prompt_id")
            key = name, json_fields.whole(json_fields.field(line, "index"), "index", low=0)
        except FieldError as error:
            raise ConfigError(f"{path}, line {number}: {error}; {again}") from error
        if key not in wanted:
            raise ConfigError(f"{path}, line {number}: is of no picture of this run; {again}")
        entry = manifest.entries.get(key)
        if line.get("sha256") != (entry.sha256 if entry is not None and entry.status == "ok" else None):
            raise ConfigError(f"{path}, line {number}: is not of the picture in the manifest; {again}")
        seen.add(key)
        yield line
    lost = [key for key in wanted if key not in seen and counts(benchmark, plan.by_id[key[0]])]
    if lost:
        raise ConfigError(f"{path}: lacks {len(lost)} pictures, {lost[0][0]}_{lost[0][1]} for one; {again}")


def counts(benchmark: Any, prompt: Prompt) -> bool:
    """Whether pictures of a prompt have lines: not where nothing that was named perceives them."""
    return not hasattr(benchmark, "perceive") or bool(references_of(benchmark, prompt))
