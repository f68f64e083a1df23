"""A curation from sources to the store: what is kept, what a second run does, and what a killed one leaves."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lens_curate import curation, engine, worker
from lens_curate.curation import curate
from lens_curate.engine import default_runner
from lens_curate.measures import Clarity
from lens_curate.progress import Progress, duration
from lens_curate.recipe import CurationSpec, read_spec
from lens_curate.tables import load
from lens_curate.verdicts import explain, verdicts
from lens_data.imports import import_folder
from lens_data.store import Store
from PIL import Image, ImageFilter
from test_curate_duplicates import texture

from lens_core.catalog import Catalog
from lens_core.cli.main import main
from lens_core.config import structure, unstructure
from lens_core.io.locks import LockedError, locked
from lens_core.types import ConfigError, LensError

FILTERS: list[Any] = [
    {"use": "resolution", "keep": {"short_side": {"min": 64}}},
    {"use": "clarity", "keep": {"edge": {"min": 24}}},
    "luminance",
]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(texture(seed, 96))


def add(folder: Path, name: str, image: Image.Image, **options: Any) -> None:
    image.save(folder / name, **options)
    (folder / name).with_suffix(".txt").write_text(f"A texture called {Path(name).stem}.")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "raw"
    made.mkdir()
    for seed in range(6):
        add(made, f"{seed}.png", picture(seed))
    add(made, "same.bmp", picture(0))
    add(made, "smaller.jpg", picture(1).resize((80, 80)), quality=90)
    add(made, "mirror.png", picture(2).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    add(made, "blurred.png", picture(7).filter(ImageFilter.GaussianBlur(4)))
    add(made, "tiny.png", picture(8).resize((40, 40)))
    (made / "torn.png").write_bytes((made / "3.png").read_bytes()[:3000])
    (made / "torn.txt").write_text("A torn one.")
    add(made, "silent.png", picture(9))
    (made / "silent.txt").unlink()
    return made


def spec(folder: Path, **changes: Any) -> CurationSpec:
    sources = [{"use": "folder", "path": str(folder), "license": "CC0-1.0"}]
    return structure(CurationSpec, {"sources": sources, "filters": FILTERS, **changes})


def run(recipe: CurationSpec, store: Path, **options: Any) -> Any:
    return curate(recipe, store, runner="serial", **options)


def stages(store: Path) -> dict[str, str]:
    return {row["name"]: row["stage"] for row in verdicts(str(store))}


def stored(store: Path) -> dict[str, dict[str, Any]]:
    rows = Store(str(store)).columns("id", "brief", "dense", "height", "width", "source").to_pylist()
    return {row["id"]: {k: v for k, v in row.items() if k != "_rowid"} for row in rows}


def hashes(folder: Path, *names: str) -> set[str]:
    """The ids of these pictures of a folder; of all that are PNGs by default."""
    files = [folder / name for name in names] or list(folder.glob("*.png"))
    return {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


EXPECTED = {
    **{f"{seed}.png": "" for seed in range(6)}, "same.bmp": "exact", "smaller.jpg": "near", "mirror.png": "mirrored",
    "blurred.png": "clarity", "tiny.png": "resolution", "torn.png": "decode", "silent.png": "captions",
}  # fmt: skip


def test_each_fault_is_found_by_its_stage(folder: Path, tmp_path: Path) -> None:
    report = run(spec(folder), tmp_path / "store")
    stage_of = stages(tmp_path / "store")
    # Which of two equal or mirrored pictures stays is decided by their keys.
    for one, other in (("0.png", "same.bmp"), ("2.png", "mirror.png")):
        if stage_of[other] == "":
            stage_of[one], stage_of[other] = stage_of[other], stage_of[one]
    assert stage_of == EXPECTED
    rows = stored(tmp_path / "store")
    assert len(rows) == report.data["kept"] == 6 and {row["source"] for row in rows.values()} == {"raw"}
    assert {row["dense"] for row in rows.values()} <= {f"A texture called {Path(n).stem}." for n in EXPECTED}
    dropped = {stage["stage"]: stage["dropped"] for stage in report.data["funnel"]}
    assert sum(dropped.values()) == 7 and report.data["records"] == 13


def test_a_second_run_reads_nothing_and_changes_nothing(folder: Path, tmp_path: Path, monkeypatch) -> None:
    run(spec(folder), tmp_path / "store")
    before, rows = stages(tmp_path / "store"), stored(tmp_path / "store")
    monkeypatch.setattr(worker, "read_raw", _never)
    report = run(spec(folder), tmp_path / "store")
    assert report.data["read"] == 0 and report.data["stored"]["added"] == 0
    assert stages(tmp_path / "store") == before and stored(tmp_path / "store") == rows


def _never(*_: Any) -> Any:
    raise AssertionError("a picture was read")


def test_another_threshold_decides_again_without_reading_a_picture(folder: Path, tmp_path: Path, monkeypatch) -> None:
    run(spec(folder), tmp_path / "store")
    monkeypatch.setattr(worker, "read_raw", _never)
    strict = [{"use": "resolution", "keep": {"short_side": {"min": 97}}}, *FILTERS[1:]]
    report = run(spec(folder, filters=strict), tmp_path / "store")
    assert report.data["kept"] == 0 and report.data["stored"]["removed"] == 6
    assert stored(tmp_path / "store") == {}
    monkeypatch.undo()
    report = run(spec(folder), tmp_path / "store")  # what is kept again is read again, for the store holds no copy
    assert report.data["kept"] == report.data["stored"]["added"] == 6 and report.data["read"] == 0


def test_another_version_of_a_scorer_scores_again_and_nothing_else_does(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    run(spec(folder), tmp_path / "store")
    scored: list[str] = []
    plain = worker.score_batch

    def noted(made: Any, records: Sequence[Any], ids: Sequence[str]) -> Any:
        scored.extend([made.name] * len(records))
        return plain(made, records, ids)

    monkeypatch.setattr(worker, "score_batch", noted)
    monkeypatch.setattr(Clarity, "version", "next")
    report = run(spec(folder), tmp_path / "store")
    assert report.data["read"] == 0 and set(scored) == {"clarity"} and len(scored) == 12
    run(spec(folder), tmp_path / "store")
    assert len(scored) == 12


def test_a_filter_that_is_added_later_scores_what_is_there(folder: Path, tmp_path: Path) -> None:
    run(spec(folder), tmp_path / "store")
    more = [*FILTERS, {"use": "entropy", "keep": {"entropy": {"max": 0}}}]
    report = run(spec(folder, filters=more), tmp_path / "store")
    assert report.data["read"] == 0 and report.data["kept"] == 0
    assert set(stages(tmp_path / "store").values()) == {"exact", "decode", "resolution", "clarity", "entropy"}


def test_new_pictures_are_read_alone_and_compared_with_the_old_ones(folder: Path, tmp_path: Path) -> None:
    run(spec(folder), tmp_path / "store")
    add(folder, "new.png", picture(20))
    add(folder, "again.jpg", picture(3), quality=80)
    report = run(spec(folder), tmp_path / "store")
    assert report.data["read"] == 2
    stage_of = stages(tmp_path / "store")
    assert stage_of["new.png"] == "" and sorted([stage_of["3.png"], stage_of["again.jpg"]]) == ["", "near"]


def test_a_picture_that_changes_is_read_again(folder: Path, tmp_path: Path) -> None:
    run(spec(folder), tmp_path / "store")
    add(folder, "torn.png", picture(21))
    report = run(spec(folder), tmp_path / "store")
    assert report.data["read"] == 1 and report.data["records"] == 13
    assert stages(tmp_path / "store")["torn.png"] == ""


def test_a_picture_that_changes_takes_the_place_of_its_old_version_in_the_store(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    add(raw, "0.png", picture(0))
    add(raw, "1.png", picture(1))
    run(spec(raw, filters=[]), tmp_path / "store")
    old = hashes(raw)
    add(raw, "1.png", picture(1).point(lambda value: min(255, value + 6)))
    report = run(spec(raw, filters=[]), tmp_path / "store")
    assert report.data["stored"] == {"added": 1, "removed": 1, "changed": 0, "gone": 0}
    assert stored(tmp_path / "store").keys() == hashes(raw) != old
    report = run(spec(raw, filters=[]), tmp_path / "store")
    assert report.data["stored"] == {"added": 0, "removed": 0, "changed": 0, "gone": 0}
    assert stored(tmp_path / "store").keys() == hashes(raw)


def test_a_picture_that_is_deleted_leaves_the_store_and_the_report(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    add(own, "mine.png", picture(50))
    import_folder(tmp_path / "store", own)
    run(spec(folder), tmp_path / "store")
    before = stored(tmp_path / "store").keys()
    gone = hashes(folder, "5.png")
    (folder / "5.png").unlink()
    (folder / "5.txt").unlink()
    whole = stored(tmp_path / "store")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"raw: no longer has 1 of 6 pictures .* use --prune to remove them"):
            run(spec(folder), tmp_path / "store")
        assert stored(tmp_path / "store") == whole
    report = run(spec(folder), tmp_path / "store", prune=True)
    assert report.data["records"] == 12 and report.data["stored"]["removed"] == 1
    assert stored(tmp_path / "store").keys() == before - gone
    assert "5.png" not in stages(tmp_path / "store")
    assert hashes(own) <= stored(tmp_path / "store").keys()


def test_a_source_that_is_empty_at_once_removes_nothing(folder: Path, tmp_path: Path) -> None:
    run(spec(folder), tmp_path / "store")
    before = stored(tmp_path / "store")
    folder.rename(tmp_path / "elsewhere")
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"raw: has no picture any more.*check the path"):
        run(spec(folder), tmp_path / "store")
    assert stored(tmp_path / "store") == before
    assert run(spec(folder), tmp_path / "store", prune=True).data["stored"]["removed"] == 6
    assert not stored(tmp_path / "store")


def test_another_folder_under_the_name_of_a_source_removes_nothing_unasked(tmp_path: Path) -> None:
    for place, seeds in (("a", (0, 1, 2)), ("b", (3, 4, 5))):
        (tmp_path / place / "raw").mkdir(parents=True)
        for number, seed in enumerate(seeds):
            add(tmp_path / place / "raw", f"{number}.png", picture(seed))
    run(spec(tmp_path / "a" / "raw", filters=[]), tmp_path / "store")
    before = stored(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"raw: no longer has 3 of 3 pictures .* another `name`"):
        run(spec(tmp_path / "b" / "raw", filters=[]), tmp_path / "store")
    assert stored(tmp_path / "store") == before


def test_a_picture_that_cannot_be_read_any_more_stays(folder: Path, tmp_path: Path) -> None:
    run(spec(folder), tmp_path / "store")
    before = stored(tmp_path / "store").keys()
    (folder / "5.png").write_bytes(b"torn")
    assert run(spec(folder), tmp_path / "store").data["stored"]["removed"] == 0
    assert stored(tmp_path / "store").keys() == before


def test_a_tar_that_loses_a_sample_loses_it_in_the_store(folder: Path, tmp_path: Path) -> None:
    def pack(*names: str) -> None:
        with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
            for name in names:
                tar.add(folder / f"{name}.png", f"{name}.png")
                tar.add(folder / f"{name}.txt", f"{name}.txt")

    (tmp_path / "tars").mkdir()
    recipe = structure(CurationSpec, {"sources": [{"use": "tars", "path": str(tmp_path / "tars")}]})
    pack("0", "1", "2")
    run(recipe, tmp_path / "store")
    pack("0", "2")
    assert run(recipe, tmp_path / "store", prune=True).data["stored"]["removed"] == 1
    assert stored(tmp_path / "store").keys() == hashes(folder, "0.png", "2.png")
    pack("0", "1", "2")
    run(recipe, tmp_path / "store")
    assert stored(tmp_path / "store").keys() == hashes(folder, "0.png", "1.png", "2.png")


def test_a_source_store_that_loses_a_picture_loses_that_one_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lens_curate.sources.STORE_ROWS", 2)
    import_folder(tmp_path / "source", folder)
    recipe = structure(CurationSpec, {"sources": [{"use": "store", "path": str(tmp_path / "source")}]})
    run(recipe, tmp_path / "store")
    before = stored(tmp_path / "store").keys()
    lost = hashes(folder, "4.png")
    assert lost <= before
    Store(str(tmp_path / "source")).delete(list(lost))
    run(recipe, tmp_path / "store", prune=True)
    assert stored(tmp_path / "store").keys() >= before - lost
    assert not lost & stored(tmp_path / "store").keys()


# The records, the part, the removal, the verdicts, the new picture.
@pytest.mark.parametrize("after", range(1, 6))
def test_a_run_that_is_killed_after_pictures_changed_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for seed in (3, 4, 5):
        add(folder, f"{seed}.png", picture(seed))
    recipe = spec(folder, filters=[])
    for name in ("whole", "store"):
        run(recipe, tmp_path / name)
    add(folder, "4.png", picture(4).point(lambda value: min(255, value + 6)))
    (folder / "5.png").unlink()
    run(recipe, tmp_path / "whole", prune=True)
    killed = [0]

    def dying(plain: Any) -> Any:
        def call(*arguments: Any) -> Any:
            killed[0] += 1
            if killed[0] == after:
                raise KeyboardInterrupt
            return plain(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("append", "rewrite", "delete", "insert"):
            patch.setattr(Store, name, dying(getattr(Store, name)))
        patch.setattr(curation, "FLUSH_ROWS", 1)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / "store", prune=True)
    for _ in range(2):
        run(recipe, tmp_path / "store", prune=True)
        assert stored(tmp_path / "store") == stored(tmp_path / "whole")
        assert stages(tmp_path / "store") == stages(tmp_path / "whole")


@pytest.mark.parametrize("ending", [".TXT", ".Txt"])
def test_a_changed_caption_is_read_again_however_its_ending_is_written(tmp_path: Path, ending: str) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    picture(0).save(raw / "0.png")
    for words in ("A texture.", "Another caption of it."):
        (raw / f"0{ending}").write_text(words)
        run(spec(raw, filters=[]), tmp_path / "store")
        assert [row["dense"] for row in stored(tmp_path / "store").values()] == [words]


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_run_that_is_killed_goes_on_to_the_same_end(folder: Path, tmp_path: Path, monkeypatch, after: int) -> None:
    run(spec(folder), tmp_path / "whole")
    monkeypatch.setattr(curation, "TASK", 2)
    monkeypatch.setattr(curation, "FLUSH_ROWS", 1)
    monkeypatch.setattr(curation.t, "COMPACT_AFTER", 2)
    plain = curation.t.Tables.append
    count = 0

    def append(self: Any, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise KeyboardInterrupt
        plain(self, *arguments)

    monkeypatch.setattr(curation.t.Tables, "append", append)
    with pytest.raises(KeyboardInterrupt):
        run(spec(folder), tmp_path / "store")
    run(spec(folder), tmp_path / "store")
    assert stages(tmp_path / "store") == stages(tmp_path / "whole")
    assert stored(tmp_path / "store") == stored(tmp_path / "whole")


def test_pictures_that_were_imported_stay_and_new_ones_are_compared_with_them(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    add(old, "small.jpg", picture(1).resize((64, 64)), quality=90)
    add(old, "blurred.png", picture(30).filter(ImageFilter.GaussianBlur(4)))
    import_folder(tmp_path / "store", old)
    before = stored(tmp_path / "store")
    run(spec(folder), tmp_path / "store")
    stage_of = stages(tmp_path / "store")
    assert stage_of["1.png"] == stage_of["smaller.jpg"] == "near"
    assert stored(tmp_path / "store").items() >= before.items()


def test_a_second_recipe_keeps_what_the_first_has_kept(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    add(other, "large.png", picture(4).resize((192, 192), Image.Resampling.LANCZOS))
    add(other, "own.png", picture(40))
    run(spec(folder), tmp_path / "store")
    first = stored(tmp_path / "store")
    run(spec(other), tmp_path / "store")
    assert stored(tmp_path / "store").items() > first.items()
    stage_of = stages(tmp_path / "store")
    assert stage_of["large.png"] == "near" and stage_of["own.png"] == "" and stage_of["5.png"] == ""
    assert stage_of["blurred.png"] == "clarity", "verdicts of the first recipe stay"


def test_a_preview_touches_no_store(folder: Path, tmp_path: Path) -> None:
    report = run(spec(folder), tmp_path / "store", preview=8)
    assert report.data["records"] == 8 and not (tmp_path / "store").exists()
    page = report.write(tmp_path / "page").read_text()
    assert "<svg" in page and "data:image/jpeg;base64" in page and "http" not in page


class _Moody:
    """A scorer that raises for one picture and has no number for another."""

    version, columns = "1", ("mood",)

    def __init__(self, mean: float) -> None:
        self.mean = mean

    def score(self, records: Sequence[Any]) -> dict[str, list[float]]:
        made = []
        for record in records:
            if record.pixels.shape[0] == 80:
                raise RuntimeError("not today")
            made.append(float("nan") if record.pixels.shape[0] == 40 else self.mean)
        return {"mood": made}


def test_a_filter_that_raises_drops_that_picture_and_goes_on(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Clarity, "columns", ("mood",))
    monkeypatch.setattr(Clarity, "score", lambda self, records: _Moody(1.0).score(records))
    report = run(spec(folder, filters=[{"use": "clarity", "keep": {"mood": {"min": 0}}}]), tmp_path / "store")
    stage_of = stages(tmp_path / "store")
    assert {name for name, stage in stage_of.items() if stage == "clarity"} == {"smaller.jpg", "tiny.png"}
    assert report.data["scores"]["clarity"]["failed"] == 2
    assert "RuntimeError: not today" in "\n".join(explain(str(tmp_path / "store"), "smaller.jpg", Catalog.installed()))


def test_a_curator_without_columns_or_version_is_refused(folder: Path, tmp_path: Path, monkeypatch) -> None:
    for name, value in (("columns", ()), ("columns", ("id",)), ("columns", "clarity"), ("version", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(Clarity, name, value)
            with pytest.raises(LensError, match=f"its {name} must be"):
                run(spec(folder), tmp_path / "store")


def test_why_tells_every_stage_of_one_picture(folder: Path, tmp_path: Path, capsys) -> None:
    run(spec(folder), tmp_path / "store")
    assert main(["data", "why", str(tmp_path / "store"), "blurred.png"]) == 0
    text = capsys.readouterr().out
    assert "dropped by clarity" in text and "FAILS (min 24)" in text and "CC0-1.0" in text
    key = next(row["id"] for row in verdicts(str(tmp_path / "store")) if row["name"] == "5.png")
    assert main(["data", "why", str(tmp_path / "store"), key[:12]]) == 0
    assert "5.png from raw: kept" in capsys.readouterr().out
    assert main(["data", "why", str(tmp_path / "store"), "nobody's.png"]) != 0
    assert "no record has the id or the name" in capsys.readouterr().err


def test_a_file_that_is_gone_before_it_is_stored_is_told_and_not_kept(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    plain = curation.Filler.fill

    def fill(self: Any, images: Any) -> None:
        (folder / "5.png").unlink()
        plain(self, images)

    monkeypatch.setattr(curation.Filler, "fill", fill)
    report = run(spec(folder), tmp_path / "store")
    assert report.data["stored"] == {"added": 5, "removed": 0, "changed": 0, "gone": 1}
    assert "gone since it was read" in next(
        v["reason"] for v in verdicts(str(tmp_path / "store")) if v["name"] == "5.png"
    )


@pytest.mark.parametrize("room", [600, 3000, 20_000])
def test_a_full_disk_stops_it_in_one_line_and_the_same_command_goes_on(
    folder: Path, tmp_path: Path, capsys, room: int
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(unstructure(spec(folder))))
    words = ["data", "curate", str(recipe), "--runner", "serial", "--output"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        code = main([*words, str(tmp_path / "store")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lens:")]
    assert code == 2 and len(lines) == 1 and "cannot be written: File too large; make room" in lines[0]
    assert main([*words, str(tmp_path / "store")]) == 0
    assert stages(tmp_path / "store") == stages(tmp_path / "whole")
    assert stored(tmp_path / "store") == stored(tmp_path / "whole")


def test_two_curations_of_one_store_are_refused(folder: Path, tmp_path: Path) -> None:
    with locked(tmp_path / "store", "store"), pytest.raises(LockedError, match="is writing to this store"):
        run(spec(folder), tmp_path / "store")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"filters": [{"use": "clarety"}]}, "no curator is called 'clarety'. Did you mean 'clarity'"),
        ({"filters": [{"use": "clarity", "keep": {"claritty": {"min": 1}}}]}, "Did you mean 'clarity'"),
        ({"filters": [{"use": "clarity", "keep": {"clarity": {}}}]}, "needs min, max or both"),
        ({"filters": [{"use": "clarity", "keep": {"clarity": {"min": 2, "max": 1}}}]}, "more than max"),
        ({"filters": [{"use": "clarity", "keep": {"clarity": {"min": float("nan")}}}]}, "finite"),
        ({"filters": ["clarity", "clarity"]}, "'clarity' is taken"),
        ({"filters": [{"use": "clarity", "name": "near"}]}, "'near' is taken"),
        ({"filters": [{"use": "clarity", "name": "A B"}]}, "lower-case letters"),
        ({"sources": []}, "at least 1 item"),
        ({"sources": [{"use": "folder"}]}, "path: missing"),
        ({"sources": [{"use": "foldr", "path": "x"}]}, "Did you mean 'folder'"),
        ({"sources": [{"use": "folder", "path": "/nowhere"}]}, "there is no such folder"),
        ({"sources": [{"use": "folder", "path": ".", "name": "(store)"}]}, "the store's own pictures"),
        ({"duplicates": {"distance": 65}}, "at most 64"),
        ({"thumbnail": 0}, "at least 16"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_run_is_refused_before_the_store_is_made(
    folder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(LensError, match=words):
        run(spec(folder, **changes), tmp_path / "store")
    assert not (tmp_path / "store" / "curate_records.lance").exists()


def test_the_output_is_no_source(folder: Path, tmp_path: Path) -> None:
    run(spec(folder), tmp_path / "store")
    again = spec(folder, sources=[{"use": "store", "path": str(tmp_path / "store")}])
    with pytest.raises(ConfigError, match="both a source and the output"):
        run(again, tmp_path / "store")
    run(structure(CurationSpec, {"sources": [{"use": "store", "path": str(tmp_path / "store")}]}), tmp_path / "copy")
    assert set(stored(tmp_path / "copy")) == set(stored(tmp_path / "store"))


def test_the_command_reads_a_recipe_and_writes_the_report(folder: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"sources:\n  - {{use: folder, path: {folder}}}\nfilters:\n  - {{use: clarity, keep: {{edge: {{min: 24}}}}}}\n"
    )
    store = tmp_path / "store"
    assert main(["data", "curate", str(recipe), "--output", str(store), "--runner", "serial"]) == 0
    assert "13 records, 7 kept" in capsys.readouterr().out
    assert json.loads((store / "report.json").read_text())["kept"] == 7
    assert main(["data", "curate", str(recipe), "--output", str(store), "--runner", "spark"]) == 2
    assert "use native, ray or serial" in capsys.readouterr().err
    recipe.write_text("sources: []\nfilter: []\n")
    assert main(["data", "curate", str(recipe), "--output", str(store)]) == 2
    error = capsys.readouterr().err
    assert "$.filter: unknown. Did you mean 'filters'?" in error and error.count("\n") >= 1


def test_the_native_runner_makes_the_same_store(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("daft")
    run(spec(folder), tmp_path / "serial")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(unstructure(spec(folder))))
    # In a process of its own, as a user runs it: Daft starts processes and threads that outlive a test.
    words = [
        "data",
        "curate",
        str(recipe),
        "--output",
        str(tmp_path / "native"),
        "--runner",
        "native",
        "--workers",
        "2",
    ]
    done = subprocess.run([sys.executable, "-m", "lens_core", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert stored(tmp_path / "native") == stored(tmp_path / "serial")
    assert sorted(map(str, verdicts(str(tmp_path / "native")))) == sorted(map(str, verdicts(str(tmp_path / "serial"))))


POISON = """
import os

