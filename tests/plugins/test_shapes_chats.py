"""Conversations of the proving ground: styles, system prompts, languages, and what a description keeps."""

from __future__ import annotations

import re

import numpy as np
import pytest
from attrs import evolve
from lens_shapes import splits
from lens_shapes.benchmark import ShapesBenchmark
from lens_shapes.captions import dense, prompt
from lens_shapes.chats import ShapesChats, is_heldout
from lens_shapes.faithful import check
from lens_shapes.languages import COLOURS, LANGUAGES, NOUNS, STEMS, request
from lens_shapes.renaming import COLOUR_WORDS
from lens_shapes.renaming import NOUNS as OTHER_NOUNS
from lens_shapes.scenes import BACKGROUNDS, NOVEL, SHAPES, prompt_facts
from lens_shapes.scenes import COLOURS as PALETTE
from lens_shapes.styles import FULL, PARTS, Style, describe, random_style, style_of, system_prompt

from lens_core.testing.checks import check_dataset
from lens_core.types import ConfigError


def scenes(count: int, *tasks: str):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        yield splits.sample(rng, "train", tasks[seed % len(tasks)] if tasks else None), rng


# ---- styles ---------------------------------------------------------------------------------------------------------


def test_a_description_keeps_what_its_request_names_in_every_style():
    tasks = ("single", "two", "counting", "colours", "position", "attribution", "words", "coloured position")
    for scene, rng in scenes(240, *tasks):
        scene = evolve(scene, named=bool(rng.random() < 0.3))
        style = random_style(rng)
        text = describe(scene, style, rng)
        assert all(check(prompt_facts(scene), text).values()), (style, text)
        if scene.named:
            assert all(name in text for name in scene.background)


def test_descriptions_of_other_scenes_are_told_from_the_right_one():
    pairs = zip(scenes(60, "attribution"), scenes(90, "attribution"), strict=False)
    others = [(a, b, rng) for (a, _), (b, rng) in pairs if prompt_facts(a) != prompt_facts(b)]
    wrong = [all(check(prompt_facts(a), describe(b, FULL, rng)).values()) for a, b, rng in others]
    assert not any(wrong)
    scene, rng = next(scenes(1, "position"))
    text = describe(scene, FULL, rng)
    swapped = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    turned = re.sub("|".join(swapped), lambda m: swapped[m[0]], text)
    assert check(prompt_facts(scene), text)["relations"] and not check(prompt_facts(scene), turned)["relations"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("the picture shows three objects in all: three red stars.", "counts"),
        ("the picture shows two objects in all: two blue stars.", "colours"),
        ("the picture shows two objects in all: two red hearts.", "shapes"),
        ("the picture shows two objects in all: two red stars. the first object is a red star. the second object is a "
         "red star. the third object is a red star.", "counts"),
    ],
)  # fmt: skip
def test_each_kind_of_fault_is_seen(text, kind):
    facts = {"groups": [{"shape": "star", "count": 2, "colour": "red"}], "relation": "", "word": ""}
    assert not check(facts, text)[kind]
    assert all(check(facts, "the picture shows two objects in all: two red stars.").values())


def test_a_word_must_be_spelled_right_where_it_is_spelled():
    facts = {"groups": [], "relation": "", "word": "CAT"}
    head = 'the picture shows one word and nothing else: "CAT". the word "CAT" is written. it has three letters: '
    assert check(facts, f'{head}"C", "A" and "T".')["words"]
    assert not check(facts, f'{head}"C", "O" and "T".')["words"]


def test_everything_is_what_dense_captions_say():
    scene, _ = next(scenes(1))
    assert describe(scene, FULL, np.random.default_rng(3)) == dense(scene, np.random.default_rng(3))


def test_what_a_style_leaves_out_is_not_spoken_of():
    for scene, rng in scenes(60, "two", "counting"):
        text = describe(scene, Style(objects=True), rng)
        assert not re.search(r"small|medium|large|background|left|right|top|bottom|above|below", text)
        assert describe(scene, Style(phrase=True), rng) == prompt(scene)


