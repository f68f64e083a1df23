"""Benchmark `variety`: how far apart the pictures are that a model draws for one prompt of the benchmark `shapes`.

A model that draws the same picture whatever the seed scores 0. Read it beside `shapes`: noise is varied too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from lens_core.types import Prompt, Score
from lens_core.validators import SEED, integer
from lens_shapes.benchmark import RULES, ShapesBenchmark
from lens_shapes.scoring import check_one_each


class Variety:
    """Diversity: each prompt several times, with other seeds.

    The pictures of a prompt come in a row; picture i has its own seed, as ever.
    """

    @frozen
    class Config:
        prompts: int = field(default=60, validator=integer(at_least=1))  # different ones
        pictures: int = field(default=4, validator=integer(at_least=2))  # of each; a distance needs two
        seed: int = field(default=0, validator=SEED)
        split: str = ""  # as of `shapes`
        rules: int = field(default=2, validator=RULES)

        def __attrs_post_init__(self) -> None:
            self.shapes()  # the same bounds

        def shapes(self) -> ShapesBenchmark.Config:
            """The config of the benchmark whose prompts are repeated."""
            return ShapesBenchmark.Config(self.prompts, self.seed, self.split, rules=self.rules)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.headline = ShapesBenchmark(config.shapes()).headline

    def prompts(self) -> list[Prompt]:
        """Those of `shapes`, each `pictures` times; ids count on, and data names the group."""
        config = self.config
        questions = ShapesBenchmark(config.shapes()).prompts()
        return [
            evolve(one, id=one.id * config.pictures + turn, data={**one.data, "group": one.id})
            for one in questions
            for turn in range(config.pictures)
        ]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        """Images uint8 [B,3,H,W] -> for each, its mean distance to the others of its group: the root mean square
        difference over pixels and channels, black to white being 1. A picture alone in its group abstains."""
        check_one_each(images, prompts)
        groups: dict[object, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(prompt.data.get("group"), []).append(place)
        scores: dict[int, Score] = {}
        for places in groups.values():
            flat = images[places].flatten(1).double().cpu() / 255
            apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5
            for row, place in enumerate(places):
                others = len(places) - 1
                scores[place] = (
                    Score("ok", float(apart[row].sum()) / others)
                    if others
                    else Score("abstain", evidence="there is no other picture for this prompt")
                )
        return [scores[place] for place in range(len(prompts))]
