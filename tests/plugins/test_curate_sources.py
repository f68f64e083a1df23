"""Sources: the same pictures from every kind, addresses within limits, pictures with text, and strange files."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from lens_curate import urls
from lens_curate.sources import build_sources
from lens_curate.text_pictures import COLOURS, TextPictures, contrast
from lens_curate.urls import Urls, forbids
from lens_curate.verdicts import verdicts
from test_curate_run import add, picture, run, stages, stored

from lens_core.catalog import Catalog
from lens_core.config import ComponentSpec, structure
from lens_core.io import folders, tars
from lens_core.io.atomic_files import WriteError
from lens_core.io.images import read_rgb
from lens_core.types import ConfigError


def spec(*sources: dict[str, Any], **changes: Any) -> Any:
    from lens_curate.recipe import CurationSpec

    return structure(CurationSpec, {"sources": list(sources), **changes})


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def make_folder(path: Path, seeds: range) -> Path:
    path.mkdir(parents=True)
    for seed in seeds:
        add(path, f"{seed}.png", picture(seed))
    return path


def make_tar(path: Path, seeds: range) -> Path:
    with tarfile.open(path, "w") as tar:
        for seed in seeds:
            for name, data in ((f"{seed}.png", png(seed)), (f"{seed}.txt", f"A texture called {seed}.".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def make_parquet(path: Path, seeds: range) -> Path:
    import pyarrow as pa

    rows = [{"image": {"bytes": png(s), "path": f"{s}.png"}, "text": f"A texture called {s}."} for s in seeds]
    path.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path / "train.parquet", row_group_size=2)
    return path


def test_the_same_pictures_come_from_every_kind_of_source(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "folder", range(5))
    run(spec({"use": "folder", "path": str(folder)}), tmp_path / "first")
    expected = {key: row["dense"] for key, row in stored(tmp_path / "first").items()}
    assert len(expected) == 5
    uses = {
        "tars": str(make_tar(tmp_path / "a.tar", range(5)).parent),
        "parquet": str(make_parquet(tmp_path / "parquet", range(5))),
        "store": str(tmp_path / "first"),
    }
    for use, path in uses.items():
        run(spec({"use": use, "path": path}), tmp_path / f"of-{use}")
        assert {key: row["dense"] for key, row in stored(tmp_path / f"of-{use}").items()} == expected, use
        again = run(spec({"use": use, "path": path}), tmp_path / f"of-{use}")
        assert again.data["read"] == 0, use


def test_pictures_of_several_sources_are_compared_and_the_first_source_wins(tmp_path: Path) -> None:
    one, two = make_folder(tmp_path / "one", range(3)), make_folder(tmp_path / "two", range(2, 5))
    report = run(spec({"use": "folder", "path": str(two)}, {"use": "folder", "path": str(one)}), tmp_path / "store")
    assert {r["source"] for r in verdicts(str(tmp_path / "store")) if r["stage"] == "exact"} == {"one"}
    assert report.data["funnel"][0]["by_source"] == {"one": 0, "two": 0}


def test_a_damaged_tar_is_told_and_the_rest_of_the_sources_are_read(tmp_path: Path) -> None:
    good = make_tar(tmp_path / "a.tar", range(3))
    data = make_tar(tmp_path / "b.tar", range(3, 9)).read_bytes()
    (tmp_path / "b.tar").write_bytes(data[: len(data) // 2])
    run(spec({"use": "tars", "path": str(tmp_path)}), tmp_path / "store")
    rows = list(verdicts(str(tmp_path / "store")))
    assert any("damaged archive" in row["reason"] for row in rows) and sum(row["kept"] for row in rows) >= 4
    assert good.is_file()


def test_two_members_with_one_name_are_two_records(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for seed in (1, 2):
            for name, data in (("x.png", png(seed)), ("x.txt", b"A texture.")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    run(spec({"use": "tars", "path": str(tmp_path / "a.tar")}), tmp_path / "store")
    assert stages(tmp_path / "store") == {"a.tar:x": "", "a.tar:x (2)": ""}


def test_what_strangers_put_into_a_folder_stops_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "raw", range(2))
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "._0.png").write_bytes(b"\0" * 99)
    (folder / "bomb.png").write_bytes(png_header(100_000, 100_000))
    os.mkfifo(folder / "pipe.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with (folder / "captions.jsonl").open("wb") as file:
        file.write(b"[" * 100_000 + b"\n\xff\xfe\n" + b'{"file": "../../etc/passwd.png"}\n')
        file.write(json.dumps({"file": "1.png", "dense": "\ud800"}).encode() + b"\n")
    (folder / "metadata.csv").write_bytes(b"file_na\rme,text\n0.png,A texture.\n")
    weird = os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png")
    picture(3).save(weird)
    (folder / "tab\tname\n.png").write_bytes(png(4))
    run(spec({"use": "folder", "path": str(folder)}), tmp_path / "store")
    stage_of = stages(tmp_path / "store")
    assert stage_of["0.png"] == stage_of["1.png"] == ""
    assert stage_of["text.png"] == stage_of["empty.png"] == stage_of["pipe.png"] == stage_of["bomb.png"] == "decode"
    assert "._0.png" not in stage_of and "\\udcff\\udcfe.png" in stage_of and "tab\\tname\\n.png" in stage_of


def png_header(width: int, height: int) -> bytes:
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


# ---- addresses ----------------------------------------------------------------------------------------------------


@pytest.fixture
def site() -> Iterator[Any]:
    """A host with pictures; `site.requests` are the paths that were asked for."""
    pages: dict[str, tuple[int, bytes, dict[str, str]]] = {
        "/a.png": (200, png(1), {}),
        "/b.png": (200, png(2), {}),
        "/noai.png": (200, png(3), {"X-Robots-Tag": "noai, noimageai"}),
        "/moved.png": (302, b"", {"Location": "/b.png"}),
        "/circle.png": (302, b"", {"Location": "/circle.png"}),
        "/file.png": (302, b"", {"Location": "file:///etc/passwd"}),
        "/large.png": (200, bytes(200_000), {}),
        "/page.png": (200, b"<html>hello</html>", {}),
        "/down.png": (503, b"", {}),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append(self.path)  # type: ignore[attr-defined]
            status, body, headers = pages.get(self.path, (404, b"", {}))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests = []  # type: ignore[attr-defined]
    server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_addresses_are_fetched_once_and_within_limits(site: Any, tmp_path: Path) -> None:
    names = ("a", "noai", "moved", "circle", "file", "large", "page", "down", "none")
    lines = [json.dumps({"url": f"{site.url}/{name}.png", "caption": f"Picture {name}."}) for name in names]
    (tmp_path / "list.txt").write_text("\n".join([*lines, "", "not a url", '{"caption": "x"}', "[[[", "ftp://x/y.png"]))
    use = {"use": "urls", "path": str(tmp_path / "list.txt"), "downloads": str(tmp_path / "kept"), "retries": 0,
           "max_bytes": 100_000, "timeout": 20}  # fmt: skip
    report = run(spec({**use, "private_hosts": True}), tmp_path / "store")
    reason_of = {row["name"].rpartition("/")[2]: row["reason"] for row in verdicts(str(tmp_path / "store"))}
    assert reason_of["a.png"] == reason_of["moved.png"] == ""
    assert "X-Robots-Tag" in reason_of["noai.png"] and "more than 5 times" in reason_of["circle.png"]
    assert (
        "http://" in reason_of["file.png"] and "max_bytes" in reason_of["large.png"] and "404" in reason_of["none.png"]
    )
    assert reason_of["page.png"] == "corrupt image" or "unsupported" in reason_of["page.png"]
    assert "503" in reason_of["down.png"] and "line without a url" in reason_of.values()
    assert report.data["kept"] == 2 and {r["dense"] for r in stored(tmp_path / "store").values()} == {
        "Picture a.", "Picture moved."
    }  # fmt: skip
    requests_before = len(site.requests)
    run(spec({**use, "private_hosts": True}), tmp_path / "other")
    assert set(site.requests[requests_before:]) == {"/down.png"}, "what may pass is tried again; nothing else is"
    run(spec(use), tmp_path / "third")
    again = {row["name"].rpartition("/")[2]: row["reason"] for row in verdicts(str(tmp_path / "third"))}
    assert "private network" in again["down.png"] and set(site.requests[requests_before:]) == {"/down.png"}


def addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: Iterable[str], down: set[str]
) -> tuple[dict[str, Any], list[str]]:
    """The source `urls` of a recipe, with an address for each name, and the names that were requested so far. Those
    that are `down` answer 503."""
    lines = [json.dumps({"url": f"http://a.example/{name}", "caption": f"Picture {name}."}) for name in names]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    requested: list[str] = []

    def fetch(self: Any, url: str) -> tuple[bytes | str, bool]:
        requested.append(name := url.rpartition("/")[2])
        return ("not fetched: HTTP 503", False) if name in down else (png(ord(name[0])), True)

    monkeypatch.setattr(Urls, "_fetch", fetch)
    use = {"use": "urls", "path": str(tmp_path / "list.txt"), "downloads": str(tmp_path / "kept"), "retries": 0}
    return use, requested


def test_an_address_that_failed_is_tried_again_by_the_same_command_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = {"slow", "dead"}
    use, asked = addresses(tmp_path, monkeypatch, ("good", "slow", "dead"), down)
    assert run(spec(use, duplicates={"exact": True, "distance": None}), tmp_path / "store").data["kept"] == 1
    down.remove("slow")
    asked.clear()
    report = run(spec(use, duplicates={"exact": True, "distance": None}), tmp_path / "store")
    assert report.data["kept"] == 2 and report.data["records"] == 3 and set(asked) == {"dead", "slow"}
    asked.clear()
    for _ in range(urls.FAILURES):
        run(spec(use, duplicates={"exact": True, "distance": None}), tmp_path / "store")
    assert asked == ["dead"] * (urls.FAILURES - 2), "once a run, and then no more"
    assert len(stored(tmp_path / "store")) == 2
    assert not list((tmp_path / "kept").rglob("*.failures"))
    down.clear()
    for file in (tmp_path / "kept").rglob("*.fault"):
        file.unlink()
    asked.clear()
    report = run(spec({**use, "retries": 1}, duplicates={"exact": True, "distance": None}), tmp_path / "store")
    assert report.data["kept"] == 3 and asked == ["dead"], "as docs/curate.md has it"


def test_an_address_that_failed_after_its_record_was_read_is_asked_again_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down: set[str] = set()
    use, asked = addresses(tmp_path, monkeypatch, "ab", down)
    assert run(spec(use), tmp_path / "store").data["kept"] == 2
    before = stored(tmp_path / "store")
    shutil.rmtree(tmp_path / "kept")
    down.update("ab")
    asked.clear()
    new = [{"use": "entropy", "keep": {"entropy": {"min": 0.0}}}]
    run(spec(use, filters=new), tmp_path / "store")
    assert sorted(asked) == ["a", "b"] and stored(tmp_path / "store") == before, "once a run"
    down.clear()
    asked.clear()
    report = run(spec(use, filters=new), tmp_path / "store")
    assert sorted(asked) == ["a", "b"] and report.data["kept"] == 2 and stored(tmp_path / "store") == before
    strict = [{"use": "entropy", "keep": {"entropy": {"min": 99.0}}}]
    assert run(spec(use, filters=strict), tmp_path / "store").data["kept"] == 0, "they are measured"


def test_a_folder_of_downloads_that_cannot_be_written_loses_none_that_are_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use, _ = addresses(tmp_path, monkeypatch, ("a", "dead", "b"), {"dead"})

    def refused(path: Path, write: Any) -> None:
        raise WriteError(f"{path}: cannot be written: Read-only file system")

    run(spec(use), tmp_path / "store")
    monkeypatch.setattr(urls, "write_atomic", refused)
    assert run(spec(use), tmp_path / "other").data["kept"] == 2
    assert {row["reason"] for row in verdicts(str(tmp_path / "other"))} == {"", "not fetched: HTTP 503"}


def test_a_file_that_the_disk_did_not_give_is_read_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for seed in range(3):
        add(raw, f"{seed}.png", picture(seed))
    read = folders._read

    def failing(path: str, most: int) -> bytes | None:
        if path.endswith("1.png"):
            raise OSError(errno.EIO, "Input/output error")
        return read(path, most)

    recipe = spec({"use": "folder", "path": str(raw)})
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_read", failing)
        run(recipe, tmp_path / "store")
    assert stages(tmp_path / "store") == {"0.png": "", "1.png": "decode", "2.png": ""}
    run(recipe, tmp_path / "store")
    assert stages(tmp_path / "store") == {"0.png": "", "1.png": "", "2.png": ""}


def make_source(use: str, path: Path, seeds: range) -> None:
    """What a source of this kind reads below `path`."""
    if use == "folder":
        make_folder(path, seeds)
        return
    path.mkdir(exist_ok=True)
    if use == "tars":
        make_tar(path / "a.tar", seeds)
    else:
        make_parquet(path / "a", seeds)


def failing(read: Any, after: int) -> Any:
    """A reader of which the disk gives so many items, and no more."""

    def some(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield from itertools.islice(read(*arguments, **options), after)
        raise OSError(errno.EIO, "Input/output error")

    return some


PIECES = {"tars": (tars, "_samples"), "parquet": (pq.ParquetFile, "iter_batches")}
"""What reads the pictures of a part."""


@pytest.mark.parametrize("use", PIECES)
def test_what_the_disk_did_not_give_of_a_larger_file_is_read_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    make_source(use, tmp_path / "raw", range(3))
    recipe = spec({"use": use, "path": str(tmp_path / "raw")})
    owner, name = PIECES[use]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), 0))
        assert run(recipe, tmp_path / "store").data["kept"] == 0
    report = run(recipe, tmp_path / "store")
    assert report.data["kept"] == report.data["records"] == 3, "and the fault is gone"


@pytest.mark.parametrize("use", PIECES)
def test_a_file_that_changes_and_is_not_read_to_its_end_loses_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    make_source(use, tmp_path / "raw", range(2))
    recipe = spec({"use": use, "path": str(tmp_path / "raw")})
    run(recipe, tmp_path / "store")
    before = stored(tmp_path / "store")
    (tmp_path / "raw").rename(tmp_path / "old")
    make_source(use, tmp_path / "raw", range(4))
    owner, name = PIECES[use]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), 0))
        for _ in range(2):
            run(recipe, tmp_path / "store", prune=True)
            assert stored(tmp_path / "store") == before
    report = run(recipe, tmp_path / "store", prune=True)
    assert report.data["kept"] == report.data["records"] == len(stored(tmp_path / "store")) == 4
    assert run(recipe, tmp_path / "store").data["read"] == 0


def test_a_folder_that_cannot_be_listed_is_counted_and_never_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    (raw / "sub").mkdir(parents=True)
    add(raw, "0.png", picture(0))
    add(raw / "sub", "1.png", picture(1))
    (raw / "link").symlink_to(tmp_path)
    recipe = spec({"use": "folder", "path": str(raw)})
    run(recipe, tmp_path / "store")
    before = stored(tmp_path / "store")
    scan = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("sub"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        with pytest.raises(ConfigError, match="raw: sub is an unreadable folder now, and --prune would remove"):
            run(recipe, tmp_path / "store", prune=True)
        with pytest.raises(ConfigError, match=r"no longer has 1 of 2 .* sub is an unreadable folder now: make"):
            run(recipe, tmp_path / "store")
        assert stored(tmp_path / "store") == before
        run(recipe, tmp_path / "other")
        reasons = {row["name"]: row["reason"] for row in verdicts(str(tmp_path / "other"))}
        assert reasons == {"0.png": "", "sub": "unreadable folder", "link": "link to a folder, which is not followed"}
    run(recipe, tmp_path / "other")
    assert stages(tmp_path / "other") == {"0.png": "", "sub/1.png": "", "link": "decode"}


def test_what_can_be_listed_only_at_times_is_never_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "raw"
    (raw / "sub").mkdir(parents=True)
    add(raw, "0.png", picture(0))
    add(raw / "sub", "1.png", picture(1))
    recipe = spec({"use": "folder", "path": str(raw)})
    run(recipe, tmp_path / "store")
    before = stored(tmp_path / "store")
    scan, times = os.scandir, itertools.count()

    def refusing_later(path: Any) -> Any:
        if str(path).endswith("sub") and next(times):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing_later)
    with pytest.raises(ConfigError, match="raw: sub is an unreadable folder now"):
        run(recipe, tmp_path / "store", prune=True)
    assert stored(tmp_path / "store") == before


def lose(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Have the system give nothing of files with these names, as where a mount has dropped."""

    def stale(call: Any) -> Any:
        def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
            if str(path).endswith(names):
                raise OSError(errno.ESTALE, "Stale file handle", str(path))
            return call(path, *arguments, **options)

        return refuse

    for owner, name in ((os, "stat"), (Path, "stat"), (Path, "open"), (builtins, "open"), (pq, "ParquetFile")):
        patch.setattr(owner, name, stale(getattr(owner, name)))
    isfile = os.path.isfile
    patch.setattr(os.path, "isfile", lambda path: not str(path).endswith(names) and isfile(path))


