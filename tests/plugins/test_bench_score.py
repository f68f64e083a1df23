"""`lens score`: verdicts on disk, headlines by both rules, and one line for whatever is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lens_bench
import numpy as np
import pytest
from lens_bench import geneval, oneig, report
from lens_bench.benchmarks import BENCHMARKS
from lens_bench.commands import score

from lens_core.catalog import Catalog
from lens_core.cli.options import CORE_COMMANDS
from lens_core.io import json_fields
from lens_core.types import ConfigError, LensError

SAMPLES = Path(__file__).parents[1] / "cases" / "bench_samples.jsonl"
VERDICT = {
    "geneval": ("kept", "color_asked", "correct", "reason"),
    "cvtg2k": ("gt_words", "total_words", "correct_words", "word_ned", "word_accuracy", "ned"),
    "longtext_en": (
        "ocr_cleaned", "ocr_normalised", "gt_normalised", "match_word_count", "gt_word_count", "text_accuracy",
    ),
    "oneig_text_en": (
        "ocr_normalised", "gt_normalised", "edit_distance", "completed", "match_word_count", "gt_word_count", "wac",
    ),
}  # fmt: skip
DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
SEEN = {"metadata": DOG, "detections": {"dog": [[0, 0, 9, 9, 0.5]]}}
UNSEEN: dict[str, Any] = {"metadata": DOG, "detections": {}}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def call(*objects: Any) -> Path:
        path = tmp_path / "perceptions.jsonl"
        path.write_text("".join((o if isinstance(o, str) else json.dumps(o)) + "\n" for o in objects), encoding="utf-8")
        return path

    return call


def test_the_plugin_brings_the_command_and_nothing_is_wrong_with_it() -> None:
    catalog = Catalog.of(lens_bench)
    assert catalog.commands(taken=CORE_COMMANDS) == {
        "bench csd": "lens_bench.commands:csd",
        "bench latency": "lens_bench.commands:latency",
        "bench ocr": "lens_bench.commands:ocr",
        "bench table": "lens_bench.commands:table",
        "figure": "lens_bench.figures:app",
        "score": "lens_bench.commands:score",
    }
    assert catalog.check(CORE_COMMANDS) == {"lens_bench": []}


@pytest.mark.parametrize("name", VERDICT)
def test_the_samples_get_their_verdicts_line_by_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "verdicts.jsonl"
    assert score(name, SAMPLES, output=out) == 0
    cases = [case for line in SAMPLES.read_text().splitlines() if (case := json.loads(line))["bench"] == name]
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    assert verdicts == [{key: case[key] for key in ("bench", "id", *VERDICT[name])} for case in cases]
    shown = capsys.readouterr().out
    assert f"{len(cases)} ok; coverage 100.0%" in shown and "lines of other benchmarks were left out" in shown


# ---- headlines ----------------------------------------------------------------------------------------------------


def test_geneval_is_the_mean_of_six_tags_over_pictures(write: Write) -> None:
    right = {"single_object": 1, "two_object": 3, "counting": 0, "colors": 4, "position": 2, "color_attr": 2}
    summary = report.score(
        "geneval",
        write(
            *(
                {"metadata": DOG | {"tag": tag}, "detections": {"dog": [[0, 0, 9, 9, 0.95]] * (i < right[tag])}}
                for tag in geneval.TAGS
                for i in range(4 if tag != "position" else 8)
            )
        ),
    )
    shares = {tag: n / (4 if tag != "position" else 8) for tag, n in right.items()}
    overall = summary.official["overall"]
    assert overall.value == pytest.approx(sum(shares.values()) / 6)
    assert 0 < overall.low < overall.value < overall.high < 1
    assert {tag: summary.official[tag].value for tag in geneval.TAGS} == shares
    assert summary.official["pictures"].value == pytest.approx(12 / 28)
    assert list(summary.official) == ["overall", *geneval.TAGS, "pictures"] and summary.notes == []


def test_a_tag_of_ones_own_is_a_row_and_no_part_of_the_overall_score(write: Write) -> None:
    tags = [SEEN | {"metadata": DOG | {"tag": tag}, "prompt_id": tag} for tag in geneval.TAGS if tag != "counting"]
    counted = UNSEEN | {"metadata": DOG | {"tag": "counting"}, "prompt_id": "counting"}
    mine = UNSEEN | {"metadata": DOG | {"tag": "mine"}, "prompt_id": "mine"}
    summary = report.score("geneval", write(*tags, counted, mine))
    assert list(summary.official) == ["overall", *geneval.TAGS, "mine", "pictures"] and summary.notes == []
    assert summary.official["overall"].value == pytest.approx(5 / 6) and summary.official["overall"].count == 6
    assert (summary.official["mine"].value, summary.official["pictures"].value) == (0, 5 / 7)


@pytest.mark.parametrize("tag", ["overall", "all pictures", "pooled", "pictures", "a\nb", "\x1b[31m"])
def test_a_tag_that_is_the_name_of_a_mean_or_no_line_is_refused(tag: str, write: Write) -> None:
    with pytest.raises(ConfigError, match=r"line 1: metadata\.tag: "):
        report.score("geneval", write(SEEN | {"metadata": DOG | {"tag": tag}}))


def test_a_tag_without_pictures_is_absent_and_never_averaged_away(write: Write) -> None:
    summary = report.score("geneval", write(SEEN, UNSEEN))
    assert "overall" not in summary.official and "overall" not in summary.strict
    assert summary.notes == [
        "no overall score: it is the mean of six tags, and no picture of "
        "two_object, counting, colors, position, color_attr has a verdict"
    ]


def test_refused_and_missing_pictures_vanish_officially_and_are_wrong_strictly(write: Write) -> None:
    lost: list[dict[str, Any]] = [{"metadata": DOG, "status": status} for status in ("refused", "failed", "missing")]
    summary = report.score("geneval", write(SEEN, SEEN | {"status": "ok"}, UNSEEN, *lost))
    assert summary.official["pictures"].value == pytest.approx(2 / 3) and summary.strict["pictures"].value == 2 / 6
    assert summary.coverage == 0.5 and summary.statuses == {"ok": 3, "refused": 1, "failed": 1, "missing": 1}
    assert [v.get("correct") for v in summary.verdicts] == [True, True, False, None, None, None]
    assert summary.verdicts[3] == {"bench": "geneval", "status": "refused"}


def test_words_are_pooled_over_pictures_and_prompts_are_the_draws(write: Write) -> None:
    long = {"text": ["a b c d e f g h"], "ocr_raw": "a b c d"}
    short = {"text": ["x y"], "ocr_raw": "x y"}
    summary = report.score("longtext_en", write(long, long, short, {"text": ["z z"], "status": "refused"}))
    assert summary.official["text score"].value == pytest.approx((4 + 4 + 2) / 18)
    assert summary.strict["text score"].value == pytest.approx(10 / 20)
    assert (summary.official["text score"].distinct, summary.strict["text score"].distinct) == (2, 3)


def test_pictures_of_one_prompt_say_less_than_pictures_of_many(write: Write) -> None:
    def width(of: int) -> float:
        texts = [{"text": [f"{i % of} a"], "ocr_raw": f"{i % of}" + " a" * (i % 2)} for i in range(40)]
        estimate = report.score("longtext_en", write(*texts)).official["text score"]
        return estimate.high - estimate.low

    assert width(2) > 1.5 * width(40)
    named = [{"text": [f"{i} a"], "ocr_raw": f"{i}" + " a" * (i % 2), "prompt_id": i % 2} for i in range(40)]
    assert report.score("longtext_en", write(*named)).official["text score"].distinct == 2


def test_cvtg_pools_words_and_counts_the_failures_of_its_engine(write: Write) -> None:
    one = {"prompt": "'a b c'", "ocr_lines": ["a b c"], "category": "CVTG/3"}
    two = {"prompt": "'d'", "ocr_lines": "RAISE", "category": "CVTG/1"}
    summary = report.score("cvtg2k", write(one, two, {"prompt": "'e f'", "status": "missing"}))
    assert summary.official["word accuracy"].value == summary.official["NED"].value == 3 / 4
    assert summary.strict["word accuracy"].value == summary.strict["NED"].value == 3 / 6
    assert summary.categories["CVTG/3"]["NED"].value == 1 and summary.categories["CVTG/1"]["NED"].value == 0
    assert summary.notes == ["1 picture is zeros because the OCR engine failed, which is no verdict"]
    three = {"prompt": "'d'", "ocr_lines": ["RAISE"], "category": "CVTG/1"}
    assert report.score("cvtg2k", write(one, three)).notes == [], "a picture may show that word"


def test_oneig_is_the_formula_of_pooled_quantities(write: Write) -> None:
    pictures = [("['abcd ef']", "abcd ef"), ("['abcd ef']", "abcd"), ("['gh']", "xx"), ("['ij kl mn']", "kl")]
    summary = report.score("oneig_text_en", write(*({"text_content": t, "ocr_raw": o} for t, o in pictures)))
    distance, completed, matched = (0 + 3 + 2 + 6) / 4, 1 / 4, (2 + 1 + 0 + 1) / (2 + 2 + 1 + 3)
    headline = summary.official["text score"]
    assert headline.value == pytest.approx(1 - distance * (1 - completed) * (1 - matched) / 100)
    assert headline.low < headline.value < headline.high and headline.distinct == 3
    parts = {name: summary.official[name].value for name in ("ED", "CR", "WAC")}
    assert parts == pytest.approx({"ED": distance, "CR": completed, "WAC": matched})


@pytest.mark.parametrize(("name", "worst"), [("oneig_text_en", 100), ("oneig_text_zh", 50)])
def test_a_refused_text_is_as_wrong_as_can_be(name: str, worst: float, write: Write) -> None:
    right = {"text_content": "['a b']", "ocr_raw": "a b"}
    summary = report.score(name, write(right, {"text_content": "['c']", "status": "refused"}))
    assert summary.official["text score"].value == 1
    assert summary.strict["text score"].value == oneig.text_score(worst / 2, 1 / 2, 2 / 3, worst) < 1


def test_the_intervals_are_the_same_each_time_and_unknown_for_a_single_prompt(write: Write) -> None:
    pair = [{"text_content": f"['{w}']", "ocr_raw": "a"} for w in ("a", "b")]
    first, again = (report.score("oneig_text_en", write(*pair)).official for _ in range(2))
    assert first == again and first["text score"].low < first["text score"].high
    single = report.score("oneig_text_en", write(pair[1])).official
    assert math.isnan(single["text score"].low) and math.isnan(single["ED"].low)
    assert report.as_json(report.score("oneig_text_en", write(pair[1])))["official"]["ED"]["low"] is None


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_promises(write: Write) -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(60):
        texts = []
        for i in range(40):
            words = [f"{i}w{j}" for j in range(rng.integers(1, 12))]
            read = [word for word in words if rng.random() < 0.7]
            texts.append({"text": [" ".join(words)], "ocr_raw": " ".join(read)})
        estimate = report.score("longtext_en", write(*texts)).official["text score"]
        inside += estimate.low <= 0.7 <= estimate.high
    assert inside >= 52  # of 60 draws at 95 %, fewer than 52 is a chance of 1 in 300


# ---- what is written and shown ------------------------------------------------------------------------------------


def test_the_verdicts_have_one_line_each_for_every_reader_of_lines(write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    score("longtext_en", write({"text": ["a"], "ocr_raw": "a\u2028b\x85c\u2029dé", "id": 7}), output=out)
    written = out.read_text(encoding="utf-8")
    assert len(written.splitlines()) == 1 and "é" in written
    assert json.loads(written)["ocr_cleaned"] == "a\u2028b\x85c\u2029dé" and json.loads(written)["id"] == 7


def test_json_has_the_headlines_of_both_rules(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    score("geneval", write(SEEN, UNSEEN, {"metadata": DOG, "status": "refused"}), json_=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["official"]["pictures"]["value"] == 0.5 and printed["strict"]["pictures"]["value"] == 1 / 3
    assert printed["coverage"] == pytest.approx(2 / 3) and printed["statuses"] == {"ok": 2, "refused": 1}


def test_blank_lines_are_no_pictures(write: Write) -> None:
    assert len(report.score("geneval", write("", SEEN, "  ", SEEN)).verdicts) == 2


# ---- what is wrong ------------------------------------------------------------------------------------------------


def row(*values: Any) -> dict[str, Any]:
    return {"metadata": DOG, "detections": {"dog": [list(values)]}}


def clause(**fields: Any) -> dict[str, Any]:
    return UNSEEN | {"metadata": {"tag": "position", "include": [{"class": "dog", "count": 1} | fields]}}


WRONG: list[tuple[str, Any, str]] = [
    ("geneval", "[1]", "line: must be a JSON object, not [1]"),
    ("geneval", '{"metadata": ', "line: is not JSON"),
    ("geneval", '{"id": 1, "id": 2}', "line: is not JSON (a key stands twice)"),
    ("geneval", {"detections": {}}, "metadata: is missing"),
    ("geneval", {"metadata": DOG, "detection": {}}, "detections: is missing. Did you mean 'detection'?"),
    ("geneval", UNSEEN | {"bench": "gen"}, "bench: 'gen' is unknown."),
    ("geneval", UNSEEN | {"status": "refuse"}, "status: 'refuse' is unknown. Did you mean 'refused'?"),
    ("geneval", UNSEEN | {"metadata": {}}, "metadata.tag: is missing"),
    ("geneval", clause(**{"class": "dgo"}), "metadata.include[0].class: 'dgo' is unknown. Did you mean 'dog'?"),
    ("geneval", clause(**{"class": "xyzzy"}), "metadata.include[0].class: 'xyzzy' is unknown. 80 are known."),
    ("geneval", clause(count=True), "metadata.include[0].count: must be a whole number of at least 1, not True"),
    ("geneval", clause(count=0), "metadata.include[0].count: must be a whole number of at least 1, not 0"),
    ("geneval", clause(color="rde"), "metadata.include[0].color: 'rde' is unknown. Did you mean 'red'?"),
    ("geneval", clause(position=["over", 0]), "metadata.include[0].position[0]: 'over' is unknown."),
    ("geneval", clause(position=["above"]), "metadata.include[0].position: must be [relation, clause]"),
    ("geneval", SEEN | {"metadata": clause(position=["above", 1])["metadata"]}, "its target is clause 1"),
    ("geneval", UNSEEN | {"detections": {"dogg": []}}, "detections.dogg: 'dogg' is unknown. Did you mean 'dog'?"),
    ("geneval", row(0, 0, 1, 1), "detections.dog[0]: must be [x1, y1, x2, y2, score]"),
    ("geneval", row(0, 0, 1e300, 1, 0.5), "detections.dog[0]: must be at most 1e+06 in size, not 1e+300"),
    ("geneval", row(0, 0, 1, 1, "1"), "detections.dog[0]: must be a finite number, not '1'"),
    ("geneval", '{"detections": {"dog": [[0, 0, 1, 1, NaN]]}}', "line: is not JSON (NaN is no number)"),
    ("geneval", SEEN | {"options": {"treshold": 0.3}}, "options.treshold: 'treshold' is unknown. Did you mean"),
    ("geneval", SEEN | {"options": {"max_objects": 1.5}}, "options.max_objects: must be a whole number"),
    ("geneval", SEEN | {"metadata": clause(color="red")["metadata"]}, "colors.dog: has no answer for row 0"),
    ("cvtg2k", {"prompt": "'a'"}, "ocr_lines: is missing"),
    ("cvtg2k", {"prompt": "'a'", "ocr_lines": "a"}, "ocr_lines: must be a list of texts, not 'a'"),
    ("cvtg2k", {"prompt": "'a'", "ocr_lines": [None]}, "ocr_lines[0]: must be a text, not None"),
    ("longtext_en", {"text": "a", "ocr_raw": "a"}, "text: must be a list of texts, not 'a'"),
    ("longtext_en", {"text": ["a"], "ocr_raw": None}, "ocr_raw: must be a text, not None"),
    ("longtext_en", {"text": ["a"], "ocr_raw": "a" * 2**17}, "ocr_raw: has 131072 characters; at most 65536 are read"),
    ("oneig_text_en", {"text_content": ["a"], "ocr_raw": "a"}, "text_content: must be a text, not ['a']"),
]


@pytest.mark.parametrize(("name", "line", "message"), WRONG, ids=[message[:40] for _, _, message in WRONG])
def test_a_wrong_line_is_one_line_with_its_number_and_its_field(
    name: str, line: Any, message: str, write: Write, tmp_path: Path
) -> None:
    path, out = write("", line), tmp_path / "out.jsonl"
    with pytest.raises(ConfigError) as error:
        score(name, path, output=out)
    assert len(error.value.problems) == 1 and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}, line 2: ") and message in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name], "nothing is written"


def test_every_wrong_line_is_listed_up_to_a_number(write: Write) -> None:
    with pytest.raises(ConfigError) as error:
        report.score("geneval", write(*[{}] * 25))
    assert len(error.value.problems) == 21 and error.value.problems[-1].endswith("5 more lines are wrong")


def test_a_line_that_stands_twice_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="line 2: id: 'a' stands in line 1 too"):
        report.score("geneval", write(SEEN | {"id": "a"}, UNSEEN | {"id": "a"}))


def test_perceptions_of_two_revisions_are_refused(write: Write) -> None:
    first = SEEN | {"perceiver": {"model": "m", "revision": "1"}}
    with pytest.raises(ConfigError, match="line 2: perceiver: is not that of line 1"):
        report.score("geneval", write(first, SEEN | {"perceiver": {"model": "m", "revision": "2"}}))
    with pytest.raises(ConfigError, match="line 2: perceiver: is missing, and line 1 has one"):
        report.score("geneval", write(first, SEEN))
    assert len(report.score("geneval", write(first, first, {"metadata": DOG, "status": "refused"})).verdicts) == 3


def test_nothing_to_score_is_never_a_number(write: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no line of geneval"):
        report.score("geneval", write({"bench": "cvtg2k"}))
    with pytest.raises(ConfigError, match="has no line of geneval"):
        report.score("geneval", write())
    with pytest.raises(LensError, match=r"no picture has perceptions \(2 refused\); there is nothing to score"):
        report.score("geneval", write(*[{"metadata": DOG, "status": "refused"}] * 2))
    empty = report.score("longtext_en", write({"text": [], "ocr_raw": ""}))
    assert "text score  " in report.table(empty) and "0.0000" not in report.table(empty)
    with pytest.raises(ConfigError, match="cannot be read"):
        report.score("geneval", tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"Did you mean 'geneval'\?"):
        report.score("genevl", SAMPLES)


def test_the_perceptions_are_never_overwritten(write: Write) -> None:
    path = write(SEEN)
    with pytest.raises(ConfigError, match="holds the perceptions"):
        score("geneval", path, output=path.parent / "." / path.name)
    assert json.loads(path.read_text()) == SEEN


def test_a_line_that_is_too_long_is_one_wrong_line(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_fields.readers, "LARGEST_LINE", 200)
    numbered = list(json_fields.numbered(write("x" * 1000, json.dumps({"a": 1}))))
    assert str(numbered[0][1]).startswith("line: is longer") and numbered[1] == (2, {"a": 1})


def test_the_help_names_every_benchmark() -> None:
    words = set((score.__doc__ or "").replace(",", " ").replace(";", " ").split())
    assert {name.replace("_zh", "_en") for name in BENCHMARKS} <= words
