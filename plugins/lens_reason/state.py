"""What a search has paid for, in files of JSON lines: after a kill it goes on, and pays for nothing twice.

A search is replayed from its start, which costs nothing: the same seed makes the same choices, every picture that was
judged and every answer of the reflecting model is read back. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

from lens_core.io import readers
from lens_core.io.atomic_files import append, read_json, write_json
from lens_core.types import ConfigError, Refinement, Score

JUDGEMENTS, REFLECTIONS, SPENT, ABOUT = "judgements.jsonl", "reflections.jsonl", "spent.json", "search.json"


def name_of_prompt(system: str) -> str:
    """A short name for a candidate: the hash of its system prompt."""
    return hashlib.sha256(system.encode()).hexdigest()[:12]


@frozen
class Judgement:
    """One picture of a search: what was asked, what was drawn, and its score. A failed one has no value."""

    candidate: str
    part: str  # dev or heldout
    prompt: int  # its index in that part
    refinement: Refinement
    score: Score


class SearchFiles:
    """The files of one search. `about` is what makes it this search: another one may not go on in its folder."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(about))
        path = folder / ABOUT
        if path.is_file():
            known = read_json(path)
            different = sorted(k for k in known.keys() | plain.keys() if k != "budget" and known.get(k) != plain.get(k))
            if different:
                raise ConfigError(
                    f"{folder}: holds another search ({', '.join(different)} differ); choose another --output"
                )
        write_json(path, plain)
        self._judged: dict[tuple[str, str, int], Judgement] = {}
        self._answers: dict[str, list[str]] = {}
        self._asked: Counter[str] = Counter()  # how often each question has been asked in this process
        self._read()
        spent = read_json(folder / SPENT) if (folder / SPENT).is_file() else {}
        self.spent: dict[str, float] = {
            k: float(v) if isinstance(v := spent.get(k), int | float) and v >= 0 else 0.0 for k in ("calls", "usd")
        }

    @property
    def pictures(self) -> int:
        """How many have been drawn."""
        return len(self._judged)

    def judged(self, candidate: str, part: str, prompt: int) -> Judgement | None:
        return self._judged.get((candidate, part, prompt))

    def all_judged(self) -> list[Judgement]:
        """In the order in which they were drawn."""
        return list(self._judged.values())

    def add_judgement(self, one: Judgement) -> None:
        append(self.folder / JUDGEMENTS, asdict(one))
        self._judged[one.candidate, one.part, one.prompt] = one

    def answer(self, question: str) -> str | None:
        """What the reflecting model has answered to this question, asked for the nth time; None for a new one."""
        key = name_of_prompt(question)
        known = self._answers.get(key, [])
        return known[self._asked[key]] if self._asked[key] < len(known) else None

    def use_answer(self, question: str, answer: str, new: bool) -> None:
        """Count an answer as used; a new one is kept."""
        key = name_of_prompt(question)
        if new:
            append(self.folder / REFLECTIONS, {"key": key, "answer": answer})
            self._answers.setdefault(key, []).append(answer)
        self._asked[key] += 1

    def spend(self, calls: float, usd: float) -> None:
        """Add to what has been spent, for good."""
        if calls or usd:
            self.spent["calls"] += calls
            self.spent["usd"] += usd
            write_json(self.folder / SPENT, self.spent)

    def _read(self) -> None:
        for name in (JUDGEMENTS, REFLECTIONS):
            path = self.folder / name
            for line in readers.json_lines(path) if path.is_file() else ():
                try:
                    self._take(name, line)
                except (KeyError, TypeError, ValueError, ConfigError):
                    continue  # torn by a kill: it is paid for again

    def _take(self, name: str, line: Any) -> None:
        if name == REFLECTIONS:
            if isinstance(line["key"], str) and isinstance(line["answer"], str):
                self._answers.setdefault(line["key"], []).append(line["answer"])
            return
        refinement = Refinement(*(str(line["refinement"][k]) for k in ("request", "text", "reason")))
        score = line["score"]
        one = Judgement(
            str(line["candidate"]), str(line["part"]), int(line["prompt"]), refinement,
            Score(score["status"], score["value"], dict(score["components"]), str(score["evidence"])),
        )  # fmt: skip
        self._judged[one.candidate, one.part, one.prompt] = one