@pytest.mark.parametrize("lost", ["1.png", "1.txt"])
def test_a_file_that_is_lost_between_listing_and_reading_is_read_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    recipe = spec({"use": "folder", "path": str(make_folder(tmp_path / "raw", range(2)))})
    read = folders.read_picture

    def read_lost(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            lose(patch, lost)
            return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "read_picture", read_lost)
        assert run(recipe, tmp_path / "store").data["kept"] == 1
    assert run(recipe, tmp_path / "store").data["kept"] == 2


def test_a_picture_of_a_list_about_which_the_system_says_nothing_keeps_its_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_folder(tmp_path / "raw", range(2))
    lines = [json.dumps({"file": f"{seed}.png", "dense": "A texture."}) for seed in range(2)]
    (raw / "captions.jsonl").write_text("\n".join(lines))
    before = list(folders.list_folder(raw))
    lose(monkeypatch, "1.png")
    assert len(before) == 2 and list(folders.list_folder(raw)) == before


def test_a_caption_whose_picture_the_file_system_cannot_have_is_one_without_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_folder(tmp_path / "raw", range(1))
    (raw / "captions.jsonl").write_text(json.dumps({"file": "a?.png", "dense": "A texture."}))
    stat = os.stat

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if "?" in str(path):
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert [item.fault for item in folders.read_folder(raw)] == ["caption without a picture", ""]


