"""Whether a description says what a request asked for: exact, for descriptions in the words of `captions` and `styles`.

`check(facts, text)` reads the objects that a text names, in its opening and one by one, its relations and its word, and
compares them with the facts of a prompt (`scenes.prompt_facts`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lens_shapes.captions import NUMBERS, ORDINALS, plural
from lens_shapes.scenes import COLOURS, NOVEL, OPPOSITE, SHAPES

_SHAPE = {form: shape for shape in (*SHAPES, *NOVEL) for form in (shape, plural(shape))}
_COUNT = {"a": 1, "an": 1, **{word: n for n, word in enumerate(NUMBERS)}}
_GROUP = re.compile(rf"\b({'|'.join(_COUNT)}) (?:({'|'.join(COLOURS)}) )?({'|'.join(_SHAPE)})\b")
_THING = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join((*SHAPES, *NOVEL))})\b(?! is (?:to the|above|below))")
_RELATION = re.compile(
    rf"\bthe (?:({'|'.join(COLOURS)}) ({'|'.join((*SHAPES, *NOVEL))})|({'|'.join(ORDINALS)}) object) is "
    rf"(?:to the )?({'|'.join(OPPOSITE)}) the (?:({'|'.join(COLOURS)}) ({'|'.join((*SHAPES, *NOVEL))})|"
    rf"({'|'.join(ORDINALS)}) object)\b"
)
_SPELLED = re.compile(r"letters?(?: in order)?: ((?:\"[A-Z]\"(?:, | and )?)+)")
KINDS = ("shapes", "colours", "counts", "relations", "words")


def check(facts: Mapping[str, Any], text: str) -> dict[str, bool]:
    """Kind of fact -> whether a description keeps all of them: of the kinds that the prompt names."""
    sentences = [sentence.strip() for sentence in re.split(r"(?<=[.;]) ", text)]
    opening = next((s for s in sentences if _GROUP.search(_after_colon(s)) or '"' in s), "")
    groups = Counter[tuple[str, str]]()
    for count, colour, shape in _GROUP.findall(_after_colon(opening)):
        groups[_SHAPE[shape], colour] += _COUNT[count]
    wanted = {group["shape"]: group for group in facts["groups"]}
    counts = Counter[str]()
    for (shape, _), count in groups.items():
        counts[shape] += count
    kept = {"shapes": set(counts) == set(wanted)} if wanted else {"shapes": not counts}
    if any(group["colour"] for group in wanted.values()):
        kept["colours"] = all(
            not group["colour"] or {c for (s, c) in groups if s == shape} == {group["colour"]}
            for shape, group in wanted.items()
        )
    if wanted:
        each = _each(sentences)
        kept["counts"] = all(counts[shape] == group["count"] for shape, group in wanted.items()) and (
            not each or each == counts
        )
    if facts["relation"]:
        kept["relations"] = _relation(facts, sentences) or f" {facts['relation']} " in _plain(text, facts)
    if facts["word"]:
        spelled = ["".join(re.findall("[A-Z]", letters)) for letters in _SPELLED.findall(text)]
        kept["words"] = f'"{facts["word"]}"' in text and all(word == facts["word"] for word in spelled)
    return kept


def _after_colon(sentence: str) -> str:
    """The list of an opening: "the picture shows two objects in all: a red star and a blue circle"."""
    head, colon, rest = sentence.partition(": ")
    return rest if colon and ("object" in head or "word" in head) else sentence


def _each(sentences: list[str]) -> Counter[str]:
    """The objects that have a sentence of their own, by shape."""
    object_sentences = [
        s for s in sentences if re.search(rf"\b(?:the object|({'|'.join(ORDINALS)}) (?:object|one))\b", s)
    ]
    things = [_THING.search(s) for s in object_sentences if not _RELATION.search(s) and " in all" not in s]
    return Counter(thing[2] for thing in things if thing)


def _relation(facts: Mapping[str, Any], sentences: list[str]) -> bool:
    """Whether a sentence relates the two groups as asked, from either side; objects may be named by their numbers."""
    numbered: dict[str, str] = {}
    for sentence in sentences:
        thing, name = _THING.search(sentence), re.search(rf"\bthe ({'|'.join(ORDINALS)}) (?:object|one)\b", sentence)
        if thing and name and not _RELATION.search(sentence):
            numbered[name[1]] = thing[2]
    first, second = (group["shape"] for group in facts["groups"])
    said = [
        (one or numbered.get(number, ""), side, other or numbered.get(last, ""))
        for _, one, number, side, _, other, last in (m for s in sentences for m in _RELATION.findall(s))
    ]
    relevant = [(a, side, b) for a, side, b in said if {a, b} == {first, second}]
    right = {(first, facts["relation"], second), (second, OPPOSITE[facts["relation"]], first)}
    return bool(relevant) and all(one in right for one in relevant)


def _plain(text: str, facts: Mapping[str, Any]) -> str:
    """A short phrase as it stands, where its two shapes come in the order of the request; else ""."""
    first, second = (group["shape"] for group in facts["groups"])
    places = [text.find(first), text.find(second)]
    return text if len(text.split()) < 20 and -1 not in places and places == sorted(places) else ""
