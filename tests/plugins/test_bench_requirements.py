"""What a run with a public benchmark lacks is reported before a picture is drawn; and what is drawn at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench_models
import bench_perceivers
import pytest
import torch
from attrs import evolve
from lens_bench.components import CVTG, GenEval, LongText, OneIG
from lens_bench.folder import Folder
from lens_bench.perceive import kept, weights
from lens_bench.perceive.kept import KEPT
from PIL import Image
from test_bench_run import GOOD, oneig_folder, write_lines

from lens_core.cli.main import main
from lens_core.evaluation import contracts
from lens_core.recipe import ComponentSpec
from lens_core.types import ConfigError, LensError, Prompt

TEXTS = [{"prompt_id": i, "prompt": f"a sign {i}", "text": ["open"], "category": "signs"} for i in range(2)]


@pytest.fixture(autouse=True)
def perceivers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The perceivers of `bench_perceivers`, found as a user's plugin is; none is kept from one test to the next."""
    monkeypatch.setenv("LENS_PLUGIN_FILES", str(Path(bench_perceivers.__file__)))
    bench_perceivers.log.clear()
    yield
    KEPT.close()


def use(name: str, **options: Any) -> ComponentSpec:
    return ComponentSpec(name, options)


def longtext(folder: Path, more: str = "") -> str:
    path = write_lines(folder / "texts.jsonl", TEXTS)
    return f"{{use: longtext, file: {json.dumps(str(path))}{more}}}"


def generator(folder: Path) -> list[str]:
    place = folder / "pictures"
    place.mkdir(exist_ok=True)
    for i in range(8):
        Image.new("RGB", (32, 24), (10 * (i + 1), 120, 60)).save(place / f"{i:06d}.png")
    spec = f'{{use: folder, folder: {json.dumps(str(place))}, pattern: "{{id}}"}}'
    return ["--generator", spec, "--num-images", "1", "--output", str(folder / "run")]


def drawn(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "run" / "images").glob("*"))


# ---- before the first picture ---------------------------------------------------------------------------------------


def test_longtext_without_a_reader_draws_nothing_unless_drawing_is_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", longtext(tmp_path), *generator(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "$.reader: LongText-Bench needs something that reads; name a reader, as in '{use: longtext" in error
    assert "To draw alone, give --stages generate" in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert main(["bench", longtext(tmp_path), *generator(tmp_path), "--stages", "generate"]) == 0
    assert drawn(tmp_path) == ["000000_0", "000001_0"]
    with_reader = longtext(tmp_path, ", reader: lines")
    assert main(["bench", with_reader, *generator(tmp_path), "--stages", "perceive,decide"]) == 0


def test_the_model_of_a_run_that_lacks_something_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "describe", lambda self: pytest.fail("the generator was used"))
    assert main(["bench", longtext(tmp_path), *generator(tmp_path)]) == 2


def test_oneig_without_a_model_draws_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = oneig_folder(tmp_path / "oneig")
    assert main(["bench", "oneig", "--prompts-file", str(folder), *generator(tmp_path)]) == 2
    assert "oneig: no perceiver is named; name one of reader, vlm" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_style_of_oneig_needs_both_of_its_models() -> None:
    half = OneIG(OneIG.Config(reader=use("lines"), style_encoder=use("style_cosine")))
    with pytest.raises(ConfigError, match=r"^\$\.style_csd: OneIG's style needs it beside style_encoder"):
        half.check_requirements()