def test_a_broken_link_keeps_the_store_from_being_pruned_until_it_is_deleted(tmp_path: Path) -> None:
    make_parquet(tmp_path / "raw", range(2))
    link = tmp_path / "raw" / "b.parquet"
    link.symlink_to(tmp_path / "not-mounted.parquet")
    recipe = spec({"use": "parquet", "path": str(tmp_path / "raw")})
    run(recipe, tmp_path / "store")
    with pytest.raises(ConfigError, match=r"b\.parquet is an unreadable file now, .*delete it if it is a broken link"):
        run(recipe, tmp_path / "store", prune=True)
    link.unlink()
    assert run(recipe, tmp_path / "store", prune=True).data["kept"] == 2


@pytest.mark.parametrize("use", PIECES)
def test_a_larger_file_about_which_the_system_says_nothing_is_never_pruned_and_read_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    make_source(use, tmp_path / "raw", range(1))
    make_source(use, tmp_path / "raw" / "b", range(1, 2))
    lost = {"tars": "b/a.tar", "parquet": "b/a/train.parquet"}[use]
    recipe = spec({"use": use, "path": str(tmp_path / "raw")})
    with monkeypatch.context() as patch:
        lose(patch, lost)
        report = run(recipe, tmp_path / "store")
        assert report.data["kept"] == 1 and report.data["records"] == 2, "it is counted"
    report = run(recipe, tmp_path / "store")
    assert report.data["kept"] == report.data["records"] == 2
    before = stored(tmp_path / "store")
    lose(monkeypatch, lost)
    with suppress(ConfigError):  # of parquet files, whose parts cannot be listed then
        run(recipe, tmp_path / "store", prune=True)
    assert stored(tmp_path / "store") == before


