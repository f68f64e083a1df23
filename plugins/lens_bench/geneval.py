"""GenEval's decision (Ghosh et al., 2023, arXiv:2310.11513): from detections and colour answers to right or wrong.

The rules are those of the authors' evaluation/evaluate_images.py at github.com/djghosh13/geneval, revision af4902f; the
code wins where the paper differs. A box is (x1, y1, x2, y2) in pixels, y downwards; a row is a box and its score.

Rules that surprise:
- A score equal to the threshold is dropped, and for the tag "counting" the threshold of every class is 0.9.
- Rows of equal score come in the reverse of numpy's default sort, which keeps the order of two or three equal rows but
  not that of more on processors with AVX2. The cap of 16 is applied before the overlap filter, so more than 16 objects
  of a class cannot be counted: an `exclude` of 17 or more never fails.
- Only the most confident objects of a clause, as many as it asks for, are looked at for colours and positions.
- A direction counts where it makes up more than half of the distance of the centres, after a margin has been taken off
  each axis; the distance itself is taken before. Two directions may hold at once, or none.
- A clause whose target clause has failed fails too. Nothing stops at the first failure: every reason is collected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from lens_core.io.json_fields import FieldError, choice

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# The detector's 80 classes in COCO's order; three have other names than COCO gives them: 64, 65 and 66.
CLASSES = tuple(
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,
    bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,
    snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,
    fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
    potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,oven,
    toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n    ", "").split(
        ","
    )
)

Row = Sequence[float]


@frozen
class Options:
    """The thresholds of the decision; the defaults are the official ones."""

    threshold: float = 0.3  # a detection's score must be above it
    counting_threshold: float = 0.9  # the same, for the tag "counting"
    max_objects: int = 16  # of a class, the most confident
    max_overlap: float = 1.0  # IoU from which the less confident of two boxes is dropped; 1: none is
    position_threshold: float = 0.1  # share of the summed sizes that is taken off the distance of two centres


@frozen
class Verdict:
    """`kept`: per class the rows that count, the most confident first, classes without any absent. `color_asked`: per
    class the rows whose colour was asked for, in order, a row once for each time. `reason`: the official text, a line
    for each failure, "" where `correct`."""

    kept: dict[str, list[int]]
    color_asked: dict[str, list[int]]
    correct: bool
    reason: str


def iou(a: Row, b: Row) -> float:
    """Intersection over union of two boxes whose last pixel belongs to them (sizes are differences + 1); 0 where both
    are empty."""
    inner = _area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = _area(*a[:4]) + _area(*b[:4]) - inner
    return inner / union if union else 0.0


def _area(x1: float, y1: float, x2: float, y2: float) -> float:
    return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)


def kept_rows(rows: Sequence[Row], threshold: float, max_objects: int = 16, max_overlap: float = 1.0) -> list[int]:
    """Indices of the rows with a score above `threshold`, highest first, at most `max_objects`; of these, each whose
    IoU with all that are kept before it is below `max_overlap` (1 keeps all)."""
    scores = np.array([row[4] for row in rows], dtype=np.float64)
    order = [int(i) for i in np.argsort(scores)[::-1] if scores[i] > threshold][:max_objects]
    if max_overlap == 1:
        return order
    kept: list[int] = []
    for i in order:
        if all(iou(rows[k], rows[i]) < max_overlap for k in kept):
            kept.append(i)
    return kept


def relations(a: Row, b: Row, margin: float = 0.1) -> set[str]:
    """Where box `a` lies, seen from box `b`: a subset of RELATIONS. `margin` is a share of the sum of their sizes."""
    offset, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        apart = (a[low] + a[high]) / 2 - (b[low] + b[high]) / 2
        sizes = abs(a[high] - a[low]) + abs(b[high] - b[low])
        offset.append(apart)
        beyond.append(float(np.sign(apart)) * max(abs(apart) - margin * sizes, 0))
    if all(abs(length) < 1e-3 for length in beyond):
        return set()
    dx, dy = (length / float(np.linalg.norm(offset)) for length in beyond)
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {name for name, true in zip(RELATIONS, holds, strict=True) if true}


def decide(
    metadata: Mapping[str, Any],
    detections: Mapping[str, Sequence[Row]],
    colors: Mapping[str, Sequence[str]] | None = None,
    options: Options | None = None,
) -> Verdict:
    """Whether a picture shows what its prompt's `metadata` asks for: `tag`, `include` and `exclude`, lists of clauses.

    `detections` are per class the rows (x1, y1, x2, y2, score) in any order; `colors` per class the colour of each row.
    A clause's `position` is [relation, index of an earlier clause of `include`]. Raises FieldError for a target that is
    no earlier clause and for a colour that is asked for but not answered.
    """
    options = options or Options()
    threshold = options.counting_threshold if metadata["tag"] == "counting" else options.threshold
    kept = {
        name: rows
        for name, all_rows in detections.items()
        if (rows := kept_rows(all_rows, threshold, options.max_objects, options.max_overlap))
    }
    colour_rows: dict[str, list[int]] = {}
    reasons: list[str] = []
    matched: list[list[tuple[str, int]] | None] = []  # per clause the (class, row) pairs that satisfy it
    for place, clause in enumerate(metadata.get("include", ())):
        name, count = clause["class"], clause["count"]
        rows = kept.get(name, [])[:count]
        failure = ""
        if len(rows) < count:
            failure = f"expected {name}>={count}, found {len(rows)}"
        elif "color" in clause:
            colour_rows.setdefault(name, []).extend(rows)
            failure = _color_failure(clause, _answers(name, rows, colors or {}))
        if not failure and "position" in clause:
            target = _target(matched, clause["position"][1], place)
            failure = _position_failure(clause, rows, target, detections, options.position_threshold)
        reasons += [failure] if failure else []
        matched.append(None if failure else [(name, row) for row in rows])
    for clause in metadata.get("exclude", ()):
        name, number = clause["class"], len(kept.get(clause["class"], ()))
        if number >= clause["count"]:
            reasons.append(f"expected {name}<{clause['count']}, found {number}")
    return Verdict(kept, {name: rows for name, rows in colour_rows.items() if rows}, not reasons, "\n".join(reasons))


def _answers(name: str, rows: Sequence[int], colors: Mapping[str, Sequence[str]]) -> list[str]:
    answers = colors.get(name, ())
    for row in rows:
        if row >= len(answers):
            raise FieldError(f"colors.{name}", f"has no answer for row {row}, whose colour is asked for")
    return [choice(answers[row], f"colors.{name}[{row}]", COLORS) for row in rows]


def _color_failure(clause: Mapping[str, Any], answers: Sequence[str]) -> str:
    color, count = clause["color"], clause["count"]
    if answers.count(color) >= count:
        return ""
    others = ", ".join(f"{answers.count(c)} {c}" for c in COLORS if c in answers)
    return f"expected {color} {clause['class']}>={count}, found {answers.count(color)} {color}; and {others}"


def _target(matched: Sequence[list[tuple[str, int]] | None], index: int, place: int) -> list[tuple[str, int]] | None:
    """What satisfied the clause at `index` (from the end where negative, as in any Python list), None if it failed."""
    if not -len(matched) <= index < len(matched):
        problem = f"its target is clause {index}, which is no earlier one; a target comes before what refers to it"
        raise FieldError(f"metadata.include[{place}].position", problem)
    return matched[index]


def _position_failure(
    clause: Mapping[str, Any],
    rows: Sequence[int],
    target: Sequence[tuple[str, int]] | None,
    detections: Mapping[str, Sequence[Row]],
    margin: float,
) -> str:
    """The first pair of an object and a target that are not as they should be; every pair must be."""
    name, relation = clause["class"], clause["position"][0]
    if target is None:
        return f"no target for {name} to be {relation}"
    for row in rows:
        for other, number in target:
            true = relations(detections[name][row], detections[other][number], margin)
            if relation not in true:
                return f"expected {name} {relation} target, found {' and '.join(sorted(true))} target"
    return ""
