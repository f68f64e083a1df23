"""Whatever a source holds, its import finishes, counts what it cannot use by reason, and can be repeated."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lens_data import imports
from lens_data.commands import import_
from lens_data.imports import ImportReport, import_folder, import_parquet, import_path, import_tars
from lens_data.store import Store
from PIL import Image
from test_data_imports import folder, png, rows, tar

from lens_core.cli.main import main
from lens_core.io import locks, sources
from lens_core.io.atomic_files import WriteError
from lens_core.io.captions import LONGEST_CAPTION
from lens_core.io.digests import Ids
from lens_core.io.locks import LockedError
from lens_core.types import ConfigError

SURROGATE = "caption with half a character (a lone surrogate)"
CONTROL = "caption with control characters (UTF-16?)"


def captions(store: Path) -> list[str]:
    return [row["dense"] or row["brief"] for row in rows(store)]


def twice(run: Any, store: Path, path: Path, **options: Any) -> ImportReport:
    """The report of an import; the same again must find the same and add nothing."""
    report = run(store, path, **options)
    assert report.total == report.added + report.updated + sum(report.skipped.values())
    before, version = rows(store), Store(str(store)).version
    again = run(store, path, **options)
    assert (again.total, again.added) == (report.total, 0)
    assert again.skipped == report.skipped | ({"already in the store": report.added} if report.added else {})
    assert rows(store) == before and Store(str(store)).version == version
    str(report).encode()  # nothing in it that a terminal cannot have
    return report


# ---- captions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "fault"),
    [
        ("a \ud800 b", SURROGATE), ("\udfff", SURROGATE), ("a\0b", CONTROL), ("\x1b[2J", CONTROL),
        ("x" * (LONGEST_CAPTION + 1), f"caption longer than {LONGEST_CAPTION} characters"),
        ("\ufeff \n", "empty caption"), (None, "missing caption"), (7, "missing caption"), (["a"], "missing caption"),
    ],
)  # fmt: skip
def test_a_caption_that_cannot_be_stored_is_counted_and_the_others_are_kept(
    caption: Any, fault: str, tmp_path: Path
) -> None:
    source = folder(tmp_path / "in", **{f"{n}__png": png(n) for n in range(3)})
    lines = [{"file": f"{n}.png", "text": text} for n, text in enumerate(["one", caption, "two"])]
    (source / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert twice(import_folder, tmp_path / "store", source).skipped == {fault: 1}
    assert captions(tmp_path / "store") == ["one", "two"]


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be", "utf-16", "latin-1"])
@pytest.mark.parametrize("text", ["a Löwe", "чёрный кот"])
def test_a_text_that_is_not_utf8_is_not_stored(codec: str, text: str, tmp_path: Path) -> None:
    data = text.encode(codec, "replace") if codec == "latin-1" else text.encode(codec)
    if data.isascii() and b"\0" not in data:
        return  # "????? ???" is a text
    source = folder(tmp_path / "in", a__png=png(1), a__txt=data, b__png=png(2), b__txt="fine")
    report = twice(import_folder, tmp_path / "store", source)
    assert list(report.skipped) in (["caption is not UTF-8"], [CONTROL])
    assert captions(tmp_path / "store") == ["fine"]


@pytest.mark.parametrize("first", ["txt", "json"])
@pytest.mark.parametrize(
    "bad", [b'{"caption": null}', b'{"caption": " "}', b'{"text": 3}', b'{"caption": "\\ud800"}', b"{", b"[]", b"\xff"]
)
def test_a_good_txt_beside_a_json_without_a_caption_is_used_in_any_order(
    first: str, bad: bytes, tmp_path: Path
) -> None:
    members = {"txt": ("a.txt", b"good"), "json": ("a.json", bad)}
    second = "json" if first == "txt" else "txt"
    tar(tmp_path / "a.tar", members[first], ("a.png", png(1)), members[second])
    assert twice(import_tars, tmp_path / "store", tmp_path / "a.tar").skipped == {}
    assert captions(tmp_path / "store") == ["good"]


@pytest.mark.parametrize("first", ["txt", "json"])
def test_a_good_json_is_used_before_a_txt_in_any_order(first: str, tmp_path: Path) -> None:
    members = {"txt": ("a.txt", b"\xff"), "json": ("a.json", b'{"caption": "of the json"}')}
    second = "json" if first == "txt" else "txt"
    tar(tmp_path / "a.tar", ("a.png", png(1)), members[first], members[second])
    import_tars(tmp_path / "store", tmp_path / "a.tar")
    assert captions(tmp_path / "store") == ["of the json"]


@pytest.mark.parametrize("deep", [b"[" * 100_000, b'{"a":' * 100_000, b'{"text": ' + b"9" * 5000 + b"}"])
def test_json_that_python_cannot_read_is_damaged_and_no_more(deep: bytes, tmp_path: Path) -> None:
    source = folder(tmp_path / "in", a__png=png(1), b__png=png(2))
    good = json.dumps({"file": "a.png", "text": "one"}).encode()
    (source / "captions.jsonl").write_bytes(deep + b"\n" + good)
    report = twice(import_folder, tmp_path / "a", source)
    assert report.skipped == {"damaged line in captions.jsonl": 1, "missing caption": 1}
    tar(tmp_path / "t.tar", ("a.png", png(1)), ("a.json", deep), ("b.png", png(2)), ("b.txt", b"two"))
    assert twice(import_tars, tmp_path / "b", tmp_path / "t.tar").skipped == {"damaged .json": 1}
    assert captions(tmp_path / "b") == ["two"]


# ---- names --------------------------------------------------------------------------------------------------------


def test_file_names_that_are_not_utf8_are_no_obstacle(tmp_path: Path) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"\xff"))
    source.mkdir()
    for number, name in enumerate((b"\xe9t\xe9", b"a\nb", b"\x1b[2J", b"torn\xfe")):
        path = os.fsencode(source) + b"/" + name
        Path(os.fsdecode(path + b".png")).write_bytes(png(number) if b"torn" not in name else b"torn")
        Path(os.fsdecode(path + b".txt")).write_text(f"no {number}")
    report = twice(import_folder, tmp_path / "a", source)
    assert report.skipped == {"corrupt image": 1} and captions(tmp_path / "a") == ["no 0", "no 1", "no 2"]
    assert report.examples["corrupt image"] == ["torn\\udcfe.png"]
    assert rows(tmp_path / "a")[0]["source"] == "in\\udcff"
    with tarfile.open(tmp_path / "t.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        for path in sorted(source.iterdir()):
            archive.add(path, path.name.encode("utf-8", "surrogateescape").decode("latin-1"))
    assert twice(import_tars, tmp_path / "b", tmp_path / "t.tar").skipped == {"corrupt image": 1}
    assert captions(tmp_path / "b") == ["no 0", "no 1", "no 2"]


def test_what_macos_leaves_behind_is_no_picture_and_no_caption(tmp_path: Path) -> None:
    double = b"\0\x05\x16\x07" + bytes(100)
    source = folder(tmp_path / "in", a__png=png(1), a__txt="one")
    for name in ("._a.png", "._a.txt", "._captions.jsonl"):
        (source / name).write_bytes(double)
    (source / "__MACOSX").mkdir()
    (source / "__MACOSX" / "._a.png").write_bytes(double)
    assert twice(import_folder, tmp_path / "a", source).total == 1
    tar(
        tmp_path / "t.tar",
        ("._a.png", double), ("a.png", png(1)), ("._a.txt", double), ("a.txt", b"one"), ("__MACOSX/b.png", double),
    )  # fmt: skip
    (tmp_path / "._t.tar").write_bytes(double)
    assert twice(import_tars, tmp_path / "b", tmp_path / "t.tar").total == 1
    assert captions(tmp_path / "b") == ["one"]
    (tmp_path / "only").mkdir()
    (tmp_path / "t.tar").rename(tmp_path / "only" / "t.tar")
    (tmp_path / "._t.tar").rename(tmp_path / "only" / "._t.tar")
    assert import_tars(tmp_path / "c", tmp_path / "only").total == 1


@pytest.mark.parametrize("name", ["./a.png", "a.png", ".//a.png", "sub\\é.png", "sub/e\u0301.png"])
def test_a_list_names_a_picture_in_whatever_way(name: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "in", a__png=png(1))
    (source / "sub").mkdir()
    (source / "sub" / "é.png").write_bytes(png(2))
    (source / "captions.jsonl").write_text(json.dumps({"file": name, "text": "named"}))
    assert twice(import_folder, tmp_path / "store", source).skipped == {"missing caption": 1}
    assert captions(tmp_path / "store") == ["named"]


@pytest.mark.parametrize(
    "name", ["../a.png", "/etc/a.png", "b.png", "a.txt", "\0.png", "\ud800.png", "x" * 5000 + ".png"]
)
def test_a_list_names_nothing_outside_its_folder(name: str, tmp_path: Path) -> None:
    folder(tmp_path, a__png=png(3))
    source = folder(tmp_path / "in", a__png=png(1), a__txt="one")
    (source / "captions.jsonl").write_text(json.dumps({"file": name, "text": "named"}))
    assert twice(import_folder, tmp_path / "store", source).skipped == {"caption without a picture": 1}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "two, three"}'),
        ("metadata.csv", 'file_name,text\na.png,one\nb.png,"two, three"\n'),
        ("metadata.csv", '\ufeffid;file_name;text\r\n1;a.png;one\r\n2;./b.png;"two, three"'),
        ("metadata.csv", "text\tFile_Name\none\ta.png\ntwo, three\tb.png\n"),
        ("captions.jsonl", '\ufeff{"file": "a.png", "dense": "one"}\r\n{"filename": "b.png", "caption": "two, three"}'),
    ],
)
def test_lists_of_hugging_face_folders_are_read(name: str, text: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    (source / "train").mkdir()
    folder(source / "train", a__png=png(1), b__png=png(2))
    (source / "train" / name).write_text(text, newline="")
    assert twice(import_folder, tmp_path / "store", source).skipped == {}
    assert captions(tmp_path / "store") == ["one", "two, three"]


def test_a_damaged_csv_loses_its_damaged_lines_alone(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", a__png=png(1), b__png=png(2), c__png=png(3))
    lines = [b"file_name,text", b"a.png,one", b"\0,x", b"b.png," + b"x" * 200_000, b"c.png,L\xf6we", b"b.png,two"]
    (source / "metadata.csv").write_bytes(b"\n".join(lines))
    report = twice(import_folder, tmp_path / "store", source)
    assert captions(tmp_path / "store") == ["one", "two"]
    assert report.skipped == {
        "damaged line in metadata.csv": 1,
        "caption without a picture": 1,
        "caption is not UTF-8": 1,
    } or (report.skipped == {"damaged line in metadata.csv": 2, "caption is not UTF-8": 1})


@pytest.mark.parametrize("end", [".TXT", ".Txt"])
def test_endings_in_capitals_are_captions_too(end: str, tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    (source / "A.PNG").write_bytes(png(1))
    (source / f"A{end}").write_text("one")
    tar(tmp_path / "T.TAR", ("A.PNG", png(1)), (f"A{end}", b"one"))
    for store, path in (("a", source), ("b", tmp_path / "T.TAR")):
        assert import_(str(tmp_path / store), path) == 0
        assert captions(tmp_path / store) == ["one"]


def test_pictures_that_cannot_be_read_are_counted_and_not_passed_over(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", a__heic=b"\0\0\0\x18ftypheic" + bytes(20), a__txt="one", b__png=b"x", b__txt="two")
    os.mkfifo(source / "c.png")
    (source / "d.png").symlink_to("nowhere.png")
    assert twice(import_folder, tmp_path / "store", source).skipped == {
        "unsupported image": 1, "corrupt image": 1, "unreadable file": 2,
    }  # fmt: skip


def test_folders_that_are_not_read_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "in", a__png=png(1), a__txt="one")
    for name in ("locked", "lost+found"):
        (source / name).mkdir()
    (source / "link").symlink_to(tmp_path)
    (source / "loop").symlink_to(source)
    scan = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith(("locked", "lost+found")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    report = import_folder(tmp_path / "store", source)
    assert report.added == 1
    assert report.skipped == {"unreadable folder": 1, "link to a folder, which is not followed": 2}
    assert report.examples["unreadable folder"] == ["locked"]


def test_one_picture_is_no_folder_to_import(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", a__png=png(1), a__txt="one")
    with pytest.raises(
        ConfigError, match=r"a\.png: is one file, and neither a tar nor a parquet file; name the folder"
    ):
        import_path(tmp_path / "store", source / "a.png")
    assert not (tmp_path / "store").exists()


# ---- tars ---------------------------------------------------------------------------------------------------------


def test_a_key_that_stands_twice_in_a_tar_is_two_samples(tmp_path: Path) -> None:
    tar(
        tmp_path / "t.tar",
        ("a.png", png(1)), ("a.txt", b"one"), ("a.png", png(2)), ("a.txt", b"two"),
        ("b.png", png(3)), ("c.png", png(4)), ("c.txt", b"four"), ("b.png", png(5)), ("b.txt", b"five"),
        ("d.png", png(6)), ("d.png", png(7)), ("d.txt", b"seven"),
        ("e.cls", b"1"), ("e.png", png(8)), ("e.txt", b"eight"), ("e.cls", b"2"),
    )  # fmt: skip
    report = twice(import_tars, tmp_path / "store", tmp_path / "t.tar")
    assert captions(tmp_path / "store") == ["eight", "five", "four", "one", "seven", "two"]
    assert report.skipped == {"missing caption": 2} and report.total == 8


def test_of_several_pictures_of_a_sample_the_plain_one_is_meant_and_the_others_are_counted(tmp_path: Path) -> None:
    for number, order in enumerate([(".mask.png", ".png", ".cond.jpg"), (".png", ".cond.jpg", ".mask.png")]):
        members = [(f"a{end}", png(9 if end == ".png" else 5)) for end in order]
        tar(tmp_path / f"{number}.tar", *members, ("a.txt", b"one"))
        report = twice(import_tars, tmp_path / f"store{number}", tmp_path / f"{number}.tar")
        assert rows(tmp_path / f"store{number}")[0]["image"] == png(9)
        assert report.skipped == {"another picture of a sample": 2}
    tar(tmp_path / "v.tar", ("a.v2.png", png(1)), ("a.v2.txt", b"of v2"))
    assert import_tars(tmp_path / "v", tmp_path / "v.tar").added == 1


def sparse(size: int) -> bytes:
    """A GNU sparse member `a.png` that claims `size` bytes and holds 512."""
    info = tarfile.TarInfo("a.png")
    info.size = 512
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = tarfile.GNUTYPE_SPARSE
    block[386:410] = b"%011o\0%011o\0" % (0, 512)
    block[483:495] = b"\x80" + size.to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512)


def test_a_sparse_member_of_20_gb_is_too_large_and_takes_no_memory(tmp_path: Path) -> None:
    tar(tmp_path / "rest.tar", ("a.txt", b"one"), ("b.png", png(1)), ("b.txt", b"two"))
    (tmp_path / "t.tar").write_bytes(sparse(20 * 10**9) + (tmp_path / "rest.tar").read_bytes())
    assert twice(import_tars, tmp_path / "store", tmp_path / "t.tar").skipped == {sources.TOO_LARGE: 1}
    assert captions(tmp_path / "store") == ["two"]


def header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "bad",
    [
        header(tarfile.XHDTYPE, 8 * 10**9), header(tarfile.GNUTYPE_LONGNAME, 10**12), b"\1" * 512,
        header(tarfile.XHDTYPE, 12) + b"99999999 a=b".ljust(512, b"\0"), b"x" * 100,
        header(tarfile.XHDTYPE, 44)
        + b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n".ljust(512, b"\0")
        + header(b"0", 512) + b"9\n" + bytes(510),
        b"".join(header(tarfile.XHDTYPE, 0) for _ in range(3000)),
    ],
    ids=["pax", "name", "noise", "length", "short", "sparse", "chain"],
)  # fmt: skip
def test_a_tar_with_a_broken_header_is_counted_and_the_next_goes_on(bad: bytes, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    good = tar(tmp_path / "good", ("a.png", png(1)), ("a.txt", b"one"), ("b.png", png(2)), ("b.txt", b"two"))
    members = good.read_bytes()[: 8 * 512]
    (source / "0.tar").write_bytes(members + bad)
    tar(source / "1.tar", ("a.png", png(3)), ("a.txt", b"three"))
    report = twice(import_tars, tmp_path / "store", source)
    assert {"one", "three"} <= set(captions(tmp_path / "store"))
    assert report.skipped == {"damaged archive, its rest is lost": 1}


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_that_expands_without_measure_is_given_up(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "EXPANSION", 2)
    monkeypatch.setattr(sources, "EXPANDED", 10**5)
    with tarfile.open(tmp_path / f"t.tar.{kind}", f"w:{kind}") as archive:
        for name, data in (("a.png", png(1)), ("a.txt", b"one"), ("b.bin", bytes(10**6)), ("c.png", png(2))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    report = twice(import_tars, tmp_path / "store", tmp_path / f"t.tar.{kind}")
    assert report.skipped == {"damaged archive, its rest is lost": 1}
    assert "expands to more than 2 times" in next(iter(report.examples.values()))[0]


def test_what_compression_is_not_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    (tmp_path / "u.tar.gz").write_bytes(gzip.compress(b"x" * 2000)[:-3])
    report = twice(import_tars, tmp_path / "store", tmp_path)
    assert report.skipped == {"damaged archive, its rest is lost": 2}
    assert "zstd" in report.examples["damaged archive, its rest is lost"][0]


def test_a_link_to_a_picture_in_a_tar_is_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name in ("a", "b"):
            for end, data in (("png", png(1)), ("txt", b"one")):
                info = tarfile.TarInfo(f"{name}.{end}")
                if (name, end) == ("b", "png"):
                    info.type, info.linkname = tarfile.LNKTYPE, "a.png"
                    archive.addfile(info)
                else:
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    assert twice(import_tars, tmp_path / "store", tmp_path / "t.tar").skipped == {
        "a link in an archive": 1, "no picture": 1,
    }  # fmt: skip


# ---- parquet ------------------------------------------------------------------------------------------------------


def struct(*files: bytes | None) -> pa.Array:
    return pa.array(
        [{"bytes": f, "path": None} for f in files], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )


@pytest.mark.parametrize("name", ["image", "img", "jpg", "png", "Image"])
def test_the_column_called_image_is_the_picture_wherever_it_stands(name: str, tmp_path: Path) -> None:
    for number, column in enumerate((struct(png(2)), pa.array([png(2)]))):
        table = pa.table({"conditioning_image": struct(png(1)), name: column, "text": ["one"], "mask": struct(png(3))})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        assert import_(str(tmp_path / f"s{number}"), tmp_path / f"{number}.parquet") == 0
        assert [row["image"] for row in rows(tmp_path / f"s{number}")] == [png(2)]


def test_the_columns_can_be_named_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.table({"first": struct(png(1)), "target": struct(png(2)), "text": ["no"], "prompt": ["one"]})
    pq.write_table(table, tmp_path / "a.parquet")
    command = ["data", "import", str(tmp_path / "store"), str(tmp_path / "a.parquet")]
    assert main(command) == 2
    assert "several image columns, first, target; name it with --image-column" in capsys.readouterr().err
    assert main([*command, "--image-column", "target", "--text-column", "prompt"]) == 0
    assert [(row["image"], row["dense"]) for row in rows(tmp_path / "store")] == [(png(2), "one")]
    for option, column in (("--image-column", "prompt"), ("--text-column", "first"), ("--text-column", "promt")):
        assert main([*command, "--image-column", "target", option, column]) == 2
    tar(tmp_path / "t.tar", ("a.png", png(1)), ("a.txt", b"one"))
    assert main([*command[:3], str(tmp_path / "t.tar"), "--text-column", "text"]) == 2
    assert "--text-column: tars have no columns" in capsys.readouterr().err


def test_a_parquet_text_that_is_not_utf8_loses_its_row_alone(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"one", b"L\xf6we", b"two"]).buffers())
    for number, texts in enumerate((bad, bad.dictionary_encode())):
        pq.write_table(
            pa.table({"image": struct(png(0), png(1), png(2)), "text": texts}), tmp_path / f"{number}.parquet"
        )
        report = twice(import_parquet, tmp_path / f"s{number}", tmp_path / f"{number}.parquet")
        assert report.skipped == {"caption is not UTF-8": 1} and captions(tmp_path / f"s{number}") == ["one", "two"]


def test_cells_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_PICTURE", 2000)
    monkeypatch.setattr(sources, "LARGEST_TEXT", 100)
    noise = np.random.default_rng(0).bytes(9000)
    table = pa.table(
        {"image": struct(png(0), noise, png(1), png(2), None, b""), "text": ["one", "x", "y" * 101, "two", "z", "w"]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert twice(import_parquet, tmp_path / "a", tmp_path / "a.parquet").skipped == {
        sources.TOO_LARGE: 1, sources.LONG_TEXT: 1, "no picture": 1, "corrupt image": 1,
    }  # fmt: skip
    assert captions(tmp_path / "a") == ["one", "two"]
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=1)
    assert twice(import_parquet, tmp_path / "b", tmp_path / "b.parquet").skipped[sources.TOO_LARGE] == 1


def test_a_file_without_the_columns_of_the_first_is_counted(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table({"image": struct(png(0)), "text": ["one"]}), source / "0.parquet")
    pq.write_table(pa.table({"label": [1]}), source / "1.parquet")
    pq.write_table(pa.table({"image": struct(png(1)), "text": ["two"]}), source / "2.parquet")
    assert twice(import_parquet, tmp_path / "s", source).skipped == {"parquet file without the columns of the first": 1}
    assert captions(tmp_path / "s") == ["one", "two"]


def test_a_damaged_row_group_is_counted_and_the_next_is_read(tmp_path: Path) -> None:
    files = [png(n, 40, 40) for n in range(3)]
    pq.write_table(
        pa.table({"image": struct(*files), "text": ["one", "two", "three"]}), tmp_path / "a.parquet",
        row_group_size=1, compression="gzip", write_page_checksum=True,
    )  # fmt: skip
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    about = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    middle = (about.dictionary_page_offset or about.data_page_offset) + about.total_compressed_size // 3
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "a.parquet").write_bytes(data)
    report = twice(import_parquet, tmp_path / "s", tmp_path / "a.parquet")
    assert captions(tmp_path / "s") == ["one", "three"]
    assert sum(report.skipped.values()) == 1


# ---- pictures -----------------------------------------------------------------------------------------------------


def large_png(side: int) -> bytes:
    """A grey picture of `side` by `side` px, a few hundred KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    line = zlib.compressobj(1)
    body = b"".join(line.compress(bytes(side + 1)) for _ in range(16)) + line.flush()
    size = side.to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_picture_of_400_megapixels_is_too_large_and_not_corrupt(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", a__png=large_png(20_000), a__txt="one", b__png=large_png(13_300), b__txt="two")
    assert twice(import_folder, tmp_path / "store", source).skipped == {"image too large": 2}


def test_the_store_has_a_picture_as_the_pipeline_reads_it(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "b.jpg", exif=exif)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    import_folder(tmp_path / "store", tmp_path)
    assert [(r["height"], r["width"]) for r in rows(tmp_path / "store")] == [(8, 8), (20, 10)]
    assert np.asarray(imports.pictures.read((tmp_path / "a.png").read_bytes())).tolist() == [[[100] * 3] * 8] * 8


# ---- two writers, and the disk ------------------------------------------------------------------------------------


def test_two_imports_of_one_source_at_once_never_double_a_row(tmp_path: Path) -> None:
    source = folder(
        tmp_path / "in", **{f"{n}__{e}": png(n) if e == "png" else f"{n}" for n in range(40) for e in ("png", "txt")}
    )
    script = (
        "import sys; from lens_data import imports; imports.ROWS = 1\n"
        "from lens_core.cli.main import main; sys.exit(main(['data', 'import', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store"), str(source)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [(process.communicate(), process.returncode, process.pid) for process in both]
    for (_, error), code, pid in ended:
        other = next(p for *_, p in ended if p != pid)
        assert code == 0 or (code == 2 and f"process {other} on" in error and len(error.splitlines()) == 1)
    assert 0 in [code for _, code, _ in ended]
    import_folder(tmp_path / "store", source)
    assert sorted(captions(tmp_path / "store"), key=int) == [str(n) for n in range(40)]


def test_an_import_into_a_locked_store_names_the_owner_and_adds_nothing(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", a__png=png(1), a__txt="one")
    import_folder(tmp_path / "store", source)
    folder(source, b__png=png(2), b__txt="two")
    with locks.locked(tmp_path / "store", "store"), pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        import_folder(tmp_path / "store", source)
    assert captions(tmp_path / "store") == ["one"]
    assert not (tmp_path / "store" / locks.NAME).exists()


def test_rows_that_another_writer_added_meanwhile_are_not_added_again(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", a__png=png(1), a__txt="one", b__png=png(2), b__txt="two")
    import_folder(tmp_path / "other", source)
    mine = [row | {"source": "x"} for row in Store(str(tmp_path / "other")).columns("id").to_pylist()]
    store = Store(str(tmp_path / "store"), create=True)
    rows = [
        {k: v for k, v in row.items() if k != "_rowid"}
        | {"image": b"", "height": 1, "width": 1, "brief": "", "dense": ""}
        for row in mine
    ]
    Store(str(tmp_path / "store")).add(rows[:1])  # without a lock, as a script might
    assert store.insert(rows) == 1
    assert len(Store(str(tmp_path / "store"))) == 2


def test_a_full_disk_is_one_line_and_the_import_goes_on_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "in", a__png=png(1, 90, 90), a__txt="one", b__png=png(2, 90, 90), b__txt="two")
    small = folder(tmp_path / "small", c__png=png(3), c__txt="three")
    import_folder(tmp_path / "store", small)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
        code = main(["data", "import", str(tmp_path / "store"), str(source)])
        with pytest.raises(WriteError, match=r"store: cannot be written: File too large"):
            import_folder(tmp_path / "store", source, update=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith(f"lens: {tmp_path}/store: cannot be written: File too large; make room")
    assert "0 pictures were added before; the same import goes on" in line
    assert import_folder(tmp_path / "store", source).added == 2
    assert captions(tmp_path / "store") == ["one", "three", "two"]


def test_a_store_where_nothing_can_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "in", a__png=png(1), a__txt="one")
    for store in (str(tmp_path / "in" / "a.png" / "store"), "/proc/store"):
        assert main(["data", "import", store, str(source)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"lens: {store}: cannot be written: ")


# ---- memory -------------------------------------------------------------------------------------------------------


def test_a_set_of_digests_holds_what_was_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    digests = [rng.bytes(31) + bytes([n % 3]) for n in range(9000)]  # a third of them end in NUL
    ids = Ids()
    for digest in digests[::2]:
        assert digest not in ids
        ids.add(digest)
    assert len(ids._sorted) > 4000
    assert [digest in ids for digest in digests] == [n % 2 == 0 for n in range(9000)]
