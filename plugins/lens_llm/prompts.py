"""Prompt sets in files: JSON lines of the schema `lens-rl/1`, their reader, writer and linter, and a benchmark on them.

One line is {schema, prompt_id, split, prompt, taxonomy: {class, …}, rubrics: [{id, q, weight}], global: {id, q,
weight}, provenance: {…}}, and what else its users need, such as sizes or checks.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from lens_core import reading
from lens_core.catalog import Catalog
from lens_core.config import Use, build
from lens_core.reading import shown
from lens_core.types import ConfigError, Prompt, Score
from lens_core.validators import integer, one_of, optional, real, text

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "lens-rl/1"
SPLITS = ("train", "eval")
LARGEST = 2**28  # bytes of a prompt set, which is read line by line
ALIKE = 0.8  # share of common words (Jaccard) from which two prompts count as near-duplicates


def lint(lines: Iterable[str], rubrics: int | None = 10, alike: float | None = ALIKE) -> list[str]:
    """Every problem of a prompt set, each with its line; an empty list is a sound set.

    `rubrics` is how many each prompt must have beside the global one; None: any number. Words are compared without
    their order, so that 'a dog and a cat' in train and 'a cat and a dog' in eval are found; they are told as overlap.
    `alike` None: only equal prompts are duplicates, where the order of few words is all that tells two apart.
    """
    return _lint(lines, rubrics, alike)[1]


def read(path: Path, rubrics: int | None = 10, alike: float | None = ALIKE) -> list[Prompt]:
    """The prompts of a file; `task` is the taxonomy's class, `data` the whole line. ConfigError with all problems."""
    try:
        text = reading.read_text(path, LARGEST)
    except ConfigError as error:
        raise ConfigError(f"{path}: cannot be read as a prompt set: {error}") from error
    entries, problems = _lint(reading.lines(text), rubrics, alike)
    if problems:
        raise ConfigError([f"{path}: {p}" for p in problems])
    return [Prompt(e["prompt"], e["prompt_id"], e["taxonomy"]["class"], e) for e in entries]


def write(
    path: Path, entries: Sequence[Mapping[str, Any]], rubrics: int | None = 10, alike: float | None = ALIKE
) -> None:
    """One line an entry, whole or not at all. ConfigError, and no file, where the set has problems."""
    lines = [json.dumps({"schema": SCHEMA, **e}, ensure_ascii=False) for e in entries]
    problems = lint(lines, rubrics, alike)
    if problems:
        raise ConfigError([f"{path}: {p}" for p in problems])
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(part, path)


class PromptFile:
    """The benchmark `prompts`: the prompts of a file, judged by a reward if one is named."""

    @frozen
    class Config:
        path: str = field(validator=text())
        split: str | None = field(default=None, validator=optional(one_of(*SPLITS)))  # None: all
        # Beside the global one; null: any number.
        rubrics: int | None = field(default=10, validator=optional(integer(at_least=0)))
        # Share of common words from which two prompts are one too many; null: equal ones.
        alike: float | None = field(default=ALIKE, validator=optional(real(above=0, at_most=1)))
        reward: Use | None = None

        def uses(self) -> Iterator[tuple[str, str, Use]]:
            """What is checked with this config: (path, kind, use)."""
            if self.reward is not None:
                yield "reward", "reward", self.reward

    def __init__(self, config: Config, reward: Any = None) -> None:
        """`reward` is one already built; None: the one that the config names, or none."""
        self.config = config
        if reward is None and config.reward is not None:
            _, cls, options = build(Catalog.installed(), "reward", config.reward, "$.reward")
            reward = cls(options)
        self.reward = reward

    def prompts(self) -> list[Prompt]:
        """In the order of the file. ConfigError where the split is empty."""
        path = Path(self.config.path).expanduser()
        found = read(path, self.config.rubrics, self.config.alike)
        mine = [p for p in found if self.config.split in (None, p.data["split"])]
        if not mine:
            raise ConfigError(f"{path}: has no prompt of the split {self.config.split!r}")
        return mine

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        """What the reward says; abstains where none is named."""
        if self.reward is None:
            return [Score("abstain", evidence="the benchmark 'prompts' names no reward") for _ in prompts]
        return list(self.reward.score(images, prompts))


