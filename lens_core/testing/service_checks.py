"""Contract checks of components without weights that judge, answer or rewrite."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens_core.io.images import read_rgb
from lens_core.testing.assertions import component_name, equal, hold, random_tensor, twice
from lens_core.types import (
    GenerationEstimate,
    Message,
    PictureOutcome,
    PictureRequest,
    Prompt,
    Record,
    Refinement,
    Score,
    SystemInfo,
)


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


def check_reasoner(reasoner: Any, requests: Sequence[str] = ("a red barn", "two cats on a roof", "« été »")) -> None:
    """One text or Refinement for each request, in their order, none of them blank; requests that stay as they were."""
    name = component_name(reasoner, "reasoner")
    sent = list(requests)
    answers = list(reasoner.refine(sent))
    hold(sent == list(requests), f"{name} changes the requests")
    hold(len(answers) == len(sent), f"{name}: {len(answers)} answers to {len(sent)} requests")
    for request, answer in zip(sent, answers, strict=True):
        hold(isinstance(answer, str | Refinement), f"{name}: an answer is {answer!r}, not a text or a Refinement")
        text = answer if isinstance(answer, str) else answer.text
        hold(bool(text.strip()), f"{name}: the answer to {request!r} is blank")
        if isinstance(answer, Refinement):
            hold(answer.request == request, f"{name}: the Refinement of {request!r} says {answer.request!r}")
    if hasattr(reasoner, "provenance"):
        facts = dict(reasoner.provenance())
        hold(all(isinstance(v, str) for v in facts.values()), f"{name}.provenance must be texts, not {facts}")


def check_curator(curator: Any, records: Sequence[Record] | None = None) -> None:
    """A number for each record and column, which follows from that record alone, and records that stay as they were."""
    name = component_name(curator, "curator")
    if records is None:
        shades = [np.full((24, 32, 3), shade, np.uint8) for shade in (0, 90, 255)]
        noise = (random_tensor(0, 24, 32, 3) * 64 + 128).clamp(0, 255).to(torch.uint8).numpy()
        records = [Record(b"", pixels, "a brief caption", "a dense caption") for pixels in (*shades, noise)]
    hold(isinstance(curator.version, str) and bool(curator.version), f"{name}.version must be a text")
    hold(len(curator.columns) > 0, f"{name}.columns names no number")
    before = [record.pixels.copy() for record in records]
    whole = _columns(name, curator, records)
    same = all((a == b.pixels).all() for a, b in zip(before, records, strict=True))
    hold(same, f"{name} changes the pictures")
    hold(_alike(whole, _columns(name, curator, records)), f"{name}.score is not the same twice")
    for row, record in enumerate(records):
        alone = _columns(name, curator, [record])
        mine = {column: values[row : row + 1] for column, values in whole.items()}
        hold(_alike(mine, alone), f"{name}: a record's numbers depend on its batch")


def _columns(name: str, curator: Any, records: Sequence[Record]) -> dict[str, list[float]]:
    scores = {column: [float(v) for v in values] for column, values in curator.score(records).items()}
    hold(scores.keys() == set(curator.columns), f"{name}.score has {sorted(scores)}, not {sorted(curator.columns)}")
    for column, values in scores.items():
        hold(len(values) == len(records), f"{name}: {len(values)} numbers of {column} for {len(records)} records")
    return scores


def _alike(a: dict[str, list[float]], b: dict[str, list[float]]) -> bool:
    """Whether all numbers are equal; NaN is equal to itself."""
    return all(np.array_equal(a[column], b[column], equal_nan=True) for column in a)


def check_generator(generator: Any, requests: Sequence[PictureRequest] | None = None) -> None:
    """One outcome for each request, pictures that can be read, in the size that was asked for, and an estimate that
    sends nothing. A generator that says it is `seeded` draws the same picture twice."""
    name = component_name(generator, "generator")
    if requests is None:
        requests = [PictureRequest(p, i, (64, 96), str(i)) for i, p in enumerate(("a red barn", "two cats"))]
    if hasattr(generator, "estimate"):
        estimate = generator.estimate(len(requests), (64, 96))
        hold(isinstance(estimate, GenerationEstimate), f"{name}.estimate gives {estimate!r}, not a GenerationEstimate")
    info = generator.describe()
    hold(isinstance(info, SystemInfo), f"{name}.describe gives {info!r}, not a SystemInfo")
    outcomes = _outcomes(name, generator, requests)
    for request, outcome in outcomes.items():
        if outcome.status == "ok":
            width, height = read_rgb(outcome.image).size
            right = request.size is None or request.size == (height, width)
            hold(right, f"{name}: a picture of {height}x{width} px, not {request.size}")
    if info.seeded:
        again = _outcomes(name, generator, requests)
        same = all(again[request].image == outcome.image for request, outcome in outcomes.items())
        hold(same, f"{name} says that it is seeded, and draws another picture for the same seed")


def _outcomes(name: str, generator: Any, requests: Sequence[PictureRequest]) -> dict[PictureRequest, PictureOutcome]:
    outcomes = list(generator.generate(requests))
    hold(all(isinstance(o, PictureOutcome) for o in outcomes), f"{name}.generate must yield PictureOutcomes")
    answered = {outcome.request: outcome for outcome in outcomes}
    right = len(outcomes) == len(requests) and answered.keys() == set(requests)
    hold(right, f"{name}: {len(outcomes)} outcomes of {len(answered)} requests for {len(requests)}; one each is right")
    return answered


def check_perceiver(perceiver: Any, questions: Sequence[Any] = (None, None)) -> None:
    """A description with model, revision and version, a canary that passes, and one answer in JSON for each picture."""
    name = component_name(perceiver, "perceiver")
    from PIL import Image

    about = dict(perceiver.describe())
    lacks = sorted({"model", "revision", "version"} - about.keys())
    hold(not lacks, f"{name}.describe lacks {', '.join(lacks)}")
    fault = perceiver.canary()
    hold(fault is None, f"{name}: its canary says: {fault}")
    images = [
        Image.new("RGB", (32, 24), colour) for colour, _ in zip(("red", "blue", "white"), questions, strict=False)
    ]
    answers = list(perceiver.perceive(images, list(questions)[: len(images)]))
    hold(len(answers) == len(images), f"{name}: {len(answers)} answers for {len(images)} pictures")
    try:
        json.dumps([about, answers])
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{name}: descriptions and answers must be JSON: {error}") from error