from attrs import frozen

from lens_core import hookimpl


class Poison:
    version = "1"
    columns = ("fine",)

    @frozen
    class Config:
        signal: int = 11

    def __init__(self, config):
        self.config = config

    def score(self, records):
        for record in records:
            if "poison" in record.data["name"]:
                os.kill(os.getpid(), self.config.signal)
        return {"fine": [1.0 for _ in records]}


@hookimpl
def lens_curators():
    return {"poison": Poison}
"""


@pytest.mark.parametrize(
    ("runner", "signal_number", "cause"),
    [
        ("native", 11, "SIGSEGV"),
        ("native", 9, "SIGKILL"),
        pytest.param("ray", 11, "SIGSEGV", marks=pytest.mark.skipif("LENS_RAY" not in os.environ, reason="a minute")),
    ],
)
def test_a_picture_that_kills_its_process_is_marked_and_the_others_go_on(
    tmp_path: Path, runner: str, signal_number: int, cause: str
) -> None:
    for needed in ("daft", *(["ray"] if runner == "ray" else [])):
        pytest.importorskip(needed)
    raw = tmp_path / "raw"
    raw.mkdir()
    for seed in range(8):
        add(raw, f"{seed}{'poison' if seed in (2, 3) else ''}.png", picture(seed))
    (tmp_path / "poison.py").write_text(POISON)
    recipe = tmp_path / "recipe.yaml"
    filters = [{"use": "poison", "signal": signal_number, "keep": {"fine": {"min": 1}}}]
    recipe.write_text(json.dumps({"sources": [{"use": "folder", "path": str(raw)}], "filters": filters}))
    words = [
        "--plugin",
        str(tmp_path / "poison.py"),
        "data",
        "curate",
        str(recipe),
        "--output",
        str(tmp_path / "store"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lens_core", *words, "--workers", "1", "--runner", runner],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "8 records, 6 kept" in done.stdout and "2 dropped by decode" in done.stdout
    reasons = {row["name"]: row["reason"] for row in verdicts(str(tmp_path / "store"))}
    crashed = f"crashed the process that read it ({cause})"
    assert {name for name, reason in reasons.items() if reason == crashed} == {"2poison.png", "3poison.png"}
    assert len(stored(tmp_path / "store")) == 6


def test_a_task_that_has_killed_a_process_is_handed_back_on_ray(folder: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    runner = engine._Runner(json.dumps(unstructure(spec(folder))), str(tmp_path / "store"), str(marks))
    (source,) = runner.worker.sources
    part = next(part for part in source.source.parts() if part.key == "1.png")
    task = "7\n" + worker.dump_task([worker.PartTask(0, part, records=True)])
    answers = runner(task)
    assert next(answers)["kind"] != "done" and len(list(marks.iterdir())) == 1  # at work
    again = engine._Runner(json.dumps(unstructure(spec(folder))), str(tmp_path / "store"), str(marks))
    assert list(again(task)) == [{"kind": "suspect", "body": b"7"}]  # tried anew while its file is there: handed back
    assert list(answers)[-1] == {"kind": "done", "body": b"7"} and not list(marks.iterdir())
    assert list(again(task))[-1]["kind"] == "done"

    def fails(tasks: Any) -> Any:
        yield worker.Answer("records", b"")
        raise ValueError("a fault of the code, which kills nothing")

    runner.worker.run = fails  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="kills nothing"):
        list(runner(task))
    assert not list(marks.iterdir())


def test_a_task_goes_on_behind_what_has_killed_a_process(folder: Path, tmp_path: Path) -> None:
    worker_ = worker.Worker(spec(folder), str(tmp_path / "store"))
    (source,) = worker_.sources
    part = next(part for part in source.source.parts() if part.key == "1.png")
    rows = {}
    for name, changes in {
        "picture": {"fatal": {1: "it died"}},
        "reading": {"unreadable": (1, "it died")},
        "score": {"fatal": {1: "it died"}, "records": False, "filters": (2,)},
    }.items():
        text = worker.dump_task([worker.PartTask(0, part, **changes)])
        answers = [(a.kind, load(a.body).to_pylist()) for a in worker_.run(worker.load_task(text))]
        assert [kind for kind, _ in answers] == (["scores 2"] if name == "score" else ["records", "parts"])
        rows[name] = answers[0][1][0]
    assert {row["fault"] for row in rows.values()} == {"it died"}
    assert rows["picture"]["id"] == rows["score"]["id"] and rows["picture"]["dense"] == "A texture called 1."
    assert rows["reading"]["id"] == "" and np.isnan(rows["score"]["mean"])


def test_equal_files_are_scored_each_with_its_captions(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, text in {"a": "One two three four.", "b": "One.", "c": "One two three."}.items():
        add(raw, f"{name}.png", picture(0))
        (raw / f"{name}.txt").write_text(text)
    recipe = spec(
        raw,
        filters=[{"use": "captions", "keep": {"words": {"min": 3}}}],
        duplicates={"exact": False, "distance": None},
    )
    run(recipe, tmp_path / "store")
    assert stages(tmp_path / "store") == {"a.png": "", "b.png": "captions_filter", "c.png": ""}
    lines = explain(str(tmp_path / "store"), "b.png", Catalog.installed())
    assert any("words 1 FAILS" in line for line in lines)
    # A caption that changes is scored again, though the file is the same.
    (raw / "b.txt").write_text("One two three four five.")
    run(recipe, tmp_path / "store")
    assert stages(tmp_path / "store")["b.png"] == ""


def test_the_runner_is_the_one_that_dafts_variable_names(monkeypatch) -> None:
    monkeypatch.delenv("DAFT_RUNNER", raising=False)
    assert default_runner() == "native"
    monkeypatch.setenv("DAFT_RUNNER", "RAY")
    assert default_runner() == "ray"


def test_progress_tells_rate_and_time_left() -> None:
    now = iter([0.0, 10.0, 10.0, 10.0, 10.0])
    progress = Progress("read", 300, clock=lambda: next(now))
    progress.done = 50
    assert str(progress) == "read: 50 of 300, 5.0 a second, 50 s left"
    assert [duration(s) for s in (0.4, 59.6, 3599, 7500)] == ["0 s", "1 min 0 s", "59 min 59 s", "2 h 5 min"]


def test_a_recipe_in_a_file_is_read_with_every_problem(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("sources: 3\nthumbnail: big\n")
    with pytest.raises(ConfigError) as error:
        read_spec(tmp_path / "r.yaml")
    assert len(error.value.problems) == 2


def test_hashes_of_float_scores_pass_the_limit_they_equal() -> None:
    from lens_curate.decide import passes
    from lens_curate.recipe import Limits

    values = np.array([0.3, 0.299, np.nan, np.inf], np.float32)
    assert passes(values, Limits(min=0.3)).tolist() == [True, False, False, False]


def test_a_store_without_a_curation_says_so(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "0.png", tmp_path / "0.png")
    (tmp_path / "in").mkdir()
    add(tmp_path / "in", "0.png", picture(0))
    import_folder(tmp_path / "store", tmp_path / "in")
    with pytest.raises(LensError, match="no curation has filled this store"):
        list(verdicts(str(tmp_path / "store")))
