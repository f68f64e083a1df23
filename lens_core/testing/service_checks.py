"""Contract checks of components without weights that judge, answer or rewrite."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lens_core.testing.assertions import component_name, equal, hold, random_tensor, twice
from lens_core.types import Message, Prompt, Score


def check_reward(reward: Any, prompts: Sequence[Prompt], images: Tensor | None = None) -> None:
    """One Score each, the same twice and alone, and no exception for a prompt that it cannot judge.

    `images` uint8 [B,3,H,W] go with the prompts; None: noise of 64 px.
    """
    _check_scores(component_name(reward, "reward"), reward, prompts, images)


def check_benchmark(benchmark: Any, images: Tensor | None = None) -> None:
    """Prompts that are text, the same twice, no two with one id; and scores in [0, 1] as `check_reward` checks them.

    `images` uint8 [B,3,H,W] go with the first B prompts; None: noise of 64 px for the first 8.
    """
    name = component_name(benchmark, "benchmark")
    prompts = twice(lambda: list(benchmark.prompts()), f"{name}.prompts")
    hold(len(prompts) > 0, f"{name}: there are no prompts")
    for prompt in prompts:
        hold(isinstance(prompt, Prompt), f"{name}: a prompt is {prompt!r}, not a Prompt")
        hold(bool(prompt.text.strip()), f"{name}: the prompt with the id {prompt.id} is blank")
    ids = [prompt.id for prompt in prompts]
    hold(len(set(ids)) == len(ids), f"{name}: two prompts have the same id, by which pictures get their seeds")
    scores = _check_scores(name, benchmark, prompts[: 8 if images is None else len(images)], images)
    for score in scores:
        hold(score.value is None or 0 <= score.value <= 1, f"{name}: a score is {score.value}; it must be in [0, 1]")


def _check_scores(name: str, scorer: Any, prompts: Sequence[Prompt], images: Tensor | None) -> list[Score]:
    if images is None:
        images = (random_tensor(0, len(prompts), 3, 64, 64) * 64 + 128).clamp(0, 255).to(torch.uint8)
    original = images.clone()
    scores: list[Score] = twice(lambda: list(scorer.score(images, prompts)), f"{name}.score")
    hold(equal(original, images), f"{name} changes the pictures")
    hold(len(scores) == len(prompts), f"{name}: {len(scores)} scores for {len(prompts)} pictures")
    for row, score in enumerate(scores):
        hold(isinstance(score, Score), f"{name}: a verdict is {score!r}, not a Score")
        hold(math.isfinite(score.value or 0.0), f"{name}: a score is {score.value}; what broke is Score('failed')")
        alone = scorer.score(images[row : row + 1], prompts[row : row + 1])[0]
        hold(alone == score, f"{name}: a picture's score depends on its batch")
    try:
        scorer.score(images[:1], [Prompt("a prompt without data")])
    except Exception as error:
        raise AssertionError(f"{name}: what cannot be judged is Score('abstain'), not {error!r}") from error
    return scores


def check_llm(llm: Any, messages: Sequence[Message] = (Message("user", "Describe a red circle."),)) -> None:
    """An answer that is text, to messages that stay as they were. A remote one is asked once."""
    name = component_name(llm, "llm")
    before = copy.deepcopy(list(messages))
    answer = llm.chat(messages)
    hold(isinstance(answer, str), f"{name}.chat gives a {type(answer).__name__}, not text")
    hold(bool(answer.strip()), f"{name}.chat gives a blank answer")
    hold(list(messages) == before, f"{name} changes the messages")
