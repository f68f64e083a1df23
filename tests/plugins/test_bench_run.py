"""The public benchmarks through `lens bench`: prompts in their own formats, perceivers by name, the authors' rules."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import lens_shapes
import numpy as np
import pytest
import torch
from lens_bench import decisions, prompt_files
from lens_bench.components import CVTG, GenEval, LongText, OneIG
from lens_bench.folder import Folder
from lens_shapes.benchmark import ShapesBenchmark, pictures
from lens_shapes.perceivers import TAGS, ShapesColors, ShapesObjects, geneval_entry
from lens_shapes.reader import read
from lens_shapes.reading import check_facts
from PIL import Image

from lens_core.catalog import Catalog
from lens_core.cli.main import main
from lens_core.io import http
from lens_core.recipe import ComponentSpec, build
from lens_core.types import ConfigError, LensError, PictureRequest

COUNT = 48


def entries() -> tuple[ShapesBenchmark, list[dict[str, Any]]]:
    benchmark = ShapesBenchmark(ShapesBenchmark.Config(prompts=COUNT, tasks=tuple(TAGS), extras=True))
    return benchmark, [geneval_entry(prompt) for prompt in benchmark.prompts()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures for prompts about shapes, in GenEval's layout: every third shows the scene of another prompt, one is
    missing; and the prompt file."""
    root = tmp_path_factory.mktemp("drawn")
    benchmark, rows = entries()
    images = pictures(benchmark.scenes(), 64, 64)
    for place in range(COUNT):
        shown = (place + 7) % COUNT if place % 3 == 0 else place
        folder = root / f"{place:05d}" / "samples"
        folder.mkdir(parents=True)
        if place != COUNT - 1:
            Image.fromarray(images[shown].permute(1, 2, 0).numpy()).save(folder / "0000.png")
    write_lines(root / "prompts.jsonl", rows)
    return root


def spec(drawn: Path) -> str:
    path = json.dumps(str(drawn / "prompts.jsonl"))
    return f"{{use: geneval, file: {path}, detector: shapes_objects, classifier: shapes_colors}}"


def folder_of(drawn: Path) -> str:
    return f'{{use: folder, folder: {json.dumps(str(drawn))}, pattern: "{{number:05d}}/samples/{{index:04d}}"}}'