def test_a_system_prompt_asks_for_the_style_that_is_read_from_it():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        style = random_style(rng)
        assert style_of(system_prompt(style, rng)) == style
    assert style_of("") == Style(phrase=True) and set(PARTS) == {n for n in PARTS if getattr(FULL, n)}


# ---- languages ------------------------------------------------------------------------------------------------------


def test_every_word_of_the_world_has_a_name_in_every_language():
    for language in LANGUAGES[1:]:
        assert set(NOUNS[language]) == {*SHAPES, *NOVEL}
        assert set(STEMS if language == "de" else COLOURS[language]) == {*PALETTE, *BACKGROUNDS}


def facts(relation: str = "", word: str = "", background=None, *groups: tuple[str, int, str | None]):
    rows = [{"shape": s, "count": n, "colour": c} for s, n, c in groups]
    return {"groups": rows, "relation": relation, "word": word, **({"background": background} if background else {})}


@pytest.mark.parametrize(
    ("named", "fr", "de", "es"),
    [
        (facts("", "", None, ("star", 1, "green")), "une étoile verte", "ein grüner Stern", "una estrella verde"),
        (facts("", "", None, ("diamond", 3, "red")), "trois losanges rouges", "drei rote Rauten", "tres rombos rojos"),
        (
            facts("left of", "", None, ("heart", 1, None), ("circle", 1, "blue")),
            "un cœur à gauche d'un cercle bleu", "ein Herz links von einem blauen Kreis",
            "un corazón a la izquierda de un círculo azul",
        ),
        (
            facts("above", "", None, ("cross", 1, "purple"), ("star", 2, "pink")),
            "une croix violette au-dessus de deux étoiles roses", "ein violettes Kreuz über zwei rosafarbenen Sternen",
            "una cruz morada encima de dos estrellas rosas",
        ),
        (facts("", "CAT"), 'le mot "CAT"', 'das Wort "CAT"', 'la palabra "CAT"'),
        (
            facts("", "", {"names": ["white"], "halves": ""}, ("ring", 2, None)), "deux anneaux sur un fond blanc",
            "zwei Ringe auf weißem Hintergrund", "dos anillos sobre un fondo blanco",
        ),
        (
            facts("", "", {"names": ["grey", "brown"], "halves": "across"}, ("square", 1, None)),
            "un carré sur un fond avec une moitié supérieure grise et une moitié inférieure marron",
            "ein Quadrat auf einem Hintergrund mit einer grauen oberen Hälfte und einer braunen unteren Hälfte",
            "un cuadrado sobre un fondo con una mitad superior gris y una mitad inferior marrón",
        ),
    ],
)  # fmt: skip
def test_requests_agree_in_gender_number_and_case(named, fr, de, es):
    assert (request(named, "fr"), request(named, "de"), request(named, "es")) == (fr, de, es)


def test_the_benchmark_asks_for_the_same_facts_in_every_language():
    english, french = (ShapesBenchmark(ShapesBenchmark.Config(prompts=21, language=name)) for name in ("en", "fr"))
    assert [p.data for p in english.prompts()] == [p.data for p in french.prompts()]
    assert not {p.text for p in english.prompts()} & {p.text for p in french.prompts() if p.task != "words"}
    with pytest.raises(ConfigError, match="only brief prompts in one wording"):
        ShapesBenchmark.Config(language="de", dense_prompts=True)
    with pytest.raises(ConfigError, match="language"):
        ShapesBenchmark.Config(language="it")


# ---- the dataset ----------------------------------------------------------------------------------------------------


def test_the_dataset_goes_on_where_it_stopped():
    check_dataset(lambda: ShapesChats(ShapesChats.Config(batch=4, seed=3, pool_size=8)))


