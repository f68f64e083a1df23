"""A perceiver that answers yes or no to questions about the colour of a picture, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen
from PIL import Image

from lens_core.validators import within

CHANNELS = {"red": 0, "green": 1, "blue": 2}


class Example:
    """Answer "Yes" if a colour that the question names is the strongest in the picture, else "No"."""

    perceives = "answer"

    @frozen
    class Config:
        margin: float = field(default=0.1, validator=within(0, 1))  # over the other channels, as a share of 255

    def __init__(self, config: Config) -> None:
        self.config = config

    def describe(self) -> Mapping[str, Any]:
        """The model and its settings. Increase `version` whenever the answer for a picture may change."""
        return {"model": "mean colour", "revision": "1", "version": 1, "margin": self.config.margin}

    def perceive(self, images: Sequence[Image.Image], questions: Sequence[Any]) -> list[str]:
        """RGB pictures with a question each -> an answer each."""
        answers = []
        for image, question in zip(images, questions, strict=True):
            means = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
            named = [channel for name, channel in CHANNELS.items() if name in str(question).lower()]
            others = [means[c] for c in CHANNELS.values() if c not in named]  # type: ignore[index]  # RGB
            mostly = bool(named) and bool(others)
            mostly = mostly and min(means[c] for c in named) > max(others) + 255 * self.config.margin  # type: ignore[index]
            answers.append("Yes" if mostly else "No")
        return answers

    def canary(self) -> str | None:
        """What is wrong with its answer about a red picture, or None."""
        red = Image.new("RGB", (8, 8), "red")
        answers = self.perceive([red, red], ["Is it red?", "Is it blue?"])
        return None if answers == ["Yes", "No"] else f"a red picture is {answers}, not ['Yes', 'No']"
