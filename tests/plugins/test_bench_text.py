"""The text benchmarks' decisions: the authors' verdicts on the samples, and what is easy to get wrong."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import asdict
from hypothesis import given, settings
from hypothesis import strategies as st
from lens_bench import cvtg, longtext, oneig
from lens_bench.text import edit_distance, kept_characters, overlap, without_sentinel

SAMPLES = Path(__file__).parents[1] / "cases" / "bench_samples.jsonl"
CASES = [case for line in SAMPLES.read_text().splitlines() if (case := json.loads(line))["bench"] != "geneval"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_a_sample_has_the_verdict_of_the_authors_code(case: dict[str, Any]) -> None:
    if case["bench"] == "cvtg2k":
        verdict: Any = cvtg.decide(case["prompt"], case["ocr_lines"])
    elif case["bench"] == "longtext_en":
        verdict = longtext.decide(case["text"], case["ocr_raw"])
    else:
        verdict = oneig.decide(case["text_content"], case["ocr_raw"])
    fields = asdict(verdict)
    assert fields == {key: case[key] for key in fields}
    assert set(case) - set(fields) <= {"bench", "id", "note", "prompt", "ocr_lines", "text", "text_content", "ocr_raw"}


# ---- what they share ----------------------------------------------------------------------------------------------


def slow_distance(a: str, b: str) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
    return int(table[-1, -1])


@settings(max_examples=400, deadline=None)
@given(st.text("abcé 中", max_size=80), st.text("abcé 中", max_size=80))
def test_the_edit_distance_is_that_of_the_whole_table(a: str, b: str) -> None:
    assert edit_distance(a, b) == slow_distance(a, b)


def test_the_edit_distance_of_long_texts_is_that_of_the_whole_table() -> None:
    rng = np.random.default_rng(0)
    for n, m in ((63, 64), (64, 65), (128, 40), (1, 200), (300, 310)):
        a, b = ("".join(rng.choice(list("abcd"), size)) for size in (n, m))
        assert edit_distance(a, b) == edit_distance(b, a) == slow_distance(a, b)
    assert edit_distance("", "") == 0 and edit_distance("", "abc") == edit_distance("abc", "") == 3


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_the_characters_that_count_are_those_of_the_published_pattern(text: str) -> None:
    pattern = r"[^\u4e00-\u9fa5a-zA-Z0-9\sàâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ]"
    assert kept_characters(text) == re.sub(r"\s+", " ", re.sub(pattern, "", text)).strip()


def test_punctuation_is_deleted_and_foreign_letters_too() -> None:
    assert kept_characters(" well-known,\n\tdon't  ") == "wellknown dont"
    assert kept_characters("ñandú Straße ﬁ Ｏ") == "and Strae", "only the listed accents are kept"
    assert kept_characters("cafe\u0301") == "cafe", "a combining accent is not the accented letter"


def test_a_sentinel_that_its_removal_forms_goes_only_beside_a_line_break() -> None:
    assert without_sentinel("a STOP b STOP", "STOP") == "a  b "
    assert without_sentinel("SSTOPTOP", "STOP") == "STOP"
    assert without_sentinel("a\nSSTOPTOP\nb", "STOP") == "a\nb"


def test_overlap_counts_repeats() -> None:
    assert overlap(["go", "go", "go", "on"], ["go", "x", "go"]) == 2


# ---- CVTG-2K ------------------------------------------------------------------------------------------------------


def test_words_stand_between_ascii_apostrophes_of_one_line() -> None:
    assert cvtg.reference_words("'One Two' and 'THREE'") == ["one", "two", "three"]
    assert cvtg.reference_words('‘curly’ "double" \'open') == []
    assert cvtg.reference_words("'' '  ' 'x'") == ["x"]
    assert cvtg.reference_words("'a\nb' c'") == ["c"], "the break ends the first; b's apostrophe opens the next"
    assert cvtg.reference_words("'a\u2028b'") == ["a", "b"], "other line ends are whitespace"
    assert cvtg.reference_words("'don't stop' it's") == ["don", "it"]


@settings(max_examples=300, deadline=None)
@given(st.text("'ab\n\r ", max_size=30))
def test_quotations_are_those_of_the_published_pattern(prompt: str) -> None:
    assert cvtg.reference_words(prompt) == [w for q in re.findall(r"'(.*?)'", prompt) for w in q.lower().split()]


@pytest.mark.parametrize("lines", [None, [], [""], [" \t"]])
def test_no_word_at_all_is_one_empty_prediction(lines: list[str] | None) -> None:
    verdict = cvtg.decide("'ab cdef'", lines)
    assert (
        verdict.word_ned == pytest.approx([1 - 2 / 2.00001, 1 - 4 / 4.00001], abs=1e-15) and min(verdict.word_ned) > 0
    )
    assert verdict.correct_words == 0 and verdict.ned == pytest.approx(sum(verdict.word_ned) / 2)


def test_an_engine_that_fails_is_zeros() -> None:
    verdict = cvtg.decide("'ab cdef'", None, failed=True)
    assert verdict == cvtg.Verdict(["ab", "cdef"], 2, 0, [0.0, 0.0], 0.0, 0.0)


def test_a_prompt_without_quotations_has_no_words_and_scores_zero() -> None:
    assert cvtg.decide("nothing quoted", ["x"]) == cvtg.Verdict([], 0, 0, [], 0.0, 0.0)


def test_punctuation_counts_and_case_does_not() -> None:
    verdict = cvtg.decide("'Stop! now'", ["STOP now."])
    assert verdict.correct_words == 0
    assert verdict.word_ned == pytest.approx([1 - 1 / 5.00001, 1 - 1 / 4.00001])


def test_the_partner_is_the_closest_by_difflib_and_ties_go_to_the_larger_text() -> None:
    # "abcd" shares as many letters with either in difflib's measure, and the larger text is the farther one by edits.
    assert (
        difflib.SequenceMatcher(None, "abxx", "abcd").ratio() == difflib.SequenceMatcher(None, "xabx", "abcd").ratio()
    )
    assert cvtg.decide("'abcd'", ["abxx xabx"]).word_ned == [cvtg.similarity("abcd", "xabx")]
    assert cvtg.similarity("abcd", "xabx") < cvtg.similarity("abcd", "abxx")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1), st.lists(st.text("abcD", max_size=6)))
def test_every_similarity_is_that_of_the_best_ratio(words: list[str], lines: list[str]) -> None:
    predictions = [word for line in lines for word in line.lower().split()] or [""]
    verdict = cvtg.decide(f"'{' '.join(words)}'", lines)
    for word, value in zip(verdict.gt_words, verdict.word_ned, strict=True):
        best = max((difflib.SequenceMatcher(None, p, word).ratio(), p) for p in predictions)[1]
        assert value == 1 - slow_distance(word, best) / (max(len(word), len(best)) + 1e-5)
    assert verdict.word_accuracy == sum(word in predictions for word in words) / len(words)


# ---- LongText-Bench -----------------------------------------------------------------------------------------------


def test_only_the_sentence_with_its_full_stop_is_removed() -> None:
    assert longtext.clean("No text recognized.\nHello") == "\nHello"
    assert longtext.clean("No text recognized") == "No text recognized"
    assert longtext.clean("addCriterion\nHello") == "addCriterion\nHello", "its removal is lost"
    assert longtext.decide(["Hello"], "addCriterion\nHello").ocr_normalised == "addcriterion hello"


def test_the_texts_are_joined_by_spaces_and_order_is_free() -> None:
    verdict = longtext.decide(["The  end,", "of the"], "OF the THE end end")
    assert verdict.gt_normalised == "the end of the"
    assert (verdict.match_word_count, verdict.gt_word_count, verdict.text_accuracy) == (4, 4, 1.0)


@pytest.mark.parametrize("text", [[], [""], ["…!"]])
def test_an_empty_reference_scores_zero(text: list[str]) -> None:
    verdict = longtext.decide(text, "words")
    assert (verdict.match_word_count, verdict.gt_word_count, verdict.text_accuracy) == (0, 0, 0.0)


def test_chinese_is_counted_by_characters_without_spaces() -> None:
    verdict = longtext.decide(["你好 世界", "OK"], "世界！ 你ok", chinese=True)
    assert verdict.gt_normalised == "你好世界OK" and verdict.ocr_normalised == "世界你ok"
    assert (verdict.match_word_count, verdict.gt_word_count) == (3, 6)


# ---- OneIG --------------------------------------------------------------------------------------------------------


def test_case_counts_and_the_list_is_used_as_it_stands() -> None:
    verdict = oneig.decide("['OPEN', \"don't\"]", "Open dont")
    assert verdict.gt_normalised == "OPEN dont"
    assert (verdict.edit_distance, verdict.completed, verdict.match_word_count, verdict.wac) == (3.0, 0, 1, 0.5)
    assert isinstance(verdict.edit_distance, float)


def test_both_sentinels_are_removed() -> None:
    assert oneig.decide("['a']", "addCriterion\nNo text recognized.a").ocr_normalised == "a"


def test_two_empty_texts_are_complete_but_no_word_is_right() -> None:
    verdict = oneig.decide("['']", "No text recognized.")
    assert (verdict.edit_distance, verdict.completed, verdict.gt_word_count, verdict.wac) == (0.0, 1, 0, 0.0)


def test_one_chinese_character_takes_all_spaces() -> None:
    assert oneig.normalise("Open 门 now") == "Open门now"
    assert oneig.decide("['a b']", "a 门 b").edit_distance == 1.0
    verdict = oneig.decide("['你好 你']", "你你你")
    assert (verdict.match_word_count, verdict.gt_word_count) == (2, 3)


def test_the_score_is_one_for_completed_texts_and_falls_with_distance_up_to_a_bound() -> None:
    assert oneig.text_score(30, 1, 0.5) == 1 and oneig.text_score(0, 0, 0) == 1
    assert oneig.text_score(30, 0.25, 0.5) == pytest.approx(1 - 30 * 0.75 * 0.5 / 100)
    assert oneig.text_score(250, 0, 0) == oneig.text_score(100, 0, 0) == 0
    assert oneig.text_score(60, 0, 0, oneig.WORST_DISTANCE["zh"]) == 0
