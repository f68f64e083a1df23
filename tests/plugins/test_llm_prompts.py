"""Prompt sets `lens-rl/1`: every problem has its line, and a benchmark draws from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lens_llm.prompts import PromptFile, _twins, _words, lint, read, write

from lens_core.types import ConfigError, Score

TEXTS = ("a red cat on a mat", "two green parrots in rain", "an empty café at night", "the word OPEN on a door")


def entry(number: int, text: str | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "schema": "lens-rl/1",
        "prompt_id": number,
        "split": "train",
        "prompt": TEXTS[number] if text is None else text,
        "taxonomy": {"class": "animal"},
        "sizes": [[64, 96]],
        "rubrics": [{"id": f"r{i}", "q": f"Is fact {i} there?", "weight": 1.0} for i in range(10)],
        "global": {"id": "g", "q": "Is it coherent?", "weight": 1.0},
        "provenance": {"generator": "by hand", "license": "CC0"},
        **changes,
    }


def lines(*entries: Any) -> list[str]:
    return [json.dumps(e) for e in entries]


def test_what_was_written_is_read_back(tmp_path: Path):
    path = tmp_path / "set.jsonl"
    entries = [entry(0), entry(2, split="eval", extra={"x": 1})]
    write(path, entries)
    first, second = read(path)
    assert (first.text, first.id, first.task) == (TEXTS[0], 0, "animal")
    assert dict(second.data) == entries[1]
    assert [p.name for p in tmp_path.iterdir()] == ["set.jsonl"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": "lens-rl/2"}, "schema is 'lens-rl/2'"),
        ({"prompt_id": True}, "prompt_id must be a whole number"),
        ({"split": "test"}, "split must be train or eval"),
        ({"prompt": "  "}, "prompt must be text"),
        ({"taxonomy": {}}, "taxonomy.class is missing"),
        ({"provenance": {}}, "provenance is missing"),
        ({"sizes": [[64]]}, "sizes must be a list of [height, width]"),
        ({"rubrics": entry(0)["rubrics"][:9]}, "has 9 rubrics, not 10"),
        ({"global": None}, "global must be"),
        ({"global": {"id": "r3", "q": "Coherent?"}}, "id 'r3' stands 2 times"),
        ({"global": {"id": "g", "q": "is FACT 3 there"}}, "2 rubrics ask the same"),
        ({"global": {"id": "g", "q": "Coherent?", "weight": 0}}, "global.weight must be above 0"),
        ({"global": {"id": "g", "q": "Coherent?", "weight": float("inf")}}, "global.weight must be above 0"),
        ({"global": {"id": "g", "q": ""}}, "global.q must be a question"),
    ],
)
def test_each_flaw_is_told_with_its_line(changes, words):
    assert lint(lines(entry(1), entry(0))) == []
    (problem,) = lint(lines(entry(1), entry(0, **changes)))
    assert problem.startswith("line 2: ") and words in problem


def test_every_problem_is_told_at_once_in_the_order_of_lines(tmp_path: Path):
    bad = [*lines(entry(0, split="x", prompt="")), "", "{", *lines(entry(1), entry(1, TEXTS[2]), [])]
    problems = lint(bad)
    assert [p.partition(":")[0] for p in problems] == ["line 1", "line 1", "line 3", "line 5", "line 6"]
    assert "prompt_id 1 stands in line 4 too" in problems[3]
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(bad), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert [p.removeprefix(f"{path}: ") for p in caught.value.problems] == problems


def test_a_set_with_problems_is_not_written_and_the_old_one_stays(tmp_path: Path):
    path = tmp_path / "set.jsonl"
    write(path, [entry(0)])
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="line 2: split"):
        write(path, [entry(0), entry(1, split="x")])
    assert path.read_bytes() == before


@pytest.mark.parametrize("swapped", [False, True])
def test_overlap_of_train_and_eval_is_found_whatever_the_order(swapped):
    pair = [entry(0, "a dog and a cat"), entry(1, "A cat, and a dog!", split="eval")]
    (problem,) = lint(lines(*(pair[::-1] if swapped else pair)))
    assert "overlaps, across train and eval, line 1" in problem
    (problem,) = lint(lines(pair[0], {**pair[1], "split": "train"}))
    assert "near-duplicate of line 1" in problem
    assert lint(lines(pair[0], entry(1, "a cow and a hen", split="eval"))) == []


@pytest.mark.parametrize("alike", [0.5, 0.8, 1.0])
def test_near_duplicates_are_those_of_all_pairs(alike):
    rng = torch.Generator().manual_seed(0)
    texts = [
        " ".join(f"w{int(w)}" for w in torch.randint(0, 7, (int(n),), generator=rng))
        for n in torch.randint(1, 7, (60,), generator=rng)
    ]
    sets = [set(_words(t)) for t in texts]
    want = [(i, j) for j in range(60) for i in range(j) if len(sets[i] & sets[j]) >= alike * len(sets[i] | sets[j])]
    assert len(want) > 10
    assert _twins(texts, alike) == want


def test_the_benchmark_gives_one_split_and_abstains_without_a_reward(tmp_path: Path):
    path = tmp_path / "set.jsonl"
    write(path, [entry(0), entry(1, split="eval"), entry(2)])
    assert [p.id for p in PromptFile(PromptFile.Config(str(path))).prompts()] == [0, 1, 2]
    held = PromptFile(PromptFile.Config(str(path), split="eval"))
    prompts = held.prompts()
    assert [p.id for p in prompts] == [1]
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert held.score(images, prompts)[0].status == "abstain"

    class Kind:
        def score(self, images: Any, prompts: Any) -> list[Score]:
            return [Score("ok", 0.75) for _ in prompts]

    assert PromptFile(held.config, Kind()).score(images, prompts)[0].value == 0.75


def test_an_empty_split_and_an_absent_file_are_errors(tmp_path: Path):
    path = tmp_path / "set.jsonl"
    write(path, [entry(0)])
    with pytest.raises(ConfigError, match="no prompt of the split 'eval'"):
        PromptFile(PromptFile.Config(str(path), split="eval")).prompts()
    with pytest.raises(ConfigError, match="cannot be read as a prompt set"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="split: must be train or eval, not 'test'"):
        PromptFile.Config(str(path), split="test")
    assert lint([]) == ["line 1: the set is empty"]