@pytest.mark.parametrize("use", ["folder", "tars", "parquet"])
def test_a_filter_that_is_new_while_pictures_cannot_be_read_removes_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    make_source(use, tmp_path / "raw", range(3))
    source = {"use": use, "path": str(tmp_path / "raw")}
    assert run(spec(source), tmp_path / "store").data["kept"] == 3
    before = stored(tmp_path / "store")
    new = {"use": "entropy", "keep": {"entropy": {"min": 0.0}}}
    with monkeypatch.context() as patch:
        lose(patch, *{"folder": ("0.png", "1.png"), "tars": (".tar",), "parquet": (".parquet",)}[use])
        for _ in range(2):
            with suppress(ConfigError):  # of parquet files, whose parts cannot be listed then
                run(spec(source, filters=[new]), tmp_path / "store")
            assert stored(tmp_path / "store") == before
    report = run(spec(source, filters=[new]), tmp_path / "store")
    assert report.data["kept"] == report.data["records"] == 3 and stored(tmp_path / "store") == before
    strict = {"use": "entropy", "keep": {"entropy": {"min": 99.0}}}
    report = run(spec(source, filters=[strict]), tmp_path / "store")
    assert report.data["stored"]["removed"] == 3, "they are known as what a curation put there, and are measured now"


@pytest.mark.parametrize("lost", [2, 1])
def test_a_filter_that_is_new_while_a_file_can_be_listed_and_not_read_removes_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    make_tar(tmp_path / "a.tar", range(3))
    source = {"use": "tars", "path": str(tmp_path / "a.tar")}
    run(spec(source), tmp_path / "store")
    before = stored(tmp_path / "store")
    samples = tars._samples

    def breaks(*arguments: Any) -> Any:
        yield from itertools.islice(samples(*arguments), 3 - lost)
        raise OSError(errno.EIO, "Input/output error")

    strict = {"use": "entropy", "keep": {"entropy": {"min": 99.0}}}
    with monkeypatch.context() as patch:
        patch.setattr(tars, "_samples", breaks)
        report = run(spec(source, filters=[strict]), tmp_path / "store")
    assert report.data["stored"]["removed"] == 3 - lost, "those that were measured"
    assert stored(tmp_path / "store").items() <= before.items()
    assert run(spec(source, filters=[strict]), tmp_path / "store").data["stored"]["removed"] == lost


