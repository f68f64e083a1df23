"""A dirty web of shapes: the captions' exact judge, the truth about the files, and a curation against it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve
from lens_curate.curation import curate
from lens_curate.recipe import CurationSpec, read_spec
from lens_curate.verdicts import verdicts
from lens_shapes import splits
from lens_shapes.captions import caption, dense, phrasings
from lens_shapes.dirty_web import COPIES, DAMAGES, Truth, read_truth, write
from lens_shapes.dirty_web_scores import figures, shown, table
from lens_shapes.matching import ShapesCaption, caption_facts
from lens_shapes.render import render
from lens_shapes.scenes import Scene, Thing
from PIL import Image

from lens_core.config import ComponentSpec
from lens_core.types import ConfigError, Record

ROOT = Path(__file__).resolve().parents[2]
SCENE = Scene(
    "coloured position", (Thing("star", "red", "large", 0.25, 0.5), Thing("ring", "blue", "large", 0.75, 0.5)),
    ("white", "mint"), "across", relation="left of",
)  # fmt: skip


def judge(scene: Scene, text: str, size: tuple[int, int] = (96, 96)) -> tuple[float, float]:
    record = Record(b"", render(scene, *size), dense=text)
    made = ShapesCaption(ShapesCaption.Config()).score([record])
    return made["unnamed"][0], made["match"][0]


@pytest.mark.parametrize("number", range(6))
def test_every_caption_of_a_scene_matches_its_picture(number: int) -> None:
    rng = np.random.default_rng([3, number])
    scene = splits.sample(rng, "train", ("two", "words", "position", "groups", "word and thing", "counting")[number])
    for text in (dense(scene, rng), caption(scene, rng), phrasings(evolve(scene, named=True))[-1]):
        assert judge(scene, text) == (0.0, 1.0), text


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("a red star left of a blue ring", True),
        ("a blue ring to the right of a red star", True),
        ("a star and a ring", True),
        ("a star and a ring on a background with a white top half and a mint bottom half", True),
        ("a red star right of a blue ring", False),
        ("a blue star left of a red ring", False),
        ("a star", False),
        ("two stars and a ring", False),
        ("a star and a ring on a white background", False),
        ("a star and a ring on a background with a mint top half and a white bottom half", False),
        ('a star and the word "CAT"', False),
        ("my holidays", False),
        ("", False),
    ],
)
def test_a_caption_is_right_or_wrong(text: str, right: bool) -> None:
    unnamed, match = judge(SCENE, text)
    assert unnamed == 0 and (match == 1) is right and 0 <= match <= 1


def test_the_judge_has_no_number_for_a_picture_of_another_world() -> None:
    made = ShapesCaption(ShapesCaption.Config()).score([Record(b"", np.zeros((20, 20, 3), np.uint8), "a star")])
    assert np.isnan([made["unnamed"], made["match"]]).all()


def test_the_words_of_a_caption_are_facts() -> None:
    facts = caption_facts('there are three red stars and the word "ZOO" on a beige background')
    assert facts is not None and facts["word"] == "ZOO" and facts["background"]["names"] == ["beige"]
    assert facts["groups"] == [{"shape": "star", "count": 3, "colour": "red"}]
    assert caption_facts("nothing of that kind") is None


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web") / "dirty-web"
    write(folder, 60, 0.5, seed=3)
    return folder


def test_the_truth_names_every_file_once_and_each_damage_as_often(web: Path, tmp_path: Path) -> None:
    truths = read_truth(web)
    files = {truth.file for truth in truths}
    assert files == {p.name for p in (web / "pictures").iterdir() if p.suffix != ".txt"} and len(files) == 60
    assert [sum(t.damage == damage for t in truths) for damage in DAMAGES] == [2] * len(DAMAGES)
    assert all((t.of in files) == (t.damage in COPIES) for t in truths)
    assert all((web / "pictures" / t.file).with_suffix(".txt").is_file() for t in truths)
    assert write(tmp_path / "again", 60, 0.5, seed=3) == truths
    for truth in truths:
        assert (tmp_path / "again/pictures" / truth.file).read_bytes() == (web / "pictures" / truth.file).read_bytes()


def test_a_mirrored_copy_is_the_mirror_image_of_its_original(web: Path) -> None:
    for truth in (t for t in read_truth(web) if t.damage == "mirrored"):
        copy, original = (np.asarray(Image.open(web / "pictures" / name), int) for name in (truth.file, truth.of))
        assert np.abs(copy - original[:, ::-1]).mean() < 6 < np.abs(copy - original).mean()


@pytest.mark.parametrize(("count", "share", "words"), [(0, 0.5, "at least 1"), (90, 0.8, "0.75"), (9, 0.5, "too few")])
def test_webs_that_cannot_be_made_are_refused(tmp_path: Path, count: int, share: float, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        write(tmp_path / "new", count, share)
    with pytest.raises(ConfigError, match="already there"):
        write(tmp_path, 90)


def recipe(web: Path) -> CurationSpec:
    """The example's recipe, for this folder."""
    spec = read_spec(ROOT / "examples" / "curation" / "dirty-web.yaml")
    return evolve(spec, sources=(ComponentSpec("folder", {"path": str(web / "pictures")}),))


