"""Stage 2: what is asked, what is kept, what a killed run goes on from, and what stops it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_perceivers
import pytest
from lens_bench import perception, report
from lens_bench.perceive import cache
from lens_bench.perceive.cache import PerceptionCache, key_of
from lens_bench.perceive.vlm import READ
from PIL import Image

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec
from lens_core.types import ConfigError, LensError, Picture, PluginError, Prompt

CATALOG = Catalog.of(bench_perceivers)


@pytest.fixture(autouse=True)
def log() -> list[tuple[str, int, Any]]:
    bench_perceivers.log.clear()
    return bench_perceivers.log


def use(name: str, **options: Any) -> ComponentSpec:
    return ComponentSpec(name, options)


def picture(folder: Path, number: int, prompt: Prompt, index: int = 0, black: bool = False) -> Picture:
    """A flat picture whose red channel is ten times its number."""
    path = folder / f"{number}.png"
    Image.new("RGB", (64, 48), (0, 0, 0) if black else (10 * number, 120, 60)).save(path)
    return Picture(path, hashlib.sha256(path.read_bytes()).hexdigest(), prompt, index)


def pictures(folder: Path, count: int, data: dict[str, Any], text: str = "a prompt") -> list[Picture]:
    return [picture(folder, number, Prompt(text, id=number, data=data)) for number in range(1, count + 1)]


def longtext(folder: Path, spec: ComponentSpec, some: Sequence[Picture]) -> list[Any]:
    config = SimpleNamespace(reader=spec, language="en")
    return [lines[0]["ocr_raw"] for lines in perception.longtext(config, some, folder, catalog=CATALOG)]


# ---- what the benchmarks ask -----------------------------------------------------------------------------------------


def test_genevals_lines_decide_as_the_detections_do(tmp_path: Path, log: list[tuple[str, int, Any]]) -> None:
    dogs = {"tag": "colors", "include": [{"class": "dog", "count": 2, "color": "red"}]}
    plain = {"tag": "counting", "include": [{"class": "dog", "count": 3}]}
    some = [picture(tmp_path, n, Prompt("p", n, data={"metadata": m})) for n, m in ((1, dogs), (4, dogs), (3, plain))]
    config = SimpleNamespace(detector=use("detector"), classifier=use("colors"))
    lines = [line for (line,) in perception.geneval(config, some, tmp_path / "cache", catalog=CATALOG)]
    assert [len(line["detections"]["dog"]) for line in lines] == [1, 4, 3]
    assert [line["colors"] for line in lines] == [{"dog": ["red"]}, {"dog": ["red", "blue", "red", "blue"]}, {}]
    assert [kind for kind, *_ in log] == ["objects"] * 3 + ["colors"] * 2  # one model after the other
    path = tmp_path / "perceptions.jsonl"
    with path.open("w") as file:
        for line, one in zip(lines, some, strict=True):
            file.write(json.dumps({**line, "metadata": one.prompt.data["metadata"]}) + "\n")
    result = report.score("geneval", path)
    assert [v["correct"] for v in result.verdicts] == [False, False, True]
    assert result.verdicts[0]["reason"] == "expected dog>=2, found 1"
    assert result.verdicts[1]["reason"] == "expected red dog>=2, found 1 red; and 1 red, 1 blue"
    assert lines[0]["perceiver"]["detector"] == {"model": "fake objects", "revision": "1", "version": "1"}


def test_colours_are_asked_of_what_may_be_decided_on_and_of_nothing_else(tmp_path: Path) -> None:
    metadata = {
        "tag": "colors",
        "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1}],
    }
    (line,) = perception.geneval(
        SimpleNamespace(detector=use("detector"), classifier=use("colors")),
        pictures(tmp_path, 1, {"metadata": metadata}), tmp_path / "cache", catalog=CATALOG,
    )[0]  # fmt: skip
    assert line["colors"] == {"cat": ["red"]}


def test_a_line_of_cvtg_has_lines_and_a_cosine_or_no_cosine_at_all(tmp_path: Path) -> None:
    some = pictures(tmp_path, 2, {}, "a sign that says 'grand opening'")
    config = SimpleNamespace(ocr=use("lines"), similarity=use("cosine"))
    lines = [line for (line,) in perception.cvtg(config, some, tmp_path / "cache", catalog=CATALOG)]
    assert [line["clip_cosine"] for line in lines] == [0.1, 0.2]
    path = tmp_path / "perceptions.jsonl"
    path.write_text(
        "".join(json.dumps({**line, "prompt": some[0].prompt.text, "prompt_id": "1"}) + "\n" for line in lines)
    )
    result = report.score("cvtg2k", path)
    assert result.official["word accuracy"].value == 1.0
    assert result.official["CLIPScore"].value == pytest.approx(2.5 * 0.15)
    config.similarity = None
    (without,) = perception.cvtg(config, some[:1], tmp_path / "cache", catalog=CATALOG)[0]
    assert "clip_cosine" not in without and "similarity" not in without["perceiver"]
    path.write_text(json.dumps({**without, "prompt": some[0].prompt.text}) + "\n")
    assert "CLIPScore" not in report.score("cvtg2k", path).official


def test_longtext_takes_an_ocr_engine_or_a_model_that_is_asked_the_official_prompt(
    tmp_path: Path, log: list[tuple[str, int, Any]]
) -> None:
    some = pictures(tmp_path, 1, {"text": ["x"]})
    assert longtext(tmp_path / "cache", use("lines"), some) == ["grand opening\nnumber 1"]
    assert longtext(tmp_path / "cache", use("answers"), some) == ["number 1"]
    assert [question for _, _, question in log] == [None, READ]
    with pytest.raises(ConfigError, match=r"'detector' perceives objects; this needs one of lines or answer"):
        longtext(tmp_path / "cache", use("detector"), some)
    with pytest.raises(ConfigError, match="needs something that reads"):
        perception.longtext(SimpleNamespace(reader=None, language="en"), some, tmp_path)


NOTHING = dict.fromkeys(("reader", "vlm", "diversity", "style_csd", "style_encoder", "reasoning"))


def test_oneig_gives_a_picture_a_line_for_each_dimension_that_it_counts_for(
    tmp_path: Path, log: list[tuple[str, int, Any]]
) -> None:
    styled = Prompt("styled", 1, data={"style": "cubism", "questions": {"1": "Is it 1?", "2": "Is it 9?"}})
    written = Prompt("written", 2, data={"text_content": "word " * 61})
    reasoned = Prompt("reasoned", 3, data={"answer": "42"})
    some = [picture(tmp_path, 1, styled), picture(tmp_path, 2, styled, 1), picture(tmp_path, 3, written),
            picture(tmp_path, 4, reasoned), picture(tmp_path, 5, styled, 2, black=True)]  # fmt: skip
    other = use("style_cosine", revision="2", shift=2)
    config = SimpleNamespace(
        language="en", reader=use("answers"), vlm=use("answers"), diversity=use("embedding"),
        style_csd=use("style_cosine"), style_encoder=other, reasoning=use("answer_cosine"),
    )  # fmt: skip
    lines = perception.oneig(config, some, tmp_path / "cache", catalog=CATALOG)
    by_bench = [{line["bench"]: line for line in one} for one in lines]
    assert [sorted(one) for one in by_bench[:2]] == [["oneig_alignment_en", "oneig_diversity_en", "oneig_style_en"]] * 2
    assert sorted(by_bench[2]) == ["oneig_diversity_en", "oneig_text_en"]
    assert sorted(by_bench[3]) == ["oneig_diversity_en", "oneig_reasoning_en"]
    assert by_bench[0]["oneig_alignment_en"]["answers"] == {"1": "Yes", "2": "no"}
    assert [one["oneig_diversity_en"]["distances"] for one in by_bench[:2]] == [[], [pytest.approx(0.4)]]
    style = by_bench[1]["oneig_style_en"]
    assert (style["style_csd_similarity"], style["style_encoder_similarity"]) == (0.2, 0.4)
    assert by_bench[3]["oneig_reasoning_en"]["answer_cosine"] == 0.4
    # A black picture stands for a refusal: nothing is asked about it.
    assert {line["bench"]: line["status"] for line in lines[4]} == dict.fromkeys(by_bench[0], "refused")
    assert all(number != 0 for _, number, _ in log)
    # The tile's trip through JPEG is part of what identifies an answer; long references get more tokens.
    assert "jpeg75" in by_bench[0]["oneig_style_en"]["perceiver"]["style_csd"]["pictures"]
    assert ("answer", 3, {"text": READ, "max_tokens": 256}) in log


def test_dimensions_whose_perceivers_are_not_named_are_absent(tmp_path: Path) -> None:
    prompt = Prompt("p", 1, data={"style": "cubism", "questions": {"1": "?"}, "text_content": "a", "answer": "b"})
    config = SimpleNamespace(language="zh", **NOTHING)
    assert perception.oneig_benches(config, prompt) == []
    config.style_csd = use("style_cosine")  # one of two
    config.reader = use("lines")
    assert perception.oneig_benches(config, prompt) == ["oneig_text_zh"]
    (lines,) = perception.oneig(config, [picture(tmp_path, 1, prompt)], tmp_path / "cache", catalog=CATALOG)
    assert [line["bench"] for line in lines] == ["oneig_text_zh"]


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_what_is_known_is_not_asked_again_and_another_revision_is(
    tmp_path: Path, log: list[tuple[str, int, Any]]
) -> None:
    some, said = pictures(tmp_path, 3, {}), []
    config = SimpleNamespace(reader=use("lines"), language="en")
    first = perception.longtext(config, some, tmp_path / "cache", catalog=CATALOG)
    assert perception.longtext(config, some, tmp_path / "cache", catalog=CATALOG) == first
    assert len(log) == 3
    config.reader = use("lines", revision="2", shift=5)
    other = perception.longtext(config, some, tmp_path / "cache", catalog=CATALOG, log=said.append)
    assert [lines[0]["ocr_raw"] for lines in other] == [f"grand opening\nnumber {n}" for n in (6, 7, 8)]
    assert len(log) == 6
    assert any("another model, revision or version are not used" in line for line in said)


def test_two_pictures_with_the_same_bytes_are_asked_about_once(tmp_path: Path, log: list[tuple[str, int, Any]]) -> None:
    one = picture(tmp_path, 1, Prompt("p", 1))
    assert longtext(tmp_path / "cache", use("lines"), [one] * 5) == ["grand opening\nnumber 1"] * 5
    assert len(log) == 1


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import bench_perceivers, test_bench_perception as t
from pathlib import Path
folder = Path(sys.argv[1])
t.longtext(folder / "cache", t.use("lines", kill_at=5, revision="1"), t.pictures(folder, 7, {{}}))
"""


