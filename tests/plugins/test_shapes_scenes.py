"""Scenes, their pictures and their words."""

from __future__ import annotations

import numpy as np
import pytest
from lens_shapes.captions import brief, dense, prompt
from lens_shapes.render import render
from lens_shapes.scenes import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    GENEVAL,
    RICH,
    SHAPES,
    SIZES,
    TASKS,
    Scene,
    Thing,
    content,
    is_in_split,
    prompt_combination,
    relation,
    sample,
)


def scenes(split, count, seed=0, task=None):
    rng = np.random.default_rng(seed)
    return [sample(rng, split, task) for _ in range(count)]


def test_the_same_generator_state_gives_the_same_scene():
    assert scenes("train", 20) == scenes("train", 20)
    assert scenes("train", 20) != scenes("train", 20, seed=1)


def test_train_and_heldout_scenes_share_no_content_and_no_prompt_but_the_single_ones():
    train, held = scenes("train", 4000), [s for task in TASKS for s in scenes("heldout", 100, task=task)]
    assert not {content(s) for s in train} & {content(s) for s in held}
    assert not {prompt_combination(s) for s in train} & {prompt_combination(s) for s in held} - {""}
    unseen = {prompt(s) for s in held if s.task != "single"}
    assert not unseen & {prompt(s) for s in train}


def test_half_kept_scenes_belong_to_neither_split():
    rng = np.random.default_rng(0)
    drawn = [sample(rng, "train", "two") for _ in range(50)]
    assert all(is_in_split(s, "train") and not is_in_split(s, "heldout") for s in drawn)


def test_heldout_single_things_show_every_shape_and_colour_and_counts_two_to_six():
    singles = [s.things[0] for s in scenes("heldout", 400, task="single")]
    assert {t.shape for t in singles} == set(SHAPES)
    assert {t.colour for t in singles} == set(COLOURS)
    assert {len(s.things) for s in scenes("heldout", 200, task="counting")} == {2, 3, 4, 5, 6}


def test_things_keep_apart_and_inside_at_every_aspect_ratio():
    for scene in scenes("train", 500):
        for height, width in ((1.0, 1.0), (1.0, 2.0), (2.0, 1.0)):
            boxes = [(t.x * width, t.y * height, t.radius) for t in scene.things]
            for n, (x, y, r) in enumerate(boxes):
                assert r < x < width - r and r < y < height - r
                assert all(max(abs(x - a), abs(y - b)) > r + c for a, b, c in boxes[:n])


def test_a_word_keeps_its_band_free():
    for scene in scenes("train", 100, task="word and thing"):
        thing = scene.things[0]
        low, high = thing.y - thing.radius, thing.y + thing.radius
        assert low > 7 * CELL + 0.05 if scene.word_at == "top" else high < 1 - 7 * CELL - 0.05
        assert 1 <= len(scene.word) <= 5


@pytest.mark.parametrize("task", ["position", "coloured position", "groups"])
def test_a_relation_is_true_of_the_layout(task):
    for scene in scenes("train", 100, task=task):
        if scene.relation:
            subject = [t for t in scene.things if t.shape == scene.things[0].shape]
            other = [t for t in scene.things if t.shape != scene.things[0].shape]
            assert relation(subject, other) == scene.relation


def test_the_world_has_the_promised_variety():
    drawn = scenes("train", 3000)
    assert len(SHAPES) >= 6 and len(COLOURS) >= 8 and len(SIZES) == 3
    assert {s.task for s in drawn} == {*GENEVAL, "words", *RICH} == set(TASKS) - {"novel"}
    assert {len(s.things) for s in drawn} == set(range(7))
    assert {s.split for s in drawn} == {"", "across", "down"}
    assert {len(s.word) for s in drawn} == set(range(6))
    assert {t.shape for s in drawn for t in s.things} == set(SHAPES)
    assert {b for s in drawn for b in s.background} == set(BACKGROUNDS)


def test_an_unknown_kind_of_scene_is_refused_by_name():
    with pytest.raises(ValueError, match="no kind of scene is called 'three'"):
        sample(np.random.default_rng(0), "train", "three")


def test_a_picture_has_the_asked_size_and_the_palette():
    scene = Scene("colours", (Thing("square", "red", "large", 0.5, 0.5),), ("white",))
    image = render(scene, 96, 160)
    assert image.shape == (96, 160, 3) and image.dtype == np.uint8
    assert tuple(image[48, 80]) == COLOURS["red"] and tuple(image[2, 2]) == BACKGROUNDS["white"]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 2  # the edge is anti-aliased


