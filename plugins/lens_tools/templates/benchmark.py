"""A benchmark of three questions: is the picture mostly of the colour that the prompt names?"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import field, frozen
from torch import Tensor

from lens_core import Prompt, Score
from lens_core.validators import within

CHANNELS = {"red": 0, "green": 1, "blue": 2}


class Example:
    """Share of pictures whose strongest colour channel is the one that was asked for."""

    @frozen
    class Config:
        margin: float = field(default=0.05, validator=within(0, 1))  # over the other channels, as a share of 255

    def __init__(self, config: Config) -> None:
        self.config = config

    def prompts(self) -> list[Prompt]:
        return [Prompt(f"a {name} wall", i, "colour", {"colour": name}) for i, name in enumerate(CHANNELS)]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        """Images uint8 [B,3,H,W] -> 1 or 0 each."""
        scores = []
        for means, prompt in zip(images.float().mean((2, 3)) / 255, prompts, strict=True):
            if "colour" not in prompt.data:
                scores.append(Score("abstain", evidence="the prompt names no colour"))
                continue
            channel = CHANNELS[prompt.data["colour"]]
            others = max(float(means[i]) for i in CHANNELS.values() if i != channel)
            scores.append(Score("ok", float(float(means[channel]) > others + self.config.margin)))
        return scores