def test_a_run_killed_within_a_batch_goes_on_from_what_was_written(
    tmp_path: Path, log: list[tuple[str, int, Any]]
) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()
    # kill_at is no part of what identifies the fake perceiver, as a crash is none of a real one.
    answers = longtext(tmp_path / "cache", use("lines"), pictures(tmp_path, 7, {}))
    assert answers == [f"grand opening\nnumber {n}" for n in range(1, 8)]
    assert [number for _, number, _ in log] == [5, 6, 7]


def filled(folder: Path, count: int = 3) -> tuple[PerceptionCache, Path]:
    made = PerceptionCache(folder, "lines", {"model": "m", "revision": "1"})
    made.add((key_of("a" * 64, {"n": i}), {"text": "é" * i, "n": i}) for i in range(count))
    (path,) = made.folder.glob("*.jsonl")
    return made, path


def again(folder: Path) -> PerceptionCache:
    return PerceptionCache(folder, "lines", {"model": "m", "revision": "1"})


def test_answers_come_back_and_several_processes_have_files_of_their_own(tmp_path: Path) -> None:
    first, _ = filled(tmp_path)
    second = again(tmp_path)
    assert len(second) == 3
    second.add([(key_of("b" * 64, None), [1.5, None, True])])
    first.add([(key_of("c" * 64, None), "late")])
    both = again(tmp_path)
    assert len(list(both.folder.glob("*.jsonl"))) == 2
    assert both.answer(key_of("b" * 64, None)) == [1.5, None, True]
    assert both.answer(key_of("a" * 64, {"n": 2})) == {"text": "éé", "n": 2}
    assert first.answer(key_of("c" * 64, None)) == both.answer(key_of("c" * 64, None)) == "late"
    with pytest.raises(KeyError):
        both.answer(key_of("d" * 64, None))


