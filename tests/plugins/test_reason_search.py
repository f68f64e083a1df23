"""The search for a system prompt, on a world in which the right one is known."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import lens_reason
import pytest
import torch
import yaml
from attrs import evolve, frozen
from lens_reason import report
from lens_reason.chat import ChatReasoner
from lens_reason.judging import BudgetReached, Judge, Part, Purse
from lens_reason.recipe import Budget, Search, read_search
from lens_reason.search import Searching, _unseen, run_search
from lens_reason.state import Judgement, SearchFiles
from lens_shapes.editor import ShapesEditor
from lens_shapes.styles import FULL, WORDINGS, style_of, system_prompt

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.cli.options import parse_reasoner
from lens_core.config import ComponentSpec
from lens_core.inference import refinement
from lens_core.inference.pipeline import Result
from lens_core.types import ConfigError, LensError, Message, Prompt, Refinement, Score

PARTS = {"objects", "sizes", "places", "background", "relations", "details"}


class Writer:
    """An llm that writes a word for every part that its system prompt asks for."""

    @frozen
    class Config:
        model: str = "writer"

    def __init__(self, config: Any) -> None:
        pass

    def chat(self, messages):
        style = style_of(messages[0].text)
        wanted = [name for name in sorted(PARTS) if getattr(style, name)]
        return " ".join([messages[1].text.removeprefix("<request>").removesuffix("</request>"), *wanted])


class Words:
    """A benchmark of pictures that show how many parts their prompt names: each part is worth a sixth."""

    headline = ("one", "two")

    @frozen
    class Config:
        split: str = "test"
        prompts: int = 12
        broken: int = 0  # pictures of prompts below this number cannot be judged

    def __init__(self, config: Any) -> None:
        self.config = config

    def prompts(self):
        return [Prompt(f"{self.config.split} {n}", n, ("one", "two")[n % 2]) for n in range(self.config.prompts)]

    def score(self, images, prompts):
        return [
            Score("failed", evidence="broken") if p.id < self.config.broken else Score("ok", int(i[0, 0, 0]) / 6)
            for i, p in zip(images, prompts, strict=True)
        ]


class Fake:
    """A pipeline whose picture is the number of parts in the drawn prompt. Counts what it draws, and may be killed."""

    version, catalog, device = "1", None, "cpu"

    def __init__(self, killed_at: int | None = None) -> None:
        self.drawn: list[str] = []
        self.reasoner: Any = None
        self.killed_at = killed_at

    def use_reasoner(self, reasoner):
        self.reasoner = reasoner

    def __call__(self, prompts, **_):
        if self.killed_at is not None and len(self.drawn) + len(prompts) > self.killed_at:
            raise KeyboardInterrupt
        refined = refinement.refine(self.reasoner, prompts)
        self.drawn += [f"{self.reasoner.system} | {p}" for p in prompts]
        counts = [len(PARTS & set(one.text.split())) for one in refined]
        return Result(
            torch.tensor(counts, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1), (), {}, tuple(refined)
        )


def plugin() -> types.ModuleType:
    module = types.ModuleType("lens_words")

    @hookimpl
    def lens_llms():
        return {"writer": Writer, "editor": ShapesEditor}

    @hookimpl
    def lens_benchmarks():
        return {"words": Words}

    module.lens_llms, module.lens_benchmarks = lens_llms, lens_benchmarks  # type: ignore[attr-defined]
    return module


CATALOG = Catalog.of(plugin(), lens_reason)
RECIPE = Search(
    reasoner=ComponentSpec("chat", {"llm": {"use": "writer"}}),
    benchmark=ComponentSpec("words"),
    dev={"split": "select"},
    heldout={"split": "test", "prompts": 20},
    reflector=ComponentSpec("editor"),
    budget=Budget(pictures=600),
    start="You are a helpful assistant. Be brief.",
    minibatch=4,
    batch_size=5,
)


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    monkeypatch.setattr(Catalog, "installed", staticmethod(lambda: CATALOG))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Catalog, "installed", staticmethod(lambda: CATALOG))
        return search(tmp_path_factory.mktemp("whole"))


def search(folder: Path, recipe: Search = RECIPE, pipeline: Any = None, **options: Any) -> Any:
    return run_search(recipe, folder, catalog=CATALOG, pipeline=pipeline or Fake(), **options)


def test_a_search_finds_the_prompt_that_asks_for_everything(tmp_path):
    pipeline = Fake()
    result = search(tmp_path, pipeline=pipeline)
    assert style_of(result.start.system).phrase and style_of(result.best.system) == FULL
    assert len(pipeline.drawn) == len(set(pipeline.drawn)) <= 600
    assert result.files.pictures == len(pipeline.drawn)
    spec = parse_reasoner(str(tmp_path / "best.txt"))
    assert spec == ComponentSpec("chat", {"llm": {"use": "writer"}, "system": result.best.system})
    report = (tmp_path / "report.md").read_text()
    assert "+1.000 from the start (+1.000 to +1.000)" in report and "within noise" not in report
    data = json.loads((tmp_path / "candidates.json").read_text())
    rows = {row["name"]: row for row in data["candidates"]}
    best = rows[data["best"]]
    assert best["dev_score"] == 1.0 and best["whole"] and best["reason"] and best["parent"] in rows
    assert rows[result.start.name]["parent"] == "" and rows[result.start.name]["pictures"] == 12
    assert (tmp_path / "progress.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("killed_at", [0, 7, 60])
def test_a_killed_search_goes_on_and_draws_and_asks_nothing_twice(tmp_path, whole, killed_at):
    questions = []

    class Counting(ShapesEditor):
        def chat(self, messages):
            questions.append(messages[-1].text)
            return super().chat(messages)

    editor = Counting(ShapesEditor.Config())
    first, second = Fake(killed_at), Fake()
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "killed", pipeline=first, reflector=editor)
    resumed = search(tmp_path / "killed", pipeline=second, reflector=editor)
    assert not set(first.drawn) & set(second.drawn)
    assert len(questions) == len(set(questions))
    assert resumed.candidates == whole.candidates and resumed.best == whole.best
    assert [*first.drawn, *second.drawn] == [f"{s} | {p}" for s, p in _drawn(whole)]


def _drawn(result: Any) -> list[tuple[str, str]]:
    systems = {c.name: c.system for c in result.candidates}
    return [(systems[j.candidate], j.refinement.request) for j in result.files.all_judged()]


@pytest.mark.parametrize("pictures", [52, 60, 100])
def test_the_budget_is_never_exceeded_and_the_end_is_always_paid_for(tmp_path, pictures):
    pipeline = Fake()
    result = search(tmp_path, evolve(RECIPE, budget=Budget(pictures=pictures)), pipeline)
    assert len(pipeline.drawn) <= pictures and "pictures are needed" in result.ended
    assert (tmp_path / "best.txt").is_file() and "held out" in (tmp_path / "report.md").read_text()


def test_calls_and_dollars_end_a_search_too(tmp_path):
    result = search(tmp_path / "calls", evolve(RECIPE, budget=Budget(pictures=600, calls=3)))
    assert len(result.candidates) <= 4 and result.files.spent["calls"] == 3 and result.ended == "all 3 calls are made"

    class Paid(ShapesEditor):
        def __init__(self, config):
            super().__init__(config)
            self.spend = types.SimpleNamespace(calls=0, usd=0.0)

        def chat(self, messages):
            self.spend.calls += 1
            self.spend.usd += 0.5
            return super().chat(messages)

    recipe = evolve(RECIPE, budget=Budget(pictures=600, usd=1.2))
    paid = search(tmp_path / "usd", recipe, reflector=Paid(ShapesEditor.Config()))
    assert paid.files.spent == {"calls": 3.0, "usd": 1.5} and "$1.2 is spent" in paid.ended
    again = search(tmp_path / "usd", recipe, reflector=Paid(ShapesEditor.Config()))
    assert again.files.spent == paid.files.spent and again.best == paid.best


def test_the_calls_of_the_reasoner_are_bounded_within_a_part(tmp_path):
    class Paid(Writer):
        def __init__(self, config):
            self.spend = types.SimpleNamespace(calls=0, usd=0.0)

        def chat(self, messages):
            self.spend.calls += 1
            return super().chat(messages)

    reasoner = ChatReasoner(ChatReasoner.Config(llm=ComponentSpec("writer")))
    reasoner.llm = Paid(Writer.Config())
    pipeline, files = Fake(), SearchFiles(tmp_path, {})
    purse = Purse(Budget(pictures=600, calls=7), files, [reasoner.llm])
    words = Words(Words.Config())
    judge = Judge(RECIPE, pipeline, reasoner, purse, print)
    with pytest.raises(BudgetReached, match="all 7 calls are made"):
        judge.judge("Be brief.", Part("dev", words, words.prompts()), range(12))
    assert reasoner.llm.spend.calls == len(pipeline.drawn) == 5, "one batch, which the budget pays for"


def test_held_out_prompts_that_the_search_sees_are_left_out():
    words = Words(Words.Config())
    seen, rest = words.prompts()[:2], [Prompt(f"other {n}", n) for n in range(10)]
    said = []
    held = _unseen(Part("dev", words, words.prompts()), Part("heldout", words, [*seen, *rest]), said.append)
    assert list(held.prompts) == rest and said == ["2 of 12 held-out prompts are dev prompts too; they are left out"]
    with pytest.raises(ConfigError, match="share 2 of 3 prompts"):
        _unseen(Part("dev", words, words.prompts()), Part("heldout", words, [*seen, rest[0]]), said.append)


def test_a_failed_judgement_is_missing_and_not_zero(tmp_path):
    recipe = evolve(RECIPE, benchmark=ComponentSpec("words", {"broken": 6}))
    result = search(tmp_path, recipe)
    assert style_of(result.best.system) == FULL
    rows = json.loads((tmp_path / "candidates.json").read_text())["candidates"]
    best = next(row for row in rows if row["system"] == result.best.system)
    assert best["dev_score"] == 1.0 and best["missing"] == 6 and best["dev_pictures"] == 12
    assert "| best | 1.000 | 1.000 |" in (tmp_path / "report.md").read_text()


def test_scores_of_other_pictures_choose_nothing(tmp_path):
    """In the control a candidate's scores are those of others'."""
    recipe = evolve(RECIPE, control="shuffled", acceptance="improvement_or_equal", budget=Budget(pictures=150))
    result = search(tmp_path, recipe)
    searching = Searching(recipe, None, result.dev, None, print)  # type: ignore[arg-type]
    searching.judge = types.SimpleNamespace(files=result.files)  # type: ignore[assignment]
    judged = [j for j in result.files.all_judged() if j.part == "dev"]
    for n, one in enumerate(judged):
        others = {j.score.value for j in judged[:n] if j.candidate != one.candidate}
        assert searching._value(one) in (others or {one.score.value})
    assert "Control: shuffled" in (tmp_path / "report.md").read_text()


def test_random_edits_are_judged_on_every_dev_prompt(tmp_path):
    pipeline = Fake()
    result = search(tmp_path, evolve(RECIPE, control="random", budget=Budget(pictures=200)), pipeline)
    rows = json.loads((tmp_path / "candidates.json").read_text())["candidates"]
    judged = [row for row in rows if row["dev_pictures"]]
    assert all(row["whole"] for row in judged) and len(judged) == (200 - 40) // 12
    assert result.best.system in {row["system"] for row in judged}


def test_a_gain_that_may_be_noise_is_said_to_be(tmp_path, whole):
    """Start and best draw the same on half of the prompts, better on some and worse on others."""
    assert report.verdict(evolve(whole, best=whole.start)).startswith("Nothing that was tried")
    assert report.difference(whole.files, whole.start.system, whole.best.system, whole.heldout).value == 1
    files = SearchFiles(tmp_path, {"a": 1})
    for n in range(20):
        for candidate, value in ((whole.start, float(n % 2)), (whole.best, float(n % 3 == 0))):
            files.add_judgement(Judgement(candidate.name, "heldout", n, Refinement("a", "b"), Score("ok", value)))
    gain = report.difference(files, whole.start.system, whole.best.system, whole.heldout)
    assert gain.low < 0 < gain.high and "**within noise**" in report.verdict(evolve(whole, files=files))


def test_torn_and_foreign_lines_are_left_out(tmp_path):
    whole = search(tmp_path)
    path = tmp_path / "judgements.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:20], '{"candidate": 1}', "[]", '{"a', *lines[20:-1], lines[-1][:40]]) + "\n")
    pipeline = Fake()
    again = search(tmp_path, pipeline=pipeline)
    assert again.best == whole.best and len(pipeline.drawn) == 1


def test_another_search_does_not_go_on_in_its_folder(tmp_path):
    search(tmp_path, evolve(RECIPE, budget=Budget(pictures=60)))
    with pytest.raises(ConfigError, match=r"holds another search \(seed differ\)"):
        search(tmp_path, evolve(RECIPE, seed=5))
    search(tmp_path, evolve(RECIPE, budget=Budget(pictures=80)))  # more money goes on


def test_a_reflecting_model_that_fails_is_an_error_and_loses_nothing(tmp_path):
    class Down:
        def chat(self, messages):
            raise LensError("m: HTTP 500")

    with pytest.raises(LensError, match="HTTP 500"):
        search(tmp_path, reflector=Down())
    pipeline = Fake()
    search(tmp_path, pipeline=pipeline)
    assert all(not line.endswith("select 0") or "Be brief" not in line for line in pipeline.drawn)


@pytest.mark.parametrize(
    "answer", ["", "no tags", "<prompt></prompt>", "<prompt>x</prompt", f"<prompt>{'x' * 40_000}</prompt>"]
)
def test_an_answer_without_a_prompt_changes_nothing_and_ends_the_search(tmp_path, answer):
    class Useless:
        def chat(self, messages):
            return answer

    result = search(tmp_path, reflector=Useless())
    assert len(result.candidates) == 1 and result.best == result.start and "were tried before" in result.ended


def test_a_search_checks_its_benchmark_first_and_frees_it_last(tmp_path, monkeypatch):
    def missing(self):
        raise LensError("the detector is not installed")

    monkeypatch.setattr(Words, "check_requirements", missing, raising=False)
    pipeline = Fake()
    with pytest.raises(ConfigError, match="the detector is not installed"):
        search(tmp_path, pipeline=pipeline)
    assert pipeline.drawn == [] and not list(tmp_path.iterdir())
    closed = []
    monkeypatch.setattr(Words, "check_requirements", lambda self: None)
    monkeypatch.setattr(Words, "close", lambda self: closed.append(len(pipeline.drawn)), raising=False)
    search(tmp_path, pipeline=pipeline)
    assert closed and set(closed) == {len(pipeline.drawn)}, "after the last picture, and not between batches"


def test_a_reasoner_without_a_system_prompt_cannot_be_searched(tmp_path):
    class Plain:
        @frozen
        class Config:
            pass

        def __init__(self, config):
            pass

        def refine(self, prompts):
            return list(prompts)

    module = plugin()

    @hookimpl
    def lens_reasoners():
        return {"plain": Plain}

    module.lens_reasoners = lens_reasoners  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="has no system prompt that could be searched"):
        run_search(
            evolve(RECIPE, reasoner=ComponentSpec("plain")), tmp_path, catalog=Catalog.of(module), pipeline=Fake()
        )


# ---- recipes --------------------------------------------------------------------------------------------------------

WRITTEN: dict[str, Any] = {
    "reasoner": {"use": "chat", "llm": "writer"},
    "benchmark": "words",
    "dev": {"split": "select"},
    "heldout": {"split": "test"},
    "reflector": "editor",
    "budget": {"pictures": 100},
}


def write(path: Path, **changes: Any) -> Path:
    data = {k: v for k, v in {**WRITTEN, **changes}.items() if v is not None}
    path.write_text(yaml.safe_dump(data))
    return path


def test_a_recipe_is_read(tmp_path):
    search = read_search(write(tmp_path / "s.yaml"), CATALOG, ["budget.calls=7"])
    assert search.budget == Budget(100, 7) and search.part("heldout").options == {"split": "test"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heldout": None}, "heldout: missing; name the options"),
        ({"budget": {"pictures": 0}}, "pictures: must be at least 1"),
        ({"budget": {"pictures": 100, "usd": 0}}, "usd: must be"),
        ({"budget": None}, "budget"),
        ({"reasoner": "chatt"}, "no reasoner is called 'chatt'"),
        ({"reflector": {"use": "editor", "modle": 1}}, "modle"),
        ({"benchmark": "wordz"}, "no benchmark is called 'wordz'"),
        ({"control": "other"}, "control: must be none, random or shuffled"),
        ({"start": "a", "start_file": "b"}, "both given"),
        ({"start": "x" * 40_000}, "more than 32768 bytes"),
        ({"minibatch": 0}, "minibatch"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_one_line_and_writes_nothing(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        read_search(write(tmp_path / "s.yaml", **changes), CATALOG)
    assert len({p for p in error.value.problems if words.split()[0] in p}) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["s.yaml"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heldout": {"split": "select"}}, "share 12 of 12 prompts"),
        ({"budget": Budget(pictures=30)}, "too small: the start on 12 dev prompts"),
        ({"start": None, "start_file": "/absent.txt"}, "/absent.txt: cannot be read"),
    ],
)
def test_what_cannot_be_searched_is_one_line_and_writes_nothing(tmp_path, changes, words):
    pipeline = Fake()
    with pytest.raises(ConfigError, match=words):
        search(tmp_path / "out", evolve(RECIPE, **changes), pipeline)
    assert not (tmp_path / "out").exists() and not pipeline.drawn


# ---- the editor -----------------------------------------------------------------------------------------------------


def test_the_editor_reads_questions_alone_and_answers_the_same_twice():
    editor = ShapesEditor(ShapesEditor.Config())
    with pytest.raises(LensError, match="reads the questions of lens reason search alone"):
        editor.chat([Message("user", "hello")])
    question = [Message("user", json.dumps({"system_prompt": "Be brief.", "examples": []}))]
    assert editor.chat(question) == editor.chat(question)
    short = json.dumps({"system_prompt": "Be brief.", "examples": [{"drawn": "a star", "score": 0.0}]})
    assert "Be brief." not in editor.chat([Message("user", short)])


def test_system_prompts_ask_for_the_style_that_is_read_from_them():
    import numpy as np
    from lens_shapes.styles import Style, random_style

    for seed in range(200):
        rng = np.random.default_rng(seed)
        style = random_style(rng)
        assert style_of(system_prompt(style, rng)) == style
    assert style_of("Write one sentence.") == Style(sentence=True) and set(WORDINGS) >= PARTS