def test_a_batch_shares_its_system_prompt_and_ranks_share_a_batch():
    def batch(rank: int, world: int):
        return next(ShapesChats(ShapesChats.Config(batch=8, seed=5)).batches(rank, world)).chats

    whole = batch(0, 1)
    assert (*batch(0, 2), *batch(1, 2)) == whole
    assert len({turns[0].text for turns in whole}) == 1 and len({turns[1].text for turns in whole}) > 4
    assert [m.role for m in whole[0]] == ["system", "user", "assistant"]


def test_requests_are_of_scenes_that_may_be_trained_on():
    dataset = ShapesChats(ShapesChats.Config(batch=64, translated=0.0, intrusions=0.0, seed=1))
    heldout = {p.text for p in ShapesBenchmark(ShapesBenchmark.Config(prompts=400)).prompts() if p.task != "single"}
    requests = {dataset.chat(n, row)[1].text for n in range(20) for row in range(8)}
    assert requests and not requests & heldout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"request": "no place"}, "must hold {} once"),
        ({"tasks": {"two": 0.0}}, "tasks has no positive weight"),
        ({"styles": {"full": 0.0}}, "styles has no positive weight"),
        ({"translated": 2.0}, "translated"),
        ({"policies": [" "]}, "policies"),
    ],
)
def test_a_wrong_config_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        ShapesChats.Config(**options)
    with pytest.raises(ConfigError, match="no equal shares for 3 ranks"):
        next(ShapesChats(ShapesChats.Config(batch=8)).batches(0, 3))


# ---- what the small reasoner is trained on --------------------------------------------------------------------------


def chats_of(**options) -> ShapesChats:
    return ShapesChats(ShapesChats.Config(seed=3, **options))


def test_a_request_is_of_training_or_held_out_whatever_its_words():
    seen = {}
    for part in ("train", "heldout"):
        chats = chats_of(requests=part, split="all", tasks={"two": 1.0, "position": 1.0})
        seen[part] = {prompt(chats.question(0, row)[0]) for row in range(150)}
    assert not seen["train"] & seen["heldout"] and min(map(len, seen.values())) > 10
    free = chats_of(split="all", tasks={"two": 1.0, "position": 1.0})
    shares = [is_heldout(free.question(0, row)[0]) for row in range(400)]
    assert 0.03 < sum(shares) / len(shares) < 0.25


def test_scenes_of_all_splits_hold_pairs_that_training_leaves_out():
    def pairs(split: str) -> set[frozenset[str]]:
        chats = chats_of(split=split, tasks={"two": 1.0})
        return {frozenset(t.shape for t in chats.question(0, row)[0].things) for row in range(300)}

    train, every = pairs("train"), pairs("all")
    assert train < every and len(every) == 28


@pytest.mark.parametrize("row", range(40))
def test_a_relation_is_stated_from_the_side_of_the_request(row):
    chats = chats_of(tasks={"coloured position": 1.0}, translated=0.0, intrusions=0.0, styles={"full": 1.0})
    scene, request_, _ = chats.question(0, row)
    answer = chats.chat(0, row)[-1].text
    first, second = sorted(scene.things, key=lambda thing: request_.lower().find(f"{thing.colour} {thing.shape}"))
    stated = re.search(r"the (\w+ \w+) is (?:to the )?(?:left of|right of|above|below) the (\w+ \w+)", answer)
    assert stated and stated.groups() == (f"{first.colour} {first.shape}", f"{second.colour} {second.shape}")
    assert check(prompt_facts(scene), answer)["relations"]


def test_renamed_conversations_call_a_thing_the_same_in_request_and_answer():
    chats = chats_of(renamed=1.0, translated=0.0, intrusions=0.0, tasks={"attribution": 1.0}, styles={"full": 1.0})
    new = 0
    for row in range(40):
        turns = chats.chat(0, row)
        answer = turns[-1].text
        words = set(re.findall(r"[a-z]+", turns[1].text)) & {*OTHER_NOUNS, *COLOUR_WORDS}
        assert all(re.search(rf"\b{word}\b", answer) for word in words)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", answer)
        new += bool(words)
    assert new > 30
