"""Three stages with files between them: what is finished is never done again, and nothing is mixed or made up."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stage_worker
import torch
from PIL import Image
from stage_worker import Brightness, Dots, png, run

from lens_core.catalog import Catalog
from lens_core.cli.main import main
from lens_core.evaluation import comparison, cost, perception, stages
from lens_core.evaluation.bench import (
    BenchmarkRequest,
    benchmark_line,
    generator_spec,
    parse_stages,
    run_benchmark,
)
from lens_core.evaluation.pipeline_generator import PipelineGenerator
from lens_core.evaluation.processes import Processes
from lens_core.evaluation.run import picture_seed
from lens_core.io.locks import LockedError
from lens_core.recipe import ComponentSpec
from lens_core.types import (
    ConfigError,
    LensError,
    PictureOutcome,
    PictureRequest,
    PluginError,
    Prompt,
    RefusedError,
    Score,
    StopGeneration,
)

WORKER = Path(stage_worker.__file__)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_picture_has_its_own_seed_file_and_line(tmp_path: Path) -> None:
    report = run(tmp_path / "run", seed=2)
    manifest = lines(tmp_path / "run" / "manifest.jsonl")
    assert [(m["prompt_id"], m["index"]) for m in manifest] == [(f"{i:06d}", k) for i in range(3) for k in range(3)]
    assert [m["seed"] for m in manifest] == [picture_seed(2, i) for i in range(9)]
    assert all((tmp_path / "run" / m["file"]).is_file() and m["usd"] == 0.25 for m in manifest)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    values = [(picture_seed(2, i) % 256) / 255 for i in range(9)]
    assert [p["value"] for p in result["pictures"]] == pytest.approx(values)
    mean = (sum(values[:3] + values[6:]) / 6 + sum(values[3:6]) / 3) / 2
    assert result["overall"]["value"] == report.decision.official["overall"].value == pytest.approx(mean)
    assert result["tasks"]["even"]["distinct"] == 2, "the pictures of a prompt are one draw"
    assert (result["usd"], result["seconds"], result["coverage"]) == (2.25, 18.0, 1.0)


def test_a_finished_stage_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path / "run", log=str(tmp_path / "drawn"))
    monkeypatch.setattr(Dots, "generate", lambda *_: pytest.fail("everything is drawn"))
    monkeypatch.setattr(Brightness, "score", lambda *_: pytest.fail("everything is scored"))
    again = run(tmp_path / "run", log=str(tmp_path / "drawn"))
    assert again.text == first.text
    monkeypatch.setattr(Dots, "describe", lambda *_: pytest.fail("this stage needs no generator"))
    assert run(tmp_path / "run", stages=("perceive", "decide")).text == first.text
    assert run(tmp_path / "run", stages=("decide",)).text == first.text
    assert run(tmp_path / "run", stages=("perceive",)) is None


def test_another_scorer_reads_the_same_pictures_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = str(tmp_path / "drawn")
    first = run(tmp_path / "run", log=log)
    drawn = Path(log).read_text()
    monkeypatch.setattr(Brightness, "score", lambda self, images, prompts: [Score("ok", 0.75) for _ in images])
    assert run(tmp_path / "run", log=log).text == first.text, "the same source: what was kept counts"
    source = tmp_path / "scorer.py"
    source.write_text("# edited")
    monkeypatch.setattr(stage_worker, "__file__", str(source))
    assert run(tmp_path / "run", log=log).decision.official["overall"].value == 0.75
    assert Path(log).read_text() == drawn, "no picture is drawn again"


def test_data_of_prompts_that_is_no_json_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Brightness, "prompts", lambda self: [Prompt("a", data={"x": object()})])
    with pytest.raises(PluginError, match=r"brightness\.prompts gave, as data, dict; .* JSON"):
        run(tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_what_a_reasoner_refuses_is_refused_and_the_others_are_drawn(checkpoint: Path, catalog: Catalog) -> None:
    asked: list[list[str]] = []

    class Careful:
        def refine(self, prompts: Sequence[str]) -> list[str]:
            asked.append(list(prompts))
            if "a person" in prompts:
                raise RefusedError("no persons")
            return [f"{prompt}, at noon" for prompt in prompts]

    generator = PipelineGenerator(PipelineGenerator.Config(model=str(checkpoint), steps=1), catalog)
    generator.pipeline.use_reasoner(Careful())
    prompts = ["a dog", "a person", "a cat"]
    requests = [PictureRequest(prompt, i, (16, 16), f"{i}", 0) for i, prompt in enumerate(prompts)]
    outcomes = {o.request.prompt: o for o in generator.generate(requests)}
    assert (outcomes["a person"].status, outcomes["a person"].reason) == ("refused", "no persons")
    assert [outcomes[p].sent_prompt for p in ("a dog", "a cat")] == ["a dog, at noon", "a cat, at noon"]
    assert asked == [prompts, ["a dog"], ["a person"], ["a cat"]], "each is asked about alone, once"


def test_a_guidance_interval_draws_what_the_pipeline_draws_with_it(checkpoint: Path, catalog: Catalog) -> None:
    requests = [PictureRequest("a dog", 3, (16, 16), "0", 0)]
    drawn = {}
    for interval in ((0.0, 1.0), (0.0, 0.6)):
        options: dict[str, Any] = {"guidance_scale": 9.0, "guidance_interval": interval}
        generator = PipelineGenerator(PipelineGenerator.Config(model=str(checkpoint), steps=4, **options), catalog)
        (outcome,) = generator.generate(requests)
        drawn[interval] = np.asarray(Image.open(io.BytesIO(outcome.image)))
        (picture,) = generator.pipeline("a dog", height=16, width=16, num_inference_steps=4, seed=3, **options).images
        assert np.array_equal(drawn[interval], np.asarray(picture))
        named = generator.describe().settings.get("guidance_interval")
        assert named == (None if interval == (0, 1) else [0.0, 0.6]), "earlier results have no such setting"
    assert not np.array_equal(*drawn.values())
    for without in ({"guidance_interval": [0.0, 1.0]}, {"guidance_interval": (0.2, 1.0), "guidance_scale": 1.0}):
        plain = PipelineGenerator(PipelineGenerator.Config(model=str(checkpoint), **without), catalog)  # type: ignore[arg-type]
        assert "guidance_interval" not in plain.describe().settings, "it changes nothing"
    for wrong, words in (((0.5, 0.5), "0 <= low < high <= 1"), ((0.0, 1.5), "at most 1"), ((0.1,), "two times")):
        with pytest.raises(ConfigError, match=words):
            PipelineGenerator.Config(guidance_interval=wrong)  # type: ignore[arg-type]


def test_refusals_are_final_and_failures_are_tried_again(tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    words = ("a", "b", "refuse c", "fail d")
    report = run(tmp_path / "run", words=words, images=1, log=str(drawn))
    assert report.decision.statuses == {"ok": 2, "refused": 1, "failed": 1}
    assert run(tmp_path / "run", words=words, images=1, log=str(drawn)).decision.coverage == 1 / 2
    assert drawn.read_text().split() == ["000000_0", "000001_0", "000002_0", "000003_0", "000003_0"]


def test_what_is_missing_vanishes_officially_and_is_0_strictly(tmp_path: Path) -> None:
    report = run(tmp_path / "run", words=("a", "refuse b", "refuse c", "d"), images=1, seed=1)
    even, odd = (picture_seed(1, 0) % 256) / 255, (picture_seed(1, 3) % 256) / 255
    assert report.decision.official["overall"].value == pytest.approx((even + odd) / 2)
    assert report.decision.strict["overall"].value == pytest.approx((even + odd) / 4)
    assert "2 ok, 2 refused; coverage 50.0%" in report.text and "| strict |" in report.text


def test_a_run_without_any_picture_has_no_score(tmp_path: Path) -> None:
    words = r"no picture has a score.*; the first, 000000_0 \(refused\): moderation_blocked: no$"
    with pytest.raises(LensError, match=words):
        run(tmp_path / "run", words=("refuse a", "fail b"))
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_file_of_prompts_for_a_benchmark_that_takes_none_is_refused_by_its_option(tmp_path: Path) -> None:
    request = BenchmarkRequest("brightness", ComponentSpec("dots"), options={"file": "prompts.txt"})
    for refused in (
        lambda: run_benchmark(request, tmp_path / "run", catalog=stage_worker.CATALOG),
        lambda: cost.estimate(request, stage_worker.CATALOG),
    ):
        with pytest.raises(ConfigError, match=r"the benchmark brightness takes no --prompts-file; leave it out$"):
            refused()


def test_a_benchmark_in_a_yaml_file_is_recorded_with_its_options(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# a comment\nuse: geneval\nfile: été.jsonl\ndetector:\n  use: mask2former\n  min_score: 1.0e-3\n")
    line = benchmark_line(str(path))
    assert line == "{use: geneval, file: été.jsonl, detector: {use: mask2former, min_score: 0.001}}"
    assert BenchmarkRequest(line).spec() == ComponentSpec(
        "geneval", {"file": "été.jsonl", "detector": {"use": "mask2former", "min_score": 0.001}}
    )
    assert benchmark_line("shapes") == "shapes"
    with pytest.raises(ConfigError, match=r"none\.yaml: there is no such file$"):
        benchmark_line("none.yaml")


def test_a_generator_that_stops_keeps_what_it_finished(tmp_path: Path) -> None:
    with pytest.raises(StopGeneration, match=r"the key is wrong; what was drawn is kept in .*run, start again"):
        run(tmp_path / "run", words=("a", "stop b"), images=1)
    assert [m["status"] for m in lines(tmp_path / "run" / "manifest.jsonl")] == ["ok"]
    assert not (tmp_path / "run" / "perceptions.jsonl").exists()


def test_failures_in_a_row_stop_a_run(tmp_path: Path) -> None:
    with pytest.raises(StopGeneration, match="20 pictures in a row failed, the last with: timeout: slow"):
        run(tmp_path / "run", words=tuple(f"fail {i}" for i in range(30)), images=1)
    assert len(lines(tmp_path / "run" / "manifest.jsonl")) == 20


def test_a_picture_that_cannot_be_read_has_failed(tmp_path: Path) -> None:
    report = run(tmp_path / "run", words=("a", "broken b", "c", "d"), images=1)
    assert report.decision.statuses == {"ok": 3, "failed": 1}
    assert lines(tmp_path / "run" / "manifest.jsonl")[1]["reason"].startswith("unreadable picture: picture 0 of 000001")


def _wrong(kind: str, requests: Sequence[PictureRequest]) -> Iterator[Any]:
    picture = PictureOutcome(requests[0], "ok", png(1))
    yield from {
        "nothing": [],
        "twice": [picture, picture],
        "other": [PictureOutcome(PictureRequest("x", 9), "ok", png(1))],
        "bytes": [png(1)],
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nothing", "yielded nothing for 1 of 1 requests"),
        ("twice", "was not asked for, or twice"),
        ("other", "was not asked for"),
        ("bytes", "yielded bytes; it must yield PictureOutcomes"),
    ],
)
def test_a_generator_must_answer_each_request_once(
    kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dots, "generate", lambda self, requests: _wrong(kind, requests))
    with pytest.raises((PluginError, LensError), match=words):
        run(tmp_path / "run", words=("a",), images=1)


# ---- interruptions and several processes --------------------------------------------------------------------------


def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_result(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), "kill", str(tmp_path / "killed")],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    results = json.loads(done.stdout)
    whole = results["whole"]
    assert results["code"] == 0 and whole["drawn"] == 9 and len(results["runs"]) >= 12
    for name, one in results["runs"].items():
        *killed, last = one["codes"]
        assert last == 0 and killed[0] == -9, name
        assert one["result"] == whole["result"] and one["perceptions"] == whole["perceptions"], name
        assert one["drawn"] <= 9 + len(killed), "a kill costs the picture at hand at most"
    assert any(one["drawn"] == 9 for one in results["runs"].values()), "a kill between two pictures costs none"


def test_processes_share_the_pictures_and_report_what_one_alone_does(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", words=tuple("abcdefg"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), "rank", str(tmp_path / "pair")],
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path),
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert [json.loads(out)["reported"] for out, _ in outputs] == [True, False]
    shares = [set(Path(f"{tmp_path / 'pair'}.drawn-{rank}").read_text().split()) for rank in (0, 1)]
    assert not shares[0] & shares[1] and {len(share) for share in shares} == {10, 11}
    pair = json.loads((tmp_path / "pair" / "result.json").read_text())
    single = json.loads((tmp_path / "alone" / "result.json").read_text())
    assert pair == single and alone.decision.coverage == 1


def test_a_wrong_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError, match="RANK is 3 and WORLD_SIZE 1"):
        Processes.from_environment()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ConfigError, match="RANK is 'x', not a number"):
        Processes.from_environment()


def test_two_runs_at_once_do_not_write_to_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner: list[type[Exception]] = []

    def second(self: Any, requests: Sequence[PictureRequest], plain: Any = Dots.generate) -> Iterator[PictureOutcome]:
        if not inner:
            with pytest.raises(LockedError) as error:
                run(tmp_path / "run")
            inner.append(error.type)
        yield from plain(self, requests)

    monkeypatch.setattr(Dots, "generate", second)
    assert run(tmp_path / "run") is not None and inner == [LockedError]


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[PictureOutcome]] = []
    most, largest = 0, 0

    def watched(self: Any, requests: Sequence[PictureRequest], plain: Any = Dots.generate) -> Iterator[PictureOutcome]:
        nonlocal most
        for outcome in plain(self, requests):
            alive.append(weakref.ref(outcome))
            alive[:] = [one for one in alive if one() is not None]
            most = max(most, len(alive))
            yield outcome

    def scored(self: Any, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        nonlocal largest
        largest = max(largest, len(images))
        return [Score("ok", 1.0)] * len(images)

    monkeypatch.setattr(Dots, "generate", watched)
    monkeypatch.setattr(Brightness, "score", scored)
    monkeypatch.setattr(perception, "MOST_PIXELS", 4 * 4 * 30)
    run(tmp_path / "run", words=tuple(f"p{i}" for i in range(50)), batch_size=8)
    assert len(list((tmp_path / "run" / "images").iterdir())) == 150
    assert most <= 3, "pictures are on the disk before the next is drawn"
    assert largest <= 30


def test_prompts_of_a_group_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[Any]] = []

    def grouped(self: Any) -> list[Prompt]:
        return [Prompt(f"p{i}", i, "", {"group": i // 3}) for i in range(9)]

    def scored(self: Any, images: torch.Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        groups.append([p.data["group"] for p in prompts])
        return [Score("ok", 1.0)] * len(images)

    monkeypatch.setattr(Brightness, "prompts", grouped)
    monkeypatch.setattr(Brightness, "score", scored)
    monkeypatch.setattr(perception, "MOST_PICTURES", 4)
    run(tmp_path / "run", images=1)
    assert groups == [[0, 0, 0, 1, 1, 1], [2, 2, 2]]


def test_a_score_that_is_not_finite_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([float("nan"), 0.5, 0.25])
    monkeypatch.setattr(Brightness, "score", lambda self, images, prompts: [Score("ok", next(scores)) for _ in images])
    report = run(tmp_path / "run", words=("a", "b", "c"), images=1)
    assert report.decision.official["even"].value == 0.25 and report.decision.official["even"].missing == 1
    assert report.decision.strict["even"].value == 0.25, "the picture is there; its judge failed"


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "holds another run, with seed 0, not 1"),
        ({"images": 2}, "with images_per_prompt 3, not 2"),
        ({"revision": "2"}, "with revision '1', not '2'"),
        ({"side": 5}, "with settings.side 4, not 5"),
        ({"words": ("a", "b", "x")}, "with prompts_sha256"),
    ],
)
def test_a_folder_takes_the_pictures_of_one_run(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    run(tmp_path / "run")
    before = (tmp_path / "run" / "result.json").read_bytes()
    with pytest.raises(ConfigError, match=words):
        run(tmp_path / "run", **change)
    assert (tmp_path / "run" / "result.json").read_bytes() == before


def test_a_picture_that_is_missing_or_changed_is_one_line(tmp_path: Path) -> None:
    run(tmp_path / "run")
    images = tmp_path / "run" / "images"
    (images / "000000_0.png").write_bytes(png(200))
    (images / "000001_1.png").unlink()
    with pytest.raises(ConfigError) as error:
        run(tmp_path / "run")
    assert len(error.value.problems) == 2
    assert "000000_0.png: is not the picture that was generated" in error.value.problems[0]
    assert "000001_1.png: is missing" in error.value.problems[1]


def test_perceptions_of_other_pictures_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "run")
    path = tmp_path / "run" / stages.PERCEPTIONS
    rows = lines(path)
    rows[4]["sha256"] = "0" * 64
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="line 5: is not of the picture in the manifest; run the stage perceive"):
        run(tmp_path / "run", stages=("decide",))


def test_a_later_stage_needs_the_earlier_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run here; start with the stage generate"):
        run(tmp_path / "none", stages=("perceive", "decide"))
    run(tmp_path / "run", stages=("generate",))
    with pytest.raises(ConfigError, match=r"perceptions\.jsonl: cannot be read"):
        run(tmp_path / "run", stages=("decide",))
    with pytest.raises(ConfigError, match="is a run with images_per_prompt 3, not 1"):
        run(tmp_path / "run", stages=("perceive",), images=1)


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": 3}', "{}", '"x"', "\udcff"])
def test_a_damaged_run_file_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as error:
        run(tmp_path / "run", stages=("decide",))
    assert len(error.value.problems) == 1 and "run.json" in str(error.value)


def test_stages_are_named_in_any_order() -> None:
    assert parse_stages(" decide,generate") == ("generate", "decide")
    with pytest.raises(ConfigError, match="no stage is called 'draw'"):
        parse_stages("draw")
    with pytest.raises(ConfigError, match="name a stage"):
        parse_stages(",")


def test_a_generator_is_named_by_name_by_yaml_or_by_a_file(tmp_path: Path) -> None:
    assert generator_spec("", {"model": "m", "steps": None}) == ComponentSpec("pipeline", {"model": "m"})
    assert generator_spec("{use: dots, side: 5}", {}) == ComponentSpec("dots", {"side": 5})
    (tmp_path / "g.yaml").write_text("use: dots\nside: 6\n")
    assert generator_spec(str(tmp_path / "g.yaml"), {}) == ComponentSpec("dots", {"side": 6})
    (tmp_path / "g.yaml").write_text("side: 6\n")
    with pytest.raises(ConfigError, match="must be a mapping with `use`"):
        generator_spec(str(tmp_path / "g.yaml"), {})
    with pytest.raises(ConfigError, match=r"none\.yaml: there is no such file"):
        generator_spec(str(tmp_path / "none.yaml"), {})
    with pytest.raises(ConfigError, match="--steps: for --model alone"):
        generator_spec("dots", {"steps": 4})


def test_the_command_line_refuses_two_systems_and_several_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "shapes", "--model", "tiny:", "--generator", "folder"]) == 2
    assert main(["bench"]) == 2
    assert main(["bench", "shapes", "novel"]) == 2
    err = capsys.readouterr().err
    assert "several are for --dry-run" in err and "name a benchmark" in err


# ---- cost and comparison --------------------------------------------------------------------------------------------


def test_a_dry_run_counts_pictures_calls_hours_and_dollars(tmp_path: Path) -> None:
    requests = [
        BenchmarkRequest("brightness", ComponentSpec("dots", {"side": side}), images=images)
        for side, images in ((4, 600), (5, None))
    ]
    table = cost.table(requests, stage_worker.CATALOG).splitlines()
    assert table[2] == "| brightness | dots | 3 | 1,800 | 1,800 | 1.0 | 450.00 | – |"
    assert table[3] == "| brightness | dots | 3 | 9 | 9 | 0.0 | 2.25 | – |"
    assert table[4].startswith("| **all** | | 6 | 1,809 | 1,809 | 1.0 | 452.25 |")
    assert list(tmp_path.iterdir()) == []


def test_results_of_runs_are_compared(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0)):
        run(tmp_path / name, seed=seed, revision=name, images=2)
    rows = comparison.compare(comparison.read_folders([tmp_path / "one", tmp_path / "two"]))
    assert [row.name for row in rows] == ["dots", "dots"]
    assert rows[1].difference is not None and rows[1].difference.value == 0 and rows[1].difference.pairs == 6
    assert "| dots | 1 |" in comparison.table(rows)


def test_a_mean_of_shares_weighs_their_words() -> None:
    base = {
        "model": "m", "model_hash": "1", "benchmark": "b", "seed": 0, "steps": None, "guidance_scale": None,
        "size": [8, 8], "headline": ["words"],
    }  # fmt: skip
    pictures = [{"prompt": "p", "task": "words", "value": 1.0, "weight": 1}]
    pictures.append({"prompt": "q", "task": "words", "value": 0.5, "weight": 9})
    other = [{**pictures[0], "value": 0.0}, {**pictures[1], "value": 1.0}]
    rows = comparison.compare([{**base, "pictures": pictures}, {**base, "model": "n", "pictures": other}])
    assert rows[0].overall.value == pytest.approx(5.5 / 10) and rows[1].overall.value == pytest.approx(9 / 10)
    assert rows[1].difference is not None and rows[1].difference.value == pytest.approx(3.5 / 10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[:-1], "lacks 1 pictures, 000002_2 for one; run the stage perceive again"),
        (lambda rows: [*rows, rows[0]], "picture 000000_0 stands twice"),
        (lambda rows: [{**rows[0], "prompt_id": []}, *rows[1:]], "line 1: prompt_id: must be a text"),
        (lambda rows: [{**rows[0], "index": True}, *rows[1:]], "line 1: index: must be a whole number"),
        (lambda rows: [{**rows[0], "score": {"status": "ok", "value": None}}, *rows[1:]], "a line without a score"),
        (lambda rows: [], "lacks 9 pictures"),
    ],
)
def test_perceptions_that_are_not_whole_are_no_measurement(change: Any, words: str, tmp_path: Path) -> None:
    run(tmp_path / "run")
    path = tmp_path / "run" / stages.PERCEPTIONS
    path.write_text("".join(json.dumps(row) + "\n" for row in change(lines(path))))
    with pytest.raises(ConfigError, match=words):
        run(tmp_path / "run", stages=("decide",))