def test_a_split_background_has_its_colours_in_order():
    across = render(Scene("single", (), ("white", "brown"), "across"), 64, 64)
    down = render(Scene("single", (), ("white", "brown"), "down"), 64, 64)
    assert tuple(across[10, 60]) == tuple(down[60, 10]) == BACKGROUNDS["white"]
    assert tuple(across[60, 10]) == tuple(down[10, 60]) == BACKGROUNDS["brown"]


def test_a_picture_under_64_px_is_refused():
    with pytest.raises(ValueError, match="at least 64 px"):
        render(Scene("single", (), ("white",)), 63, 128)


def test_prompts_are_worded_as_the_benchmark_words_them():
    star, circle = Thing("star", "red", "small", 0.2, 0.5), Thing("circle", "orange", "small", 0.8, 0.5)
    cross = Thing("cross", "blue", "small", 0.5, 0.5)
    assert prompt(Scene("single", (circle,), ("white",))) == "a circle"
    assert prompt(Scene("colours", (circle,), ("white",))) == "an orange circle"
    assert prompt(Scene("two", (circle, star), ("white",))) == "a circle and a star"
    assert prompt(Scene("counting", (cross,) * 3, ("white",))) == "three crosses"
    assert prompt(Scene("attribution", (star, circle), ("white",))) == "a red star and an orange circle"
    assert prompt(Scene("position", (star, circle), ("white",), relation="left of")) == "a star left of a circle"
    assert prompt(Scene("words", (), ("white",), word="CAT", word_at="top")) == 'the word "CAT"'
    groups = Scene("groups", (star, star, circle), ("white",), relation="left of")
    assert prompt(groups) == "two red stars left of an orange circle"


def test_brief_captions_have_several_phrasings_and_often_the_benchmarks_own():
    scene = scenes("train", 1, task="position")[0]
    rng = np.random.default_rng(0)
    captions = [brief(scene, rng) for _ in range(200)]
    assert len(set(captions)) > 5 and 80 < captions.count(prompt(scene)) < 160


def test_dense_captions_have_80_to_140_words_and_109_on_average():
    rng = np.random.default_rng(0)
    lengths = [len(dense(scene, rng).split()) for scene in scenes("train", 1500)]
    assert min(lengths) >= 80 and max(lengths) <= 140 and 104 < np.mean(lengths) < 114


def test_a_dense_caption_tells_every_thing_the_background_and_the_word():
    rng = np.random.default_rng(0)
    for scene in scenes("train", 300):
        words = dense(scene, rng)
        assert all(f"{t.size} {t.colour} {t.shape}" in words for t in scene.things)
        assert all(colour in words for colour in scene.background)
        assert f'"{scene.word}"' in words or not scene.word


def test_a_dense_caption_never_names_what_is_not_there():
    rng = np.random.default_rng(1)
    for scene in scenes("train", 300):
        words = set(dense(scene, rng).replace(".", " ").replace(",", " ").replace(":", " ").split())
        absent = set(COLOURS) - {t.colour for t in scene.things}
        absent |= set(SHAPES) - {t.shape for t in scene.things}
        assert not words & absent


def test_the_vocabulary_is_small_and_lower_case_but_for_words():
    rng = np.random.default_rng(0)
    drawn = scenes("train", 1500)
    text = " ".join(tell(s, rng) for s in drawn for tell in (brief, dense))
    words = set("".join(c if c.isalpha() or c == '"' else " " for c in text).split())
    assert len({w for w in words if '"' not in w}) < 500
    assert all(w == w.lower() for w in words if '"' not in w)


def test_the_largest_things_are_what_their_number_allows() -> None:
    allowed = {1: "large", 2: "large", 3: "medium", 4: "medium", 5: "small", 6: "small"}
    seen = set()
    for number in range(150):
        scene = sample(np.random.default_rng([5, number]), "train", largest=True)
        assert {thing.size for thing in scene.things} <= {allowed[len(scene.things)]} if scene.things else True
        seen.add(len(scene.things))
    assert seen == set(range(7))
    usual = {t.size for n in range(150) for t in sample(np.random.default_rng([5, n]), "train", "single").things}
    assert usual == set(SIZES)
