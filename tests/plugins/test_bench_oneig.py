"""OneIG's dimensions beside text, and CLIPScore: decisions and headlines."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from lens_bench import oneig_dimensions, report
from lens_bench.oneig_dimensions import alignment, diversity, style

from lens_core.types import ConfigError, LensError

# ---- decisions -------------------------------------------------------------------------------------------------------


def test_a_question_is_zeroed_by_its_parent_one_step_and_no_further() -> None:
    # 1 no -> 2 is zeroed for it; 3 hangs on 2, whose own answer was yes, so it counts.
    dependencies = {"1": [0], "2": [1], "3": [2], "4": [0]}
    verdict = alignment(["1", "2", "3", "4"], dependencies, {"1": "No", "2": "Yes", "3": "Yes", "4": "Yes"})
    assert verdict.yes == {"1": False, "2": True, "3": True, "4": True}
    assert verdict.zeroed == ["2"]
    assert verdict.score == 2 / 4


@pytest.mark.parametrize("answer", ["yes", "Yes.", " Yes", "YES", "Yes\n", "", "No", "Yes, it is"])
def test_only_the_exact_answer_is_a_yes(answer: str) -> None:
    assert alignment(["1"], {}, {"1": answer}).score == 0.0
    assert alignment(["1"], {}, {"1": "Yes"}).score == 1.0


def test_any_of_several_parents_zeroes_and_an_unknown_one_does_not() -> None:
    answers = {"1": "Yes", "2": "No", "3": "Yes"}
    assert alignment(list(answers), {"3": [1, 2]}, answers).zeroed == ["3"]
    assert alignment(list(answers), {"3": [1, 9]}, answers).zeroed == []
    assert alignment(list(answers), {"3": [3]}, answers).zeroed == []  # its own parent


def by_the_authors(questions: list[int], dependencies: Mapping[int, list[int]], answers: Mapping[int, str]) -> float:
    """Their loop, in other words: a copy is zeroed while the raw scores decide."""
    raw = {q: 1.0 if answers[q] == "Yes" else 0.0 for q in questions}
    filtered = dict(raw)
    for question, parents in dependencies.items():
        for parent in parents:
            if parent != 0 and raw[parent] == 0:
                filtered[question] = 0.0
    return sum(filtered.values()) / len(filtered)


def test_alignment_is_the_authors_on_random_questions() -> None:
    rng = random.Random(0)
    for _ in range(300):
        questions = list(range(1, rng.randint(2, 20)))
        dependencies = {q: rng.sample([0, *questions], rng.randint(1, min(3, len(questions)))) for q in questions}
        answers = {q: rng.choice(["Yes", "No", "Yes", "yes"]) for q in questions}
        names = [str(q) for q in questions]
        verdict = alignment(
            names, {str(q): p for q, p in dependencies.items()}, {str(q): a for q, a in answers.items()}
        )
        assert verdict.score == pytest.approx(by_the_authors(questions, dependencies, answers))


def test_style_floors_each_similarity_before_the_mean() -> None:
    assert style(0.6, -0.4).score == pytest.approx(0.3)
    assert style(-0.6, -0.4).score == 0.0
    assert diversity([0.2, 0.4]) == oneig_dimensions.Diversity(pytest.approx(0.6), 2)


# ---- headlines -------------------------------------------------------------------------------------------------------


def write(folder: Path, lines: list[Mapping[str, Any]]) -> Path:
    path = folder / "perceptions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def aligned(prompt: str, *answers: str, category: str = "anime") -> dict[str, Any]:
    questions = {str(i): "?" for i, _ in enumerate(answers, 1)}
    return {
        "prompt_id": prompt, "category": category, "questions": questions, "dependencies": {},
        "answers": dict(zip(questions, answers, strict=True)),
    }  # fmt: skip


def refused(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("answers", "distances")} | {"status": "refused"}


def test_alignment_is_a_mean_over_prompts_not_over_pictures_or_categories(tmp_path: Path) -> None:
    lines = [aligned("a", "Yes"), aligned("a", "Yes"), aligned("a", "Yes"), aligned("b", "No", category="human"),
             refused(aligned("b", "Yes", category="human"))]  # fmt: skip
    result = report.score("oneig_alignment_en", write(tmp_path, lines))
    assert result.official["score"].value == pytest.approx((1 + 0) / 2)
    assert result.strict["score"].value == pytest.approx((1 + 0) / 2)
    assert result.official["score"].distinct == 2 and result.official["score"].count == 4
    assert result.categories["human"]["score"].value == 0.0
    assert result.verdicts[0]["yes"] == {"1": True} and result.verdicts[0]["score"] == 1.0


def test_a_refused_picture_vanishes_officially_and_is_zero_strictly(tmp_path: Path) -> None:
    lines = [aligned("a", "Yes"), refused(aligned("a", "Yes")), aligned("b", "Yes")]
    result = report.score("oneig_alignment_zh", write(tmp_path, lines))
    assert result.official["score"].value == 1.0
    assert result.strict["score"].value == pytest.approx(0.75)


def test_diversity_is_the_mean_over_prompts_of_all_pairs(tmp_path: Path) -> None:
    four = [{"prompt_id": "a", "distances": [0.5] * i} for i in range(4)]
    two = [{"prompt_id": "b", "distances": []}, {"prompt_id": "b", "distances": [0.1]}]
    result = report.score("oneig_diversity_en", write(tmp_path, [*four, *two, {"prompt_id": "c", "distances": []}]))
    assert result.official["score"].value == pytest.approx((0.5 + 0.1) / 2)  # c has no pair
    # Strictly a pair with a picture that is not there has the distance 0.
    missing = {"prompt_id": "b", "status": "missing"}
    result = report.score("oneig_diversity_en", write(tmp_path, [*four, *two, missing]))
    assert result.official["score"].value == pytest.approx(0.3)
    assert result.strict["score"].value == pytest.approx((0.5 + 0.1 / 3) / 2)


def test_style_and_reasoning_are_means_over_prompts(tmp_path: Path) -> None:
    similar = {"prompt_id": "a", "style_csd_similarity": 0.4, "style_encoder_similarity": 0.6}
    other = {"prompt_id": "b", "style_csd_similarity": -0.4, "style_encoder_similarity": 0.2}
    result = report.score("oneig_style_en", write(tmp_path, [similar, similar, other]))
    assert result.official["score"].value == pytest.approx((0.5 + 0.1) / 2)
    lines = [{"prompt_id": "a", "answer_cosine": 0.3}, {"prompt_id": "b", "answer_cosine": -0.1}]
    assert report.score("oneig_reasoning_en", write(tmp_path, lines)).official["score"].value == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("bench", "line", "message"),
    [
        ("alignment", aligned("a", "Yes") | {"questions": {}}, "questions: must hold a question"),
        ("alignment", aligned("a", "Yes") | {"answers": {}}, r"answers\.1: is missing"),
        ("alignment", aligned("a", "Yes") | {"answers": {"1": True}}, r"answers\.1: must be a text"),
        ("alignment", aligned("a", "Yes") | {"dependencies": {"1": [-1]}}, r"dependencies\.1\[0\]: must be a whole"),
        ("alignment", {"prompt_id": "a"}, "questions: is missing"),
        ("diversity", {"prompt_id": "a", "distances": [2.5]}, r"distances\[0\]: must be at most 2.01"),
        ("diversity", {"prompt_id": "a", "distances": None}, "distances: must be a list"),
        ("style", {"prompt_id": "a", "style_csd_similarity": 0.1}, "style_encoder_similarity: is missing"),
        ("style", {"prompt_id": "a", "style_csd_similarity": 7}, "style_csd_similarity: must be at most"),
        ("reasoning", {"prompt_id": "a", "answer_cosine": "0.3"}, "answer_cosine: must be a finite number"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_decided_names_its_field(
    tmp_path: Path, bench: str, line: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"line 1: {message}"):
        report.score(f"oneig_{bench}_en", write(tmp_path, [line]))


def test_a_dimension_without_a_picture_has_no_score(tmp_path: Path) -> None:
    with pytest.raises(LensError, match="there is nothing to score"):
        report.score("oneig_alignment_en", write(tmp_path, [refused(aligned("a", "Yes"))]))
    with pytest.raises(ConfigError, match="has no line of oneig_style_en"):
        report.score("oneig_style_en", write(tmp_path, [aligned("a", "Yes") | {"bench": "oneig_alignment_en"}]))


def test_clip_score_is_absent_where_some_pictures_have_no_cosine(tmp_path: Path) -> None:
    line = {"prompt": "a sign 'open'", "ocr_lines": ["open"], "prompt_id": "a"}
    both = report.score("cvtg2k", write(tmp_path, [line | {"clip_cosine": 0.3}, line | {"clip_cosine": -0.2}]))
    assert both.official["CLIPScore"].value == pytest.approx(0.75 / 2)
    assert both.verdicts[0]["clip_score"] == pytest.approx(0.75)
    assert "CLIPScore" not in report.score("cvtg2k", write(tmp_path, [line | {"clip_cosine": 0.3}, line])).official
    lost = {"prompt": line["prompt"], "prompt_id": "b", "status": "refused"}
    result = report.score("cvtg2k", write(tmp_path, [line | {"clip_cosine": 0.4}, lost]))
    assert result.official["CLIPScore"].value == pytest.approx(1.0)
    assert result.strict["CLIPScore"].value == pytest.approx(0.5)