def test_a_curation_drops_what_is_spoiled_and_keeps_what_is_clean(web: Path, tmp_path: Path) -> None:
    curate(recipe(web), tmp_path / "store", runner="serial")
    made = figures(read_truth(web), list(verdicts(str(tmp_path / "store"))))
    for name, row in made["stages"].items():
        assert row["hits"] == row["spoiled"], name
        assert row.get("dropped", row["hits"]) == row["hits"], name
    assert made["kept"] == made["kept_clean"] == made["clean"] == 30
    assert made["kept_spoiled"] == made["lost"] == 0
    assert "| mirrored duplicates | `mirrored` | 2 | 2 | 1.000 (0.342 to 1.000) |" in table(made)


def verdict(name: str, stage: str, reason: str = "", of: str = "") -> dict[str, object]:
    return {
        "name": name,
        "id": f"id {name}",
        "kept": not stage,
        "stage": stage,
        "reason": reason,
        "of": of,
        "distance": 4,
    }


def test_figures_count_what_is_missed_and_what_is_wrongly_dropped() -> None:
    truths = [Truth("a"), Truth("b"), Truth("c"), Truth("d", "blur"), Truth("e", "blur"), Truth("f", "resized", "a"),
              Truth("g", "mirrored", "b")]  # fmt: skip
    rows = [
        verdict("a", "near", of="id f"),  # the copy is the better one
        verdict("b", "near", of="id g"),  # found, but not as mirrored
        verdict("c", "clarity", "acuity is 0.1, below 0.28"),
        verdict("d", "clarity", "acuity is 0.1, below 0.28"),
        verdict("e", ""), verdict("f", ""), verdict("g", ""),
    ]  # fmt: skip
    made = figures(truths, rows)
    assert [made["stages"]["blur"][name][0] for name in ("precision", "recall")] == [0.5, 0.5]
    near, mirrored = made["stages"]["near"], made["stages"]["mirrored"]
    assert (near["precision"][0], near["recall"][0], near["dropped"]) == (0.5, 1.0, 2)
    assert (mirrored["precision"], mirrored["recall"][0]) == (None, 0.0)
    assert made["stages"]["noise"]["precision"] is None
    assert (made["kept"], made["kept_spoiled"], made["kept_clean"], made["lost"]) == (3, 1, 2, 1)
    with pytest.raises(ConfigError, match="no verdict"):
        figures([*truths, Truth("h")], rows)


def test_the_figures_of_the_page_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "dirty-web.md").read_text(encoding="utf-8")
    made, clean = (
        json.loads((ROOT / "docs" / "results" / "dirty-web" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("stages", "clean")
    )
    assert table(made) in page
    assert f"loses {clean['lost']} of {clean['pictures']:,} pictures, {shown(clean['lost_clean'])}" in page
    assert f"loses {made['lost']} clean pictures" in page and made["kept_spoiled"] == 0
    near, mirrored = (made["stages"][name]["bits_apart"] for name in ("near", "mirrored"))
    assert f"at most {near[0]:g} of 256 bits from the one that is kept, 95 % at most {near[1]:g}" in page
    assert f"mirrored ones {mirrored[0]:g} and {mirrored[1]:g}." in page
