"""Models side by side: means over seeds, paired differences, and what must not be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lens_core.cli.main import main
from lens_core.evaluation.comparison import compare, read, table
from lens_core.types import CheckpointError, ConfigError


def result(values: list[float | None], model: str = "a", seed: int = 0, **other: Any) -> dict[str, Any]:
    """Half of the prompts are of task x, half of task y; words are no headline."""
    half = len(values) // 2
    pictures = [
        {"prompt": f"{i}", "task": "x" if i < half else "y", "value": v, "status": "ok", "seed": seed + i}
        for i, v in enumerate(values)
    ]
    words = {"prompt": "w", "task": "words", "value": 0.0, "status": "ok", "seed": 99}
    return {
        "benchmark": "b", "model": model, "model_hash": model, "seed": seed, "steps": 4, "guidance_scale": 1.0,
        "size": [8, 8], "headline": ["x", "y"], "pictures": [*pictures, words],
    } | other  # fmt: skip


def test_the_overall_score_is_the_mean_of_the_headline_tasks_over_seeds() -> None:
    (row,) = compare([result([1, 1, 0, 0]), result([1, 0, 1, None], seed=7)])
    assert row.seeds == 2
    assert row.tasks == {"x": 0.75, "y": pytest.approx(1 / 3), "words": 0.0}  # y: three pictures have a score, one is 1
    assert (row.overall.value, row.overall.missing) == (pytest.approx((0.75 + 1 / 3) / 2), 1)
    assert row.difference is None


def test_a_paired_interval_is_that_of_the_differences_alone() -> None:
    rng = np.random.default_rng(3)
    base = rng.integers(2, size=400).astype(float)
    better = base.copy()
    better[:200] += rng.uniform(-0.1, 0.2, 200)  # task x alone
    _, row = compare([result(list(base)), result(list(better), "b")])
    gained = (better - base)[:200]
    # Independently: half the mean of task x's gains, whose standard error is that of a mean of 200 over two
    error = gained.std() / np.sqrt(200) / 2
    assert row.difference is not None
    assert row.difference.value == pytest.approx(gained.mean() / 2, abs=1e-12)
    assert row.difference.low == pytest.approx(row.difference.value - 1.96 * error, abs=0.1 * error)
    assert row.difference.high == pytest.approx(row.difference.value + 1.96 * error, abs=0.1 * error)
    assert row.difference.pairs == 400
    apart = (row.overall.high - row.overall.low) / (row.difference.high - row.difference.low)
    assert apart > 3, "pairing must cancel what both models share"


def test_only_pictures_that_both_models_have_a_score_for_are_compared() -> None:
    easy, hard = [1.0] * 50, [0.0] * 50
    base = result([*easy, *hard] * 2)
    other = result([*easy, *([None] * 50)] * 2, "b")
    first, second = compare([base, other])
    assert (first.overall.value, second.overall.value) == (0.5, 1.0), "each row is of the model's own scores"
    assert second.overall.missing == 100
    assert second.difference is not None
    assert (second.difference.value, second.difference.pairs) == (0.0, 100)
    assert "| +0.000 | +0.000 to +0.000 | 100 |" in table([first, second])


def test_with_the_same_seeds_pictures_are_paired_seed_by_seed() -> None:
    # In seed 0 the other model has no score for what the first one fails at; averaging seeds first would favour it.
    base = [result([0, 1, 1, 1]), result([1, 1, 1, 1], seed=1)]
    other = [result([None, 1, 1, 1], "b"), result([1, 1, 1, 1], "b", seed=1)]
    _, row = compare([*base, *other])
    assert row.difference is not None
    assert (row.difference.value, row.difference.pairs) == (0.0, 7)


def test_a_task_with_one_score_still_has_a_difference() -> None:
    _, row = compare([result([1, None, 0, 0]), result([0, 1, 1, 0], "b")])
    assert row.difference is not None
    assert row.difference.value == pytest.approx((-1 + 0.5) / 2)
    with pytest.raises(ConfigError, match="no picture that both models"):
        compare([result([1, None, 0, 0]), result([None, 1, 1, 0], "b")])


def test_results_of_another_precision_are_no_seeds_of_the_same_model() -> None:
    rows = compare([result([1, 0], dtype="float32", device="cpu"), result([1, 0], dtype="bfloat16", device="cuda")])
    assert [row.name for row in rows] == [
        "a, 4 steps, guidance 1, float32 on cpu",
        "a, 4 steps, guidance 1, bfloat16 on cuda",
    ]


def test_pictures_of_one_prompt_are_one_draw_in_every_interval() -> None:
    rng = np.random.default_rng(6)
    of_prompt = rng.normal(size=(2, 60))
    base, other = result([0.25] * 480), result([0.25] * 480, "b")
    for task in (0, 1):
        for i in range(240):
            base["pictures"][240 * task + i]["cluster"] = other["pictures"][240 * task + i]["cluster"] = f"{i // 4}"
            other["pictures"][240 * task + i]["value"] = 0.25 + of_prompt[task, i // 4]
    _, row = compare([base, other])
    error = np.sqrt((of_prompt.var(1) / 60).sum()) / 2
    assert row.difference is not None
    for low, high in ((row.difference.low, row.difference.high), (row.overall.low, row.overall.high)):
        assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_the_interval_of_a_score_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(200):
        values = [*(rng.random(60) < 0.8), *(rng.random(60) < 0.4)]
        (row,) = compare([result([float(v) for v in values])])
        held += row.overall.low <= 0.6 <= row.overall.high
    assert 180 <= held <= 199  # 95 % of 200, plus or minus what 200 trials leave open


def test_folders_joined_by_commas_are_models_of_one_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, values in {"base": [1, 0, 0, 0], "s1": [1, 1, 0, 0], "s2": [1, 0, 1, 1]}.items():
        Path(name).mkdir()
        (Path(name) / "result.json").write_text(json.dumps(result(values, name)))
    assert main(["compare", "base", "s1,s2"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| s1,s2, 4 steps, guidance 1 | 2 | 0.75 | 0.50 |") and "**0.625**" in last
    rows = compare([result([1, 0], m, steps=steps) | {"group": "g"} for m, steps in (("a", 4), ("b", 40))])
    assert [row.name for row in rows] == ["g, 4 steps, guidance 1", "g, 40 steps, guidance 1"], (
        "other settings, other row"
    )
    with pytest.raises(ConfigError, match="the seed 0 stands twice"):
        compare([r | {"group": "g"} for r in (result([1, 0]), result([1, 0]))])


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match="two benchmarks"):
        compare([result([1, 0]), result([1, 0], "b", benchmark="c")])
    with pytest.raises(ConfigError, match="other prompts"):
        compare([result([1, 0]), result([1, 0, 1, 0], "b")])
    with pytest.raises(ConfigError, match="seed 0 stands twice"):
        compare([result([1, 0]), result([1, 0])])
    with pytest.raises(ConfigError, match="no score"):
        compare([result([None, None, 1, 0])])


def test_a_benchmark_is_its_options_however_they_were_written() -> None:
    def measured(model: str, written: str, **options: Any) -> dict[str, Any]:
        run = {"benchmark": "p:b", "options": {"split": "test", "extras": False} | options}
        return result([1, 0], model, benchmark=written, run=run)

    plain = measured("a", "{use: b, split: test}")
    assert len(compare([plain, measured("b", "{split: test, use: b}")])) == 2
    assert len(compare([plain, measured("b", "b", newer=1)])) == 2, "older files do not name every option"
    with pytest.raises(ConfigError, match="two benchmarks"):
        compare([plain, measured("b", "{use: b, split: test, extras: true}", extras=True)])
    with pytest.raises(ConfigError, match="two benchmarks"):
        compare([plain, result([1, 0], "b")])


def test_a_weight_is_that_of_a_picture_with_a_score_whatever_the_order_of_seeds() -> None:
    def measured(model: str, seed: int, long: float | None, short: float) -> dict[str, Any]:
        made = result([long, short], model, seed=seed, headline=["x"])
        for picture, weight in zip(made["pictures"], (100, 1), strict=False):
            picture |= {"task": "x"} | ({} if picture["value"] is None else {"weight": weight})
        return made

    base, failed, whole = measured("a", 0, 0.0, 1.0), measured("b", 0, None, 1.0), measured("b", 1, 1.0, 1.0)
    for others in ([failed, whole], [whole, failed]):
        row = compare([base, *others])[1]
        assert row.difference is not None and row.difference.value == pytest.approx(100 / 101)


def test_few_pairs_that_are_all_alike_have_no_interval_and_a_bar_in_a_name_is_no_column() -> None:
    rows = compare([result([0, 0]), result([1, 1], "b")])
    assert "| +1.000 | – | 2 |" in table(rows)
    many = compare([result([0.0] * 60), result([1.0] * 60, "b")])
    assert "| +1.000 | +1.000 to +1.000 | 60 |" in table(many)
    barred = result([1, 0], "a|b")
    for picture in barred["pictures"]:
        picture["task"] = {"x": "x|z"}.get(picture["task"], picture["task"])
    head, _, row = table(compare([barred | {"headline": ["x|z", "y"]}])).splitlines()
    assert "x\\|z" in head and "| a\\|b, 4 steps" in row
    assert head.replace("\\|", "").count("|") == row.replace("\\|", "").count("|")


def test_the_command_prints_and_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, run in {"a": result([1, 0, 1, 0]), "b": result([1, 1, 1, 1], "b")}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(run), encoding="utf-8")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "table.md")]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.md").read_text(encoding="utf-8")
    head, rule, first, second = printed.splitlines()
    assert head.count("|") == rule.count("|") == first.count("|") == second.count("|")
    assert "a, 4 steps, guidance 1 " in first and "**0.500**" in first
    assert "| +0.500 |" in second


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"headline": None}, "headline"),
        ({"pictures": None}, "pictures"),
        ({"pictures": [{"prompt": "p", "task": "x"}]}, "value"),
        ({"pictures": [{"prompt": "p", "task": "x", "value": "1"}]}, "value"),
        ({"headline": ["z"]}, "headline"),
        ({"headline": []}, "headline"),
        ({"headline": [["z"]]}, "headline"),
        ({"model": "a\nb"}, "model"),
        ({"model_hash": ["a"]}, "model_hash"),
        ({"benchmark": "x" * 2000}, "benchmark"),
        ({"seed": 0.5}, "seed"),
        ({"steps": True}, "steps"),
        ({"size": [1]}, "size"),
        ({"guidance_scale": "1"}, "guidance_scale"),
        ({"group": 7}, "group"),
        ({"pictures": [{"prompt": "p", "task": "x", "value": float("inf")}]}, "value"),
        ({"pictures": [{"prompt": "p", "task": "x", "value": True}]}, "value"),
        ({"pictures": [[[]]]}, "value"),
    ],
)
def test_a_result_that_lacks_something_is_refused_by_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    whole = result([1, 0])
    broken = {k: v for k, v in (whole | change).items() if v is not None}
    (tmp_path / "result.json").write_text(json.dumps(broken), encoding="utf-8")
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path / "result.json")
    (tmp_path / "result.json").write_text(json.dumps(whole), encoding="utf-8")
    assert table(compare([read(tmp_path / "result.json")])).count("\n") == 2


def test_rows_that_differ_by_a_setting_alone_are_called_by_it() -> None:
    early = {"sampler": {"use": "euler", "mu": None}, "negative_prompt": "", "quality": "high"}
    late = {**early, "sampler": {"use": "euler", "mu": 2.0}, "negative_prompt": "blurred"}
    rows = compare([result([1, 0, 1, 0], settings=early), result([1, 1, 1, 0], settings=late)])
    assert [row.name for row in rows] == [
        "a, 4 steps, guidance 1, sampler {'use': 'euler', 'mu': None}",
        "a, 4 steps, guidance 1, sampler {'use': 'euler', 'mu': 2.0}, negative_prompt 'blurred'",
    ]
    (row,) = compare([result([1, 0, 1, 0], settings=early), result([1, 1, 1, 0], seed=7, settings=early)])
    assert row.name == "a, 4 steps, guidance 1", "what all have in common is left out"
    rows = compare([result([1, 0, 1, 0]), result([1, 1, 1, 0], settings=late)])
    assert rows[0].name == "a, 4 steps, guidance 1", "older files say nothing of it"