def test_geneval_runs_from_a_folder_to_the_report(drawn: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    place = ["--generator", folder_of(drawn), "--num-images", "1", "--output", str(run)]
    assert main(["bench", spec(drawn), *place]) == 0
    result = json.loads((run / "result.json").read_text())
    benchmark, _ = entries()
    facts = []
    for number, prompt in enumerate(benchmark.prompts()[: COUNT - 1]):
        image = np.asarray(Image.open(drawn / f"{number:05d}" / "samples" / "0000.png"))
        facts.append(all(check_facts(read(image), prompt.data, True, prompt.task == "counting").values()))
    verdicts = [picture["value"] for picture in result["pictures"]]
    assert verdicts[-1] is None and result["statuses"] == {"ok": COUNT - 1, "failed": 1}
    assert set(verdicts[:-1]) == {0.0, 1.0}
    agree = sum(float(a) == b for a, b in zip(facts, verdicts, strict=False))
    assert agree >= COUNT - 2, "the direct judge has the same verdict on all but the odd picture"
    assert all(verdicts[i] == 1.0 for i in range(COUNT - 1) if i % 3), "every true scene is right"
    direct = [[f for f, p in zip(facts, benchmark.prompts(), strict=False) if p.task == task] for task in TAGS]
    whole = result["official"]["overall"]
    assert whole["low"] < sum(sum(some) / len(some) for some in direct) / 6 < whole["high"]
    tags = {tag: result["official"][tag]["value"] for tag in TAGS.values()}
    assert result["official"]["overall"]["value"] == pytest.approx(sum(tags.values()) / 6)
    assert result["strict"]["overall"]["value"] < result["official"]["overall"]["value"]
    assert result["coverage"] == pytest.approx((COUNT - 1) / COUNT) and result["headline"] == list(TAGS.values())
    rows = [json.loads(line) for line in (run / "perceptions.jsonl").read_text().splitlines()]
    assert main(["score", "geneval", str(run / "perceptions.jsonl"), "--output", str(tmp_path / "v.jsonl")]) == 0
    assert [json.loads(line).get("correct") for line in (tmp_path / "v.jsonl").read_text().splitlines()] == [
        None if value is None else bool(value) for value in verdicts
    ]
    assert rows[0]["perceiver"]["detector"]["model"] == "lens_shapes reader"
    assert main(["compare", str(run)]) == 0 and "single_object" in capsys.readouterr().out
    assert main(["bench", spec(drawn), *place, "--stages", "perceive,decide"]) == 0, "all from the cache"
    again = json.loads((run / "result.json").read_text())
    assert again == result


def test_a_missing_picture_may_come_later(drawn: Path, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    request = PictureRequest("p", prompt_id="000004", index=2)
    folder = Folder(Folder.Config(str(root), "{number:02d}-{index}"))
    (first,) = folder.generate([request])
    assert first.status == "failed" and "there is no 04-2.png" in first.reason
    Image.new("RGB", (2, 2)).save(root / "04-2.webp")
    (second,) = folder.generate([request])
    assert second.status == "ok" and second.image == (root / "04-2.webp").read_bytes()


def test_another_folder_is_another_run_and_pictures_of_a_prompt_need_a_number(drawn: Path, tmp_path: Path) -> None:
    here, there = (Folder(Folder.Config(str(tmp_path / name))) for name in ("a", "b"))
    for folder in (here, there):
        folder.folder.mkdir()
    assert here.describe() != there.describe()
    request = PictureRequest("p", prompt_id="000004", index=1)
    with pytest.raises(ConfigError, match=r"has no \{index\}"):
        list(Folder(Folder.Config(str(tmp_path), "{number}")).generate([request]))
    run = ["bench", spec(drawn), "--num-images", "1", "--output", str(tmp_path / "run"), "--generator"]
    assert main([*run, folder_of(drawn)]) == 0
    assert main([*run, folder_of(tmp_path / "a")]) == 2


def test_a_dry_run_counts_the_prompts_of_a_file_and_refuses_more_than_there_are(
    drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", spec(drawn), "--dry-run"]) == 0
    assert f"| pipeline | {COUNT} | {4 * COUNT} |" in capsys.readouterr().out
    assert main(["bench", "geneval", "--limit", "10000", "--dry-run"]) == 2
    assert "there are 553 prompts, not 10000" in capsys.readouterr().err
    assert main(["bench", "{use: geneval, file: nowhere.jsonl}", "--dry-run"]) == 2


@pytest.mark.parametrize(
    "pattern", ["", "x", "{index}", "{index", "{0}", "{a}_{index}", "../{id}_{index}", "/{id}", "{id.x}"]
)
def test_a_pattern_that_names_no_file_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError):
        Folder.Config("pictures", pattern)


def test_the_reader_is_an_exact_detector_and_says_where_it_fails() -> None:
    assert (
        ShapesObjects(ShapesObjects.Config()).canary() is None and ShapesColors(ShapesColors.Config()).canary() is None
    )
    benchmark, rows = entries()
    config = build(Catalog.of(lens_shapes), "benchmark", ComponentSpec("shapes"))[2]
    assert config.extras is False, "the benchmark of the embedded checkpoints is the strict one"
    scenes = pictures(benchmark.scenes(), 96, 96)
    assert all(score.value == 1.0 for score in benchmark.score(scenes, benchmark.prompts()))
    detector = ShapesObjects(ShapesObjects.Config())
    for image, row in zip(scenes[:12], rows, strict=False):
        (objects,) = detector.perceive([Image.fromarray(image.permute(1, 2, 0).numpy())], [None])
        assert all(len(objects.get(clause["class"], [])) >= clause["count"] for clause in row["include"])


def test_a_benchmark_scores_tensors_too(drawn: Path) -> None:
    benchmark, _ = entries()
    specs = {"detector": ComponentSpec("shapes_objects"), "classifier": ComponentSpec("shapes_colors")}
    geneval = GenEval(GenEval.Config(file=str(drawn / "prompts.jsonl"), **specs))
    images = pictures(benchmark.scenes()[:6], 64, 64)
    scores = geneval.score(torch.cat([images[:4], images[:2]]), geneval.prompts()[:6])
    assert [score.value for score in scores[:4]] == [1.0] * 4 and scores[5].value == 0.0


# ---- prompt files ---------------------------------------------------------------------------------------------------


def test_geneval_prompts_keep_their_order_and_a_part_is_spread_over_the_file(drawn: Path) -> None:
    path = str(drawn / "prompts.jsonl")
    prompts = GenEval(GenEval.Config(file=path)).prompts()
    assert [p.id for p in prompts] == list(range(COUNT)) and prompts[0].task == "single_object"
    part = GenEval(GenEval.Config(file=path, prompts=5)).prompts()
    assert [p.id for p in part] == [i * COUNT // 5 for i in range(5)]
    with pytest.raises(ConfigError, match="there are 48 prompts, not 49"):
        GenEval(GenEval.Config(file=path, prompts=49)).prompts()


GOOD = {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "prompt: is empty"),
        ({"prompt": 3}, "prompt: must be a text"),
        ({"include": [{"class": "unicorn", "count": 1}]}, r"metadata.include\[0\].class: 'unicorn' is unknown"),
        ({"include": 1}, "metadata.include: must be a list"),
        ({"tag": None}, "metadata.tag: must be a text"),
    ],
)
def test_a_wrong_line_of_a_prompt_file_is_one_line(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [GOOD, GOOD | change])
    with pytest.raises(ConfigError, match=rf"p\.jsonl, line 2: {words}"):
        GenEval(GenEval.Config(file=str(path))).prompts()


def test_a_prompt_file_may_not_be_another_empty_or_missing(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [GOOD])
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(GenEval(GenEval.Config(file=str(path), sha256=right)).prompts()) == 1
    with pytest.raises(ConfigError, match="has the SHA-256"):
        GenEval(GenEval.Config(file=str(path), sha256="0" * 64)).prompts()
    with pytest.raises(ConfigError, match=r"there is no such file; geneval needs prompts/evaluation_metadata\.jsonl"):
        GenEval(GenEval.Config(file=str(tmp_path / "none.jsonl"))).prompts()
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        GenEval(GenEval.Config(file=str(path))).prompts()


def test_offline_the_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"evaluation_metadata\.jsonl: is not there, and HF_HUB_OFFLINE forbids"):
        GenEval(GenEval.Config()).prompts()
    with pytest.raises(ConfigError, match=r"OneIG-Bench\.csv: is not there"):
        OneIG(OneIG.Config()).prompts()
    with pytest.raises(ConfigError, match=r"CVTG-2K\.zip is not given, and no revision to fetch it at"):
        CVTG(CVTG.Config()).prompts()


