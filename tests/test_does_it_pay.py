"""The experiment of docs/does-it-pay.md: what its bundle holds, what each arm learns from, and its figures."""

from __future__ import annotations

import io
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lens_data.store import Store
from PIL import Image

from lens_core import LensPipeline
from lens_core.types import LensError


@pytest.fixture(scope="module")
def scripts(import_script: Callable[[str], Any]) -> Any:
    return {name: import_script(name) for name in ("does_it_pay", "pay_training", "pay_report")}


def row(number: int, size: tuple[int, int], torn: bool = False) -> dict[str, Any]:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = file.getvalue()[:200] if torn else file.getvalue()
    return {"id": f"{number:064x}", "image": data, "height": size[0], "width": size[1], "brief": f"brief {number}",
            "dense": f"dense {number}", "source": "here"}  # fmt: skip


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    rows = [row(n, (64, 64)) for n in range(5)]
    rows += [row(5, (40, 90)), row(6, (64, 200)), row(7, (64, 64), torn=True)]
    for name, held in (("dirty", rows), ("curated", rows[:3]), ("random", [*rows[2:4], rows[5]])):
        Store(str(tmp_path / "stores" / name), create=True).insert(held)
    return tmp_path / "stores"


@pytest.mark.filterwarnings("ignore:.*left out")
def test_a_bundle_holds_what_training_would_see(scripts: Any, stores: Path, tmp_path: Path) -> None:
    scripts["does_it_pay"].bundle(stores, tmp_path / "bundle")
    bundle = scripts["pay_training"].read_bundle(scripts["does_it_pay"].bundle_of(tmp_path))
    assert sorted(bundle.brief) == [f"brief {n}" for n in range(5)]  # neither small nor long nor torn ones
    kept = {s: sorted(bundle.brief[n] for n in members) for s, members in bundle.members.items()}
    assert kept["curated"] == [f"brief {n}" for n in range(3)] and kept["random"] == ["brief 2", "brief 3"]
    for image, brief, dense in zip(bundle.images, bundle.brief, bundle.dense, strict=True):
        number = int(brief.split()[1])
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        assert np.array_equal(image.numpy(), pixels) and dense == f"dense {number}"
    (tmp_path / "bundle" / "pictures.jsonl").write_text("{}\n")
    with pytest.raises(LensError, match="1 captions do not belong to 5 pictures"):
        scripts["pay_training"].read_bundle(tmp_path / "bundle")
    with pytest.raises(LensError, match="holds no bundle"):
        scripts["does_it_pay"].bundle_of(tmp_path / "stores")


