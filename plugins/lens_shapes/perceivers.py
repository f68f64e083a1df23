"""Perceivers `shapes_objects` and `shapes_colors`: the exact reader as GenEval's detector and colour classifier.

GenEval's rules know COCO's classes and ten colours, so shapes go under the names of classes, and cyan under white.
`geneval_entry` writes a prompt of the benchmark `shapes` as an entry of GenEval's prompt file under the same names. So
GenEval's own path can be measured against a judge that makes no mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lens_core.types import Prompt
from lens_shapes.scenes import COLOURS, SHAPES

if TYPE_CHECKING:
    from PIL.Image import Image

    from lens_shapes.reading import Reading, Seen

CLASSES = dict(
    zip(SHAPES, ("sports ball", "book", "pizza", "kite", "scissors", "apple", "donut", "clock"), strict=True)
)
"""Shape -> the class that stands for it."""
COLOR_NAMES = {name: "white" if name == "cyan" else name for name in COLOURS}
"""Colour -> the name by which GenEval's rules know it."""
TAGS = {
    "single": "single_object", "two": "two_object", "counting": "counting", "colours": "colors",
    "position": "position", "attribution": "color_attr",
}  # fmt: skip
"""Task -> GenEval's tag."""
SURE = 0.99  # the score of everything that the reader names: above both thresholds


def geneval_entry(prompt: Prompt) -> dict[str, Any]:
    """A line of GenEval's prompt file. Raises KeyError for a prompt of another task than GenEval's six."""
    tag, groups = TAGS[prompt.task], prompt.data["groups"]
    clauses = []
    for group in groups:
        color = {} if group["colour"] is None else {"color": COLOR_NAMES[group["colour"]]}
        clauses.append({"class": CLASSES[group["shape"]], "count": group["count"], **color})
    entry: dict[str, Any] = {"tag": tag, "include": clauses, "prompt": prompt.text}
    if tag == "position":
        subject, other = clauses
        entry["include"] = [other, {**subject, "position": [prompt.data["relation"], 0]}]
    if tag == "counting":
        entry["exclude"] = [{"class": clause["class"], "count": clause["count"] + 1} for clause in clauses]
    return entry


def _read(image: Image) -> Reading:
    import numpy as np

    from lens_shapes.reader import read

    return read(np.ascontiguousarray(np.asarray(image)))


def _box(thing: Seen, reading: Reading) -> list[float]:
    """x1, y1, x2, y2 in px: the square around its circle."""
    radius = thing.radius * min(reading.width, reading.height)
    x, y = thing.x * reading.width, thing.y * reading.height
    return [x - radius, y - radius, x + radius, y + radius]


class _Reader:
    """What both perceivers have in common."""

    @frozen
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    def describe(self) -> Mapping[str, Any]:
        return {"model": "lens_shapes reader", "revision": "2", "version": 1}


class ShapesObjects(_Reader):
    """Coloured shapes as objects with boxes, read from pixels: stands in for a detector.

    Every thing that the reader names, with a box and a score above every threshold.
    """

    perceives = "objects"

    def perceive(self, images: Sequence[Image], questions: Sequence[Any]) -> list[dict[str, list[dict[str, Any]]]]:
        answers = []
        for image in images:
            reading = _read(image)
            rows_by_class: dict[str, list[dict[str, Any]]] = {}
            for thing in reading.things:
                if thing.shape in CLASSES:
                    row = {"box": _box(thing, reading), "score": SURE, "mask": None}
                    rows_by_class.setdefault(CLASSES[thing.shape], []).append(row)
            answers.append(rows_by_class)
        return answers

    def canary(self) -> str | None:
        counts = {name: len(rows) for name, rows in self.perceive([_known()], [None])[0].items()}
        expected = {CLASSES["circle"]: 1, CLASSES["star"]: 1}
        return None if counts == expected else f"a circle and a star were read as {counts}"


class ShapesColors(_Reader):
    """Colours of shapes, read from pixels: stands in for `clip_colors`.

    The colour of the thing that the reader sees nearest to the middle of each object's box.
    """

    perceives = "colors"

    def perceive(self, images: Sequence[Image], questions: Sequence[Any]) -> list[list[str]]:
        return [
            [self._color(_read(image), thing["box"]) for thing in question["objects"]]
            for image, question in zip(images, questions, strict=True)
        ]

    def _color(self, reading: Reading, box: Sequence[float]) -> str:
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2

        def distance(thing: Seen) -> float:
            return (thing.x * reading.width - x) ** 2 + (thing.y * reading.height - y) ** 2

        things = [thing for thing in reading.things if thing.colour in COLOR_NAMES]
        return COLOR_NAMES[min(things, key=distance).colour] if things else "black"

    def canary(self) -> str | None:
        known = _known()
        boxes = ShapesObjects(ShapesObjects.Config()).perceive([known], [None])[0]
        questions = [{"class": name, "objects": boxes.get(CLASSES[name], [])} for name in ("circle", "star")]
        answers = self.perceive([known, known], questions)
        return None if answers == [["red"], ["blue"]] else f"a red circle and a blue star were read as {answers}"


def _known() -> Image:
    """A red circle left of a blue star on white."""
    from PIL import Image as pil

    from lens_shapes.render import render
    from lens_shapes.scenes import Scene, Thing

    things = (Thing("circle", "red", "large", 0.28, 0.5), Thing("star", "blue", "large", 0.72, 0.5))
    return pil.fromarray(render(Scene("two", things, ("white",)), 128, 128))
