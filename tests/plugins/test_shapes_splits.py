"""The splits of rules 2: disjoint in what is asked and in what is shown, by enumeration of the whole world."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, islice, permutations, product
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve
from lens_shapes.benchmark import ShapesBenchmark
from lens_shapes.captions import caption, dense, phrasings, prompt
from lens_shapes.dataset import ShapesDataset
from lens_shapes.facts import label, shown_facts, sub_facts
from lens_shapes.novel import Novel
from lens_shapes.reader import read
from lens_shapes.reading import check_facts
from lens_shapes.render import render
from lens_shapes.scenes import COLOURS, NOVEL, SHAPES, TASKS, Scene, Thing, prompt_facts
from lens_shapes.splits import SPLITS, capacity, colourings, distinct_questions, questions, sample
from lens_shapes.variety import Variety

from lens_core.types import ConfigError

LISTED = tuple(task for task in TASKS if task not in ("words", "word and thing"))
ASKED = ("two", "counting", "colours", "position", "attribution", "words")


def named_facts(question):
    """What a question names, written apart from `splits`: (kind, ...) of its groups, colours, counts and sides."""
    facts, groups = set(), question.groups
    for shape, colour, count in groups:
        facts |= {("is", shape, colour)} if colour else set()
        facts |= {("many", shape, count)} if count > 1 else set()
        facts |= {("many", shape, colour, count)} if count > 1 and colour else set()
    if len(groups) == 2:
        facts.add(("both", frozenset(g[0] for g in groups)))
        if sum(g[2] for g in groups) > 2:
            facts.add(("both many", frozenset((g[0], g[2]) for g in groups)))
        if all(g[1] for g in groups):
            facts.add(("both", frozenset(g[:2] for g in groups)))
        if question.relation:
            facts.add(("lies", groups[0][0], question.relation, groups[1][0]))
            if all(g[1] for g in groups):
                facts.add(("lies", groups[0][:2], question.relation, groups[1][:2]))
    return facts | ({("word", question.word)} if question.word else set())


def seen_facts(scene):
    """What a picture shows, told or not, read from its things one pair at a time; for pictures from 1:2 to 2:1."""
    counts = Counter((t.shape, t.colour) for t in scene.things)
    facts = {("is", *kind) for kind in counts}
    facts |= {("many", s, n) for s, n in Counter(t.shape for t in scene.things).items() if n > 1}
    facts |= {("many", s, c, n) for (s, c), n in counts.items() if n > 1}
    for (one, n), (other, m) in combinations(counts.items(), 2):
        facts |= {("both", frozenset((one[0], other[0]))), ("both", frozenset((one, other)))}
        facts |= {("both many", frozenset(((one[0], n), (other[0], m))))} if n + m > 2 else set()
    for a, b in permutations(scene.things, 2):
        for wide in (0.5, 1.0, 2.0):
            across, down = (b.x - a.x) * wide, b.y - a.y
            side = ("left of" if across > 0 else "") if abs(across) > abs(down) else ("above" if down > 0 else "")
            if side and a.shape != b.shape:
                facts.add(("lies", a.shape, side, b.shape))
                facts.add(("lies", (a.shape, a.colour), side, (b.shape, b.colour)))
    return facts | ({("word", scene.word)} if scene.word else set())


@pytest.fixture(scope="module")
def whole():
    """Every question of every listed task: {split: {task: questions}}."""
    return {split: {task: questions(task, split) for task in LISTED} for split in SPLITS}


def shown_by(whole, split, tasks=LISTED):
    """Every fact that the questions of a split name, in any colours that their scenes may have."""
    facts = set()
    for task in tasks:
        for question in whole[split][task]:
            for colours in colourings(question, split):
                groups = tuple((s, c, n) for (s, _, n), c in zip(question.groups, colours, strict=True))
                facts |= named_facts(evolve(question, groups=groups))
    return facts


@pytest.fixture(scope="module")
def trained(whole):
    return shown_by(whole, "train")


@pytest.fixture(scope="module")
def keys(whole, trained):
    """What each question asks that no training question may show: {split: [(question, its unseen facts)]}."""
    return {
        split: [(q, named_facts(q) - trained) for task in LISTED if task != "single" for q in whole[split][task]]
        for split in SPLITS
    }


def test_every_question_of_select_and_test_asks_for_something_that_no_training_scene_shows(keys):
    for split in ("select", "test"):
        for question, unseen in keys[split]:
            assert unseen, question


def test_select_and_test_share_nothing_unseen(whole, keys):
    unseen = {split: set().union(*(u for _, u in keys[split])) for split in ("select", "test")}
    assert unseen["select"] and unseen["test"] and not unseen["select"] & unseen["test"]
    # nor do the scenes of one show what the other keeps, in any colours
    assert not shown_by(whole, "select") & unseen["test"]
    assert not shown_by(whole, "test") & unseen["select"]


def test_no_text_stands_in_two_splits_but_those_of_single_shapes(whole):
    texts = {}
    for split, task in product(SPLITS, LISTED):
        if task == "single":
            continue
        for question in whole[split][task]:
            things = tuple(Thing(s, c or "red", "small", 0, 0) for s, c, n in question.groups for _ in range(n))
            scene = Scene(task, things, ("white",), relation=question.relation)
            for words in phrasings(scene):
                assert texts.setdefault(words, split) == split, words
    assert len(texts) > 20_000
    assert whole["train"]["single"] == whole["select"]["single"] == whole["test"]["single"]


def test_the_parts_of_what_is_unseen_are_seen_in_training(trained, keys):
    for split in ("select", "test"):
        for question, _ in keys[split]:
            key = question.key()
            for part in sub_facts(key):
                assert label(part) == "train"
            for shape, colour, _ in question.groups:
                assert question.task == "novel" or any(f[:2] == ("is", shape) for f in trained)
                assert not colour or any(f[0] == "is" and f[2] == colour for f in trained)
    for shape in SHAPES:
        assert len([f for f in trained if f[:2] == ("many", shape) and len(f) == 3]) >= 2
        sides = {(f[2], f[1] == shape) for f in trained if f[0] == "lies" and shape in (f[1], f[3])}
        assert len(sides) == 4, shape  # left of something, right of something, above and below
        assert len([1 for f in trained if f[0] == "is" and f[1] == shape]) == 5


def test_the_kept_combinations_are_spread_over_shapes_colours_and_numbers(whole):
    test = whole["test"]
    assert [len(test[task]) for task in ("two", "counting", "colours", "position")] == [8, 10, 16, 16]
    assert Counter(s for q in test["two"] for s, _, _ in q.groups) == dict.fromkeys(SHAPES, 2)
    assert Counter(q.groups[0][0] for q in test["colours"]) == dict.fromkeys(SHAPES, 2)
    assert Counter(q.groups[0][1] for q in test["colours"]) == dict.fromkeys(COLOURS, 2)
    assert Counter(q.groups[0][2] for q in test["counting"]) == dict.fromkeys(range(2, 7), 2)
    assert {q.groups[0][0] for q in test["counting"]} == set(SHAPES)
    assert {q.relation for q in test["position"]} == {"left of", "above"}


@pytest.mark.parametrize("largest", [False, True])
def test_no_scene_of_training_shows_a_kept_fact_whatever_its_task(keys, largest):
    kept = set().union(*(u for split in ("select", "test") for _, u in keys[split]))
    rng = np.random.default_rng(1)
    for number in range(900):
        scene = sample(rng, "train", list(TASKS)[number % len(TASKS)], largest=largest)
        shown = seen_facts(scene)
        assert not shown & kept, scene
        assert all(label(fact) == "train" for fact in shown_facts(scene))
        assert all(label(("word", f[1])) == "train" for f in shown if f[0] == "word")


@pytest.mark.parametrize("split", ["select", "test"])
def test_a_scene_of_select_or_test_shows_its_own_unseen_combination_and_no_other(keys, split):
    other = "test" if split == "select" else "select"
    rng = np.random.default_rng(2)
    foreign = set().union(*(u for _, u in keys[other]))
    for number in range(440):
        scene = sample(rng, split, [t for t in TASKS if t != "single"][number % (len(TASKS) - 1)])
        labels = {label(fact) for fact in shown_facts(scene)}
        assert split in labels and labels <= {"train", split}
        assert not seen_facts(scene) & foreign


def test_facts_are_what_an_independent_count_sees():
    rng = np.random.default_rng(3)
    names = {"colour": "is", "count": "many", "coloured count": "many", "pair": "both", "coloured pair": "both",
             "counted pair": "both many", "relation": "lies", "coloured relation": "lies", "word": "word"}  # fmt: skip
    for _ in range(150):
        scene = sample(rng, "train")
        mine, theirs = shown_facts(scene), seen_facts(scene)
        assert len(mine) == len(theirs)
        assert Counter(names[f[0]] for f in mine) == Counter(f[0] for f in theirs)


def test_training_captions_of_either_length_never_ask_what_test_asks():
    held = {p.text for split in ("select", "test") for p in ShapesBenchmark(
        ShapesBenchmark.Config(prompts=480, tasks=ASKED, split=split, phrasings=5)).prompts()}  # fmt: skip
    config = ShapesDataset.Config(dense_caption_ratio=0.0, images=False)
    captions = {c for b in islice(ShapesDataset(config).batches(0, 1), 60)
            for c in b.captions}  # fmt: skip
    assert len(held) == 2 * 480 * 5 and len(captions) > 1500 and not held & captions


def test_a_dense_caption_of_training_names_no_kept_side(whole):
    rng = np.random.default_rng(4)
    kept = {q.key() for split in ("select", "test") for q in whole[split]["position"]}
    words = {("left of", False): "to the left of", ("left of", True): "to the right of",
             ("above", False): "above", ("above", True): "below"}  # fmt: skip
    for _ in range(400):
        scene = sample(rng, "train", "attribution")
        text = dense(scene, rng)
        looks = [f"the {t.colour} {t.shape}" for t in scene.things]
        for (side, turned), phrase in words.items():
            for a, b in ((0, 1), (1, 0)):
                if f"{looks[a]} is {phrase} {looks[b]}." in text:
                    one, other = (b, a) if turned else (a, b)
                    assert ("relation", scene.things[one].shape, side, scene.things[other].shape) not in kept


@pytest.mark.parametrize("split", SPLITS)
def test_there_are_120_distinct_prompts_a_task_and_all_that_are_asked_differ(split):
    config = ShapesBenchmark.Config(prompts=120 * len(ASKED), tasks=ASKED, split=split)
    prompts = ShapesBenchmark(config).prompts()
    assert all(len({p.text for p in prompts if p.task == task}) == 120 for task in ASKED)
    assert len({p.data["question"] for p in prompts}) == len({p.text for p in prompts}) == 720
    assert all(capacity(task, split) >= 120 for task in TASKS if task != "novel")


def test_a_question_is_asked_in_several_wordings_that_share_its_name():
    once = ShapesBenchmark(ShapesBenchmark.Config(prompts=14)).prompts()
    often = ShapesBenchmark(ShapesBenchmark.Config(prompts=14, phrasings=4)).prompts()
    assert [p.id for p in often] == list(range(56)) and [p.text for p in often[::4]] == [p.text for p in once]
    assert len({p.text for p in often}) == 56 and len({p.data["question"] for p in often}) == 14
    assert all(often[n].data == often[n - n % 4].data for n in range(56))


def test_more_prompts_repeat_no_question_and_begin_with_the_fewer():
    few, many = (distinct_questions("test", "two", count, 5) for count in (8, 200))
    assert many[:8] == few and len(set(many)) == 200
    assert [q.background for q in many[:8]] == [()] * 8 and {len(q.background) for q in many[8:56]} == {1}
    assert len({q.key() for q in many}) == 8


def test_every_benchmark_scene_is_true_of_its_prompt():
    benchmark = ShapesBenchmark(ShapesBenchmark.Config(prompts=132, tasks=tuple(t for t in TASKS if t != "novel")))
    prompts, scenes = benchmark.prompts(), benchmark.scenes()
    for question, scene in zip(prompts, scenes, strict=True):
        assert question.text == prompt(scene) and question.task == scene.task
        facts_read = check_facts(read(render(scene, 96, 96)), question.data)
        assert set(facts_read.values()) == {1.0}, (question.text, facts_read)
        assert ("background" in facts_read) == ("background" in question.text)
    assert len({p.data["question"] for p in prompts}) == 132


def test_a_prompt_that_names_the_background_wants_it_and_its_halves():
    thing = Thing("star", "red", "large", 0.5, 0.5)
    scene = Scene("colours", (thing,), ("white", "brown"), "across", named=True)
    assert prompt(scene) == "a red star on a background with a white top half and a brown bottom half"
    for wrong in (
        evolve(scene, background=("brown", "white")),
        evolve(scene, split="down"),
        evolve(scene, background=("white",), split=""),
        evolve(scene, background=("white", "grey")),
    ):
        facts_read = check_facts(read(render(wrong, 64, 64)), prompt_facts(scene))
        assert {name for name, value in facts_read.items() if not value} == {"background"}
    plain = evolve(scene, background=("mint",), split="")
    assert prompt(plain) == "a red star on a mint background"


def test_a_training_caption_sometimes_names_the_background_and_often_is_the_plain_prompt():
    rng = np.random.default_rng(0)
    scene = sample(rng, "train", "colours")
    captions = [caption(scene, rng) for _ in range(400)]
    assert 60 < sum("background" in words for words in captions) < 140
    assert captions.count(prompt(scene)) > 120 and len(set(captions)) == 10


def test_the_new_shape_has_train_select_and_test_colours():
    assert sum(len(questions("novel", split)) for split in SPLITS) == 8 * len(NOVEL)
    prompts = Novel(Novel.Config(prompts=100)).prompts()
    assert len({p.text for p in prompts}) == 100
    shown, new = ({p.data["fact"] for p in prompts if p.task == task} for task in Novel.headline)
    assert len(shown) == 5 and len(new) == 2 and not shown & new


def test_the_overall_figure_leaves_out_what_cannot_be_held_out():
    assert "single" not in ShapesBenchmark(ShapesBenchmark.Config()).headline
    assert "single" not in Variety(Variety.Config()).headline
    assert ShapesBenchmark(ShapesBenchmark.Config(tasks=("single",), prompts=8)).headline == ("single",)
    assert "single" in ShapesBenchmark(ShapesBenchmark.Config(rules=1)).headline


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ShapesBenchmark.Config(prompts=8000),
            "'single' has 536 distinct prompts in .* 'test', not 1143",
        ),
        (lambda: ShapesBenchmark.Config(prompts=537, tasks=("two",)), "'two' has 536 distinct .* 'test', not 537"),
        (lambda: Novel.Config(prompts=2000), "'novel' has 335 distinct prompts in the split 'train', not 1000"),
        (lambda: Variety.Config(prompts=8000), "has 536 distinct prompts"),
        (lambda: ShapesBenchmark.Config(split="tset"), "no split of rules 2 is called 'tset'.*Did you mean 'test'"),
        (lambda: ShapesBenchmark.Config(split="heldout"), "'heldout' is a split of rules 1"),
        (lambda: ShapesBenchmark.Config(split="select", rules=1), "'select' is a split of rules 2"),
        (lambda: Variety.Config(split="x"), "no split of rules 2 is called 'x'"),
        (lambda: ShapesBenchmark.Config(rules=3), "rules"),
        (lambda: ShapesDataset.Config(rules=0), "rules"),
        (lambda: Novel.Config(rules=7), "rules"),
        (lambda: ShapesBenchmark.Config(phrasings=6), "phrasings"),
        (lambda: ShapesBenchmark.Config(phrasings=0), "phrasings"),
        (lambda: ShapesBenchmark.Config(phrasings=2, rules=1), "rules 1 have one wording"),
        (lambda: ShapesBenchmark.Config(tasks=("two", "two")), "twice"),
    ],
)
def test_what_the_world_does_not_have_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_the_first_rules_are_still_there_for_the_embedded_checkpoints():
    from lens_shapes.scenes import sample as first

    config = ShapesBenchmark.Config(prompts=28, rules=1)
    old = [first(np.random.default_rng([0, n]), "heldout", config.tasks[n % 7]) for n in range(28)]
    assert [p.text for p in ShapesBenchmark(config).prompts()] == [prompt(s) for s in old]
    (batch,) = islice(ShapesDataset(ShapesDataset.Config(batch=4, rules=1, sizes=((64, 64),))).batches(0, 1), 1)
    drawn = [first(np.random.default_rng([0, 0, n]), "train") for n in range(4)]
    assert all(
        (b.permute(1, 2, 0).numpy() == render(s, 64, 64)).all() for b, s in zip(batch.images, drawn, strict=True)
    )


def test_the_page_states_how_many_combinations_stand_behind_the_questions_of_each_task():
    page = (Path(__file__).parents[2] / "docs" / "proving-ground.md").read_text()
    prompts = ShapesBenchmark(ShapesBenchmark.Config(prompts=500)).prompts()
    for task in ("single", *ASKED):
        asks = [p for p in prompts if p.task == task]
        questions, facts = ({p.data[key] for p in asks} for key in ("question", "fact"))
        assert f"| {task} | {len(questions)} | {len(facts)} |" in page
