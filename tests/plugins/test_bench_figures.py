"""What is told of finished runs: the table of systems, the figure, and seconds by part. From results alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lens_bench import figures, latency, published
from lens_bench.commands import table as table_command
from lens_bench.figures import speed_quality
from PIL import Image

from lens_core.catalog import Catalog
from lens_core.cli.main import main
from lens_core.evaluation.bench import make_generator
from lens_core.evaluation.pipeline_generator import PipelineGenerator
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import ComponentSpec
from lens_core.types import ConfigError


def estimate(value: float | None) -> dict[str, Any]:
    low, high = (None, None) if value is None else (value - 0.1, value + 0.1)
    return {"value": value, "low": low, "high": high, "count": 4, "distinct": 2, "missing": 0}


def result(folder: Path, benchmark: str = "geneval", official: Any = None, **more: Any) -> Path:
    official = {"overall": estimate(0.5)} if official is None else official
    folder.mkdir()
    fields = {
        "benchmark": benchmark, "model": "m", "model_hash": "0123456789", "seed": 0, "steps": 4, "guidance_scale": 1.0,
        "size": [8, 8], "device": "cpu", "prompts": "raw", "headline": ["x"], "metric": "overall",
        "pictures": [{"prompt": f"p{i}", "task": "x", "value": 0.5} for i in range(2)], "official": official,
        "overall": next(iter(official.values())), "seconds_per_picture": 2.0, "coverage": 1.0,
        "run": {"benchmark": f"lens_bench:{benchmark}", "options": {}},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(fields | more))
    return folder


# ---- the table ------------------------------------------------------------------------------------------------------


def test_results_of_one_system_become_one_row_beside_the_published_ones(tmp_path: Path, capsys: Any) -> None:
    words = {"word accuracy": estimate(0.7), "NED": estimate(0.8)}
    folders = [result(tmp_path / "g"), result(tmp_path / "c", "cvtg", words, coverage=0.5)]
    folders.append(result(tmp_path / "o", "geneval", model="n", prompts="refined", model_hash=""))
    (mine, other) = published.measured(folders)
    assert mine.system == "m (01234567)" and other.system == "n" and (mine.prompts, other.prompts) == ("raw", "refined")
    assert mine.values == {
        "GenEval": "0.500 [0.400, 0.600]",
        "CVTG WA": "0.700 [0.600, 0.800] (coverage 50.0%)",
        "CVTG NED": "0.800 [0.700, 0.900] (coverage 50.0%)",
    }
    assert table_command(*folders, output=tmp_path / "t.md") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert any(
        line.startswith("| Seedream 4.0 | raw | 0.84 | 0.573 | 0.921 or 0.936 | 0.892 | – | – |") for line in lines
    )
    assert (tmp_path / "t.md").read_text().splitlines()[0] == lines[0]
    assert all(row.prompts in ("raw", "refined", "unknown") and row.source for row in published.PUBLISHED)


def test_a_mean_of_oneig_needs_all_five_dimensions(tmp_path: Path) -> None:
    names = ("alignment", "text", "diversity", "style", "reasoning")
    all_five = {name: estimate(0.1 * i) for i, name in enumerate(names)}
    (row,) = published.measured([result(tmp_path / "five", "oneig", all_five)])
    assert row.values == {"OneIG-EN": "0.200"}
    part = {name: all_five[name] for name in names[:2]}
    (row,) = published.measured([result(tmp_path / "two", "oneig", part)])
    assert row.values == {"OneIG-EN": "alignment 0.000, text 0.100"}


def test_a_part_of_a_benchmark_or_other_prompts_are_said_to_be_that(tmp_path: Path) -> None:
    run = {"benchmark": "lens_bench:geneval", "options": {"file": "/x/mine.jsonl"}}
    (row,) = published.measured([result(tmp_path / "a", run=run)])
    assert row.values["GenEval"].endswith("(2 prompts of mine.jsonl)")


def test_the_table_refuses_what_has_no_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is of shapes, which has no column here"):
        published.measured([result(tmp_path / "s", "shapes")])
    one = result(tmp_path / "g")
    with pytest.raises(ConfigError, match="has two results for GenEval"):
        published.measured([one, one])
    chinese = {"benchmark": "lens_bench:longtext", "options": {"language": "zh"}}
    with pytest.raises(ConfigError, match="is in zh"):
        published.measured([result(tmp_path / "z", "longtext", {"text score": estimate(0.5)}, run=chinese)])


# ---- the figure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_figure_is_drawn_from_results_alone(ending: str, tmp_path: Path) -> None:
    folders = [result(tmp_path / f"r{i}", steps=i, seconds_per_picture=0.1 * i) for i in (4, 8, 20)]
    folders.append(result(tmp_path / "other", model="n", steps=None, overall=estimate(0.9)))
    path = tmp_path / f"f.{ending}"
    assert speed_quality(*folders, output=path) == 0 and path.stat().st_size > 1000
    if ending == "png":
        with Image.open(path) as figure:
            assert figure.size == (1050, 675)
    if ending == "svg":
        text = path.read_text()
        assert all(f"<!-- m, {i} steps -->" in text for i in (4, 8, 20)) and "<!-- n -->" in text
    points, title = figures.points(folders)
    assert [p.label for p in points] == ["m, 4 steps", "m, 8 steps", "m, 20 steps", "n"]
    assert title == "geneval, overall" and points[0].seconds == pytest.approx(0.4)


def test_the_figure_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    one = result(tmp_path / "a")
    with pytest.raises(ConfigError, match="other and geneval are two benchmarks"):
        figures.points([one, result(tmp_path / "b", "other")])
    with pytest.raises(ConfigError, match="was measured on other prompts"):
        figures.points([one, result(tmp_path / "h", pictures=[{"prompt": "p0", "task": "x", "value": 0.5}])])
    for name, value in (("c", None), ("d", 0), ("e", "1"), ("f", True)):
        with pytest.raises(ConfigError, match="has no score or no seconds"):
            figures.points([result(tmp_path / name, seconds_per_picture=value)])
    with pytest.raises(ConfigError, match="has no score"):
        figures.points([result(tmp_path / "g", overall=None)])
    with pytest.raises(ConfigError, match="give the folders"):
        figures.points([])
    with pytest.raises(ConfigError, match=r"written as \.png"):
        speed_quality(one, output=tmp_path / "f.txt")


def test_one_result_is_a_figure_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "f.png"
    with warnings.catch_warnings(), np.errstate(divide="raise", invalid="raise"):
        warnings.simplefilter("error")
        overall = estimate(0.794) | {"low": None, "high": None}
        alone = result(tmp_path / "a", overall=overall, seconds_per_picture=0.0625)
        assert speed_quality(alone, output=path) == 0 and path.stat().st_size > 1000


def test_a_benchmark_that_was_written_in_two_ways_is_one_figure(tmp_path: Path) -> None:
    label = "{use: geneval, prompts: null}"
    run = {"benchmark": "lens_bench:geneval", "options": {}}
    folders = [result(tmp_path / "a"), result(tmp_path / "b", label, run=run)]
    assert len(figures.points(folders)[0]) == 2


def test_a_bar_in_the_name_of_a_system_is_no_column(tmp_path: Path) -> None:
    lines = published.table(published.measured([result(tmp_path / "a", model="a|b")])).splitlines()
    assert "a\\|b" in lines[2] and len({line.replace("\\|", "").count("|") for line in lines}) == 1


# ---- latency --------------------------------------------------------------------------------------------------------


def test_parts_of_a_picture_add_up_to_its_seconds(checkpoint: Path, catalog: Catalog) -> None:
    config = PipelineGenerator.Config(model=str(checkpoint), steps=2)
    generator = PipelineGenerator(config, catalog)
    measured = latency.measure(generator, (16, 16), pictures=3)
    assert len(measured.warm) == 3 and measured.load > 0
    for timing in (measured.cold, *measured.warm):
        assert set(timing.parts) == set(latency.PARTS) and all(value > 0 for value in timing.parts.values())
        inner = sum(value for name, value in timing.parts.items() if name != "save")
        assert inner <= timing.total
    assert generator.pipeline.sample.__func__ is LensPipeline.sample, "the pipeline is left as it was"
    assert "encode_once" not in vars(generator.pipeline)
    record = latency.as_json(measured, "here")
    assert json.loads(json.dumps(record, allow_nan=False))["machine"] == "here" and record["size"] == (16, 16)
    assert record["seconds_per_picture"] == sorted(t.total for t in measured.warm)[1]
    assert measured.peak_bytes is None or measured.peak_bytes > 2**20
    assert latency.table(measured).count("\n") == 8


def test_of_another_generator_only_the_total_is_known(tmp_path: Path) -> None:
    for index in (0, 1):
        Image.new("RGB", (4, 4)).save(tmp_path / f"0_{index}.png")
    spec = ComponentSpec("folder", {"folder": str(tmp_path)})
    generator = make_generator(spec, Catalog.installed())
    measured = latency.measure(generator, None, 1)
    assert measured.cold.parts == {} and measured.cold.total > 0 and measured.peak_bytes is None
    (tmp_path / "0_0.png").unlink()
    with pytest.raises(ConfigError, match="the picture is failed"):
        latency.measure(generator, None, 1)
    assert main(["bench", "latency", "--pictures", "0", "--generator", f"{{use: folder, folder: {tmp_path}}}"]) == 2
