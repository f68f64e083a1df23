"""Prompt sets in files: JSON lines of the schema `lens-rl/1`, their reader, writer and linter, and a benchmark on them.

One line is {schema, prompt_id, split, prompt, taxonomy: {class, …}, rubrics: [{id, q, weight}], global: {id, q,
weight}, provenance: {…}}, and what else its users need, such as sizes or checks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from lens_core.attribution import TASK, calling, checked_scores, is_task
from lens_core.catalog import Catalog
from lens_core.io import readers
from lens_core.io.atomic_files import write_text
from lens_core.io.readers import shown
from lens_core.recipe import ComponentSpec, build
from lens_core.types import ConfigError, Prompt, Score
from lens_core.validators import integer, one_of, optional, real, text
from lens_llm.duplicates import near_duplicates, words

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "lens-rl/1"
SPLITS = ("train", "eval")
LARGEST = 2**28  # bytes of a prompt set, which is read line by line
SIMILARITY_THRESHOLD = 0.8  # share of common words (Jaccard) from which two prompts count as near-duplicates

# What a set may hold. A file is written by strangers; whatever reads it later relies on these.
LINE = 1 << 20  # characters
PROMPT = 10_000  # characters
QUESTION = 2_000  # characters
QUESTIONS = 100  # rubrics of a prompt
NAME = 200  # characters of a class, under which results are grouped and logged
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a rubric: it stands in what a judge reads, and in logs
WEIGHTS = (1e-6, 1e6)
PROMPT_ID = 2**63  # ids are below: they are kept in 64 bits


def lint(
    lines: Iterable[str], rubrics: int | None = 10, similarity_threshold: float | None = SIMILARITY_THRESHOLD
) -> list[str]:
    """Every problem of a prompt set, each with its line; an empty list is a sound set.

    `rubrics` is how many each prompt must have beside the global one; None: any number up to 100. Words are compared
    without their order, so that 'a dog and a cat' in train and 'a cat and a dog' in eval are duplicates too, reported
    as overlap. `similarity_threshold` None: only equal prompts are duplicates, for sets in which prompts differ in
    word order alone.
    """
    return _lint(lines, rubrics, similarity_threshold)[1]


def read(
    path: Path, rubrics: int | None = 10, similarity_threshold: float | None = SIMILARITY_THRESHOLD
) -> list[Prompt]:
    """The prompts of a file; `task` is the taxonomy's class, `data` the whole line. ConfigError with all problems.

    A file that is no JSON, with one prompt a line, has prompts without a task and without data, whose ids are the
    numbers of their lines. A reward that needs rubrics abstains from them, and says so.
    """
    try:
        text = readers.read_text(path, LARGEST)
    except ConfigError as error:
        raise ConfigError(f"{path}: cannot be read as a prompt set: {error}") from error
    lines = readers.lines(text)
    if is_plain(path, lines):
        prompts, problems = _plain(lines)
        if problems:
            raise ConfigError([f"{path}: {p}" for p in problems])
        return prompts
    entries, problems = _lint(lines, rubrics, similarity_threshold)
    if problems:
        raise ConfigError([f"{path}: {p}" for p in problems])
    return [Prompt(e["prompt"], e["prompt_id"], e["taxonomy"]["class"], e) for e in entries]


def is_plain(path: Path, lines: Sequence[str]) -> bool:
    """Whether a file holds one prompt a line: it is not called .jsonl or .json, and does not begin as JSON does."""
    first = next((line.strip() for line in lines if line.strip()), "")
    return path.suffix.lower() not in (".jsonl", ".json") and not first.startswith(("{", "["))


def _plain(lines: Sequence[str]) -> tuple[list[Prompt], list[str]]:
    prompts: dict[str, Prompt] = {}
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        problems += [f"line {number}: the prompt {flaw}" for flaw in text_flaws(text, PROMPT)]
        if text in prompts:
            problems.append(f"line {number}: stands in line {prompts[text].id} too; keep one")
        prompts.setdefault(text, Prompt(text, number))
    return list(prompts.values()), problems or ([] if prompts else ["line 1: the set is empty"])


def write(
    path: Path,
    entries: Sequence[Mapping[str, Any]],
    rubrics: int | None = 10,
    similarity_threshold: float | None = SIMILARITY_THRESHOLD,
) -> None:
    """One line an entry, whole or not at all. ConfigError, and no file, where the set has problems; WriteError where it
    cannot be written."""
    lines = [json.dumps({"schema": SCHEMA, **e}, ensure_ascii=False) for e in entries]
    problems = lint(lines, rubrics, similarity_threshold)
    if problems:
        raise ConfigError([f"{path}: {p}" for p in problems])
    write_text(path, "".join(f"{line}\n" for line in lines))


class PromptFile:
    """Prompts of a file (one a line, or JSON lines), scored by a reward if named."""

    @frozen
    class Config:
        path: str = field(validator=text())
        split: str | None = field(default=None, validator=optional(one_of(*SPLITS)))  # None: all
        # Beside the global one; null: any number.
        rubrics: int | None = field(default=10, validator=optional(integer(at_least=0)))
        # Share of common words from which two prompts are one too many; null: equal ones.
        similarity_threshold: float | None = field(
            default=SIMILARITY_THRESHOLD, validator=optional(real(above=0, at_most=1))
        )
        reward: ComponentSpec | None = None

        def uses(self) -> Iterator[tuple[str, str, ComponentSpec]]:
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
        prompts = read(path, self.config.rubrics, self.config.similarity_threshold)
        if self.config.split is not None and not all("split" in p.data for p in prompts):
            raise ConfigError(f"{path}: has one prompt a line, and no splits; leave split out")
        mine = [p for p in prompts if self.config.split in (None, p.data.get("split"))]
        if not mine:
            raise ConfigError(f"{path}: has no prompt of the split {self.config.split!r}")
        return mine

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        """The reward's scores; abstains where none is named."""
        if self.reward is None:
            return [Score("abstain", evidence="the benchmark 'prompts' names no reward") for _ in prompts]
        with calling(self.reward, "score"):
            scores = self.reward.score(images, prompts)
        return list(checked_scores(self.reward, scores, len(prompts)))


