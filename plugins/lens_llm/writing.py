"""Prompt sets written by a language model from a taxonomy: for each item a prompt, then its rubrics.

Every finished entry goes to FILE.partial at once, so that a stopped run goes on where it was, without asking again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

from lens_core.io import readers
from lens_core.io.locks import locked
from lens_core.recipe import unstructure
from lens_core.types import ConfigError, LensError, Message
from lens_llm.duplicates import near_duplicates
from lens_llm.prompts import PROMPT as MAX_PROMPT
from lens_llm.prompts import QUESTION, SCHEMA, SIMILARITY_THRESHOLD, flaws_of, text_flaws, write
from lens_llm.taxonomy import MAX_ASPECTS, Taxonomy

GLOBAL = {
    "id": "g",
    "kind": "coherence",
    "q": "Is the picture coherent as a whole: anatomy, perspective and light plausible, without artefacts?",
    "weight": 1.0,
}
PROMPT = (
    "You write requests for a text-to-image model. Write one request in English, of 10 to 60 words, for the item you "
    "are given. It must use each aspect you are given in a way that can be seen in one still picture, and be clear "
    "enough that two people would agree whether a picture fulfils it."
)
RUBRICS = (
    "You write the questions by which pictures for a request are judged. Each is one yes-or-no question about a single "
    "thing that can be seen and that the request asks for; yes means that the picture has it. No question may ask two "
    "things, repeat another, or ask what the request leaves open. `kind` is the aspect that it is about."
)
MAX_WORDS = 30  # in a question that asks one thing
PARTIAL_SCHEMA = "lens-rl/1 partial"  # the schema of the first line of FILE.partial


@frozen
class PromptRequest:
    """One prompt to write. All prompts of an item are in one split: whoever knows one knows much of the others."""

    id: int
    split: str
    taxonomy: Mapping[str, Any]


def prompt_requests(taxonomy: Taxonomy) -> Iterator[PromptRequest]:
    """One request for each prompt, with one to four aspects.

    A request, its id included, depends on its item's names and the seed alone, so that a taxonomy may grow.
    """
    for name, subclasses in taxonomy.classes.items():
        for subclass, items in subclasses.items():
            for item in items:
                key = _hash(taxonomy.seed, name, subclass, item)
                split = "eval" if key % 10_000 < 10_000 * taxonomy.eval else "train"
                for number in range(taxonomy.prompts_per_item):
                    prompt_id = _hash(taxonomy.seed, name, subclass, item, number)
                    rng = np.random.default_rng(prompt_id)
                    count = int(rng.integers(1, min(MAX_ASPECTS, len(taxonomy.aspects)) + 1))
                    picked = sorted(rng.choice(len(taxonomy.aspects), count, replace=False))
                    aspects = [taxonomy.aspects[i] for i in picked]
                    about = {"class": name, "subclass": subclass, "item": item, "aspects": aspects}
                    yield PromptRequest(prompt_id, split, about)


def compose(
    llm: Any,
    taxonomy: Taxonomy,
    out: Path,
    similarity_threshold: float = SIMILARITY_THRESHOLD,
    log: Callable[[str], None] = lambda line: None,
) -> int:
    """Write the set to `out`, and return how many prompts it has. Near-duplicates are left out: in eval those of
    train, and else the later ones. `llm` has `chat(messages, schema, check)` and `map`.

    LensError where a prompt could not be written; what was written stays in FILE.partial, and the same call goes on.
    ConfigError, before anything is paid for, where FILE.partial was begun with another taxonomy, and LockedError where
    another process writes the same set.
    """
    lock = out.with_name(f"{out.name}.lock")  # a folder, for others may write other sets beside this one
    try:
        with locked(lock, "prompt set"):
            return _compose(llm, taxonomy, out, similarity_threshold, log)
    finally:
        with contextlib.suppress(OSError):  # another has it
            lock.rmdir()


def _compose(llm: Any, taxonomy: Taxonomy, out: Path, similarity_threshold: float, log: Callable[[str], None]) -> int:
    partial = out.with_name(f"{out.name}.partial")
    wanted = list(prompt_requests(taxonomy))
    if len({o.id for o in wanted}) < len(wanted):
        raise ConfigError("the taxonomy names an item twice in one subclass; keep one")
    template = hashlib.sha256(f"{PROMPT}{RUBRICS}".encode()).hexdigest()[:16]
    header = {"schema": PARTIAL_SCHEMA, "taxonomy_sha": _sha(taxonomy, template)}
    done = {e["prompt_id"]: e for e in _kept(partial, header, taxonomy.rubrics)}
    left = [o for o in wanted if o.id not in done]
    if done:
        log(f"{len(wanted) - len(left)} of {len(wanted)} prompts were written before")
    problems: list[LensError] = []
    size = 4 * getattr(getattr(llm, "config", None), "concurrency", 1)
    try:
        with partial.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(f"{json.dumps(header)}\n")
            for start in range(0, len(left), size):
                for entry in llm.map(
                    lambda request: _entry(llm, taxonomy, request, template), left[start : start + size]
                ):
                    if isinstance(entry, LensError):
                        problems.append(entry)
                        continue
                    done[entry["prompt_id"]] = entry
                    file.write(f"{json.dumps(entry, ensure_ascii=False)}\n")
                file.flush()
                log(f"{sum(o.id in done for o in wanted)} of {len(wanted)} prompts written")
                if problems:
                    break  # an endpoint that is away, or a spent budget, would fail for all the rest
    except OSError as error:
        raise LensError(
            f"{partial}: cannot be written ({error.strerror or error}); make room, and run again"
        ) from error
    if problems:
        raise LensError(
            f"{len(problems)} prompts could not be written ({problems[0]}); "
            f"{sum(o.id in done for o in wanted)} of {len(wanted)} are kept in {partial}: fix it, and run again"
        )
    # Those of train stand first, so that an overlap costs eval its prompt, never train and eval one each.
    entries = sorted((done[o.id] for o in wanted), key=lambda e: e["split"] != "train")
    repeated = {later for _, later in near_duplicates([e["prompt"] for e in entries], similarity_threshold)}
    kept = [e for i, e in enumerate(entries) if i not in repeated]
    if repeated:
        log(f"{len(repeated)} near-duplicates left out")
    write(out, kept, taxonomy.rubrics, similarity_threshold)
    partial.unlink()
    return len(kept)


def _entry(llm: Any, taxonomy: Taxonomy, request: PromptRequest, template: str) -> dict[str, Any]:
    """One line of the set, from two chats: the prompt, then its rubrics."""
    text = llm.chat(
        [Message("system", PROMPT), Message("user", json.dumps({**request.taxonomy, "number": request.id % 1000}))],
        _object(prompt={"type": "string"}),
        lambda answer: next((f"the prompt {f}" for f in text_flaws(answer["prompt"], MAX_PROMPT)), None),
    )["prompt"].strip()
    question = {"request": text, "kinds": list(taxonomy.aspects), "how_many": taxonomy.rubrics}
    one = _object(kind={"type": "string", "enum": list(taxonomy.aspects)}, q={"type": "string"})
    answer = llm.chat(
        [Message("system", RUBRICS), Message("user", json.dumps(question, ensure_ascii=False))],
        _object(rubrics={"type": "array", "items": one}),
        lambda answer: flaw([r["q"] for r in answer["rubrics"]], taxonomy.rubrics),
    )
    rubrics = [
        {"id": f"r{i:02}", "kind": r["kind"], "q": r["q"].strip(), "weight": 1.0}
        for i, r in enumerate(answer["rubrics"])
    ]
    config = getattr(llm, "config", None)
    return {
        "schema": SCHEMA,
        "prompt_id": request.id,
        "split": request.split,
        "prompt": text,
        "lang": "en",
        "taxonomy": dict(request.taxonomy),
        "sizes": [list(size) for size in taxonomy.sizes],
        "rubrics": rubrics,
        "global": GLOBAL,
        "provenance": {
            "generator": getattr(config, "model", taxonomy.llm.use),
            "template_sha": template,
            "license": taxonomy.license,
        },
    }


def flaw(questions: Sequence[str], count: int) -> str | None:
    """What is wrong with a prompt's questions: their number, and whether each is one short question of its own."""
    if len(questions) != count:
        return f"there must be {count} rubrics, not {len(questions)}"
    for q in questions:
        wrong = next(text_flaws(q, QUESTION, "a question"), None)
        if wrong is not None:
            return f"a rubric {wrong}"
        if not q.strip().endswith("?") or q.count("?") != 1 or len(q.split()) > MAX_WORDS:
            return (
                f"{q[:200]!r} must be one question of at most {MAX_WORDS} words that ends with its only question mark"
            )
    repeated = near_duplicates(questions, 1.0)
    return f"two rubrics ask the same: {questions[repeated[0][1]][:200]!r}" if repeated else None


