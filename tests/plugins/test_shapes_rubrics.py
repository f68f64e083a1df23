"""Rubrics about shapes: the same facts as the benchmark's judge, question by question, from pixels."""

from __future__ import annotations

import os
import signal
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from lens_shapes import scoring
from lens_shapes.benchmark import ShapesBenchmark
from lens_shapes.captions import prompt
from lens_shapes.reader import read
from lens_shapes.render import render
from lens_shapes.rubrics import ShapesRubrics, answer, rubrics
from lens_shapes.scenes import TASKS, prompt_facts, sample
from lens_shapes.scoring import score_images

from lens_core.config import decisive
from lens_core.testing import check_reward
from lens_core.types import ConfigError, Prompt


def scene(number: int, task: str | None = None):
    return sample(np.random.default_rng([11, number]), "train", task)


def question(made, number: int = 0) -> Prompt:
    facts = prompt_facts(made)
    return Prompt(prompt(made), number, made.task, {**facts, **rubrics(facts)})


def picture(made) -> torch.Tensor:
    return torch.from_numpy(render(made, 96, 96)).permute(2, 0, 1)


def judge(**options: Any) -> ShapesRubrics:
    return ShapesRubrics(ShapesRubrics.Config(**options))


def test_the_right_picture_has_a_yes_to_every_question():
    made = [scene(i, task) for i, task in enumerate([t for t in TASKS for _ in range(4)])]
    scores = judge().score(torch.stack([picture(m) for m in made]), [question(m, i) for i, m in enumerate(made)])
    assert [s.value for s in scores] == [1.0] * len(made)
    assert all(set(s.components.values()) == {1.0} and len(s.components) >= 3 for s in scores)


def test_all_yes_is_what_the_strict_judge_accepts():
    # every prompt against every picture of the same kinds: the two must never disagree
    made = [scene(i) for i in range(40)]
    prompts = [question(m, i) for i, m in enumerate(made)]
    for shift in (0, 1, 7):
        shown = torch.stack([picture(m) for m in made[shift:] + made[:shift]])
        facts = [all(v for k, v in s.components.items() if k != "g") for s in judge().score(shown, prompts)]
        assert facts == [s.value == 1 for s in score_images(shown, prompts)]
        assert any(facts) == (shift == 0)


def test_the_number_of_processes_makes_no_other_benchmark():
    plain, fast = (decisive(ShapesBenchmark.Config(processes=n)) for n in (1, 8))
    assert plain == fast and plain["split"] == "" and "processes" not in plain
    assert decisive(ShapesBenchmark.Config(extras=True)) != plain


def test_processes_read_as_one_does():
    made = [scene(i) for i in range(10)]
    prompts = [question(m, i) for i, m in enumerate(made)]
    prompts[3] = Prompt("a dream", 3)  # no facts: abstains
    shown = torch.stack([picture(m) for m in made[1:] + made[:1]] + [picture(made[0])])
    prompts.append(prompts[0])
    alone = score_images(shown, prompts, partial=True)
    assert alone == score_images(shown, prompts, partial=True, processes=2)
    assert [s.status for s in alone].count("abstain") == 1 and alone[-1].value == 1.0


def test_readers_outlive_an_interrupt_and_are_replaced_where_they_die():
    made = [scene(i) for i in range(6)]
    prompts = [question(m, i) for i, m in enumerate(made)]
    shown = torch.stack([picture(m) for m in made])
    alone = score_images(shown, prompts)
    assert score_images(shown, prompts, processes=2) == alone
    readers = list(scoring._pool(2)._processes.values())
    for reader in readers:
        os.kill(reader.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    assert score_images(shown, prompts, processes=2) == alone
    assert all(reader.is_alive() for reader in readers)
    os.kill(readers[0].pid, signal.SIGKILL)
    readers[0].join(10)
    assert score_images(shown, prompts, processes=2) == alone
    assert not {r.pid for r in readers} & {r.pid for r in scoring._pool(2)._processes.values()}


def test_the_value_is_the_weighted_mean_of_the_answers():
    made = scene(3, "counting")
    one = question(made)
    short = evolve(made, things=made.things[:-1])
    (score,) = judge().score(picture(short)[None], [one])
    no = [k for k, v in score.components.items() if v == 0]
    assert no and score.value == pytest.approx(1 - len(no) / len(score.components))
    heavy = [{**r, "weight": 5.0} if r["id"] == no[0] else r for r in one.data["rubrics"]]
    (weighed,) = judge().score(picture(short)[None], [evolve(one, data={**one.data, "rubrics": heavy})])
    weight = len(score.components) + 4
    assert weighed.value == pytest.approx(1 - (len(no) + 4) / weight)


def test_the_questions_name_what_the_prompt_asks():
    facts = {"groups": [{"shape": "cross", "count": 2, "colour": "red"}, {"shape": "ring", "count": 1, "colour": None}],
             "relation": "left of", "word": ""}  # fmt: skip
    questions = [r["q"] for r in rubrics(facts)["rubrics"]]
    assert any("number of crosses exactly two" in q for q in questions)
    assert any("red" in q for q in questions) and any("left of" in q for q in questions)
    assert len({r["id"] for r in rubrics(facts)["rubrics"]}) == len(questions) == len(set(questions))
    (word,) = [r["q"] for r in rubrics({**facts, "word": "CAT"})["rubrics"] if r["kind"] == "text"]
    assert '"CAT"' in word


@pytest.mark.parametrize(
    "check",
    [
        None,
        "count_eq",
        {},
        {"op": "smells", "args": {}},
        {"op": ["count_eq"], "args": {}},
        {"op": "count_eq", "args": {"shape": "dog", "n": 1}},
        {"op": "count_eq", "args": {"shape": "ring", "n": 1, "colour": "mauve"}},
        {"op": "count_eq", "args": {"shape": "ring"}},
        {"op": "count_eq"},
        {"op": "lies", "args": {"subject": {"shape": "ring"}, "relation": "behind", "other": {"shape": "star"}}},
        {"op": "lies", "args": {"subject": {}, "relation": "above", "other": {"shape": "star"}}},
    ],
)
def test_a_question_of_another_world_has_no_answer(check):
    reading = read(render(scene(5, "two"), 96, 96))
    assert answer(reading, {"id": "r", "q": "?", "check": check}) is None


def test_too_few_answers_abstain_and_none_never_reads_the_picture():
    one = question(scene(6, "two"))
    strange = [{"id": f"s{i}", "q": "Does it smell?", "weight": 1.0} for i in range(4)]
    mixed = evolve(one, data={**one.data, "rubrics": [*one.data["rubrics"], *strange]})
    image = picture(scene(6, "two"))[None]
    (score,) = judge().score(image, [mixed])
    assert score.status == "abstain" and score.value is None
    (score,) = judge(min_answered=0.3).score(image, [mixed])
    assert score.value == 1.0 and not {s["id"] for s in strange} & score.components.keys()
    (score,) = judge().score(image, [Prompt("a dog", data={"rubrics": strange})])
    assert score.status == "abstain" and not score.components


def test_it_keeps_the_contract_of_rewards():
    prompts = ShapesBenchmark(ShapesBenchmark.Config(prompts=6)).prompts()
    check_reward(judge(), prompts)
    with pytest.raises(ConfigError, match="min_answered: must be at least 0 and at most 1, not"):
        judge(min_answered=1.5)
