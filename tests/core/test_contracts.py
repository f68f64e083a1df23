"""What a plugin's benchmark or generator wrongly gives to a benchmark run is one line that names the component."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import frozen
from stage_worker import CATALOG, Brightness, Dots, png, run

from lens_core.evaluation import cost
from lens_core.evaluation import run as evaluation
from lens_core.evaluation.bench import BenchmarkRequest
from lens_core.evaluation.comparison import compare, read
from lens_core.recipe import ComponentSpec
from lens_core.types import (
    ConfigError,
    GenerationEstimate,
    LensError,
    PictureOutcome,
    PluginError,
    Prompt,
    Score,
    SystemInfo,
)

HALF = "\udcff"  # half a character, as Python reads a file name that is not UTF-8


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Brightness, "images_per_prompt", 1)


def answering(**fields: Any) -> Callable[..., Any]:
    """A `generate` whose outcomes have these fields."""
    return lambda self, requests: [PictureOutcome(r, **{"status": "ok", "image": png(9), **fields}) for r in requests]


def describing(*fields: Any, **more: Any) -> Callable[..., Any]:
    return lambda self: SystemInfo(*fields, **more)


def perceiving(line: Any) -> Callable[..., Any]:
    return lambda self, pictures, folder, log: [[line] for _ in pictures]


def refusal(tmp_path: Path) -> str:
    with pytest.raises(PluginError) as caught:
        run(tmp_path / "run", words=("a", "b"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seconds": None}, "as seconds, None; the seconds of an outcome must be a number of at least 0"),
        ({"seconds": float("nan")}, "as seconds, nan"),
        ({"usd": -1.0}, "as usd, -1.0"),
        ({"usd": True}, "as usd, True"),
        ({"image": "a.png"}, "str; the image of an outcome must be bytes"),
        ({"image": bytearray(b"x")}, "bytearray; the image of an outcome must be bytes"),
        ({"sent_prompt": 3}, "int; the sent_prompt of an outcome must be a text or None"),
        ({"facts": None}, "facts that are no mapping of what JSON has"),
        ({"facts": {"a": np.int64(2)}}, "facts that are no mapping of what JSON has (Object of type int64"),
        ({"status": "failed", "image": b"", "reason": ValueError("x")}, "ValueError; the reason of an outcome"),
    ],
)
def test_an_outcome_that_cannot_be_recorded_names_its_generator(
    fields: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dots, "generate", answering(**fields))
    message = refusal(tmp_path)
    assert message.startswith("stage_worker:dots.generate yielded") and words in message


def test_an_outcome_without_a_request_names_its_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dots, "generate", lambda self, requests: [PictureOutcome(None, "ok", png(1))])  # type: ignore[arg-type]
    assert refusal(tmp_path).startswith("stage_worker:dots.generate yielded NoneType; the request of an outcome must")


@pytest.mark.parametrize(
    ("describe", "words"),
    [
        (describing("a\nb"), "and revision a line of text, not 'a\\nb' and ''"),
        (describing(HALF), "name must be a line of text"),
        (describing("a", None), "revision a line of text"),
        (describing("a", seeded="no"), "seeded must be True or False"),
        (describing("a", settings=None), "settings must be a mapping of what JSON has (they are None)"),
        (describing("a", settings={"x": Path("x")}), "settings must be a mapping of what JSON has (Object of type"),
        (describing("a", settings={"x": float("nan")}), "settings must be a mapping of what JSON has"),
        (describing("a", settings={"steps": "20"}), "settings.steps must be a whole number or None, not '20'"),
        (describing("a", settings={"guidance_scale": "3"}), "settings.guidance_scale must be a number or None"),
        (
            describing("a", settings={"prompts": ["raw"]}),
            "settings.prompts must be a line of text or None, not ['raw']",
        ),
    ],
)
def test_a_system_that_no_report_can_name_is_refused_before_anything_is_drawn(
    describe: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dots, "describe", describe)
    message = refusal(tmp_path)
    assert message.startswith("stage_worker:dots.describe returned a SystemInfo that cannot be recorded: ")
    assert words in message and not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("cls", "name", "value", "words"),
    [
        (Dots, "most_failures", "x", "dots.most_failures is 'x'; it must be a whole number of at least 1, or None"),
        (Dots, "most_failures", 0, "dots.most_failures is 0"),
        (Dots, "open", lambda self, folder: 1 / 0, "dots.open raised ZeroDivisionError"),
        (Dots, "close", lambda self: 1 / 0, "dots.close raised ZeroDivisionError"),
        (Brightness, "images_per_prompt", None, "brightness.images_per_prompt is None; it must be a whole number"),
        (Brightness, "images_per_prompt", True, "brightness.images_per_prompt is True"),
        (Brightness, "images_per_prompt", 0, "brightness.images_per_prompt is 0"),
        (Brightness, "size", 512, "brightness.size is int; it must be (height, width) in px"),
        (Brightness, "size", (512,), "brightness.size is tuple of int; it must be (height, width) in px"),
        (Brightness, "size", (512, -1), "brightness.size is -1"),
        (Brightness, "headline", ("even", "even"), "brightness.headline names a task twice, even, even"),
        (Brightness, "decide", lambda self, path: None, "brightness has decide and lacks perceive and references"),
        (Brightness, "prompts", lambda self: [Prompt("a", task="x\ny")], "as a task, 'x\\ny'; a task must be one"),
        (Brightness, "prompts", lambda self: [Prompt("a", task="pooled")], "none of overall, all pictures, pooled"),
        (Brightness, "prompts", lambda self: [Prompt(HALF)], "a prompt must be a text that UTF-8 can hold"),
        (Brightness, "prompts", lambda self: [Prompt("a", data={"question": HALF})], "gave, as data, dict"),
    ],
)
def test_what_a_component_says_of_itself_is_checked(
    cls: Any, name: str, value: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cls, name, value, raising=False)
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    ("line", "references", "decided", "words"),
    [
        ({"x": np.float32(1)}, [{}], None, "perceive returned lines that are no JSON (Object of type float32"),
        ({"x": float("nan")}, [{}], None, "perceive returned lines that are no JSON"),
        ("line", [{}], None, "perceive returned list of list; it must return a list of lines"),
        ({}, None, None, "references returned NoneType; it must return a list of mappings"),
        ({}, [{}], None, "decide returned NoneType; it must return a Decision"),
        ({}, [{"x": np.float32(1)}], None, "references returned lines that are no JSON (Object of type float32"),
        ({}, [{"bench": ["x"]}], None, "references returned, as bench, ['x']; it must be a text"),
        ({"bench": ["x"]}, [{}], None, "perceive returned, as bench, ['x']; it must be a text"),
        ({"x": HALF}, [{}], None, "decide returned NoneType; it must return a Decision"),
        ({"bench": 2}, [{"bench": 1}, {"bench": 2}], None, "decide returned NoneType; it must return a Decision"),
    ],
)
def test_a_benchmark_that_perceives_and_decides_is_held_to_its_contract(
    line: Any, references: Any, decided: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Brightness, "perceive", perceiving(line), raising=False)
    monkeypatch.setattr(Brightness, "references", lambda self, prompt: references, raising=False)
    monkeypatch.setattr(Brightness, "decide", lambda self, path: decided, raising=False)
    assert refusal(tmp_path).startswith(f"stage_worker:brightness.{words}")


@pytest.mark.parametrize(
    ("cls", "name", "value", "words"),
    [
        (Brightness, "workload", {}, 'brightness.workload returned {}; it must return {"prompts": their number'),
        (Brightness, "workload", {"prompts": "x"}, "brightness.workload returned {'prompts': 'x'}"),
        (Brightness, "workload", None, "brightness.workload returned None"),
        (Dots, "estimate", None, "dots.estimate returned NoneType; it must return a GenerationEstimate"),
        (
            Dots,
            "estimate",
            GenerationEstimate(3, usd="x"),
            "dots.estimate returned a GenerationEstimate that cannot be",
        ),  # type: ignore[arg-type]
        (Dots, "estimate", GenerationEstimate(-1), "calls must be a whole number of at least 0, and usd"),
    ],
)
def test_a_dry_run_names_whose_figures_are_none(
    cls: Any, name: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cls, name, lambda *_: value, raising=False)
    request = BenchmarkRequest("brightness", ComponentSpec("dots"))
    with pytest.raises(PluginError, match=re.escape(words)):
        cost.table([request], CATALOG)


def test_numbers_of_every_type_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's, Decimal dollars, and whole numbers that are floats."""
    monkeypatch.setattr(Brightness, "images_per_prompt", np.int64(2))
    monkeypatch.setattr(Brightness, "size", (np.int32(4), 4.0), raising=False)
    monkeypatch.setattr(Brightness, "workload", lambda self, images: {"prompts": np.int64(2), "x": 4.0}, raising=False)
    monkeypatch.setattr(Dots, "estimate", lambda *_: GenerationEstimate(4.0, Decimal("0.5"), np.float32(2)))  # type: ignore[arg-type]
    monkeypatch.setattr(Dots, "generate", answering(seconds=np.float32(2), usd=Decimal("0.25")))
    monkeypatch.setattr(Dots, "describe", describing("dots", settings={"steps": 20.0}))
    request = BenchmarkRequest("brightness", ComponentSpec("dots"))
    assert "| 2 | 4 | 4 | 0.0 | 0.50 | 4 x |" in cost.table([request], CATALOG)
    report = run(tmp_path / "run", words=("a", "b"))
    assert (report.settings["steps"], report.settings["size"]) == (20, [4, 4])
    entry = json.loads((tmp_path / "run" / "manifest.jsonl").read_text().splitlines()[0])
    assert (entry["seconds"], entry["usd"]) == (2.0, 0.25)
    assert compare([read(tmp_path / "run" / "result.json")])[0].name == "dots, 20 steps"