def test_a_fetched_file_is_kept_and_refused_once_it_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    body = (json.dumps({"prompt_id": 3, "prompt": "a sign", "text": ["x y"], "category": "signs"}) + "\n").encode()
    urls: list[str] = []

    def get(url: str, *_: Any) -> http.Answer:
        urls.append(url)
        return http.Answer(200, "text/plain", None, None, body)

    monkeypatch.setattr(prompt_files.http, "get", get)
    with pytest.raises(ConfigError, match="the file has 1 prompts, and the benchmark 160"):
        LongText(LongText.Config()).prompts()
    assert urls == [
        "https://raw.githubusercontent.com/X-Omni-Team/X-Omni/2b8237bb3789638c290eeda3e83ed81bd3652c3b/"
        "textbench/text_prompts.jsonl"
    ]
    (path,) = prompt_files.locate(prompt_files.LONGTEXT["en"], None).values()
    assert path.read_bytes() == body and len(urls) == 1, "it is fetched once"
    path.write_bytes(body + b"\n")
    with pytest.raises(ConfigError, match=r"has the SHA-256 .* fetch the file again"):
        LongText(LongText.Config()).prompts()
    monkeypatch.setattr(prompt_files.http, "get", lambda *_: http.Answer(404, "", None, None, b""))
    with pytest.raises(ConfigError, match="the server answers 404; download it from https://"):
        LongText(LongText.Config(language="zh")).prompts()