GENEVAL = GenEval.Config(detector=use("detector"), classifier=use("colors"))
PACKAGES = [
    (LongText(LongText.Config(reader=use("rapidocr"))), "rapidocr", "$.reader (rapidocr): "),
    (LongText(LongText.Config(reader=use("paddle_ocr", folder="x"))), "onnxruntime", "$.reader (paddle_ocr): "),
    (CVTG(CVTG.Config(similarity=None)), "onnxruntime", "$.ocr (rapidocr): "),
    (CVTG(CVTG.Config(ocr=use("lines"))), "transformers", "$.similarity (clip_similarity): needs transformers"),
    (GenEval(evolve(GENEVAL, detector=use("mask2former"))), "cv2", "$.detector (mask2former): mask2former needs"),
    (GenEval(evolve(GENEVAL, detector=use("mask2former"))), "scipy", "$.detector (mask2former): mask2former needs"),
    (GenEval(evolve(GENEVAL, classifier=use("clip_colors"))), "transformers", "$.classifier (clip_colors): needs tr"),
    (OneIG(OneIG.Config(diversity=use("dreamsim", folder="x"))), "dreamsim", "$.diversity (dreamsim): the package"),
]  # fmt: skip


@pytest.mark.parametrize(("benchmark", "package", "words"), PACKAGES)
def test_a_package_that_is_not_installed_is_named_with_its_cure(
    benchmark: Any, package: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        benchmark.check_requirements()
    (problem,) = caught.value.problems
    assert problem.startswith(words) and "pip install" in problem


def test_everything_that_is_missing_is_reported_at_once_and_no_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "load", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    model = str(bench_models.mask2former(tmp_path / "m2f"))
    config = GenEval.Config(detector=use("mask2former", model=model), classifier=use("clip_colors", model="./none"))
    with pytest.raises(ConfigError) as caught:
        GenEval(config).check_requirements()
    photo, clip = caught.value.problems
    assert photo.startswith("$.detector (mask2former): ") and "pip install matplotlib" in photo
    assert clip.startswith("$.classifier (clip_colors): ./none: no such folder")
    GenEval(evolve(config, detector=use("mask2former", model=model, photo=__file__), classifier=use("colors"))
            ).check_requirements()  # fmt: skip


def test_offline_a_model_that_is_not_in_the_cache_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"\$\.similarity .*not in the cache, and nothing is fetched offline"):
        CVTG(CVTG.Config(ocr=use("lines"), similarity=use("clip_similarity", model="a/b"))).check_requirements()


def test_a_perceiver_of_the_wrong_kind_is_refused_and_so_is_a_server_without_a_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"^\$\.detector: 'lines' perceives lines; this needs one of objects$"):
        GenEval(evolve(GENEVAL, detector=use("lines"))).check_requirements()
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    vlm = LongText(LongText.Config(reader=use("vlm", llm={"use": "openai", "model": "m"})))
    with pytest.raises(
        ConfigError, match=r"^\$\.reader \(vlm\): m: the environment variable OPENAI_API_KEY is not set"
    ):
        vlm.check_requirements()
    monkeypatch.setenv("OPENAI_API_KEY", "word")
    vlm.check_requirements()


def test_a_dry_run_prints_its_table_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", longtext(tmp_path), "oneig", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "longtext would draw nothing: $.reader: LongText-Bench needs" in out
    assert "oneig would draw nothing: oneig: no perceiver is named" in out and "| **all** |" in out
    assert main(["bench", longtext(tmp_path), "--dry-run", "--stages", "generate"]) == 0
    assert main(["bench", longtext(tmp_path, ", reader: lines"), "--dry-run"]) == 0
    assert "would draw nothing" not in capsys.readouterr().out


def test_a_run_that_has_all_its_pictures_needs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Any) -> None:
        raise LensError("the detector is gone")

    path = json.dumps(str(write_lines(tmp_path / "p.jsonl", [GOOD, GOOD])))
    benchmark = f"{{use: geneval, file: {path}, detector: detector, classifier: colors}}"
    assert main(["bench", benchmark, *generator(tmp_path)]) == 0
    monkeypatch.setattr(bench_perceivers.Detector, "check_requirements", missing, raising=False)
    assert main(["bench", benchmark, *generator(tmp_path)]) == 0
    (tmp_path / "run" / "manifest.jsonl").unlink()
    assert main(["bench", benchmark, *generator(tmp_path)]) == 2, "a picture is to be drawn"


