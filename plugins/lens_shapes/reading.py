"""What the reader has read in a picture, and whether it is what a prompt asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from lens_shapes.scenes import NOVEL, SHAPES

NAMES = (*SHAPES, *NOVEL)
"""Every shape that has a name here."""


@frozen
class Seen:
    """One thing as read. `x`, `y`: centre, shares of width and height; `radius` in shorter sides. "?": no name fits."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@frozen
class Reading:
    """Everything read from one picture of `height` x `width` px. `background`: one name, or two of halves that meet in
    a straight line, `halves` "across" (top, bottom) or "down" (left, right)."""

    things: tuple[Seen, ...]
    background: tuple[str, ...]
    word: str
    height: int
    width: int
    halves: str = ""

    def __str__(self) -> str:
        """A short sentence, for evidence."""
        things = ", ".join(f"{t.size} {t.colour} {t.shape} at ({t.x:.2f}, {t.y:.2f})" for t in self.things) or "nothing"
        return f"read {things}" + (f' and the word "{self.word}"' if self.word else "")


def check_facts(
    reading: Reading, data: Mapping[str, Any], extras: bool = False, exact: bool = True
) -> dict[str, float]:
    """Each fact that a prompt asked, 1.0 if the picture has it, else 0.0. `data` is that of `scenes.prompt_facts`.

    things: every kind asked for is there; counts: as many of each as asked, and nothing else in the picture;
    colours: every thing asked to have a colour has it; relation: every subject lies on that side of every other, and
    the way between the groups' centres runs mainly along that axis; word: the writing is exactly the word, or none;
    background, where it is asked for: its colours lie where they should.
    `extras`: things and words that were not asked for do no harm, as by GenEval's rules; then `exact` says whether
    there must be as many of each kind as asked, or at least as many.
    """
    groups = data["groups"]
    facts = {"things": 1.0, "counts": 1.0}
    picked: list[list[Seen]] = []
    for group in groups:
        alike = [t for t in reading.things if t.shape == group["shape"]]
        right = [t for t in alike if group["colour"] in (None, t.colour)]
        picked.append(right)
        if not alike:
            facts["things"] = 0.0
        wanted = sum(other["count"] for other in groups if other["shape"] == group["shape"])
        if len(alike) < wanted or (exact and len(alike) > wanted):
            facts["counts"] = 0.0
        if group["colour"] is not None:
            enough = len(right) >= group["count"] if extras else len(right) == group["count"]
            facts["colours"] = min(facts.get("colours", 1.0), float(enough))
    if not extras and len(reading.things) != sum(group["count"] for group in groups):
        facts["counts"] = 0.0
    if data["relation"]:
        facts["relation"] = float(_lies(picked, data["relation"], reading))
    if data["word"] or not extras:
        facts["word"] = float(reading.word == data["word"])
    if data.get("background"):
        facts["background"] = float(lies_behind(reading, **data["background"]))
    return facts


def satisfies(reading: Reading, data: Mapping[str, Any]) -> bool:
    """Whether the picture has every fact asked, and no other thing: GenEval mostly lets extra things pass."""
    return all(check_facts(reading, data).values())


def lies_behind(reading: Reading, names: Sequence[str], halves: str) -> bool:
    """Whether the background has these colours, in this order, halved in this way."""
    return reading.background == tuple(names) and reading.halves == halves


def _lies(groups: list[list[Seen]], relation: str, reading: Reading) -> bool:
    if len(groups) != 2 or not all(groups):
        return False
    unit = min(reading.height, reading.width)
    places = [np.array([(t.x * reading.width, t.y * reading.height) for t in group]) / unit for group in groups]
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[relation]
    way = places[0].mean(0) - places[1].mean(0)
    apart = sign * (places[0][:, None, axis] - places[1][None, :, axis])
    return bool((apart > 0).all() and sign * way[axis] > max(abs(way[1 - axis]), 0.1))