@pytest.mark.parametrize("keep", range(1, 60, 7))
def test_a_torn_last_line_is_as_if_it_were_not_there(tmp_path: Path, keep: int) -> None:
    _, path = filled(tmp_path)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[: last + keep])
    torn = again(tmp_path)
    assert len(torn) == 2
    torn.add([(key_of("a" * 64, {"n": 2}), "anew")])
    assert again(tmp_path).answer(key_of("a" * 64, {"n": 2})) == "anew"


def test_a_changed_answer_is_refused_with_its_line(tmp_path: Path) -> None:
    _, path = filled(tmp_path)
    path.write_text(path.read_text().replace('"text": "é"', '"text": "e"'))
    with pytest.raises(ConfigError, match=r"line 3: is damaged \(its checksum differs\); delete the file"):
        again(tmp_path)


@pytest.mark.parametrize("bad", ["{", "[]", '{"picture": "a"}', "\x00", '{"picture": "a", "picture": "a"}'])
def test_a_line_that_is_no_answer_is_refused(tmp_path: Path, bad: str) -> None:
    _, path = filled(tmp_path)
    path.write_text(path.read_text() + bad + "\n")
    with pytest.raises(ConfigError, match="line 5: is") as caught:
        again(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_moved_between_revisions_is_refused(tmp_path: Path) -> None:
    _, path = filled(tmp_path)
    other = PerceptionCache(tmp_path, "lines", {"model": "m", "revision": "2"})
    other.folder.mkdir()
    path.rename(other.folder / path.name)
    with pytest.raises(ConfigError, match="perceived by another model, revision or version"):
        PerceptionCache(tmp_path, "lines", {"model": "m", "revision": "2"})


def test_a_line_longer_than_the_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LARGEST", 400)
    made, path = filled(tmp_path)
    with pytest.raises(LensError, match="at most 400 are kept"):
        made.add([(key_of("b" * 64, None), "x" * 500)])
    path.write_text(path.read_text() + "x" * 500 + "\n")
    with pytest.raises(ConfigError, match="line 5: is longer than"):
        again(tmp_path)


# ---- what stops a run ------------------------------------------------------------------------------------------------


def test_a_perceiver_that_fails_its_canary_is_asked_nothing(tmp_path: Path, log: list[tuple[str, int, Any]]) -> None:
    with pytest.raises(LensError, match="lines does not see what is there: the sentence was read as ''"):
        longtext(tmp_path / "cache", use("lines", canary="the sentence was read as ''"), pictures(tmp_path, 3, {}))
    assert log == [] and not (tmp_path / "cache").exists()


def test_pictures_without_an_answer_stop_the_run_and_the_others_are_kept(
    tmp_path: Path, log: list[tuple[str, int, Any]]
) -> None:
    some = pictures(tmp_path, 5, {})
    with pytest.raises(LensError, match=r"2 questions about pictures have no answer \(the first: picture 2"):
        longtext(tmp_path / "cache", use("lines", fails=[2, 4]), some)
    assert len(log) == 5
    log.clear()
    assert longtext(tmp_path / "cache", use("lines"), some)[1] == "grand opening\nnumber 2"
    assert [number for _, number, _ in log] == [2, 4]


def test_where_eight_in_a_row_have_no_answer_the_run_stops(tmp_path: Path, log: list[tuple[str, int, Any]]) -> None:
    with pytest.raises(LensError, match="have no answer"):
        longtext(tmp_path / "cache", use("lines", fails=list(range(2, 20))), pictures(tmp_path, 14, {}))
    assert len(log) == 10  # batches of two: 1 is answered, 2 to 9 are not, and 10 is in the batch of 9


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("raise", PluginError, "perceive raised RuntimeError: CUDA error: no kernel image"),
        ("few", PluginError, "returned 0 answers to 2 questions"),
        ("nan", LensError, "cannot be written as JSON"),
        ("tensor", LensError, "cannot be written as JSON"),
    ],
)
def test_a_perceiver_that_breaks_is_named_in_one_line(
    tmp_path: Path, how: str, error: type[LensError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        longtext(tmp_path / "cache", use("broken", revision=how), pictures(tmp_path, 2, {}))
    assert "\n" not in str(caught.value)


def test_a_changed_or_missing_picture_is_named(tmp_path: Path) -> None:
    some = pictures(tmp_path, 2, {})
    Image.new("RGB", (8, 8)).save(some[1].path)
    with pytest.raises(ConfigError, match=r"2\.png: is not the picture that was generated"):
        longtext(tmp_path / "cache", use("lines"), some)
    some[1].path.unlink()
    with pytest.raises(ConfigError, match=r"2\.png: cannot be read"):
        longtext(tmp_path / "cache", use("lines"), some)
    some[1].path.write_bytes(b"<html>")
    fake = Picture(some[1].path, hashlib.sha256(b"<html>").hexdigest(), some[1].prompt)
    with pytest.raises(ConfigError, match=r"2\.png: cannot be read as a picture"):
        longtext(tmp_path / "cache", use("lines"), [fake])


def test_an_unknown_perceiver_or_option_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no perceiver is called 'line'"):
        longtext(tmp_path / "cache", use("line"), pictures(tmp_path, 1, {}))
    with pytest.raises(ConfigError, match=r"\$\.reader"):
        longtext(tmp_path / "cache", use("lines", speed=1), pictures(tmp_path, 1, {}))


def test_no_picture_is_no_work(tmp_path: Path) -> None:
    assert longtext(tmp_path / "cache", use("lines", canary="unused"), []) == []
