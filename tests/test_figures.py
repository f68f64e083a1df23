"""Figures in the documentation are those of the result files beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lens_core.evaluation.comparison import compare, read_folders

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
MODELS = ("first-tiny", "rl", "turbo")
RULES = {
    "first splits, first reader": "first-reader",
    "first splits (`rules: 1`), today's reader": "rules-1",
    "split `test` (`rules: 2`), today's reader": ".",
}


def result(*folders: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((RESULTS.joinpath(*folders) / "result.json").read_text(encoding="utf-8"))
    return data


def rows(first_model: bool = True) -> dict[str, list[str]]:
    """The table of scores: its first column -> the others."""
    page = (ROOT / "docs" / "proving-ground.md").read_text(encoding="utf-8")
    section = page.split("## What the embedded checkpoints score")[1].split("\n## ")[0]
    section = section.split("### The first model")[first_model]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {first: others for first, *others in cells}


@pytest.mark.parametrize(("label", "folder"), RULES.items())
def test_the_table_of_scores_is_that_of_the_results(label: str, folder: str) -> None:
    compared = compare(read_folders([RESULTS / model / folder for model in MODELS]))
    want = [f"{r.overall.value:.3f} ({r.overall.low:.3f} to {r.overall.high:.3f})" for r in compared]
    assert rows()[label][:3] == want
    if folder != "first-reader":
        assert rows()[label][3] == f"{result('first-tiny', folder)['ceiling']['overall']:.3f}"


def test_the_share_of_all_pictures_is_that_of_the_results() -> None:
    shares = [f"{result(model)['pooled']['value']:.3f}" for model in MODELS]
    ceiling = f"{result('first-tiny')['ceiling']['pooled']:.3f}"
    assert rows()["of all pictures of the last line, share right"] == [*shares, ceiling]


def test_what_rl_gained_is_the_difference_of_the_results() -> None:
    page = " ".join((ROOT / "docs" / "proving-ground.md").read_text(encoding="utf-8").split())
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    gains = {}
    for folder in RULES.values():
        gain = compare(read_folders([RESULTS / model / folder for model in MODELS[:2]]))[1].difference
        assert gain is not None
        gains[folder] = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
        assert gains[folder] in page
    assert gains["."] in readme


def turbo_seeds(method: str = "regression") -> list[str]:
    return [str(RESULTS / "turbo" / method / f"seed-{seed}") for seed in range(3)]


def seeds(side: int) -> list[str]:
    return [str(RESULTS / "tiny" / str(side) / f"seed-{seed}") for seed in range(3)]


@pytest.mark.parametrize("side", [128, 64])
def test_the_scores_of_the_embedded_model_are_those_of_the_results(side: int) -> None:
    (row,) = compare(read_folders([",".join(seeds(side))]))
    results = [result("tiny", str(side), f"seed-{seed}") for seed in range(3)]
    share = sum(p["value"] for one in results for p in one["pictures"]) / 1500
    want = [f"{value:.2f}" for value in row.tasks.values()]
    want += [f"**{row.overall.value:.3f}** ({row.overall.low:.3f} to {row.overall.high:.3f})"]
    assert rows(first_model=False)[f"{side} px"] == [*want, f"{results[0]['ceiling']['overall']:.3f}", f"{share:.3f}"]


def test_the_results_of_the_embedded_model_are_those_of_its_training_run() -> None:
    facts = result("embedded")
    measured = [score for score in facts["scores"] if score["split"] == "test"]
    assert len(measured) == 6
    for score in measured:
        stored = result("tiny", str(score["side"]), f"seed-{score['seed']}")
        assert [p["value"] for p in stored["pictures"]] == score["values"]
        assert stored["guidance_scale"] == score["guidance"]


def test_the_readme_says_what_the_results_say() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    (row,) = compare(read_folders([",".join(seeds(128))]))
    results = [result("tiny", "128", f"seed-{seed}") for seed in range(3)]
    assert len({p.get("cluster", p["prompt"]) for p in results[0]["pictures"]}) == 500
    assert re.search(r"On (\d+) distinct test prompts", readme)[1] == "500"  # type: ignore[index]  # None fails too
    assert len(results[0]["headline"]) == 5
    assert f"scores {row.overall.value:.2f} in the mean of five tasks" in readme
    assert f"(95 % interval {row.overall.low:.2f} to {row.overall.high:.2f}, three times 500 pictures" in readme
    assert f"can score more than {results[0]['ceiling']['overall']:.2f})" in readme
    share = sum(p["value"] for one in results for p in one["pictures"]) / 1500
    assert f"words included, {share:.2f} are right" in readme
    _, turbo = compare(read_folders([",".join(seeds(128)), ",".join(turbo_seeds())]))
    assert turbo.difference is not None
    assert f"scores {-turbo.difference.value:.2f} less than its teacher" in readme
    assert f"scores {turbo.overall.value:.3f} ({turbo.overall.low:.3f} to {turbo.overall.high:.3f}) at 128 px" in (
        ROOT / "docs" / "proving-ground.md"
    ).read_text(encoding="utf-8")


def test_the_scores_of_the_student_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "distill.md").read_text(encoding="utf-8").split("## The embedded `tiny:turbo`")[1]
    models = [seeds(128), turbo_seeds(), turbo_seeds("dmd2")]
    rows = compare(read_folders([",".join(model) for model in models]))
    for row in rows:
        cells = [f"{value:.2f}" for value in row.tasks.values()] + [f"**{row.overall.value:.3f}**"]
        assert " | ".join([*cells, f"{row.overall.low:.3f} to {row.overall.high:.3f}"]) in page
        gap = row.difference
        assert gap is None or f"| {gap.value:+.3f} | {gap.low:+.3f} to {gap.high:+.3f} |" in page
    _, better = compare(read_folders([",".join(model) for model in models[:0:-1]]))
    assert better.difference is not None
    assert f"by {better.difference.value:+.3f} ({better.difference.low:+.3f} to {better.difference.high:+.3f})" in page


def measured(*path: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(RESULTS.joinpath(*path).read_text(encoding="utf-8"))
    return data


def page_of(*path: str) -> str:
    return " ".join(ROOT.joinpath(*path).read_text(encoding="utf-8").split())


def seconds(way: dict[str, float] | None) -> str:
    if way is None:
        return "not timed"
    median, least, most = (way[k] for k in ("median_s", "least_s", "most_s"))
    digits = 2 if median >= 1 else 3
    return f"{median:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


@pytest.mark.parametrize(("card", "file", "timed"), [("H100", "h100-80gb", 4), ("H200", "h200", 2)])
def test_the_times_on_a_gpu_are_those_of_the_results(card: str, file: str, timed: int) -> None:
    page = page_of("docs", "gpu.md")
    items = measured("gpu", f"{file}.json")["latency"]["items"]
    rows = []
    for side in (1024, 512):
        for mode, words in (("turbo", "4 steps without guidance"), ("base", "20 steps with guidance")):
            graphed = items.get(f"graphed {mode} {side}x{side}", {}).get("ways", {})
            ways = graphed | items[f"{mode} {side}x{side}"].get("ways", {})
            cells = [seconds(ways.get(name)) for name in ("port", "lens", "compiled", "graphed")]
            rows += [f"| {side}x{side}, {words} | {card} | {' | '.join(cells)} |"] * bool(ways)
    assert len(rows) == timed == page.count(f" | {card} | ")
    assert all(row in page for row in rows)


def test_the_goals_on_a_gpu_are_compared_with_the_results() -> None:
    page, readme = page_of("docs", "gpu.md"), page_of("README.md")
    data = measured("gpu", "h200.json")
    items, (setup, _) = data["latency"]["items"], data["training"]["items"].values()
    turbo, base = items["turbo 1024x1024"], items["base 1024x1024"]
    graphed = items["graphed turbo 1024x1024"]["ways"]["graphed"]["median_s"]
    steps = {name: way["median_s"] for name, way in base["ways"].items()}
    assert f"0.22 s | {turbo['ways']['compiled']['median_s']:.3f} s compiled, {graphed:.3f} s graphed | yes |" in page
    assert f"1.50 s | {steps['compiled']:.2f} s compiled, {steps['graphed']:.2f} s graphed | no, by 4 % |" in page
    assert f"{steps['graphed'] / 1.5 - 1:.0%}" == "4%"
    faster = {name: f"{base[f'port / {name}']['median']:.2f} times" for name in ("compiled", "graphed")}
    assert f"{faster['compiled']} compiled, {faster['graphed']} graphed | yes |" in page
    assert f"{turbo['port / compiled']['median']:.2f} times compiled; " in page
    ways = {name: way for name, way in setup["ways"].items() if "median_s" in way}
    assert len(ways) == 3
    for name, way in ways.items():
        speed = f"{way['images_per_s']:.1f} | {100 * way['mfu']:.1f} % | {way['memory_gb']:.1f}"
        assert f"| {name} | {seconds(way)} | {speed} |" in page
    trained = ways["bucketed, compiled"]
    assert f"40 images/s | {trained['images_per_s']:.1f} images/s compiled | no |" in page
    assert f"MFU 45 % | {100 * trained['mfu']:.1f} % compiled | no |" in page
    assert f"forecasts {setup['dry_run_gb']:.1f} GB" in page
    assert f"takes {steps['compiled']:.2f} s for 20 guided steps compiled, {faster['compiled']} as fast" in readme
    assert f"and {graphed:.2f} s for four" in readme and f"at {trained['images_per_s']:.0f} images a second" in readme


def test_the_ratios_on_a_cpu_are_those_of_the_results() -> None:
    page, data = page_of("docs", "gpu.md"), measured("cpu", "ratios.json")
    rows = {}
    for key, words, goal in (("port_over_lens", "the port", 1.5), ("qwenimage_over_lens", "QwenImage", 1.6)):
        for size, record in data["sizes"].items():
            rows[f"guided step, {words}, {size}"] = record[key], goal
    for kind, record in data["encoder"].items():
        tokens = f"{record['tokens']['prompt']} tokens after {record['tokens']['before']}"
        rows[f"text encoder without the cache, {kind} prompts ({tokens})"] = record["plain_over_lens"], 1.6
    assert len(rows) == 6
    for words, (ratio, goal) in rows.items():
        cells = " | ".join(f"{ratio[k]:.2f}" for k in ("median", "least", "most"))
        assert f"| {words} | {cells} | {goal} | {'yes' if ratio['median'] >= goal else 'no'} |" in page


def test_the_kernels_and_tests_on_a_gpu_are_those_of_the_results() -> None:
    page, data = page_of("docs", "gpu.md"), measured("gpu", "h100-80gb.json")
    items = data["latency"]["items"]
    for name in ("port", "lens", "compiled"):
        kernel = items["kernels"][name]
        attention = next(k["ms"] for k in kernel["top"] if "sdpa" in k["name"])
        assert f"| `{name}` | {kernel['launches']} | {kernel['milliseconds']:.1f} | {attention:.1f} |" in page
    outcomes = [test["outcome"] for test in data["correctness"]["tests"].values()]
    assert outcomes == ["passed"] * 48 and "48 of 51 tests passed" in page


@pytest.mark.parametrize(
    ("label", "folder"),
    {
        "`tiny:`, where both began": "start",
        "same noise levels": "same",
        "noisier": "noisier",
        "the mean of these two": "mean",
    }.items(),
)
def test_what_learning_on_gave_is_what_its_tables_say(label: str, folder: str) -> None:
    text = (RESULTS / "embedded" / "named" / folder / "table.md").read_text(encoding="utf-8")
    cells = [[c.strip(" *") for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    by_task = {row[0].split()[0].strip("*"): row[1:3] for row in cells}
    *tasks, overall = rows(first_model=False)[label]
    names = ("two", "counting", "colours", "position", "attribution", "words")
    assert tasks == [f"{float(by_task[name][0]):.2f}" for name in names]
    assert overall == f"{by_task['overall'][0]} ({by_task['overall'][1]})"


def test_where_the_student_loses_is_what_its_results_say() -> None:
    page = (ROOT / "docs" / "distill.md").read_text(encoding="utf-8")
    patterns = json.loads((RESULTS / "turbo" / "steps.json").read_text(encoding="utf-8"))["patterns"]
    for pattern, measured in patterns.items():
        values = [measured["tasks"][t] for t in ("two", "counting", "colours", "position", "attribution", "words")]
        row = re.search(rf"^\| {pattern}[^|]*\|(.*)\|$", page, re.MULTILINE)
        assert row is not None, pattern
        *tasks, overall, difference = (cell.strip() for cell in row[1].split("|"))
        assert tasks == [f"{value:.2f}" for value in values] and overall == f"{measured['overall']['value']:.3f}"
        gain = measured["difference"]
        want = f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
        assert difference == (want if pattern != "SSSS" else "")
    alone, helped = json.loads((RESULTS / "turbo" / "steps-test.json").read_text(encoding="utf-8"))["patterns"].values()
    gain = helped["difference"]
    want = f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
    said = f"SSSS has {alone['overall']['value']:.3f} and TTSS {helped['overall']['value']:.3f}: {want}"
    assert said in page


@pytest.mark.parametrize("seed", range(3))
def test_what_more_training_at_the_first_steps_gave_is_what_its_tables_say(seed: int) -> None:
    page = (ROOT / "docs" / "distill.md").read_text(encoding="utf-8")
    before = result("turbo", "regression", f"seed-{seed}")["overall"]["value"]
    text = (RESULTS / "turbo" / "trials" / "early-steps" / f"test-{seed}.md").read_text(encoding="utf-8")
    (after,) = re.findall(r"\*\*overall\*\*[^|]*\| ([\d.]+) \|", text)
    assert f"| `test`, seed {seed} | {before:.3f} | | {after} | {float(after) - before:+.3f} (" in page
