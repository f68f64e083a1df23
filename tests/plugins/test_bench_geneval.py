"""GenEval's decision: the authors' verdicts on the samples, and a second transcription on random detections."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import asdict
from lens_bench import geneval
from lens_bench.geneval import CLASSES, COLORS, Options, decide, iou, kept_rows, relations

from lens_core.io.json_fields import FieldError

SAMPLES = Path(__file__).parents[1] / "cases" / "bench_samples.jsonl"
CASES = [case for line in SAMPLES.read_text().splitlines() if (case := json.loads(line))["bench"] == "geneval"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_a_sample_has_the_verdict_of_the_authors_code(case: dict[str, Any]) -> None:
    verdict = decide(case["metadata"], case["detections"], case["colors"], Options(**case.get("options", {})))
    assert asdict(verdict) == {key: case[key] for key in ("kept", "color_asked", "correct", "reason")}


def test_there_are_80_classes_and_three_have_names_that_coco_does_not_give() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80 and all(name == name.strip() for name in CLASSES)
    assert CLASSES[64:67] == ("computer mouse", "tv remote", "computer keyboard")
    assert (CLASSES[0], CLASSES[9], CLASSES[57], CLASSES[79]) == ("person", "traffic light", "couch", "toothbrush")


# ---- a second transcription, in other terms -----------------------------------------------------------------------


def pixels(box: list[int]) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box[0], box[2] + 1) for y in range(box[1], box[3] + 1)}


def test_overlap_is_that_of_the_pixels_and_the_last_one_belongs_to_a_box() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        a, b = rng.integers(0, 9, (2, 4)).tolist()  # degenerate ones too
        union = len(pixels(a) | pixels(b))
        overlap = len(pixels(a) & pixels(b)) / union if union else 0.0
        assert iou(a, b) == iou(b, a) == pytest.approx(overlap, abs=1e-12)
        seen.add(overlap > 0)
    assert seen == {False, True}
    assert iou([3, 3, 3, 3], [3, 3, 3, 3]) == 1  # a box of one pixel


def true_relations(a: list[float], b: list[float], margin: float) -> set[str]:
    """In exact arithmetic: a share of more than one half is a square of more than one quarter."""
    ax, ay, aw, ah = (Fraction(v) for v in (a[0] + a[2], a[1] + a[3], abs(a[2] - a[0]), abs(a[3] - a[1])))
    bx, by, bw, bh = (Fraction(v) for v in (b[0] + b[2], b[1] + b[3], abs(b[2] - b[0]), abs(b[3] - b[1])))
    dx, dy, m = (ax - bx) / 2, (ay - by) / 2, Fraction(margin)
    rx, ry = max(abs(dx) - m * (aw + bw), 0), max(abs(dy) - m * (ah + bh), 0)
    if max(rx, ry) < Fraction(1, 1000):
        return set()
    far = dx * dx + dy * dy
    names = {"left of" if dx < 0 else "right of"} if 4 * rx * rx > far else set()
    return names | ({"above" if dy < 0 else "below"} if 4 * ry * ry > far else set())


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.25])
def test_relations_are_those_of_exact_arithmetic(margin: float) -> None:
    rng = np.random.default_rng(1)
    counts = [0, 0, 0]
    for _ in range(2000):
        a, b = (rng.random((2, 4)) * 400).tolist()  # every other box has its corners swapped on an axis
        expected = true_relations(a, b, margin)
        assert relations(a, b, margin) == expected
        counts[len(expected)] += 1
    assert min(counts) > 0 or margin == 0.0


def test_a_direction_of_exactly_one_half_does_not_hold() -> None:
    assert relations([0, 0, 50, 50], [20, 0, 70, 50]) == set()  # 20 apart, 10 of them the margin
    assert relations([0, 0, 50, 50], [20.5, 0, 70.5, 50]) == {"left of"}
    assert relations([0, 0, 0, 0], [3, 4, 3, 4], 0.0) == {"left of", "above"}


def test_equal_centres_have_no_relation_whatever_their_sizes() -> None:
    assert relations([0, 0, 10, 10], [0, 0, 10, 10]) == relations([4, 4, 6, 6], [0, 0, 10, 10], 0.0) == set()


def second_decision(metadata: Any, detections: Any, colors: Any, o: Options) -> tuple[Any, ...]:
    """Official rules once more, on objects that carry their class and row. Scores are distinct."""
    floor = o.counting_threshold if metadata["tag"] == "counting" else o.threshold
    kept: dict[str, list[int]] = {}
    for name, rows in detections.items():
        best = sorted((i for i, row in enumerate(rows) if row[4] > floor), key=lambda i: -rows[i][4])[: o.max_objects]
        alive = list(best)
        for i in best:
            if i in alive and o.max_overlap != 1:
                later = best[best.index(i) + 1 :]
                alive = [j for j in alive if j not in later or iou(rows[i], rows[j]) < o.max_overlap]
        if alive:
            kept[name] = alive
    results: list[list[list[float]] | None] = []
    reasons, colour_rows = [], []
    for want in metadata.get("include", []):
        mine = kept.get(want["class"], [])[: want["count"]]
        bad = None
        if len(mine) != want["count"]:
            bad = f"expected {want['class']}>={want['count']}, found {len(mine)}"
        if bad is None and "color" in want:
            colour_rows += [(want["class"], i) for i in mine]
            seen = [colors[want["class"]][i] for i in mine]
            right = sum(c == want["color"] for c in seen)
            if right < want["count"]:
                rest = ", ".join(f"{seen.count(c)} {c}" for c in sorted(set(seen), key=COLORS.index))
                bad = f"expected {want['color']} {want['class']}>={want['count']}, found {right} {want['color']}; and "
                bad += rest
        boxes = [detections[want["class"]][i] for i in mine]
        if bad is None and "position" in want:
            relation, index = want["position"]
            goal = results[index]
            pairs = [] if goal is None else [(a, b) for a in boxes for b in goal]
            wrong = [r for a, b in pairs if relation not in (r := true_relations(a, b, o.position_threshold))]
            if goal is None:
                bad = f"no target for {want['class']} to be {relation}"
            elif wrong:
                bad = f"expected {want['class']} {relation} target, found {' and '.join(sorted(wrong[0]))} target"
        results.append(boxes if bad is None else None)
        reasons += [bad] * (bad is not None)
    for want in metadata.get("exclude", []):
        n = len(kept.get(want["class"], []))
        reasons += [f"expected {want['class']}<{want['count']}, found {n}"] * (n >= want["count"])
    return kept, colour_rows, not reasons, "\n".join(reasons)


def random_case(rng: np.random.Generator) -> tuple[Any, ...]:
    names = ["dog", "apple", "bus"]
    detections = {}
    for name in names[: rng.integers(1, 4)]:
        n = int(rng.choice([0, 1, 2, 3, 5, 18, 30]))
        corners = rng.random((n, 2)) * 100
        rows = np.concatenate([corners, corners + rng.random((n, 2)) * 60], 1) + rng.integers(0, 2) * 50
        scores = rng.permutation(1000)[:n] / 1000 * 0.9 + rng.choice([0.0, 0.1])
        detections[name] = np.concatenate([rows, scores[:, None]], 1).tolist()
    colors = {name: rng.choice(["red", "blue"], len(rows)).tolist() for name, rows in detections.items()}
    include = []
    for i in range(rng.integers(0, 4)):
        clause: dict[str, Any] = {"class": str(rng.choice(names)), "count": int(rng.integers(1, 3))}
        if rng.random() < 0.4:
            clause["color"] = str(rng.choice(["red", "blue"]))
        if i and rng.random() < 0.7:
            clause["position"] = [str(rng.choice(geneval.RELATIONS)), int(rng.integers(0, i))]
        include.append(clause)
    exclude = [{"class": str(rng.choice(names)), "count": int(rng.integers(1, 18))} for _ in range(rng.integers(0, 2))]
    metadata = {"tag": str(rng.choice(["position", "counting"])), "include": include, "exclude": exclude}
    options = Options(
        threshold=float(rng.choice([0.1, 0.3])),
        counting_threshold=float(rng.choice([0.5, 0.9])),
        max_objects=int(rng.choice([2, 16])),
        max_overlap=float(rng.choice([0.0, 0.3, 0.6, 1.0, 1.5])),
        position_threshold=float(rng.choice([0.0, 0.1])),
    )
    return metadata, detections, colors, options


def test_random_pictures_have_the_verdict_of_a_second_transcription() -> None:
    rng = np.random.default_rng(2)
    words: dict[str, int] = {"and ": 0, "no target": 0, "<": 0, "; and": 0, "target, found  target": 0}
    correct = 0
    for _ in range(1500):
        case = random_case(rng)
        kept, colour_rows, right, reason = second_decision(*case)
        verdict = decide(*case)
        assert (verdict.kept, verdict.correct, verdict.reason) == (kept, right, reason)
        assert {name: [i for n, i in colour_rows if n == name] for name in dict(colour_rows)} == verdict.color_asked
        correct += right
        for word in words:
            words[word] += word in reason
    assert correct > 100 and all(count > 20 for count in words.values()), "every kind of failure occurs"


# ---- edges --------------------------------------------------------------------------------------------------------


def test_rows_of_equal_score_come_in_the_reverse_order_of_numpys_sort() -> None:
    def rows(scores: list[float]) -> list[list[float]]:
        return [[0.0, 0.0, 1.0, 1.0, score] for score in scores]

    assert kept_rows(rows([0.5, 0.5]), 0.3) == [1, 0]
    assert kept_rows(rows([0.5, 0.9, 0.5]), 0.3) == [1, 2, 0]
    rng = np.random.default_rng(3)
    for n in (5, 16, 17, 40):
        scores = (rng.integers(4, 8, n) / 8).tolist()
        assert kept_rows(rows(scores), 0.3, max_objects=n) == np.argsort(np.array(scores))[::-1].tolist()


def test_the_cap_comes_before_the_overlap_filter() -> None:
    twins = [[0, 0, 9, 9, 0.99 - i / 1000] for i in range(16)]
    apart = [[100, 100, 109, 109, 0.5]]
    assert kept_rows([*twins, *apart], 0.3, max_overlap=0.5) == [0]  # the 17th is not considered
    assert kept_rows([*twins[:15], *apart], 0.3, max_overlap=0.5) == [0, 15]


def test_a_box_that_was_dropped_drops_no_other() -> None:
    rows = [[0, 0, 99, 9, 0.9], [50, 0, 149, 9, 0.8], [100, 0, 199, 9, 0.7]]
    assert kept_rows(rows, 0.3, max_overlap=0.3) == [0, 2]


def test_more_than_sixteen_objects_cannot_be_counted() -> None:
    rows = [[i, 0, i + 1, 1, 0.91 + i / 1000] for i in range(20)]
    metadata = {"tag": "counting", "exclude": [{"class": "dog", "count": 17}]}
    assert decide(metadata, {"dog": rows}).correct
    assert (
        decide(metadata | {"exclude": [{"class": "dog", "count": 16}]}, {"dog": rows}).reason
        == "expected dog<16, found 16"
    )


def test_a_threshold_is_strict_and_counting_has_its_own_for_every_class() -> None:
    detections = {"dog": [[0, 0, 9, 9, 0.9]], "cat": [[0, 0, 9, 9, 0.3], [0, 0, 9, 9, 0.31]]}
    assert decide({"tag": "counting"}, detections).kept == {}
    assert decide({"tag": "colors"}, detections).kept == {"dog": [0], "cat": [1]}


def test_only_the_most_confident_objects_are_asked_for_their_colour() -> None:
    rows = [[0, 0, 9, 9, 0.5], [0, 0, 9, 9, 0.8], [0, 0, 9, 9, 0.7]]
    metadata = {"tag": "colors", "include": [{"class": "dog", "count": 2, "color": "red"}]}
    verdict = decide(metadata, {"dog": rows}, {"dog": ["red", "red", "blue"]})
    assert verdict.color_asked == {"dog": [1, 2]}
    assert verdict.reason == "expected red dog>=2, found 1 red; and 1 red, 1 blue"


def test_a_class_in_two_clauses_is_asked_twice() -> None:
    clauses = [{"class": "dog", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}]
    verdict = decide({"tag": "color_attr", "include": clauses}, {"dog": [[0, 0, 9, 9, 0.5]]}, {"dog": ["red"]})
    assert verdict.color_asked == {"dog": [0, 0]}
    assert verdict.reason == "expected blue dog>=1, found 0 blue; and 1 red"


def test_a_failed_colour_keeps_the_position_from_being_tried() -> None:
    clauses = [
        {"class": "cat", "count": 1},
        {"class": "dog", "count": 1, "color": "red", "position": ["above", 0]},
        {"class": "bus", "count": 1, "position": ["above", 1]},
    ]
    boxes = {name: [[0, 0, 9, 9, 0.5]] for name in ("cat", "dog", "bus")}
    verdict = decide({"tag": "position", "include": clauses}, boxes, {"dog": ["blue"]})
    assert verdict.reason == "expected red dog>=1, found 0 red; and 1 blue\nno target for bus to be above"


def test_every_pair_must_have_the_relation_and_the_first_that_has_not_is_the_reason() -> None:
    clauses = [{"class": "cat", "count": 2}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    cats = [[200, 0, 210, 10, 0.9], [0, 200, 10, 210, 0.8]]
    verdict = decide({"tag": "position", "include": clauses}, {"cat": cats, "dog": [[0, 0, 10, 10, 0.5]]})
    assert verdict.reason == "expected dog left of target, found above target"
    far = {"cat": [[200, 200, 210, 210, 0.9], [300, 0, 310, 10, 0.8]], "dog": [[0, 0, 10, 10, 0.5]]}
    assert decide({"tag": "position", "include": clauses}, far).correct
    clauses[1]["position"] = ["right of", 0]
    assert decide({"tag": "position", "include": clauses}, far).reason == (
        "expected dog right of target, found above and left of target"
    )


@pytest.mark.parametrize("index", [0, 1, 7, -1])
def test_a_target_that_is_no_earlier_clause_is_refused(index: int) -> None:
    metadata = {"tag": "position", "include": [{"class": "dog", "count": 1, "position": ["above", index]}]}
    with pytest.raises(FieldError, match=r"metadata.include\[0\].position: its target is clause"):
        decide(metadata, {"dog": [[0, 0, 9, 9, 0.5]]})
    assert decide(metadata, {}).reason == "expected dog>=1, found 0", "it is never reached"


@pytest.mark.parametrize(("answers", "message"), [([], "has no answer for row 0"), (["rad"], "Did you mean 'red'?")])
def test_a_colour_that_is_not_answered_is_no_failure_of_the_picture(answers: list[str], message: str) -> None:
    metadata = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    with pytest.raises(FieldError) as error:
        decide(metadata, {"dog": [[0, 0, 9, 9, 0.5]]}, {"dog": answers})
    assert message in str(error.value)


def test_an_entry_that_asks_for_nothing_is_met_by_any_picture() -> None:
    assert decide({"tag": "single_object"}, {}) == geneval.Verdict({}, {}, True, "")
    assert math.isclose(Options().max_overlap, 1)