@pytest.mark.parametrize("most", [sys.maxsize, float("inf"), None, np.int64(9)])
def test_a_generator_may_allow_any_number_of_failures(
    most: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dots, "most_failures", most, raising=False)
    assert run(tmp_path / "run", words=("fail", "fail 2", "a", "b")).decision.statuses == {"failed": 2, "ok": 2}


def test_settings_of_a_system_may_be_none_or_hold_half_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"device": None, "dtype": None, "prompts": None, "folder": HALF}
    monkeypatch.setattr(Dots, "describe", describing("dots", settings=settings))
    for _ in range(2):  # and it goes on
        report = run(tmp_path / "run")
    assert report.settings["prompts"] == "raw" and "device" not in report.settings
    assert report.settings["settings"]["folder"] == "\ufffd"


def test_a_benchmark_that_scores_may_have_references_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Brightness, "references", lambda self: ["a picture"], raising=False)
    assert run(tmp_path / "run").decision.statuses["ok"] == 3


def test_a_limit_for_a_benchmark_that_takes_none_is_refused_by_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @frozen
    class Config:
        words: tuple[str, ...] = ("a",)

    monkeypatch.setattr(Brightness, "Config", Config)
    with pytest.raises(ConfigError, match="the benchmark brightness takes no --limit; leave it out"):
        run(tmp_path / "run", limit=2)


