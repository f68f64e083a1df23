"""Running a benchmark: pictures, their seeds, and what is written of them."""

from __future__ import annotations

import json

import pytest
import torch
import toy

from lens_core.evaluation.report import contact_sheet, result_json, table
from lens_core.evaluation.run import evaluate, picture_seed, score
from lens_core.inference.pipeline import LensPipeline
from lens_core.types import ConfigError, LensError, Prompt, Score


def test_a_failure_cannot_have_a_value_nor_a_success_lack_one() -> None:
    for status, value in (("failed", 0.0), ("abstain", 1.0), ("ok", None)):
        with pytest.raises(ValueError, match="cannot have the value"):
            Score(status, value)  # type: ignore[arg-type]  # what the test is about


def test_a_benchmark_does_not_depend_on_the_batch(pipeline: LensPipeline) -> None:
    outcomes = [
        evaluate(pipeline, toy.Reds(toy.Reds.Config(5)), seed=3, batch_size=b, height=16, width=32) for b in (1, 2, 5)
    ]
    assert outcomes[0].images.shape == (5, 3, 16, 32)
    for other in outcomes[1:]:
        assert (outcomes[0].images.int() - other.images.int()).abs().max() <= 1
    assert outcomes[0].tasks["other"].missing == 2
    assert outcomes[0].overall.count == 3
    assert "| red |" in table(outcomes[0]) and "**overall**" in table(outcomes[0])


def test_a_contact_sheet_frames_each_picture() -> None:
    images = torch.zeros(3, 3, 16, 32, dtype=torch.uint8)
    sheet = contact_sheet(images, ["one", "two", "three"], [True, False, None], columns=2)
    assert sheet.size == (2 * 40, 2 * (16 + 8 + 34))
    assert [sheet.getpixel(p) for p in ((1, 1), (41, 1), (1, 59))] == [(26, 150, 65), (215, 25, 28), (153, 153, 153)]


def test_two_seeds_of_a_benchmark_share_no_noise(pipeline: LensPipeline) -> None:
    benchmark = toy.Reds(toy.Reds.Config(4))
    runs = [evaluate(pipeline, benchmark, seed=seed, height=16, width=32) for seed in (0, 1)]
    first, second = (
        [picture["seed"] for picture in result_json(run, benchmark.prompts(), s)["pictures"]]
        for s, run in enumerate(runs)
    )
    assert not set(first) & set(second)
    assert first == [0, 1, 2, 3], "seed 0 keeps the seeds that `lens generate --seed 0` gives"
    again = pipeline(benchmark.prompts()[1].text, seed=second[1], output_type="pt", height=16, width=32).images
    assert (again[0].int() - runs[1].images[1].int()).abs().max() <= 1, "a picture can be drawn again by its seed"
    for seed in (-1, 2**63):
        with pytest.raises(ConfigError, match="seed must be from 0"):
            picture_seed(seed, 0)


class Measured(toy.Reds):
    """Scores that are no shares: from -2 to 2."""

    def score(self, images: torch.Tensor, prompts: list[Prompt]) -> list[Score]:
        return [Score("ok", float(i % 5 - 2)) for i in range(len(prompts))]


class Broken(toy.Reds):
    def score(self, images: torch.Tensor, prompts: list[Prompt]) -> list[Score]:
        raise LensError("the judge is out")


def test_a_reward_outside_0_and_1_is_measured(pipeline: LensPipeline) -> None:
    outcome = evaluate(pipeline, Measured(Measured.Config(10)), height=16, width=32)
    assert outcome.overall.low <= outcome.overall.value <= outcome.overall.high
    text = table(outcome)
    assert "**overall** (mean of" in text and "| all pictures |" in text
    assert json.loads(json.dumps(result_json(outcome, Measured(Measured.Config(10)).prompts(), 0), allow_nan=False))


def test_pictures_are_given_out_before_they_are_scored(pipeline: LensPipeline) -> None:
    drawn: list[tuple[int, list[int]]] = []

    def keep(first: int, images: torch.Tensor) -> None:
        drawn.append((first, list(images.shape)))

    with pytest.raises(LensError, match="out"):
        evaluate(pipeline, Broken(Broken.Config(3)), batch_size=2, on_images=keep, height=16, width=32)
    assert drawn == [(0, [2, 3, 16, 32]), (2, [1, 3, 16, 32])]


class Known(toy.Reds):
    """Knows that the VAE spoils the first of its pictures."""

    def ceiling(self, vae: torch.nn.Module, height: int, width: int) -> list[Score]:
        assert isinstance(vae, torch.nn.Module) and (height, width) == (16, 32)
        return [Score("ok", float(i > 0)) if i % 2 == 0 else Score("abstain") for i in range(self.config.prompts)]


def test_a_bar_in_a_task_is_no_column_and_a_task_without_scores_has_a_dash() -> None:
    benchmark = toy.Reds(toy.Reds.Config(2))
    benchmark.score = lambda images, prompts: [Score("ok", 1.0), Score("abstain")]  # type: ignore[method-assign]
    benchmark.headline = ("a|b",)  # type: ignore[attr-defined]
    prompts = [Prompt("one", task="a|b"), Prompt("two", task="c")]
    lines = table(score(benchmark, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), prompts)).splitlines()
    assert lines[2] == "| a\\|b | 1.000 | 0.207 to 1.000 | 1 | 1 |" and lines[3] == "| c | – |  | 0 | 0 |"


def test_the_ceiling_stands_beside_each_score(pipeline: LensPipeline) -> None:
    benchmark = Known(Known.Config(5))
    outcome = evaluate(pipeline, benchmark, ceiling=True, height=16, width=32)
    lines = table(outcome).splitlines()
    assert lines[0].endswith("| ceiling |") and len({line.count("|") for line in lines}) == 1
    assert next(line for line in lines if line.startswith("| red")).endswith("| 0.667 |")
    assert next(line for line in lines if line.startswith("| **overall**")).endswith("| 0.667 |")
    assert result_json(outcome, benchmark.prompts(), 0)["ceiling"]["red"] == pytest.approx(2 / 3, abs=1e-6)
    assert "ceiling" not in table(evaluate(pipeline, toy.Reds(toy.Reds.Config(5)), height=16, width=32))