def test_longtext_prompts_have_the_files_ids(tmp_path: Path) -> None:
    rows = [{"prompt_id": i, "prompt": f"p{i}", "text": [f"t{i}", "u"], "category": "signs"} for i in (0, 100, 160)]
    path = write_lines(tmp_path / "t.jsonl", rows)
    longtext = LongText(LongText.Config(file=str(path)))
    assert [p.id for p in longtext.prompts()] == [0, 100, 160]
    assert longtext.references(longtext.prompts()[1]) == [
        {"bench": "longtext_en", "text": ["t100", "u"], "category": "signs"}
    ]


@pytest.mark.parametrize("archive", [True, False])
def test_cvtg_is_read_from_its_zip_or_its_folder(archive: bool, tmp_path: Path) -> None:
    place = tmp_path / ("cvtg.zip" if archive else "cvtg")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for style in ("CVTG", "CVTG-style"):
            for regions in (2, 3, 4, 5):
                listed = [{"index": k, "prompt": f"{style} {regions} '{k}'"} for k in range(2)]
                file.writestr(f"CVTG-2K/{style}/{regions}.json", json.dumps({"data_list": listed}))
                file.writestr(f"CVTG-2K/{style}/{regions}_combined.json", "{}")
    if archive:
        place.write_bytes(data.getvalue())
    else:
        zipfile.ZipFile(data).extractall(place)
        place /= "CVTG-2K"
    prompts = CVTG(CVTG.Config(file=str(place))).prompts()
    assert len(prompts) == 16 and [p.id for p in prompts] == list(range(16))
    assert prompts[8].text == "CVTG-style 2 '0'" and prompts[8].data["category"] == "CVTG-Style/2"


@pytest.mark.parametrize("content", [b"", b"PK", b"\0" * 100])
def test_a_file_that_is_no_zip_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "c.zip").write_bytes(content)
    with pytest.raises(ConfigError, match="is no zip archive"):
        CVTG(CVTG.Config(file=str(tmp_path / "c.zip"))).prompts()


def oneig_folder(root: Path) -> Path:
    rows = [
        ("Anime_Stylization", "000", "a cat"), ("Portrait", "000", "a man"), ("General_Object", "001", "a cup"),
        ("Text_Rendering", "000", "a sign"), ("Knowledge_Reasoning", "000", "the moon"),
    ]  # fmt: skip
    files: dict[str, str] = {
        "OneIG-Bench.csv": "category,id,prompt_en\n" + "".join(f"{c},{i},{p}\n" for c, i, p in rows),
        "scripts/text/text_content.csv": "id,text_content\n000,['Open \\n now']\n",
        "scripts/style/style.csv": "id,class\n000,Chinese Ink Painting\n001,\n",
        "scripts/reasoning/gt_answer.json": json.dumps({"000": "craters"}),
    }
    questions = {"question": json.dumps({"1": "Is it?", "2": "Big?"}), "dependency": json.dumps({"1": [0], "2": [1]})}
    for name, key in (("anime", "000"), ("human", "000"), ("object", "001")):
        files[f"scripts/alignment/Q_D/{name}.json"] = json.dumps({key: questions})
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_oneig_joins_its_files(tmp_path: Path) -> None:
    prompts = OneIG(OneIG.Config(file=str(oneig_folder(tmp_path)))).prompts()
    assert [p.task for p in prompts][:2] == ["Anime_Stylization", "Portrait"]
    anime, man, cup, sign, moon = (p.data for p in prompts)
    assert anime["style"] == "chinese_ink_painting" and anime["questions"] == {"1": "Is it?", "2": "Big?"}
    assert man["dependencies"] == cup["dependencies"] == {"1": ["0"], "2": ["1"]}
    assert sign["text_content"] == "['Open \\n now']" and moon["answer"] == "craters"
    (tmp_path / "scripts/style/style.csv").unlink()
    with pytest.raises(ConfigError, match=r"style\.csv: there is no such file"):
        OneIG(OneIG.Config(file=str(tmp_path))).prompts()