def _lint(lines: Iterable[str], rubrics: int | None, alike: float | None) -> tuple[list[dict[str, Any]], list[str]]:
    entries: list[tuple[int, dict[str, Any]]] = []
    problems: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = reading.parse_json(line, finite=False)
        except ValueError as error:
            problems.append((number, f"is not JSON: {reading.one_line(error)}"))
            continue
        flaws = list(_flaws(entry, rubrics))
        problems += [(number, flaw) for flaw in flaws]
        if not flaws:
            entries.append((number, entry))
    first: dict[int, int] = {}
    for number, entry in entries:
        if first.setdefault(entry["prompt_id"], number) != number:
            problems.append((number, f"prompt_id {entry['prompt_id']} stands in line {first[entry['prompt_id']]} too"))
    for earlier, later in _twins([e["prompt"] for _, e in entries], alike):
        (place, one), (number, two) = entries[earlier], entries[later]
        same = one["split"] == two["split"]
        word = "is a near-duplicate of" if same else "overlaps, across train and eval,"
        problems.append((number, f"the prompt {word} line {place}: {shown(two['prompt'])}"))
    if not entries and not problems:
        problems.append((1, "the set is empty"))
    return [e for _, e in entries], [f"line {n}: {p}" for n, p in sorted(problems)]


def _flaws(entry: Any, rubrics: int | None) -> Iterator[str]:
    """What is wrong with one entry by itself."""
    if not isinstance(entry, dict):
        yield "is not a JSON object"
        return
    if entry.get("schema") != SCHEMA:
        yield f"schema is {shown(entry.get('schema'))}, not {SCHEMA!r}"
    if type(entry.get("prompt_id")) is not int or entry["prompt_id"] < 0:
        yield f"prompt_id must be a whole number from 0 on, not {shown(entry.get('prompt_id'))}"
    if entry.get("split") not in SPLITS:
        yield f"split must be train or eval, not {shown(entry.get('split'))}"
    if not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        yield "prompt must be text"
    taxonomy = entry.get("taxonomy")
    if not isinstance(taxonomy, dict) or not isinstance(taxonomy.get("class"), str):
        yield "taxonomy.class is missing"
    if not isinstance(entry.get("provenance"), dict) or not entry["provenance"]:
        yield "provenance is missing; say who made the prompt, and under which license"
    sizes = entry.get("sizes", [])
    if not isinstance(sizes, list) or not all(
        isinstance(s, list) and len(s) == 2 and all(type(n) is int and n > 0 for n in s) for s in sizes
    ):
        yield "sizes must be a list of [height, width] in pixels"
    own = entry.get("rubrics")
    if not isinstance(own, list) or not own:
        yield "rubrics must be a list of {id, q, weight}"
        own = []
    elif rubrics is not None and len(own) != rubrics:
        yield f"has {len(own)} rubrics, not {rubrics}"
    every = [(f"rubrics[{i}]", r) for i, r in enumerate(own)] + [("global", entry.get("global"))]
    ids: Counter[str] = Counter()
    questions: Counter[tuple[str, ...]] = Counter()
    for where, rubric in every:
        if not isinstance(rubric, dict):
            yield f"{where} must be {{id, q, weight}}"
            continue
        if not isinstance(rubric.get("id"), str) or not rubric["id"]:
            yield f"{where}.id must be text"
        else:
            ids[rubric["id"]] += 1
        if not isinstance(rubric.get("q"), str) or not rubric["q"].strip():
            yield f"{where}.q must be a question"
        else:
            questions[tuple(_words(rubric["q"]))] += 1
        weight = rubric.get("weight", 1.0)
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            yield f"{where}.weight must be above 0, not {shown(weight)}"
    for name, count in ids.items():
        if count > 1:
            yield f"the rubric id {shown(name)} stands {count} times"
    for words, times in questions.items():
        if times > 1:
            yield f"{times} rubrics ask the same: {shown(' '.join(words))}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _twins(texts: Sequence[str], alike: float | None) -> list[tuple[int, int]]:
    """Pairs (earlier, later) of texts whose sets of words have at least `alike` of their union in common.

    None: pairs of equal texts, whatever their case and punctuation.

    Prefix filtering: of sets that much alike, the few rarest words of each must share one, so only those are indexed.
    """
    if alike is None:
        return _twins([" ".join(_words(t)).replace(" ", "_") for t in texts], 1.0)
    sets = [frozenset(_words(t)) for t in texts]
    common = Counter(word for s in sets for word in s)
    index: dict[str, list[int]] = {}
    found = []
    for later, words in enumerate(sets):
        rare = sorted(words, key=lambda w: (common[w], w))
        rare = rare[: len(rare) - math.ceil(alike * len(rare) - 1e-9) + 1]
        for earlier in sorted({i for w in rare for i in index.get(w, ())}):
            both = len(words & sets[earlier])
            if both >= alike * (len(words) + len(sets[earlier]) - both) - 1e-9:
                found.append((earlier, later))
        for w in rare:
            index.setdefault(w, []).append(later)
    return found