@pytest.mark.parametrize(
    ("robots", "forbidden"),
    [("", False), ("noai", True), ("all", False), ("googlebot: noindex", True), ("nofollow, noimageai", True),
     ("noarchive", False), ("none", False)],
)  # fmt: skip
def test_a_robots_header_that_forbids_training_is_honoured(robots: str, forbidden: bool) -> None:
    assert forbids(robots) is forbidden


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    use = {"path": str(tmp_path / "none"), "downloads": str(tmp_path)}
    with pytest.raises(ConfigError, match="no such list"):
        Urls(Urls.Config(**use), Catalog.installed()).check()
    with pytest.raises(ConfigError, match=r"downloads: missing"):
        build_sources([ComponentSpec("urls", {"path": "x"})], Catalog.installed())


# ---- pictures with text -------------------------------------------------------------------------------------------


def test_a_text_picture_depends_on_seed_and_number_alone_and_its_caption_quotes_it() -> None:
    source = TextPictures(TextPictures.Config(200, sizes=((128, 128),)), Catalog.installed())
    source.check()
    parts = list(source.parts())
    assert sum(part.count for part in parts) == 200
    items = list(source.read(parts[1]))
    assert items[3].image == source.draw(64 + 3).image != source.draw(0).image
    for number in range(12):
        item = source.draw(number)
        words = source._style(np.random.default_rng([0, number])).words
        captions = item.captions[0]
        assert f'"{words}"' in captions["dense"] and f'"{words}"' in captions["brief"]
        pixels = np.asarray(read_rgb(item.image or b"")).astype(int)
        assert pixels.std(axis=(0, 1)).max() > 5, "something is written there"