def _lint(
    lines: Iterable[str], rubrics: int | None, similarity_threshold: float | None
) -> tuple[list[dict[str, Any]], list[str]]:
    entries: list[tuple[int, dict[str, Any]]] = []
    problems: list[tuple[int, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(line) > LINE:
            problems.append((number, f"has {len(line):,} characters; a line may have {LINE:,}"))
            continue
        try:
            entry = readers.parse_json(readers.check_text(line), finite=False)
        except ValueError as error:
            problems.append((number, f"is not JSON that can be used: {readers.one_line(error)}"))
            continue
        flaws = list(flaws_of(entry, rubrics))
        problems += [(number, flaw) for flaw in flaws]
        if not flaws:
            entries.append((number, entry))
    first: dict[int, int] = {}
    for number, entry in entries:
        if first.setdefault(entry["prompt_id"], number) != number:
            problems.append((number, f"prompt_id {entry['prompt_id']} stands in line {first[entry['prompt_id']]} too"))
    for earlier, later in near_duplicates([e["prompt"] for _, e in entries], similarity_threshold):
        (place, one), (number, two) = entries[earlier], entries[later]
        same = one["split"] == two["split"]
        word = "is a near-duplicate of" if same else "overlaps, across train and eval,"
        problems.append((number, f"the prompt {word} line {place}: {shown(two['prompt'])}"))
    if not entries and not problems:
        problems.append((1, "the set is empty"))
    return [e for _, e in entries], [f"line {n}: {p}" for n, p in sorted(problems)]


def flaws_of(entry: Any, rubrics: int | None) -> Iterator[str]:
    """What is wrong with one entry by itself. It has `rubrics` of them beside the global one; None: any number."""
    if not isinstance(entry, dict):
        yield "is not a JSON object"
        return
    if entry.get("schema") != SCHEMA:
        yield f"schema is {shown(entry.get('schema'))}, not {SCHEMA!r}"
    if type(entry.get("prompt_id")) is not int or not 0 <= entry["prompt_id"] < PROMPT_ID:
        yield f"prompt_id must be a whole number from 0 on and below 2^63, not {shown(entry.get('prompt_id'))}"
    if entry.get("split") not in SPLITS:
        yield f"split must be train or eval, not {shown(entry.get('split'))}"
    yield from (f"prompt {flaw}" for flaw in text_flaws(entry.get("prompt"), PROMPT))
    taxonomy = entry.get("taxonomy")
    if not isinstance(taxonomy, dict) or not isinstance(taxonomy.get("class"), str):
        yield "taxonomy.class is missing"
    elif len(taxonomy["class"]) > NAME:
        yield f"taxonomy.class has {len(taxonomy['class']):,} characters; it may have {NAME}"
    elif not is_task(taxonomy["class"]):
        yield f"taxonomy.class must be {TASK}, not {shown(taxonomy['class'])}"
    if not isinstance(entry.get("provenance"), dict) or not entry["provenance"]:
        yield "provenance is missing; name who made the prompt, and its license"
    sizes = entry.get("sizes", [])
    if not isinstance(sizes, list) or not all(
        isinstance(s, list) and len(s) == 2 and all(type(n) is int and n > 0 for n in s) for s in sizes
    ):
        yield "sizes must be a list of [height, width] in pixels"
    listed = entry.get("rubrics")
    if not isinstance(listed, list) or not listed:
        yield "rubrics must be a list of {id, q, weight}"
        listed = []
    elif len(listed) > QUESTIONS or (rubrics is not None and len(listed) != rubrics):
        yield f"has {len(listed)} rubrics, not {rubrics if rubrics is not None else f'{QUESTIONS} at most'}"
        listed = listed[:QUESTIONS]
    every = [(f"rubrics[{i}]", r) for i, r in enumerate(listed)] + [("global", entry.get("global"))]
    ids: Counter[str] = Counter()
    questions: Counter[tuple[str, ...]] = Counter()
    for where, rubric in every:
        flaws = list(rubric_flaws(rubric))
        yield from (f"{where}{flaw}" for flaw in flaws)
        if isinstance(rubric, dict) and isinstance(rubric.get("id"), str) and rubric["id"]:
            ids[rubric["id"]] += 1
        if not flaws:
            questions[tuple(words(rubric["q"]))] += 1
    for name, count in ids.items():
        if count > 1:
            yield f"the rubric id {shown(name)} stands {count} times"
    for question, times in questions.items():
        if times > 1:
            yield f"{times} rubrics ask the same: {shown(' '.join(question))}"


def rubric_flaws(rubric: Any) -> Iterator[str]:
    """What is wrong with one rubric, each to be read after its place."""
    if not isinstance(rubric, Mapping):
        yield " must be {id, q, weight}"
        return
    if not isinstance(rubric.get("id"), str) or not rubric["id"]:
        yield ".id must be text"
    elif not ID.fullmatch(rubric["id"]):
        yield f".id must be of letters, digits, dots, dashes and underscores, 64 at most, not {shown(rubric['id'])}"
    yield from (f".q {flaw}" for flaw in text_flaws(rubric.get("q"), QUESTION, "a question"))
    weight = rubric.get("weight", 1.0)
    if type(weight) not in (int, float) or not WEIGHTS[0] <= weight <= WEIGHTS[1]:
        yield f".weight must be above 0, and in [1e-6, 1e6], not {shown(weight)}"


def text_flaws(text: Any, most: int, what: str = "text") -> Iterator[str]:
    """What is wrong with a text of at most `most` characters, to be read after its name."""
    if not isinstance(text, str) or not text.strip():
        yield f"must be {what}"
    elif len(text) > most:
        yield f"has {len(text):,} characters; it may have {most:,}"
    elif re.search(r"[\ud800-\udfff]", text):
        yield f"holds half a character: {shown(text)}"
    elif re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text):
        yield f"holds a control character: {shown(text)}"