def _object(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has all of these and nothing else."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _hash(*names: object) -> int:
    """53 bits, so that every reader of JSON keeps the number whole."""
    digest = hashlib.blake2b(json.dumps(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 11


def _sha(taxonomy: Taxonomy, template: str) -> str:
    """Of all that decides what a set is asked for. The llm may change while it is written: a budget that is raised, or
    another model, which each entry names."""
    plain = unstructure(taxonomy)
    plain.pop("llm")
    return hashlib.sha256(json.dumps([plain, template]).encode()).hexdigest()[:16]


def _kept(partial: Path, header: Mapping[str, Any], rubrics: int) -> Iterator[dict[str, Any]]:
    """The whole entries of a file that may end inside one. That end is cut off, so that the next line is one.

    ConfigError where its first line is not `header`, or another is no entry that the set could take.
    """
    if not partial.is_file():
        return
    try:
        text = partial.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            partial.write_bytes(whole)
    except OSError as error:
        raise LensError(f"{partial}: cannot be read or written ({error.strerror or error})") from error
    for number, line in enumerate(readers.lines(whole.decode("utf-8", "replace")), 1):
        try:
            entry = readers.parse_json(line)
        except ValueError as error:
            raise ConfigError(
                f"{partial}: line {number} is not an entry of a set; delete the line or the file"
            ) from error
        if number == 1 and isinstance(entry, dict) and entry.get("schema") == PARTIAL_SCHEMA:
            if entry != header:
                raise ConfigError(
                    f"{partial}: was begun with another taxonomy; go on with that one, or delete the file to begin anew"
                )
            continue
        flaw = "the first line does not name its taxonomy" if number == 1 else next(flaws_of(entry, rubrics), None)
        if flaw is not None:
            raise ConfigError(
                f"{partial}: line {number} is not an entry of this set ({flaw}); delete the line or the file"
            )
        yield entry