def test_names_may_hold_every_space_and_joiner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A no-break space, as French has it, and the joiners of Persian words and of emoji."""
    name, task = "modèle\u00a0x", "می\u200cخواهم 👩\u200d🚀"
    monkeypatch.setattr(Dots, "describe", describing(name, settings={"device": "cpu\u3000a"}))
    monkeypatch.setattr(Brightness, "prompts", lambda self: [Prompt("a", task=task)])
    assert run(tmp_path / "run").decision.tasks == (task,)
    (row,) = compare([read(tmp_path / "run" / "result.json")])
    assert row.name == name and list(row.tasks) == [task]


def test_half_characters_of_plugins_do_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the message of an error about a file name."""
    scored = [Score("ok", 0.5, {HALF: 1.0}, HALF), Score("abstain", evidence=HALF)]
    monkeypatch.setattr(Brightness, "score", lambda self, images, prompts: scored)
    monkeypatch.setattr(Brightness, "headline", ("even",), raising=False)
    monkeypatch.setattr(Dots, "generate", answering(facts={"said": [HALF]}, sent_prompt=HALF))
    report = run(tmp_path / "run", words=("a", "b"))
    assert report.decision.official["even"].value == 0.5
    entry = json.loads((tmp_path / "run" / "manifest.jsonl").read_text().splitlines()[0])
    assert (entry["facts"], entry["sent_prompt"]) == ({"said": ["\ufffd"]}, "\ufffd")


def test_a_run_without_any_score_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Score("failed", evidence="the judge is away")
    monkeypatch.setattr(Brightness, "score", lambda self, images, prompts: [failed] * len(prompts))
    with pytest.raises(LensError, match=re.escape("; the first picture without a score: failed, the judge is away")):
        run(tmp_path / "run", words=("a", "b"))


def test_the_reason_for_a_missing_score_is_that_of_a_task_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture of a, of one task with c, abstains; that of b is the only one of its task."""
    scores = [Score("abstain", evidence="blurred"), Score("failed", evidence="the judge is away"), Score("ok", 1.0)]
    monkeypatch.setattr(Brightness, "score", lambda self, images, prompts: scores)
    benchmark, prompts = Brightness(Brightness.Config()), [Prompt(w, task=t) for w, t in zip("abc", "eoe", strict=True)]
    for measure in (
        lambda: run(tmp_path / "run", words=("a", "b", "c")),
        lambda: evaluation.score(benchmark, torch.zeros(3, 3, 4, 4, dtype=torch.uint8), prompts),
    ):
        with pytest.raises(LensError, match="first picture without a score: failed, the judge is away"):
            measure()
    scores[1] = Score("ok", 1.0)  # and where no picture of the task is there, no judge is to blame
    with pytest.raises(LensError, match="has no score at all") as caught:
        run(tmp_path / "other", words=("a", "refuse", "b", "refuse", "c"))
    assert "blurred" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, 1e200])
def test_a_score_that_cannot_be_averaged_is_a_failure_of_its_picture_in_training_too(value: Any) -> None:
    scores = [Score("ok", value), Score("ok", 1.0), Score("ok", 0.0)]
    benchmark = Brightness(Brightness.Config())
    benchmark.score = lambda images, prompts: scores  # type: ignore[method-assign]
    result = evaluation.score(benchmark, torch.zeros(3, 3, 4, 4, dtype=torch.uint8), [Prompt("a")] * 3)
    assert (result.overall.value, result.overall.missing, result.scores[0].status) == (0.5, 1, "failed")