@pytest.mark.filterwarnings("ignore:.*left out")
def test_a_bundle_of_stores_that_disagree_is_refused(scripts: Any, stores: Path, tmp_path: Path) -> None:
    Store(str(stores / "random")).insert([row(9, (64, 64))])
    with pytest.raises(LensError, match=r"1 pictures, 0+9 one of them, are not in dirty"):
        scripts["does_it_pay"].bundle(stores, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.fixture(scope="module")
def samples(scripts: Any) -> Any:
    module = scripts["pay_training"]
    images = torch.arange(6 * 64 * 64 * 3).remainder(251).to(torch.uint8).view(6, 64, 64, 3)
    images = images + 30 * torch.arange(6, dtype=torch.uint8)[:, None, None, None]
    words = ("red", "blue", "green", "pink", "mint", "cyan")
    bundle = module.Bundle(images, [f"a {w} circle" for w in words], [f"There is a {w} circle here." for w in words],
                           {"dirty": torch.arange(6), "curated": torch.tensor([1, 2, 4, 5])})  # fmt: skip
    tiny = LensPipeline.from_pretrained("tiny:", dtype=torch.bfloat16, device="cpu")
    return module.Samples(bundle, tiny, [module.ARMS[a] for a in ("dirty", "curated", "mixed", "shuffled")])


@pytest.mark.parametrize("name", ["dirty", "curated", "dense", "mixed", "shuffled"])
def test_an_arm_learns_from_its_pictures_and_captions(scripts: Any, samples: Any, name: str) -> None:
    arm = scripts["pay_training"].ARMS[name]
    rows = samples.of(arm, 3)
    z, features, mask = samples.draw(arm, rows, 400, torch.Generator().manual_seed(0))
    store = samples.stores[arm.tokens]
    assert features.shape[2] == mask.shape[1] == arm.tokens
    pairs: Counter[tuple[int, int, bool]] = Counter()  # picture, picture of the caption, whether it is dense
    for latent, text, known in zip(z, features, mask, strict=True):
        (place,) = [n for n in range(6) if torch.equal(latent, samples.latents[n])]
        captions = [
            (n, dense)
            for (tokens, dense), held in samples.rows.items()
            if tokens == arm.tokens
            for n in range(6)
            if held[n] and torch.equal(text, store.features[held[n]])
        ]
        ((source, dense),) = captions
        if known.any():
            pairs[place, source, dense] += 1
    assert 330 <= pairs.total() <= 390  # a tenth without a caption
    assert {place for place, _, _ in pairs} == set(samples.bundle.members[arm.store].tolist())
    right = sum(count for (place, source, _), count in pairs.items() if place == source)
    assert right == pairs.total() if name != "shuffled" else right < pairs.total() / 2
    share = sum(count for (_, _, dense), count in pairs.items() if dense) / pairs.total()
    assert abs(share - arm.dense) < 0.1 and (share == arm.dense or name == "mixed")


def test_runs_come_seed_by_seed_and_stop_where_the_time_does(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = scripts["pay_training"]
    options = module.Options("cpu", "eager", 6, 4, 1e-3, 4, 8, 1, until=1e12)
    runs = module.queue(["dirty", "dense"], [1, 2])
    assert [run.name for run in runs] == ["dense-1", "dirty-1", "dense-2", "dirty-2"]
    trained: list[str] = []

    class Short:
        """A job with time for two runs, of which the first fails."""

        def __init__(self, *_: Any) -> None:
            self.open: list[Any] = []

        def fits(self) -> bool:
            return len(trained) < 2

        def train(self, run: Any) -> None:
            trained.append(run.name)
            if len(trained) == 1:
                raise RuntimeError("no memory")

        def collect(self, wait: bool = False) -> None:
            trained.append("collected")

        def close(self) -> None:
            trained.append("closed")

    monkeypatch.setattr(module, "Job", Short)
    module.work(tmp_path, tmp_path, options, runs, multiprocessing.Value("i", 1))
    assert trained == ["dirty-1", "dense-2", "collected", "closed"]


def test_a_run_that_is_there_is_skipped_and_one_of_other_steps_refused(scripts: Any, tmp_path: Path) -> None:
    module = scripts["pay_training"]
    options = module.Options("cpu", "eager", 6, 4, 1e-3, 4, 8, 1, until=0.0)
    runs = module.queue(["dirty", "dense"], [1])
    (tmp_path / "dirty-1.json").write_text(json.dumps(options.facts))
    assert [run.name for run in module.missing(tmp_path, runs, options)] == ["dense-1"]
    (tmp_path / "dense-1.json").write_text(json.dumps(options.facts))
    assert module.train_all(tmp_path / "nowhere", tmp_path, options, runs, 2) == 0  # opens no bundle
    (tmp_path / "dense-1.json").write_text(json.dumps(options.facts | {"steps": 7}))
    with pytest.raises(LensError, match=r"dense-1.json: is a run with another steps"):
        module.missing(tmp_path, runs, options)


def test_the_rate_rises_stays_and_falls_to_zero(scripts: Any) -> None:
    rate = scripts["pay_training"].rate
    rates = [rate(step, 600, 2.0) for step in range(600)]
    assert rates[0] == pytest.approx(2 / 30) and set(rates[29:301]) == {2.0}
    assert rates[450] == pytest.approx(1.0) and 0 < rates[599] < 0.01


def result(arm: str, seed: int, values: list[int]) -> dict[str, Any]:
    tasks = ["single", "two", "colours"]
    verdicts = [[tasks[n % 3], f"question {n}", value] for n, value in enumerate(values)]
    means = {t: float(np.mean([v for task, _, v in verdicts if task == t])) for t in tasks}
    score = means | {"overall": (means["two"] + means["colours"]) / 2}
    return {"arm": arm, "seed": seed, "steps": 6, "batch": 4, "device": "cpu", "torch": "2", "training_seconds": 1.0,
            "curve": [{"step": step, "brief": score} for step in (3, 6)], "test": {"brief": score},
            "verdicts": {"brief": verdicts}}  # fmt: skip


def test_the_report_pairs_the_same_prompts_of_the_same_seed(
    scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    values = {(arm, seed): rng.integers(0, 2, 30).tolist() for arm in ("dirty", "curated") for seed in (1, 2, 3)}
    for (arm, seed), held in values.items():
        if (arm, seed) != ("dirty", 3):
            (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(result(arm, seed, held)))
    results = scripts["pay_report"].read_results(tmp_path)
    gain = scripts["pay_report"].difference(results["curated"], results["dirty"], "brief")
    both = np.array([values["curated", s] for s in (1, 2)]) - np.array([values["dirty", s] for s in (1, 2)])
    measured, each = gain.over_questions, (both[:, 1::3].mean(1) + both[:, 2::3].mean(1)) / 2
    assert measured.value == pytest.approx(each.mean()) and measured.pairs == 40
    assert measured.low < measured.value < measured.high
    assert gain.seeds == pytest.approx(each.tolist()) and gain.deviation == pytest.approx(np.std(each, ddof=1))
    half = 12.7062 * np.std(each, ddof=1) / np.sqrt(2)  # Student's t of one degree of freedom
    assert gain.over_seeds() == pytest.approx((each.mean() - half, each.mean() + half), rel=1e-4)
    single = scripts["pay_report"].difference(results["curated"], results["dirty"], "brief", ("single",))
    assert single.over_questions.value == pytest.approx(both[:, ::3].mean()) and single.over_questions.pairs == 20
    Image.new("RGB", (512, 192)).save(tmp_path / "curated-2.png")
    scripts["pay_report"].report(tmp_path)
    text = capsys.readouterr().out
    assert f"| curated minus dirty | overall | {measured.value:+.3f}" in text
    assert f"| curated minus dirty | single | {single.over_questions.value:+.3f}" in text
    assert "dirty minus" not in text and "dense prompts | score |" in text  # nothing twice
    for name in ("curated.png", "captions.png", "pictures.png"):
        with Image.open(tmp_path / "report" / name) as picture:
            assert picture.width > 400
    with pytest.raises(LensError, match="holds no result"):
        scripts["pay_report"].read_results(tmp_path / "report")


# ---- the page -------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results" / "does-it-pay"


def words(page: Path) -> str:
    return " ".join(page.read_text(encoding="utf-8").split())


def shares(arm: str, kind: str = "brief") -> dict[str, np.ndarray[Any, Any]]:
    """From the verdicts alone: the share that is right by task, one a seed, and `overall`."""
    runs = [json.loads((RESULTS / f"{arm}-{seed}.json").read_text(encoding="utf-8")) for seed in (1, 2, 3)]
    assert [(run["arm"], run["seed"], run["steps"], run["batch"]) for run in runs] == [
        (arm, seed, 900, 64) for seed in (1, 2, 3)
    ]
    by_task = {
        task: np.array([np.mean([v for name, _, v in run["verdicts"][kind] if name == task]) for run in runs])
        for task in ("single", "two", "colours")
    }
    return by_task | {"overall": (by_task["two"] + by_task["colours"]) / 2}


def test_the_tables_of_the_page_are_those_of_the_results(scripts: Any) -> None:
    page = (DOCS / "does-it-pay.md").read_text(encoding="utf-8")
    lines = scripts["pay_report"].tables(scripts["pay_report"].read_results(RESULTS)).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    shown = page[page.index("## Dirty, curated, random") :].splitlines()
    assert len(rows) == 38 and [line for line in shown if line.startswith("|")] == rows
    assert len(list(RESULTS.glob("*-?.json"))) == 18 and lines[0].startswith("18 runs of 900 steps of 64 pictures")


def test_the_opening_of_the_page_is_what_the_results_say() -> None:
    opening = words(DOCS / "does-it-pay.md").split("```")[0]
    arms = {arm: shares(arm) for arm in ("dirty", "random", "curated", "dense", "mixed", "shuffled")}
    dense = {arm: shares(arm, "dense")["overall"].mean() for arm in ("curated", "dense", "mixed")}
    mean = {arm: held["overall"].mean() for arm, held in arms.items()}
    for task, name in (("overall", "+0.078"), ("single", "+0.267")):
        each = arms["curated"][task] - arms["dirty"][task]
        half = 4.3027 * np.std(each, ddof=1) / np.sqrt(3)  # Student's t of two degrees of freedom
        assert f"{each.mean():+.3f}" == name and name in opening
        assert f"{each.mean() - half:+.3f} to {each.mean() + half:+.3f}" in opening
        assert ", ".join(f"{one:+.3f}" for one in each[:2]) + f" and {each[2]:+.3f}" in opening
        assert f"{arms['curated'][task].mean():.3f} against {arms['dirty'][task].mean():.3f}" in opening
    assert f"{mean['random'] - mean['dirty']:+.3f}" in opening
    assert not any(arms["shuffled"]["overall"]) and "score 0.000" in opening
    for arm in dense:
        assert f"{mean[arm]:.3f} of brief prompts and {dense[arm]:.3f} of dense ones" in opening


def test_pages_that_link_to_the_experiment_say_its_outcome() -> None:
    for page in (DOCS.parent / "README.md", *(DOCS / name for name in ("index.md", "curate.md", "dirty-web.md"))):
        links = [line for line in page.read_text(encoding="utf-8").splitlines() if "does-it-pay.md" in line]
        assert links and all("0.322 against 0.244" in line for line in links), page
