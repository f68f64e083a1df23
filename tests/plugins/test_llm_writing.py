"""Prompt sets written by a language model: what is asked, what is refused, and going on after a stop."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from lens_llm.prompts import read
from lens_llm.taxonomy import ASPECTS, CLASSES, Taxonomy, read_taxonomy
from lens_llm.writing import GLOBAL, compose, flaw, prompt_requests

from lens_core.io.locks import LockedError
from lens_core.recipe import ComponentSpec, structure
from lens_core.types import ConfigError, LensError

ITEMS = {"animal": {"bird": ["parrot", "heron", "wren"], "fish": ["carp"]}, "text": {"sign": ["shop", "road"]}}


def taxonomy(**changes: Any) -> Taxonomy:
    plain = {"llm": "openai", "license": "CC0", "classes": ITEMS, "rubrics": 3, "eval": 0.3, **changes}
    return structure(Taxonomy, plain)


class Writer:
    """Answers like a language model would; `fails` are items that it cannot write about, `most` calls that it takes."""

    def __init__(self, fails: Sequence[str] = (), repeats: bool = False) -> None:
        self.fails, self.repeats = fails, repeats
        self.questions: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def chat(self, messages: Any, schema: Any = None, check: Callable[[Any], str | None] | None = None) -> Any:
        question = json.loads(messages[-1].text)
        with self.lock:
            self.questions.append(question)
        if "item" in question:
            if question["item"] in self.fails:
                raise LensError("the endpoint is away")
            words = "one and the same" if self.repeats else f"{question['item']} {' '.join(question['aspects'])}"
            answer: dict[str, Any] = {"prompt": f" a {words} {question['number']} "}
        else:
            several = [{"kind": "counting", "q": f"Is fact {i} there?"} for i in range(question["how_many"])]
            answer = {"rubrics": several}
        assert check is None or check(answer) is None
        return answer

    def map(self, task: Callable[[Any], Any], things: Sequence[Any]) -> list[Any]:
        results = []
        for thing in things:
            try:
                results.append(task(thing))
            except LensError as error:
                results.append(error)
        return results


def test_a_set_has_a_prompt_and_its_rubrics_for_every_item(tmp_path: Path):
    out = tmp_path / "set.jsonl"
    llm = Writer()
    assert compose(llm, taxonomy(sizes=[[64, 96]]), out) == 6
    prompts = read(out, rubrics=3)
    assert sorted(p.data["taxonomy"]["item"] for p in prompts) == ["carp", "heron", "parrot", "road", "shop", "wren"]
    assert all(len(p.data["rubrics"]) == 3 and p.data["global"] == GLOBAL for p in prompts)
    assert all(p.data["sizes"] == [[64, 96]] and p.data["provenance"]["license"] == "CC0" for p in prompts)
    assert all(1 <= len(p.data["taxonomy"]["aspects"]) <= 4 and p.text == p.text.strip() for p in prompts)
    assert len(llm.questions) == 2 * 6
    assert [p.name for p in tmp_path.iterdir()] == ["set.jsonl"]


def test_requests_do_not_change_when_a_taxonomy_grows():
    before = {o.id: o for o in prompt_requests(taxonomy())}
    more = {
        **ITEMS,
        "plant": {"tree": ["oak"]},
        "animal": {**ITEMS["animal"], "bird": ["owl", *ITEMS["animal"]["bird"]]},
    }
    after = {o.id: o for o in prompt_requests(taxonomy(classes=more))}
    assert len(after) == len(before) + 2
    assert all(after[key] == order for key, order in before.items())
    assert not before.keys() & {o.id for o in prompt_requests(taxonomy(seed=1))}


def test_every_prompt_of_an_item_is_of_its_split_and_the_share_is_about_right():
    many = {"a": {"b": [f"item {i}" for i in range(400)]}}
    requests = list(prompt_requests(taxonomy(classes=many, prompts_per_item=2, eval=0.25)))
    split = {}
    for order in requests:
        assert split.setdefault(order.taxonomy["item"], order.split) == order.split
    assert 70 < Counter(split.values())["eval"] < 130  # 100, plus or minus three and a half standard deviations


def test_a_stopped_set_goes_on_without_asking_again_even_after_half_a_line(tmp_path: Path):
    out, partial = tmp_path / "set.jsonl", tmp_path / "set.jsonl.partial"
    broken = Writer(fails=["carp"])
    with pytest.raises(LensError, match=r"1 prompts could not be written \(the endpoint is away\); 3 of 6 are kept"):
        compose(broken, taxonomy(), out)
    assert not out.exists() and len(partial.read_text().splitlines()) == 1 + 3
    with partial.open("a") as file:
        file.write('{"schema": "lens-rl/1", "prompt')  # as if killed while writing
    said: list[str] = []
    second = Writer()
    assert compose(second, taxonomy(), out, log=said.append) == 6
    assert said[0] == "3 of 6 prompts were written before"
    assert {q["item"] for q in second.questions if "item" in q} == {"carp", "shop", "road"}
    assert not partial.exists()
    whole = tmp_path / "whole.jsonl"
    compose(Writer(), taxonomy(), whole)
    assert whole.read_text() == out.read_text()


def test_a_partial_file_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "set.jsonl.partial").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="line 1 is not an entry"):
        compose(Writer(), taxonomy(), tmp_path / "set.jsonl")


@pytest.mark.parametrize(
    "changes",
    [{"rubrics": 4}, {"seed": 1}, {"classes": {"a": {"b": ["wren"]}}}, {"license": "MIT"}, {"sizes": [[64, 64]]}],
    ids=str,
)  # fmt: skip
def test_a_set_begun_with_another_taxonomy_is_refused_before_anything_is_paid_for(tmp_path: Path, changes):
    out, partial = tmp_path / "set.jsonl", tmp_path / "set.jsonl.partial"
    with pytest.raises(LensError, match="3 of 6 are kept"):
        compose(Writer(fails=["carp"]), taxonomy(), out)
    before, llm = partial.read_bytes(), Writer()
    with pytest.raises(ConfigError, match="begun with another taxonomy"):
        compose(llm, taxonomy(**changes), out)
    assert llm.questions == [] and partial.read_bytes() == before
    cheaper = taxonomy(llm={"use": "openai", "model": "other", "max_usd": 5})  # who writes may change on the way
    assert compose(Writer(), cheaper, out) == 6


def test_two_who_write_one_set_do_not_pay_twice(tmp_path: Path):
    out, second = tmp_path / "set.jsonl", Writer()

    class First(Writer):
        def map(self, task: Callable[[Any], Any], things: Sequence[Any]) -> list[Any]:
            with pytest.raises(LockedError, match="prompt set"):
                compose(second, taxonomy(), out)
            assert compose(Writer(), taxonomy(), tmp_path / "other.jsonl") == 6  # beside it all is free
            return super().map(task, things)

    assert compose(First(), taxonomy(), out) == 6
    assert second.questions == [] and sorted(p.name for p in tmp_path.iterdir()) == ["other.jsonl", "set.jsonl"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda line: line.replace("Is fact 1", "Is fact 0"),
        lambda line: line.replace('"r01"', '"a b"'),
        lambda line: "[" * 100_000,
        lambda line: "5",
        lambda line: line.replace('"weight": 1.0', '"weight": NaN'),
    ],
)
def test_an_entry_that_the_set_could_not_take_is_refused_before_anything_is_paid_for(tmp_path: Path, spoil):
    out, partial = tmp_path / "set.jsonl", tmp_path / "set.jsonl.partial"
    with pytest.raises(LensError, match="3 of 6 are kept"):
        compose(Writer(fails=["carp"]), taxonomy(), out)
    rows = partial.read_text().split("\n")
    rows[2] = spoil(rows[2])
    partial.write_text("\n".join(rows))
    llm = Writer()
    with pytest.raises(ConfigError, match="line 3 is not an entry"):
        compose(llm, taxonomy(), out)
    assert llm.questions == []


def test_a_prompt_that_holds_a_line_separator_is_gone_on_with(tmp_path: Path):
    class Separated(Writer):
        def chat(self, messages: Any, schema: Any = None, check: Any = None) -> Any:
            answer = super().chat(messages, schema, check)
            return {"prompt": answer["prompt"].replace(" a ", "a\u2028\x85")} if "prompt" in answer else answer

    out = tmp_path / "set.jsonl"
    with pytest.raises(LensError, match="3 of 6 are kept"):
        compose(Separated(fails=["carp"]), taxonomy(), out)
    assert compose(Separated(), taxonomy(), out) == 6
    assert all("\u2028" in p.text for p in read(out, rubrics=3))


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path):
    (tmp_path / "set.jsonl.partial").symlink_to("/dev/full")
    with pytest.raises(LensError, match=r"set\.jsonl\.partial: cannot be written \(No space left"):
        compose(Writer(), taxonomy(), tmp_path / "set.jsonl")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts_per_item": 10**7}, "1,000,000 prompts"),
        ({"rubrics": 500}, "rubrics"),
        ({"sizes": [[0, 64]]}, "sizes"),
        ({"classes": {"a": {"b": ["x" * 500]}}}, "characters"),
        ({"classes": {"a\x00": {"b": ["c"]}}}, "control character"),
    ],
)
def test_a_taxonomy_whose_set_would_be_refused_is_refused_first(changes, words):
    with pytest.raises(ConfigError, match=words):
        taxonomy(**changes)


def test_near_duplicates_are_left_out_and_cost_eval_its_prompt(tmp_path: Path):
    out = tmp_path / "set.jsonl"
    count = compose(Writer(repeats=True), taxonomy(), out, similarity_threshold=0.5)
    assert count == 1 and read(out, rubrics=3, similarity_threshold=0.5)[0].data["split"] == "train"


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        (["Is it red?"], "there must be 2 rubrics, not 1"),
        (["Is it red?", "It is red."], "one question"),
        (["Is it red?", "Is it red? Is it big?"], "one question"),
        (["Is it red?", "Is it " + "very " * 30 + "red?"], "at most 30 words"),
        (["Is it red?", "is it RED?"], "two rubrics ask the same"),
        (["Is it red?", "Is it big?"], None),
    ],
)
def test_questions_are_checked_before_they_are_taken(questions, words):
    problem = flaw(questions, 2)
    assert problem is None if words is None else words in problem


def test_a_taxonomy_tells_all_its_problems_with_their_paths(tmp_path: Path):
    path = tmp_path / "t.yaml"
    path.write_text("llm: openai\nlicense: ''\nclasses: {a: {b: 3}}\nrubrics: 0\neval: 1\n")
    with pytest.raises(ConfigError) as caught:
        read_taxonomy(path)
    problems = "\n".join(caught.value.problems)
    for words in (
        "classes",
        "license: must be text",
        "rubrics: must be at least 1",
        "eval: must be at least 0 and below 1",
    ):
        assert words in problems
    assert all(p.startswith(str(path)) for p in caught.value.problems)
    path.write_text("llm: openai\nlicense: CC0\nclasses: {a: {b: []}}\n")
    with pytest.raises(ConfigError, match="classes holds no item"):
        read_taxonomy(path)
    path.write_text("licence: CC0\nllm: openai\nlicense: CC0\nclasses: {a: {b: [c]}}\n")
    with pytest.raises(ConfigError, match=r"licence: unknown\. Did you mean 'license'"):
        read_taxonomy(path)
    path.write_text("llm: openai\nlicense: CC0\nclasses: {a: {b: [c]}}\n")
    assert read_taxonomy(path).llm == ComponentSpec("openai")


@pytest.mark.parametrize("name", ["overall", "pooled", "all pictures", "a\nb", "a\tb"])
def test_a_class_that_no_prompt_set_may_have_is_refused_before_anything_is_paid(name: str):
    with pytest.raises(ConfigError, match=r"the class .* must be one line of text, and none of overall, all pictures"):
        taxonomy(classes={name: {"b": ["c"]}})


def test_a_class_with_a_no_break_space_is_written_and_read_back(tmp_path: Path):
    """As French has before a colon."""
    name = "text\u00a0art"
    compose(Writer(), taxonomy(classes={name: {"b": ["c", "d"]}}), tmp_path / "x.jsonl")
    assert {prompt.task for prompt in read(tmp_path / "x.jsonl", rubrics=3)} == {name}


def test_an_item_named_twice_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="names an item twice"):
        compose(Writer(), taxonomy(classes={"a": {"b": ["c", "c"]}}), tmp_path / "x.jsonl")


def test_without_classes_the_taxonomy_is_the_papers(tmp_path: Path):
    path = tmp_path / "t.yaml"
    path.write_text("llm: openai\nlicense: CC0\nprompts_per_item: 20\n")
    plan = read_taxonomy(path)
    assert plan.classes == CLASSES and len(CLASSES) == 10 and plan.aspects == ASPECTS and len(ASPECTS) == 5
    drawn = [len(request.taxonomy["aspects"]) for request in prompt_requests(plan)]
    assert set(drawn) == {1, 2, 3, 4} and len(drawn) == 20 * sum(len(i) for c in CLASSES.values() for i in c.values())
    share = Counter(drawn)  # each number of aspects as likely as the others
    assert all(abs(share[n] / len(drawn) - 0.25) < 0.05 for n in share)
