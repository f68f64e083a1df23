"""The reader reads what was drawn, and the judge accepts what was asked and nothing else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from lens_shapes.benchmark import ShapesBenchmark, ShapesReward
from lens_shapes.reader import judge, read, satisfies
from lens_shapes.render import render
from lens_shapes.scenes import COLOURS, GENEVAL, OPPOSITE, SHAPES, Scene, Thing, asked, sample
from scipy import ndimage

from lens_core.types import ConfigError, Prompt

SIZES = ((128, 128), (96, 160), (144, 112))


def scene_of(number):
    return sample(np.random.default_rng([7, number]), "train")


def blurred(image, rng):
    """What an autoencoder does to a picture: a blur of one pixel, a tint and noise."""
    soft = ndimage.gaussian_filter(image.astype(float), (1.0, 1.0, 0.0))
    return np.clip(soft + rng.normal(0, 5, 3) + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)


def right(scene, reading):
    drawn = sorted((t.shape, t.colour, t.size) for t in scene.things)
    seen = sorted((t.shape, t.colour, t.size) for t in reading.things)
    return drawn == seen and scene.word == reading.word and set(scene.background) == set(reading.background)


@pytest.mark.parametrize("soft", [False, True], ids=["sharp", "blurred"])
def test_pictures_are_read_back_right(soft):
    rng = np.random.default_rng(3)
    wrong = []
    for number in range(150):
        scene = scene_of(number)
        image = render(scene, *SIZES[number % 3])
        reading = read(blurred(image, rng) if soft else image)
        if not (right(scene, reading) and satisfies(reading, asked(scene))):
            wrong.append((scene, str(reading)))
    assert not wrong


def test_places_are_read_within_a_pixel():
    scene = Scene("single", (Thing("circle", "blue", "medium", 0.31, 0.7),), ("beige",))
    seen = read(render(scene, 128, 160)).things[0]
    assert abs(seen.x - 0.31) * 160 < 1 and abs(seen.y - 0.7) * 128 < 1 and abs(seen.radius - 0.13) < 0.01


def other(name, names):
    known = list(names)
    return known[(known.index(name) + 1) % len(known)]


def lies(data):
    """The same facts with one of them false, in every way."""
    for n, group in enumerate(data["groups"]):
        for change in ({"shape": other(group["shape"], SHAPES)}, {"count": group["count"] + 1}):
            lie = copy.deepcopy(data)
            lie["groups"][n] |= change
            yield lie
        if group["colour"]:
            lie = copy.deepcopy(data)
            lie["groups"][n]["colour"] = other(group["colour"], COLOURS)
            yield lie
        yield data | {"groups": [g for m, g in enumerate(data["groups"]) if m != n], "relation": ""}
    if data["relation"]:
        yield data | {"relation": OPPOSITE[data["relation"]]}
        turned = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}
        yield data | {"relation": turned[data["relation"]]}
    if data["word"]:
        yield data | {"word": data["word"][:-1] + ("A" if data["word"][-1] != "A" else "B")}
        yield data | {"word": ""}


def test_a_prompt_with_one_false_fact_is_never_accepted():
    tried = 0
    for number in range(100):
        scene = scene_of(number)
        reading, truth = read(render(scene, 128, 128)), asked(scene)
        for lie in lies(truth):
            assert not satisfies(reading, lie), (scene, lie)
            tried += 1
    assert tried > 400


def test_at_most_one_in_a_hundred_mismatched_pairs_is_accepted():
    drawn = [scene_of(n) for n in range(100)]
    readings = [read(render(scene, 128, 128)) for scene in drawn]
    pairs = [(r, s) for i, r in enumerate(readings) for j, s in enumerate(drawn) if i != j]
    accepted = sum(satisfies(reading, asked(scene)) for reading, scene in pairs)
    assert accepted <= 0.01 * len(pairs)


def test_an_extra_thing_fails_the_count_and_nothing_else():
    circle, star = Thing("circle", "red", "medium", 0.25, 0.3), Thing("star", "blue", "medium", 0.7, 0.7)
    asking = asked(Scene("colours", (circle,), ("white",)))
    facts = judge(read(render(Scene("two", (circle, star), ("white",)), 128, 128)), asking)
    assert facts == {"things": 1.0, "counts": 0.0, "colours": 1.0, "word": 1.0}


def test_touching_things_of_two_colours_are_two_things():
    pair = (Thing("square", "red", "large", 0.35, 0.5), Thing("square", "blue", "large", 0.65, 0.5))
    seen = read(render(Scene("two", pair, ("white",)), 128, 128)).things
    assert [t.colour for t in seen] == ["red", "blue"]


@pytest.mark.parametrize("fill", [0, 128, 255])
def test_an_empty_picture_satisfies_no_prompt(fill):
    reading = read(np.full((128, 128, 3), fill, np.uint8))
    assert not any(satisfies(reading, asked(scene_of(n))) for n in range(50))


def test_noise_satisfies_no_prompt():
    reading = read(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    assert not any(satisfies(reading, asked(scene_of(n))) for n in range(50))


def test_the_benchmark_is_spread_over_the_six_tasks_and_words():
    benchmark = ShapesBenchmark(ShapesBenchmark.Config(prompts=70))
    prompts = benchmark.prompts()
    assert prompts == ShapesBenchmark(ShapesBenchmark.Config(prompts=70)).prompts()
    assert all(sum(p.task == task for p in prompts) == 10 for task in (*GENEVAL, "words"))
    assert benchmark.headline == GENEVAL and [p.id for p in prompts] == list(range(70))


def test_the_benchmark_gives_perfect_pictures_one_and_shuffled_ones_almost_nothing():
    drawn = [sample(np.random.default_rng([0, n]), "heldout", t) for n, t in enumerate((*GENEVAL, "words") * 4)]
    benchmark = ShapesBenchmark(ShapesBenchmark.Config(prompts=28))
    images = torch.stack([torch.from_numpy(render(s, 128, 128)).permute(2, 0, 1) for s in drawn])
    prompts = benchmark.prompts()
    assert [s.value for s in benchmark.score(images, prompts)] == [1.0] * 28
    assert sum(s.value for s in benchmark.score(images.roll(1, 0), prompts)) <= 1
    assert "read" in benchmark.score(images[:1], prompts[:1])[0].evidence


def test_the_reward_abstains_from_a_prompt_without_facts():
    reward = ShapesReward(ShapesReward.Config())
    score = reward.score(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [Prompt("a circle")])[0]
    assert score.status == "abstain" and score.value is None


def test_pictures_and_prompts_must_be_equally_many():
    with pytest.raises(ValueError, match="1 pictures cannot answer 0 prompts"):
        ShapesReward(ShapesReward.Config()).score(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [])


@pytest.mark.parametrize("wrong", [{"prompts": 0}, {"seed": -1}, {"split": "test"}])
def test_a_wrong_benchmark_config_is_refused(wrong):
    with pytest.raises(ConfigError):
        ShapesBenchmark.Config(**wrong)