def test_what_a_check_raises_names_the_benchmark() -> None:
    class Broken:
        def check_requirements(self) -> None:
            raise ZeroDivisionError

    with pytest.raises(LensError, match=r"Broken\.check_requirements raised ZeroDivisionError"):
        contracts.check_requirements(Broken())
    contracts.check_requirements(object())


# ---- what is drawn of OneIG -----------------------------------------------------------------------------------------


def oneig(folder: Path, more: str = "") -> str:
    place = oneig_folder(folder / "oneig")
    return f"{{use: oneig, file: {json.dumps(str(place))}{more}}}"


def test_oneig_draws_the_prompts_of_the_dimensions_that_are_scored(tmp_path: Path) -> None:
    place = generator(tmp_path)
    assert main(["bench", oneig(tmp_path, ", reader: lines"), *place]) == 0
    assert drawn(tmp_path) == ["000003_0"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert next(iter(result["official"])) == "text" and result["statuses"] == {"ok": 1} and result["coverage"] == 1
    # A dimension that is named later takes the same folder, and the pictures that it lacks.
    before = (tmp_path / "run" / "manifest.jsonl").read_text().splitlines()
    assert main(["bench", oneig(tmp_path, ", reader: lines, vlm: answers"), *place]) == 0
    assert drawn(tmp_path) == ["000000_0", "000001_0", "000002_0", "000003_0"]
    after = (tmp_path / "run" / "manifest.jsonl").read_text().splitlines()
    assert after[: len(before)] == before
    seeds = {line["prompt_id"]: line["seed"] for line in map(json.loads, after)}
    assert {"alignment", "text"} <= json.loads((tmp_path / "run" / "result.json").read_text())["official"].keys()
    # Each picture has the seed that it has where everything is drawn.
    whole = tmp_path / "whole"
    whole.mkdir()
    assert main(["bench", oneig(whole), *generator(whole), "--stages", "generate"]) == 0
    lines = map(json.loads, (whole / "run" / "manifest.jsonl").read_text().splitlines())
    assert len(drawn(whole)) == 5 and seeds.items() <= {line["prompt_id"]: line["seed"] for line in lines}.items()
    assert main(["bench", oneig(whole, ", reader: lines"), *generator(whole), "--stages", "perceive,decide"]) == 0


def test_a_limit_takes_prompts_that_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(oneig_folder(tmp_path))
    assert [p.id for p in OneIG(OneIG.Config(folder, prompts=1, reader=use("lines"))).prompts()] == [3]
    assert [p.id for p in OneIG(OneIG.Config(folder, prompts=2, vlm=use("answers"))).prompts()] == [0, 1]
    assert len(OneIG(OneIG.Config(folder, prompts=5)).prompts()) == 5
    with pytest.raises(ConfigError, match="there are 1 prompts, not 2"):
        OneIG(OneIG.Config(folder, prompts=2, reader=use("lines"))).prompts()


@pytest.mark.parametrize(
    ("named", "prompts"),
    [
        ({"reader": use("lines")}, 200),
        ({"vlm": use("answers")}, 695),
        ({"reader": use("lines"), "vlm": use("answers")}, 895),
        ({"style_csd": use("style_cosine"), "style_encoder": use("style_cosine")}, 114),
        ({"reader": use("lines"), "diversity": use("embedding")}, 1120),
        ({}, 1120),
    ],
)
def test_a_dry_run_counts_the_prompts_that_are_drawn(named: dict[str, Any], prompts: int) -> None:
    workload = OneIG(OneIG.Config(**named)).workload(4)
    assert workload["prompts"] == prompts
    if "reader" in named:
        assert workload["reader readings"] == 800
    if set(named) == {"vlm"}:
        assert workload["vlm readings"] == 4 * 11_231
        assert OneIG(OneIG.Config(prompts=139, **named)).workload(1)["vlm readings"] == round(11_231 / 5)


def test_a_dry_run_with_a_file_counts_the_prompts_that_are_drawn(tmp_path: Path) -> None:
    config = OneIG.Config(str(oneig_folder(tmp_path)), vlm=use("answers"))
    assert OneIG(config).workload(1)["prompts"] == 3


# ---- score ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Canaries and closings of the detector, in order, with its revision."""
    names: list[str] = []

    def canary(self: Any) -> str | None:
        names.append(f"canary {self.config.revision}")
        return self.config.canary or None

    monkeypatch.setattr(bench_perceivers.Detector, "canary", canary)
    close = lambda self: names.append(f"close {self.config.revision}")  # noqa: E731
    monkeypatch.setattr(bench_perceivers.Detector, "close", close, raising=False)
    return names


DOGS = {"tag": "counting", "include": [{"class": "dog", "count": 2}]}


def scored(config: Any, *numbers: int) -> list[float | None]:
    images = torch.stack([torch.tensor([10 * n, 120, 60]).reshape(3, 1, 1).expand(3, 8, 8) for n in numbers])
    prompts = [Prompt("two dogs", n, "counting", {"metadata": DOGS}) for n in numbers]
    return [score.value for score in GenEval(config).score(images.to(torch.uint8), prompts)]


def test_score_loads_a_perceiver_once_and_frees_it_where_its_options_change(calls: list[str]) -> None:
    assert scored(GENEVAL, 1, 2) == [0.0, 1.0]
    assert scored(evolve(GENEVAL, prompts=3), 2, 3) == [1.0, 1.0], "another instance, with the same detector"
    assert calls == ["canary 1"]
    options: dict[str, Any] = {"revision": "2", "shift": 1}
    other = evolve(GENEVAL, detector=ComponentSpec("detector", options))
    assert scored(other, 1) == [1.0]
    assert calls == ["canary 1", "close 1", "canary 2"]
    options["revision"] = "3"
    assert scored(other, 1) == [1.0] and calls[3:] == ["close 2", "canary 3"], "a changed mapping is another config"
    GenEval(GENEVAL).close()
    assert calls[5:] == ["close 3"]
    assert scored(GENEVAL, 2) == [1.0] and calls[6:] == ["canary 1"]


def test_the_stage_perceive_frees_what_score_keeps_and_keeps_nothing(calls: list[str], tmp_path: Path) -> None:
    scored(GENEVAL, 1)
    GenEval(GENEVAL).perceive([], tmp_path)
    assert calls == ["canary 1", "close 1", "close 1"], "the kept one, and the one of the stage"


def test_a_perceiver_that_failed_is_not_kept(calls: list[str]) -> None:
    blind = evolve(GENEVAL, detector=use("detector", canary="it sees nothing"))
    for _ in range(2):
        with pytest.raises(LensError, match="it sees nothing"):
            scored(blind, 1)
    assert calls == ["canary 1", "close 1"] * 2
    failing = evolve(GENEVAL, detector=use("detector", fails=[1]))
    with pytest.raises(LensError, match="1 questions about pictures have no answer"):
        scored(failing, 1)
    assert scored(failing, 2) == [1.0]
    assert calls[4:] == ["canary 1", "close 1", "canary 1"]


def test_never_two_perceivers_of_a_role_are_loaded() -> None:
    loaded: list[str] = []

    class Model:
        def __init__(self, name: str) -> None:
            loaded.append(name)
            self.name = name

        def close(self) -> None:
            loaded.remove(self.name)

    holder = kept.KeptPerceivers()
    for name in ("a", "a", "b", "a"):
        one = holder.get("detector", name, lambda name=name: kept.LoadedPerceiver(Model(name), {}))  # type: ignore[misc]
        assert one.perceiver.name == name and loaded == [name]
    holder.close()
    assert loaded == []
