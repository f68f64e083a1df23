"""The shape that no training scene holds: drawn only when it is asked for, described, read back, its colours split."""

from __future__ import annotations

import numpy as np
import torch
from lens_shapes.captions import brief, dense, prompt
from lens_shapes.novel import Novel
from lens_shapes.reader import read
from lens_shapes.reading import satisfies
from lens_shapes.render import render
from lens_shapes.scenes import NOVEL, SHAPES, TASKS, content, prompt_facts, sample
from scipy import ndimage

from lens_core.evaluation.run import by_task


def test_no_scene_of_training_or_of_the_benchmark_holds_it():
    rng = np.random.default_rng(1)
    drawn = [sample(rng, split) for split in ("train", "heldout") for _ in range(1500)]
    assert not {t.shape for s in drawn for t in s.things} & set(NOVEL)
    assert not set(NOVEL) & set(SHAPES)
    assert TASKS["novel"] == 0


def test_its_colours_are_split_between_training_and_what_is_kept_back():
    rng = np.random.default_rng(2)
    train = {content(sample(rng, "train", "novel")) for _ in range(200)}
    held = {content(sample(rng, "heldout", "novel")) for _ in range(200)}
    assert not train & held
    assert len(train) + len(held) == 8 * len(NOVEL)


def test_it_is_read_back_through_blur_and_never_taken_for_another():
    rng = np.random.default_rng(3)
    right, taken = 0, 0
    for number in range(200):
        scene = sample(rng, "train", "novel", largest=number % 2 == 0)
        size = ((64, 64), (64, 80), (128, 128))[number % 3]
        image = ndimage.gaussian_filter(render(scene, *size), (0.7, 0.7, 0))
        facts = prompt_facts(scene)
        right += satisfies(read(image), facts)
        for other in SHAPES:
            group = {**facts["groups"][0], "shape": other}
            taken += satisfies(read(image), {**facts, "groups": [group]})
    assert right >= 199
    assert taken == 0


def test_it_is_reported_in_words():
    scene = sample(np.random.default_rng(4), "train", "novel")
    colour = scene.things[0].colour
    assert prompt(scene).endswith(f"{colour} moon")
    assert "moon" in brief(scene, np.random.default_rng(0))
    assert "round bite" in dense(scene, np.random.default_rng(0))


def test_the_benchmark_asks_for_shown_and_for_new_colours_and_takes_nothing_else():
    judge = Novel(Novel.Config(prompts=20))
    prompts = judge.prompts()
    assert prompts == Novel(Novel.Config(prompts=20)).prompts()
    assert {p.task for p in prompts} == set(judge.headline)
    shown, new = ({p.text for p in prompts if p.task == task} for task in judge.headline)
    assert not shown & new
    rng = np.random.default_rng(5)
    images = [render(scene, 64, 64) for scene in judge.scenes()]
    wrong = [render(sample(rng, "train", "colours"), 64, 64) for _ in prompts]
    stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    assert {k: v.mean for k, v in by_task(prompts, judge.score(stack, prompts)).items()} == dict.fromkeys(
        judge.headline, 1.0
    )
    others = torch.from_numpy(np.stack(wrong)).permute(0, 3, 1, 2)
    assert not any(s.value for s in judge.score(others, prompts))
