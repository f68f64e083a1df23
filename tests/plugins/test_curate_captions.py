"""Captions: what is refused, how often is asked again, what is paid for, and what is never paid for twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lens_curate import filling
from lens_curate.captioner import checked, flaw_of, repeats
from lens_curate.recipe import Captioning, CurationSpec
from lens_curate.verdicts import verdicts
from test_curate_run import add, picture, run, stages, stored
from test_llm_client import Endpoint

from lens_core.config import ComponentSpec, structure
from lens_core.io import folders
from lens_core.io.sources import SourceItem
from lens_core.types import ConfigError, LensError

GOOD = "A round red apple lies on a wooden table beside a folded newspaper and a white cup of black coffee."
RANGE = (10, 40)


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        (GOOD, ""),
        ("The image shows a red apple on a wooden table beside a newspaper and a cup.", "begins with words about"),
        ("This picture depicts a red apple on a wooden table beside a newspaper.", "begins with words about"),
        ("In this image, a red apple lies on a wooden table beside a cup.", "begins with words about"),
        ("I'm sorry, but I can't help with describing this picture of a person today.", "refusal"),
        ("As an AI I cannot name the people who stand in this picture of a street.", "refusal"),
        ("A red apple.", "3 words; 10 to 40"),
        ("word " * 41, "41 words"),
        ("A red apple on a table. A cup of tea. A red apple on a table. A plate.", "repeats itself"),
        ("on and on and on and on and on and on and on it goes", "repeats itself"),
        ('A shop sign says "I am sorry, we are closed" above a green wooden door.', ""),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_caption(text: str, flaw: str) -> None:
    problem = flaw_of(text, RANGE)
    assert (flaw in problem) if flaw else problem == ""


def test_an_answer_is_cleaned_and_its_quoted_text_stays() -> None:
    assert checked(f'"{GOOD}"\n', RANGE) == (GOOD, "")
    quoted = 'A sign says "OPEN" above a door, and another one beside it says "CLOSED"'
    assert checked(quoted, RANGE) == (quoted, "")
    assert checked("A  red\n apple\u00a0lies on a table near nine other large red apples.", RANGE)[0].startswith(
        "A red"
    )
    for empty in ("", "  ", None, 7, "\ud800 half"):
        assert checked(empty, RANGE)[0] == "" and checked(empty, RANGE)[1]
    assert not repeats("")


@pytest.fixture
def endpoint(monkeypatch) -> Any:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    made = Endpoint()
    made.reply = lambda body: GOOD
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "raw"
    made.mkdir()
    for seed in range(4):
        add(made, f"{seed}.png", picture(seed))
    for seed in (0, 1):
        (made / f"{seed}.txt").unlink()
    return made


def spec(folder: Path, endpoint: Endpoint, llm: dict[str, Any] | None = None, **changes: Any) -> CurationSpec:
    use = {"use": "openai", "model": "m", "base_url": endpoint.url, "retries": 0, "price_in": 1.0, "price_out": 1.0}
    captions = {"llm": {**use, **(llm or {})}, "dense_words": [10, 40], **changes}
    return structure(CurationSpec, {"sources": [{"use": "folder", "path": str(folder)}], "captions": captions})


def test_captions_are_made_for_what_is_kept_and_the_old_ones_are_kept_beside_them(
    folder: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    add(folder, "near.jpg", picture(0).resize((80, 80)))
    report = run(spec(folder, endpoint), tmp_path / "store")
    assert len(endpoint.bodies) == 4 and report.data["cost"]["calls"] == 4
    assert {row["dense"] for row in stored(tmp_path / "store").values()} == {GOOD}
    records = (
        filling.t.Tables(str(tmp_path / "store"), filling_catalog()).table("curate_records").to_arrow().to_pylist()
    )
    assert {row["dense"] for row in records} >= {"", "A texture called 3."}
    system, user = endpoint.bodies[0]["messages"]
    assert "about 109 words" in system["content"] and "double quotation marks" in system["content"]
    assert user["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")


def filling_catalog() -> Any:
    from lens_core.catalog import Catalog

    return Catalog.installed()


def test_a_picture_that_cannot_be_read_for_a_new_caption_stays_with_its_old_one(
    folder: Path, tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(spec(folder, endpoint), tmp_path / "store")
    before = stored(tmp_path / "store")
    (tmp_path / "prompt.txt").write_text("Describe it in another way.")
    read = folders.read_picture

    def refuse(root: Path, relative: str, captions: Any) -> SourceItem:
        if relative == "1.png":
            return SourceItem(relative, fault="unreadable file", retry=True)
        return read(root, relative, captions)

    other = spec(folder, endpoint, prompt=str(tmp_path / "prompt.txt"))
    endpoint.reply = lambda body: GOOD.replace("red", "green")
    with monkeypatch.context() as patch:
        patch.setattr(folders, "read_picture", refuse)
        run(other, tmp_path / "store")
    now = stored(tmp_path / "store")
    assert now.keys() == before.keys() and sorted(row["dense"] == GOOD for row in now.values()) == [False] * 3 + [True]
    run(other, tmp_path / "store")
    assert {row["dense"] for row in stored(tmp_path / "store").values()} == {GOOD.replace("red", "green")}


def test_no_caption_is_paid_for_twice(folder: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    run(spec(folder, endpoint), tmp_path / "store")
    run(spec(folder, endpoint), tmp_path / "store")
    assert len(endpoint.bodies) == 4
    add(folder, "new.png", picture(9))
    run(spec(folder, endpoint), tmp_path / "store")
    assert len(endpoint.bodies) == 5


def test_a_kill_after_the_answers_and_before_they_are_written_pays_for_none_again(
    folder: Path, tmp_path: Path, endpoint: Endpoint, monkeypatch
) -> None:
    plain = filling.Filler._ask

    def killed(self: Any, captioner: Any, pictures: Any, progress: Any) -> None:
        list(captioner.caption(pictures))
        raise KeyboardInterrupt

    monkeypatch.setattr(filling.Filler, "_ask", killed)
    with pytest.raises(KeyboardInterrupt):
        run(spec(folder, endpoint), tmp_path / "store")
    calls = len(endpoint.bodies)
    assert calls == 4
    monkeypatch.setattr(filling.Filler, "_ask", plain)
    report = run(spec(folder, endpoint), tmp_path / "store")
    assert len(endpoint.bodies) == calls and report.data["cost"]["cached"] == 4
    assert len(stored(tmp_path / "store")) == 4


def test_a_caption_that_fails_its_checks_is_asked_for_again_and_then_given_up(
    folder: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    def answer(body: dict[str, Any]) -> str:
        first = len(body["messages"]) == 2
        return f"The image shows {GOOD[0].lower()}{GOOD[1:]}" if first else GOOD

    endpoint.reply = answer
    run(spec(folder, endpoint, regenerations=1), tmp_path / "store")
    assert len(endpoint.bodies) == 8 and set(stages(tmp_path / "store").values()) == {""}
    assert "begins with words about" in endpoint.bodies[-1]["messages"][-1]["content"]
    endpoint.reply = lambda body: "I'm sorry, I can't help with that."
    run(spec(folder, endpoint, {"model": "n"}, regenerations=2), tmp_path / "other")
    assert len(endpoint.bodies) == 8 + 12 and set(stages(tmp_path / "other").values()) == {"captions"}
    reasons = {row["reason"] for row in verdicts(str(tmp_path / "other"))}
    assert reasons == {"dense caption: it is a refusal, after 3 attempts"}
    run(spec(folder, endpoint, {"model": "n"}, regenerations=2), tmp_path / "other")
    assert len(endpoint.bodies) == 20, "what was given up is not asked for again"


def test_a_budget_stops_captions_and_a_larger_one_goes_on(folder: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    report = run(spec(folder, endpoint, {"max_calls": 3, "concurrency": 1}), tmp_path / "store")
    assert len(endpoint.bodies) == 3 and len(stored(tmp_path / "store")) == 3
    assert "1 captions were not made" in report.waiting and "max_calls (3) is reached" in report.waiting
    assert "no dense caption yet" in {row["reason"] for row in verdicts(str(tmp_path / "store"))}
    run(spec(folder, endpoint, {"max_calls": 9, "concurrency": 1}), tmp_path / "store")
    assert len(endpoint.bodies) == 4 and len(stored(tmp_path / "store")) == 4


def test_both_styles_and_only_what_is_missing(folder: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.reply = lambda body: GOOD if "109 words" in body["messages"][0]["content"] else "A red apple on a table."
    run(spec(folder, endpoint, style="both"), tmp_path / "store")
    assert {(r["dense"], r["brief"]) for r in stored(tmp_path / "store").values()} == {
        (GOOD, "A red apple on a table.")
    }
    before = len(endpoint.bodies)
    run(spec(folder, endpoint, only_missing=True), tmp_path / "missing")
    assert len(endpoint.bodies) == before + 2
    assert {r["dense"] for r in stored(tmp_path / "missing").values()} == {
        GOOD, "A texture called 2.", "A texture called 3."
    }  # fmt: skip


def test_another_prompt_makes_captions_anew_and_replaces_them_in_the_store(
    folder: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    run(spec(folder, endpoint), tmp_path / "store")
    (tmp_path / "prompt.txt").write_text("Describe the picture in rhyme.")
    endpoint.reply = lambda body: GOOD.replace("apple", "pear")
    report = run(spec(folder, endpoint, prompt=str(tmp_path / "prompt.txt")), tmp_path / "store")
    assert report.data["stored"] == {"added": 0, "removed": 0, "changed": 4, "gone": 0}
    assert {r["dense"] for r in stored(tmp_path / "store").values()} == {GOOD.replace("apple", "pear")}
    assert endpoint.bodies[-1]["messages"][0]["content"] == "Describe the picture in rhyme."


def test_a_preview_asks_for_few_captions_and_the_run_does_not_ask_for_these_again(
    folder: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    run(spec(folder, endpoint), tmp_path / "store", preview=3)
    assert len(endpoint.bodies) == 3
    run(spec(folder, endpoint), tmp_path / "store")
    assert len(endpoint.bodies) == 4


def test_an_endpoint_that_is_down_loses_nothing(folder: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    endpoint.server.shutdown()
    endpoint.server.server_close()
    report = run(spec(folder, endpoint), tmp_path / "store")
    assert "4 captions were not made" in report.waiting and stored(tmp_path / "store") == {}


def test_a_captioner_that_cannot_run_is_refused(folder: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    for changes, words in (
        ({"prompt": str(tmp_path / "none.txt")}, "check the path"),
        ({"prompt": str(folder / "2.txt"), "style": "both"}, "is one file, and style is both"),
        ({"llm": {"use": "nobody"}}, "no llm is called 'nobody'"),
    ):
        with pytest.raises(LensError, match=words):
            run(spec(folder, endpoint, **{"llm": None, **changes}), tmp_path / "store")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ascending"):
        Captioning(ComponentSpec("openai"), dense_words=(9, 3))
