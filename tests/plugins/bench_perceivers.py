"""A plugin with perceivers that answer from the pixels of a picture, without any model. For tests of stage 2.

A picture's red channel at (0, 0) is its number; `log` holds what was asked, in order.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any, ClassVar

from attrs import frozen
from PIL.Image import Image

from lens_core import hookimpl
from lens_core.types import LensError

log: list[tuple[str, int, Any]] = []
BOX = [1, 1, 9, 9]


@frozen
class Config:
    revision: str = "1"
    canary: str = ""  # what the canary says is wrong
    fails: tuple[int, ...] = ()  # numbers of pictures of which there is no answer
    kill_at: int = -1  # the number of a picture at which the process dies
    shift: int = 0  # of the number that is answered


class Base:
    Config = Config
    perceives: ClassVar[str] = ""
    batch_size = 2

    def __init__(self, config: Config) -> None:
        self.config = config

    def describe(self) -> dict[str, str]:
        return {"model": f"fake {self.perceives}", "revision": self.config.revision, "version": "1"}

    def canary(self) -> str | None:
        return self.config.canary or None

    def perceive(self, images: Sequence[Image], questions: Sequence[Any]) -> list[Any]:
        return [self._one(image, question) for image, question in zip(images, questions, strict=True)]

    def _one(self, image: Image, question: Any) -> Any:
        red: int = image.getpixel((0, 0))[0]  # type: ignore[index]  # an RGB picture
        number = round(red / 10)  # JPEG moves it a little
        if number == self.config.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        log.append((self.perceives, number, question))
        if number in self.config.fails:
            return LensError(f"picture {number} is too much")
        return self.answer(number + self.config.shift, question)

    def answer(self, number: int, question: Any) -> Any:
        raise NotImplementedError


class Detector(Base):
    """`number` dogs, scores falling from 0.95, and a cat that is less certain."""

    perceives = "objects"

    def answer(self, number: int, question: Any) -> Any:
        dogs = [{"box": [10 * i, 0, 10 * i + 8, 8], "score": 0.95 - 0.01 * i, "mask": None} for i in range(number)]
        return {"dog": dogs, "cat": [{"box": BOX, "score": 0.35, "mask": None}]}


class Colors(Base):
    """Red, blue, red, …"""

    perceives = "colors"

    def answer(self, number: int, question: Any) -> Any:
        return [("red", "blue")[i % 2] for i in range(len(question["objects"]))]


class Lines(Base):
    perceives = "lines"

    def answer(self, number: int, question: Any) -> Any:
        return ["grand opening", f"number {number}"]


class Answers(Base):
    """To a question, whether it holds the picture's number; else the number as text."""

    perceives = "answer"

    def answer(self, number: int, question: Any) -> Any:
        if isinstance(question, str) and "Yes" in question:
            return "Yes" if str(number) in question else "no"
        return f"number {number}"


class Embedding(Base):
    perceives = "embedding"

    def answer(self, number: int, question: Any) -> Any:
        return [1.0, 0.0] if number % 2 else [0.6, 0.8]


class Cosine(Base):
    perceives = "similarity"

    def answer(self, number: int, question: Any) -> Any:
        return number / 10


class StyleCosine(Cosine):
    perceives = "style similarity"


class AnswerCosine(Cosine):
    perceives = "answer similarity"


class Broken(Base):
    """Answers what JSON cannot hold, too little, or raises, as its revision says."""

    perceives = "lines"

    def perceive(self, images: Sequence[Image], questions: Sequence[Any]) -> list[Any]:
        if self.config.revision == "raise":
            raise RuntimeError("CUDA error:\nno kernel image")
        return {"nan": [float("nan")] * len(images), "few": [], "tensor": [object()] * len(images)}[
            self.config.revision
        ]


@hookimpl
def lens_perceivers() -> dict[str, type[Any]]:
    return {
        "answers": Answers, "answer_cosine": AnswerCosine, "broken": Broken, "colors": Colors, "cosine": Cosine,
        "detector": Detector, "embedding": Embedding, "lines": Lines, "style_cosine": StyleCosine,
    }  # fmt: skip
