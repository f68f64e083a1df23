"""What a search has found: its candidates, and the best of them."""

from __future__ import annotations

from attrs import frozen

from lens_reason.judging import Part
from lens_reason.state import SearchFiles, name_of_prompt


@frozen
class Candidate:
    """A system prompt that was tried: its parent's name ("" for the start), and why it was proposed."""

    system: str
    parent: str
    reason: str

    @property
    def name(self) -> str:
        return name_of_prompt(self.system)


@frozen
class SearchResult:
    """A search that has ended: every candidate in order, the best by the dev prompts, why it ended, and its files."""

    start: Candidate
    best: Candidate
    candidates: tuple[Candidate, ...]
    ended: str
    files: SearchFiles
    dev: Part
    heldout: Part
