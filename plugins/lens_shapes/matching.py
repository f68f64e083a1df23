"""Curator `shapes_caption`: whether a picture shows what its caption says, exactly, in the world of shapes.

The judge of a caption in the proof of the data engine (docs/dirty-web.md): it reads the facts that a caption states,
and looks for them in the picture with the reader of the benchmark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import evolve, frozen

from lens_core.types import ConfigError, Record
from lens_shapes.captions import NUMBERS, plural
from lens_shapes.reader import read
from lens_shapes.reading import NAMES, Reading, check_facts
from lens_shapes.scenes import BACKGROUNDS, COLOURS, RELATIONS

_SHAPE = {form: shape for shape in NAMES for form in (shape, plural(shape))}
_COUNT = {"a": 1, "an": 1, **{word: n for n, word in enumerate(NUMBERS) if n}}
_COLOUR, _NAME, _SIDE = "|".join(COLOURS), "|".join(_SHAPE), "|".join(RELATIONS)
_GROUP = re.compile(rf"\b({'|'.join(_COUNT)}) (?:({_COLOUR}) )?({_NAME})\b")
_BEHIND = "|".join(BACKGROUNDS)
_BRIEF_RELATION = re.compile(
    rf"\b(?:{'|'.join(_COUNT)}) (?:({_COLOUR}) )?({_NAME}) (?:to the )?({_SIDE}) "
    rf"(?:{'|'.join(_COUNT)}) (?:({_COLOUR}) )?({_NAME})\b"
)
_DENSE_RELATION = re.compile(rf"\bthe ({_COLOUR}) ({_NAME}) is (?:to the )?({_SIDE}) the ({_COLOUR}) ({_NAME})\b")
_PLAIN = re.compile(
    rf"\b(?:({_BEHIND}) background|the background is plain ({_BEHIND})|"
    rf"one flat ({_BEHIND}) colour fills the whole background)\b"
)
_HALVES = re.compile(
    rf"\b(?:({_BEHIND}) (top|left) half and an? ({_BEHIND}) (?:bottom|right) half|"
    rf"the (top|left) half is ({_BEHIND}) and the (?:bottom|right) half is ({_BEHIND}))\b"
)
_WORD = re.compile(r'"([A-Z]+)"')


def caption_facts(text: str) -> dict[str, Any] | None:
    """The facts that a caption in the words of `captions` states, as `scenes.prompt_facts` has them, with a list of
    `relations`; None where it names no shape and no word."""
    opening = re.split(r"(?<=[.;]) ", text.strip())[0]
    listed = opening.partition(": ")[2] if "objects in all: " in opening or "object: " in opening else opening
    groups = [
        {"shape": _SHAPE[name], "count": _COUNT[count], "colour": colour or None}
        for count, colour, name in _GROUP.findall(listed)
    ]
    words = _WORD.findall(opening)
    if not groups and not words:
        return None
    facts: dict[str, Any] = {"groups": groups, "relation": "", "word": words[0] if words else ""}
    pairs = _DENSE_RELATION.findall(text) or _BRIEF_RELATION.findall(listed)
    facts["relations"] = [
        ((_SHAPE[one], colour or None), side, (_SHAPE[other], last or None)) for colour, one, side, last, other in pairs
    ]
    if halves := _HALVES.search(text):
        one, way, two, other_way, first, second = halves.groups()
        names = [one or first, two or second]
        facts["background"] = {"names": names, "halves": "across" if (way or other_way) == "top" else "down"}
    elif plain := _PLAIN.search(text):
        facts["background"] = {"names": [next(filter(None, plain.groups()))], "halves": ""}
    return facts


def caption_match(reading: Reading, facts: Mapping[str, Any]) -> float:
    """The share of a caption's facts that a picture has, things without a name left out of account."""
    named = evolve(reading, things=tuple(thing for thing in reading.things if thing.shape != "?"))
    results = list(check_facts(named, facts).values())
    for (one, colour), side, (other, last) in facts["relations"]:
        groups = [{"shape": one, "count": 1, "colour": colour}, {"shape": other, "count": 1, "colour": last}]
        results.append(check_facts(named, {"groups": groups, "relation": side, "word": ""})["relation"])
    return sum(results) / len(results)


class ShapesCaption:
    """How well a caption about shapes fits its picture, read from pixels.

    The picture's facts are compared with those of the longer of its two captions.

    `unnamed` counts the things and letters of the picture that have no name: a watermark, a smudge, a frame. `match` is
    the share of the caption's facts that the picture shows, from 0 to 1; 0 for a caption that is not about shapes.
    A picture that the reader does not take (a side below 64 px, longer than 2:1) has neither.
    """

    version = "1"
    columns = ("unnamed", "match")
    reads_captions = True
    costly = True  # the slowest of all, and a copy may have another caption than the picture that is kept

    @frozen
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, records: Sequence[Record]) -> Mapping[str, Sequence[float]]:
        rows = [self._judge(record) for record in records]
        return {"unnamed": [row[0] for row in rows], "match": [row[1] for row in rows]}

    def _judge(self, record: Record) -> tuple[float, float]:
        try:
            reading = read(record.pixels)
        except ConfigError:
            return math.nan, math.nan
        unnamed = sum("?" in (thing.shape, thing.colour) for thing in reading.things) + reading.word.count("?")
        facts = caption_facts(max(record.dense, record.brief, key=len))
        return float(unnamed), 0.0 if facts is None else caption_match(reading, facts)
