"""The benchmark keeps its contract."""

import torch
from lens_example.benchmark import Example

from lens_core.testing import check_benchmark


def test_contract() -> None:
    check_benchmark(Example(Example.Config()))


def test_each_prompt_accepts_its_colour_alone() -> None:
    walls = torch.eye(3, dtype=torch.uint8)[:, :, None, None].expand(3, 3, 4, 4) * 255
    benchmark = Example(Example.Config())
    for shift in range(3):
        scores = benchmark.score(walls.roll(shift, 0), benchmark.prompts())
        assert [score.value for score in scores] == [float(shift == 0)] * 3