def test_text_is_legible_by_its_contrast_with_every_background() -> None:
    source = TextPictures(TextPictures.Config(1), Catalog.installed())
    for number in range(300):
        style = source._style(np.random.default_rng([1, number]))
        assert contrast(style.colour, style.background) >= 4.5
        assert style.gradient is None or contrast(style.colour, style.gradient) >= 4.5
    assert contrast("black", "white") == pytest.approx(21) and contrast("red", "red") == 1
    assert all(any(contrast(a, b) >= 4.5 for b in COLOURS) for a in COLOURS)


def test_a_script_that_no_font_has_is_refused_and_a_folder_of_backgrounds_is_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no font here has the letters of 'han'"):
        TextPictures(TextPictures.Config(1, scripts=("han",)), Catalog.installed()).check()
    with pytest.raises(ConfigError, match="is no font"):
        TextPictures(TextPictures.Config(1, fonts=(__file__,)), Catalog.installed()).check()
    folder = make_folder(tmp_path / "backgrounds", range(2))
    source = TextPictures(TextPictures.Config(1, backgrounds=str(folder), sizes=((96, 96),)), Catalog.installed())
    source.check()
    assert "on a picture" in source.draw(0).captions[0]["brief"]
    with pytest.raises(ConfigError, match="holds no picture to write on"):
        TextPictures(TextPictures.Config(1, backgrounds=str(tmp_path / "no")), Catalog.installed()).check()
