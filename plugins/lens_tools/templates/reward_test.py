"""The reward keeps its contract."""

import torch
from lens_example.reward import Example

from lens_core import Prompt
from lens_core.testing import check_reward


def test_contract() -> None:
    check_reward(Example(Example.Config()), [Prompt("a bright room"), Prompt("")])


def test_white_is_best_where_white_is_the_target() -> None:
    white = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    scores = Example(Example.Config(target=1.0)).score(torch.cat([white, white // 5]), [Prompt("")] * 2)
    assert [round(score.value or 0, 6) for score in scores] == [1.0, 0.2]
