"""Filling the training store: three formats, nothing lost in silence, nothing twice."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lens_data import imports
from lens_data.commands import import_, info
from lens_data.imports import import_folder, import_parquet, import_tars
from lens_data.store import Store
from lens_data.summary import summary
from PIL import Image

from lens_core.types import ConfigError, LensError


def png(seed: int, height: int = 8, width: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def folder(path: Path, **files: bytes | str) -> Path:
    """Files by name; `__` is a dot."""
    path.mkdir(exist_ok=True)
    for name, data in files.items():
        (path / name.replace("__", ".")).write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def parquet(path: Path, images: list[object], **columns: list[object]) -> Path:
    path.parent.mkdir(exist_ok=True)
    struct = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": struct, **columns}), path)
    return path


def rows(store: Path) -> list[dict]:
    names = ("image", "height", "width", "brief", "dense", "source")
    table = Store(str(store)).columns("id", *names).drop_columns(["_rowid"]).to_pylist()
    return sorted(table, key=lambda row: row["dense"] + row["brief"])


def test_a_folder_with_a_text_beside_each_picture(tmp_path):
    source = folder(tmp_path / "pets", a__png=png(1), a__txt=" a cat \n", b__png=png(2, 20, 10), b__txt="ein Löwe")
    report = import_folder(tmp_path / "store", source)
    assert (report.total, report.added, report.skipped) == (2, 2, {})
    first, second = rows(tmp_path / "store")
    assert first["image"] == png(1) and (first["height"], first["width"]) == (8, 12)
    assert (first["dense"], first["brief"], first["source"]) == ("a cat", "", "pets")
    assert second["dense"] == "ein Löwe" and (second["height"], second["width"]) == (20, 10)


def test_captions_jsonl_gives_both_captions_and_wins_over_texts(tmp_path):
    source = folder(
        tmp_path / "in", a__png=png(1), b__png=png(2), c__png=png(3), a__txt="unread", c__txt="see", d__png=png(4)
    )
    lines = [
        {"file": "a.png", "brief": "cat", "dense": "a grey cat"},
        {"file_name": "b.png", "text": "dog"},
        {"file": "e.png", "text": "nothing"},
        {"file": "b.png", "text": "twice"},
    ]
    (source / "captions.jsonl").write_text("\n".join([*map(json.dumps, lines), "{broken", "[1]", ""]))
    report = import_folder(tmp_path / "store", source, caption="brief")
    assert [(r["brief"], r["dense"]) for r in rows(tmp_path / "store")] == [
        ("cat", "a grey cat"),
        ("dog", ""),
        ("see", ""),
    ]
    assert report.skipped == {
        "caption without a picture": 1,
        "listed again in captions.jsonl": 1,
        "damaged line in captions.jsonl": 2,
        "missing caption": 1,
    }
    assert report.total == 8 and report.added == 3


def test_what_cannot_be_used_is_counted_by_reason_and_named(tmp_path):
    source = folder(
        tmp_path / "in",
        good__png=png(1), good__txt="fine",
        torn__png=png(2)[:60], torn__txt="torn",
        empty__png=b"", empty__txt="empty",
        mute__png=png(3),
        blank__png=png(4), blank__txt=" \n",
        latin__png=png(5), latin__txt="Löwe".encode("latin-1"),
        twin__png=png(1), twin__txt="twin",
    )  # fmt: skip
    report = import_folder(tmp_path / "store", source)
    assert report.skipped == {
        "corrupt image": 2,
        "missing caption": 1,
        "empty caption": 1,
        "caption is not UTF-8": 1,
        "the same picture again": 1,
    }
    assert report.total == 7 == report.added + sum(report.skipped.values())
    assert "2 skipped: corrupt image (empty.png, torn.png)" in str(report).splitlines()
    assert [r["dense"] for r in rows(tmp_path / "store")] == ["fine"]


def test_the_same_import_twice_adds_nothing(tmp_path):
    source = folder(tmp_path / "in", a__png=png(1), a__txt="one", b__png=png(2), b__txt="two")
    import_folder(tmp_path / "store", source)
    before, version = rows(tmp_path / "store"), Store(str(tmp_path / "store")).version
    report = import_folder(tmp_path / "store", source)
    assert (report.added, report.skipped) == (0, {"already in the store": 2})
    assert rows(tmp_path / "store") == before and Store(str(tmp_path / "store")).version == version
    (source / "c.png").write_bytes(png(3))
    (source / "c.txt").write_text("three")
    assert import_folder(tmp_path / "store", source).added == 1


def test_captions_change_only_when_asked_and_the_other_caption_stays(tmp_path):
    source = folder(tmp_path / "in", a__png=png(1), a__txt="long", b__png=png(2), b__txt="two")
    import_folder(tmp_path / "store", source)
    (source / "a.txt").write_text("short")
    report = import_folder(tmp_path / "store", source, caption="brief")
    assert report.added == report.updated == 0 and rows(tmp_path / "store")[0]["brief"] == ""
    assert "already in the store with other captions; --update replaces them" in report.skipped
    report = import_folder(tmp_path / "store", source, caption="brief", update=True)
    assert report.updated == 2
    assert {(r["brief"], r["dense"]) for r in rows(tmp_path / "store")} == {("short", "long"), ("two", "two")}
    assert len(rows(tmp_path / "store")) == 2


def test_an_import_that_was_killed_goes_on(tmp_path, monkeypatch):
    source = folder(
        tmp_path / "in", **{f"{i}__{e}": png(i) if e == "png" else f"{i}" for i in range(6) for e in ("png", "txt")}
    )
    monkeypatch.setattr(imports, "FLUSH", 1)  # every picture is written at once
    read, calls = imports.pictures.read, []

    def dying(data: bytes) -> Image.Image:
        calls.append(data)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(data)

    monkeypatch.setattr(imports.pictures, "read", dying)
    with pytest.raises(KeyboardInterrupt):
        import_folder(tmp_path / "store", source)
    assert len(rows(tmp_path / "store")) == 3
    report = import_folder(tmp_path / "store", source)
    assert (report.added, report.skipped) == (3, {"already in the store": 3})
    assert [r["dense"] for r in rows(tmp_path / "store")] == ["0", "1", "2", "3", "4", "5"]


def test_webdataset_tars(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    tar(
        shards / "0.tar",
        ("x/000.png", png(1)), ("x/000.txt", b"one"), ("x/000.cls", b"7"),
        ("x/001.json", b'{"brief": "b", "dense": "d", "score": 3}'), ("x/001.PNG", png(2)),
        ("y/001.png", png(3)), ("y/001.json", b"{"),
        ("y/002.txt", b"alone"),
    )  # fmt: skip
    tar(shards / "1.tar", ("000.png", png(4)), ("000.txt", b"four"))
    report = import_tars(tmp_path / "store", shards)
    assert [(r["brief"], r["dense"]) for r in rows(tmp_path / "store")] == [("b", "d"), ("", "four"), ("", "one")]
    assert report.skipped == {"damaged .json": 1, "no picture": 1}
    assert report.examples["no picture"] == ["0.tar:y/002"]


def test_a_torn_tar_gives_what_is_whole_and_the_others_go_on(tmp_path):
    whole = tar(tmp_path / "0.tar", ("0.png", png(1)), ("0.txt", b"one"), ("1.png", png(2, 90, 90)), ("1.txt", b"two"))
    whole.write_bytes(whole.read_bytes()[:6000])
    tar(tmp_path / "1.tar", ("0.png", png(3)), ("0.txt", b"three"))
    (tmp_path / "2.tar").write_bytes(b"no archive at all")
    report = import_tars(tmp_path / "store", tmp_path)
    assert [r["dense"] for r in rows(tmp_path / "store")] == ["one", "three"]
    assert report.skipped == {"damaged archive, its rest is lost": 2}


def test_a_hugging_face_folder(tmp_path):
    images = [{"bytes": png(n), "path": None} for n in range(3)]
    parquet(tmp_path / "data" / "train-0.parquet", images, text=["one", "two", None])
    parquet(tmp_path / "data" / "train-1.parquet", [{"bytes": None, "path": "x.png"}, None], text=["four", "five"])
    (tmp_path / "data" / "train-2.parquet").write_bytes(b"PAR1 torn")
    report = import_parquet(tmp_path / "store", tmp_path / "data")
    assert [(r["dense"], r["image"]) for r in rows(tmp_path / "store")] == [("one", png(0)), ("two", png(1))]
    assert report.skipped == {"missing caption": 1, "no picture": 2, "damaged parquet file": 1}


def test_columns_of_a_hugging_face_folder_can_be_named(tmp_path):
    file = parquet(
        tmp_path / "data" / "a.parquet", [{"bytes": png(1), "path": ""}], prompt=["seven words"], text=["no"]
    )
    import_parquet(tmp_path / "store", file, text_column="prompt", caption="brief")
    assert [(r["brief"], r["dense"]) for r in rows(tmp_path / "store")] == [("seven words", "")]
    with pytest.raises(ConfigError, match="no column 'promt' among image, prompt, text"):
        import_parquet(tmp_path / "store", file, text_column="promt")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "data" / "a.parquet")
    with pytest.raises(ConfigError, match="no image column among text"):
        import_parquet(tmp_path / "store", file)


def test_the_three_formats_make_the_same_store(tmp_path):
    pictures, texts = [png(n) for n in range(3)], ["one", "two", "three"]
    files = {f"{n}__png": p for n, p in enumerate(pictures)} | {f"{n}__txt": t for n, t in enumerate(texts)}
    members = [(f"{n}.{e}", d) for n in range(3) for e, d in (("png", pictures[n]), ("txt", texts[n].encode()))]
    folder(tmp_path / "in", **files)
    tar(tmp_path / "in.tar", *members)
    parquet(tmp_path / "hf" / "0.parquet", [{"bytes": p, "path": None} for p in pictures], text=texts)
    for name, path in (("a", "in"), ("b", "in.tar"), ("c", "hf")):
        assert import_(str(tmp_path / name), tmp_path / path, source="here") == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b") == rows(tmp_path / "c") and len(rows(tmp_path / "a")) == 3


def test_show_counts_by_source_size_caption_and_bucket(tmp_path):
    source = folder(
        tmp_path / "in",
        a__png=png(1, 16, 16),
        a__txt="one two",
        b__png=png(2, 16, 24),
        b__txt="one",
        c__png=png(3, 8, 8),
        c__txt="x " * 9,
    )
    import_folder(tmp_path / "store", source)
    lines = [
        " ".join(line.split()) for line in summary(Store(str(tmp_path / "store")), (((16, 16), (16, 24)),)).splitlines()
    ]
    assert lines[0].endswith("store: 3 pictures, version 2") and lines[1] == "3 from in"
    assert "height, px 3 8 16 16" in lines and "width, px 3 8 16 24" in lines
    assert "brief caption, words 0 - - -" in lines and "dense caption, words 3 1 2 9" in lines
    assert lines[-3:] == ["16x16 1", "16x24 1", "too small 1"]


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_an_import_of_nothing_is_refused(tmp_path, path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no such folder|holds no picture"):
        import_folder(tmp_path / "store", tmp_path / path)


def test_a_store_that_is_not_there_is_not_made_by_looking(tmp_path):
    with pytest.raises(LensError, match="holds no training store; fill one with `lens data import`"):
        info(str(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(LensError, match=r"cannot be opened|holds no training store"):
        Store(str(tmp_path / "file"))


def test_a_store_of_another_schema_is_refused(tmp_path):
    schema = pa.schema([("id", pa.string())], metadata={"lens.schema": "7"})
    lancedb.connect(tmp_path / "store").create_table("samples", schema=schema)
    with pytest.raises(LensError, match="is a store of schema 7; this Lens reads 1"):
        Store(str(tmp_path / "store"))


def test_without_lancedb_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(LensError, match=r"pip install 'lens-t2i\[data\]'"):
        Store(str(tmp_path), create=True)


def test_an_unknown_format_or_caption_is_refused(tmp_path):
    source = folder(tmp_path / "in", a__png=png(1), a__txt="one")
    with pytest.raises(ConfigError, match="known: auto, folder, tars, parquet"):
        import_(str(tmp_path / "store"), source, format="zip")
    with pytest.raises(ConfigError, match="brief or dense, not 'long'"):
        import_folder(tmp_path / "store", source, caption="long")


def test_a_folder_of_pictures_and_tars_is_refused_until_the_kind_is_named(tmp_path):
    source = folder(tmp_path / "in", a__png=png(1), a__txt="one", b__png=png(2), b__txt="two")
    (source / "sub").mkdir()
    tar(source / "sub" / "backup.tar", ("c.png", png(3)), ("c.txt", b"three"))
    with pytest.raises(ConfigError, match=r"has files of two kinds, .*--format (folder|tars) or --format") as caught:
        import_(str(tmp_path / "store"), source)
    assert all(name in str(caught.value) for name in (".png (folder)", "sub/backup.tar (tars)"))
    assert len(str(caught.value).splitlines()) == 1
    import_(str(tmp_path / "store"), source, format="folder")
    assert [row["dense"] for row in rows(tmp_path / "store")] == ["one", "two"]
