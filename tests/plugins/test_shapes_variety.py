"""The benchmark variety measures distances between pictures for one prompt, and nothing between prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lens_shapes.benchmark import ShapesBenchmark
from lens_shapes.variety import Variety

from lens_core.types import ConfigError, Prompt


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_each_prompt_of_the_benchmark_is_asked_several_times_in_a_row() -> None:
    prompts = Variety(Variety.Config(prompts=7, pictures=3)).prompts()
    once = ShapesBenchmark(ShapesBenchmark.Config(prompts=7)).prompts()
    assert [p.text for p in prompts] == [p.text for p in once for _ in range(3)]
    assert [p.id for p in prompts] == list(range(21))


def test_the_score_is_the_mean_rms_distance_to_the_other_pictures_of_the_prompt() -> None:
    benchmark = Variety(Variety.Config(prompts=2, pictures=3))
    images = pictures(6)
    scores = [score.value for score in benchmark.score(images, benchmark.prompts())]
    plain = images.numpy().astype(np.float64) / 255
    for place, value in enumerate(scores):
        mates = [other for other in range(6) if other // 3 == place // 3 and other != place]
        expected = np.mean([np.sqrt(np.mean((plain[place] - plain[other]) ** 2)) for other in mates])
        assert value == pytest.approx(expected, abs=1e-12)


def test_one_picture_a_prompt_scores_nothing_however_much_the_prompts_differ() -> None:
    benchmark = Variety(Variety.Config(prompts=4, pictures=2))
    images = pictures(4).repeat_interleave(2, 0)
    assert [s.value for s in benchmark.score(images, benchmark.prompts())] == [0.0] * 8
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 8, 6).repeat(4, 1, 1, 1)
    assert [s.value for s in benchmark.score(black_and_white, benchmark.prompts())] == [1.0] * 8


def test_a_lonely_picture_abstains_and_impossible_options_are_refused() -> None:
    (score,) = Variety(Variety.Config()).score(pictures(1), [Prompt("a circle", data={"group": 0})])
    assert score.status == "abstain"
    with pytest.raises(ConfigError, match="pictures: must be at least 2, not 1"):
        Variety.Config(pictures=1)
    with pytest.raises(ConfigError, match="prompts: must be at least 1"):
        Variety.Config(prompts=0)
    with pytest.raises(ValueError, match="pass one picture a prompt"):
        Variety(Variety.Config()).score(pictures(2), [])