def test_oneig_without_a_perceiver_is_no_measurement(tmp_path: Path) -> None:
    oneig = OneIG(OneIG.Config(file=str(oneig_folder(tmp_path))))
    with pytest.raises(ConfigError, match="no perceiver is named"):
        oneig.perceive([], tmp_path)


def test_absent_dimensions_are_named_and_in_no_mean(tmp_path: Path) -> None:
    rows = [
        {"bench": "oneig_text_en", "text_content": "['a b']", "ocr_raw": "a b", "category": "Text_Rendering"},
        {"bench": "oneig_text_en", "text_content": "['c d']", "ocr_raw": "c", "category": "Text_Rendering"},
    ]
    rows = [
        {"id": f"{i:06d}_0", "prompt_id": f"{i:06d}", "index": 0, "status": "ok", **row} for i, row in enumerate(rows)
    ]
    decision = decisions.decide("OneIG", write_lines(tmp_path / "p.jsonl", rows))
    assert list(decision.official) == ["text"] and decision.headline == "text"
    assert decision.notes == ["absent, and in no mean: alignment, diversity, style, reasoning"]
    assert [(s.value, s.weight) for s in decision.scores] == [(1.0, 2.0), (0.5, 2.0)]


def test_a_dimension_whose_pictures_are_all_refused_is_absent_and_zero_by_the_strict_rule(tmp_path: Path) -> None:
    text = {"bench": "oneig_text_en", "text_content": "['a b']", "ocr_raw": "a b", "category": "Text_Rendering"}
    style = {"bench": "oneig_style_en", "style": "chinese_ink_painting", "category": "Anime_Stylization"}
    rows = [{**text, "status": "ok"}, {**style, "status": "refused"}, {**style, "status": "failed"}]
    rows = [{"id": f"{i:06d}_0", "prompt_id": f"{i:06d}", "index": 0, **row} for i, row in enumerate(rows)]
    decision = decisions.decide("OneIG", write_lines(tmp_path / "p.jsonl", rows))
    assert list(decision.official) == ["text"] and decision.headline == "text"
    assert decision.strict["style"].value == 0 and decision.strict["text"].value == 1
    assert decision.notes == ["absent, and in no mean: alignment, diversity, style, reasoning"]
    assert decision.statuses == {"ok": 1, "refused": 1, "failed": 1}
    with pytest.raises(LensError, match="no picture of any dimension has perceptions"):
        decisions.decide("OneIG", write_lines(tmp_path / "q.jsonl", rows[1:]))


def test_nothing_to_decide_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no line"):
        decisions.decide("GenEval", write_lines(tmp_path / "p.jsonl", []))
    row = {"bench": "geneval", "id": "0_0", "prompt_id": "0", "status": "refused", "metadata": GOOD}
    with pytest.raises(LensError, match="no picture has perceptions"):
        decisions.decide("GenEval", write_lines(tmp_path / "p.jsonl", [row]))


def test_a_dry_run_of_all_four_benchmarks_needs_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    systems = ["--generator", "{use: folder, folder: x}", "--generator", "{use: pipeline, seconds_per_picture: 3.6}"]
    assert main(["bench", "geneval", "oneig", "longtext", "cvtg", *systems, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "| geneval | pipeline | 553 | 2,212 | 45 | 2.2 | 0.00 | 2,212 detector readings" in out
    assert "| oneig | pipeline | 1,120 | 4,480 |" in out and "| longtext | pipeline | 160 | 640 |" in out
    assert "| **all** | | 7,666 | 18,664 |" in out
