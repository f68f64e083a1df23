"""Where pictures with captions come from: folders, WebDataset tars, parquet files of Hugging Face datasets.

A reader yields one `Found` for each picture, and for each thing that it cannot use, with the reason. It never raises
for what a file holds: decoders raise whatever they stumble over, and what is broken is counted and passed by.

Bounds, for files that a stranger wrote: a picture's file LARGEST_PICTURE bytes, a caption's file and a line of a list
LARGEST_TEXT, a header in a tar LARGEST_HEADER, and a compressed tar EXPANSION times its own size (EXPANDED at least).
Nothing larger is held, whatever a header claims.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

from attrs import field, frozen, mutable

from lens_core.io.system_files import is_system_file
from lens_core.types import ConfigError
from lens_data import pictures
from lens_data.digests import Ids

LARGEST_PICTURE = 128 * 1024**2  # bytes of one image file
LARGEST_TEXT = 1024**2  # bytes of one .txt or .json, and of one line of a list
LARGEST_HEADER = 1024**2  # bytes of one long name or extended header in a tar
EXPANSION = 200  # times its own size to which a compressed tar may expand
EXPANDED = 64 * 1024**2  # bytes to which any may
LISTS = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
"""Files that list pictures of their folder with captions; the last two are those of Hugging Face's image folders."""

_NAMES = ("file", "file_name", "filename")  # what a list calls a picture's name
_TEXTS = ("brief", "dense", "caption", "text")
_IMAGES = ("image", "img", "jpg", "png", "jpeg", "webp")  # columns that hold the picture, the likeliest first
_ENDINGS, _CAPTIONS = 1000, 8  # members of one sample of a tar, and how many of its texts are read

TOO_LARGE = f"image file larger than {LARGEST_PICTURE >> 20} MiB"
LONG_TEXT = f"caption file larger than {LARGEST_TEXT >> 20} MiB"


@frozen
class Found:
    """One picture as its source has it. `captions` are texts, or their UTF-8 bytes, by key, the better source first.
    `fault` says why the picture cannot be used."""

    name: str
    image: bytes | None = None
    captions: tuple[Mapping[str, Any], ...] = ()
    fault: str = ""


# ---- folders ------------------------------------------------------------------------------------------------------


def in_folder(root: Path) -> Iterator[Found]:
    """Pictures below `root`: those that a list names, with its captions, then the others, with a .txt beside each."""
    listed = Ids()
    for folder, names in _walk(root):
        for name in LISTS:
            if name in names:
                yield from _in_list(root, folder, name, listed)
    for folder, names in _walk(root):
        for name in names:
            relative = f"{folder}{name}"
            if _is_picture(name) and _name_digest(relative) not in listed:
                yield _picture(root, relative, ())


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """For each folder, its path below `root` with a slash at its end, and the pictures and lists in it, sorted."""
    for here, folders, names in os.walk(root):
        below = os.path.relpath(here, root)
        prefix = "" if below == "." else f"{below}/"
        folders[:] = sorted(name for name in folders if not is_system_file(name))
        yield prefix, sorted(n for n in names if (_is_picture(n) or n in LISTS) and not is_system_file(n))


def _picture(root: Path, relative: str, captions: tuple[Mapping[str, Any], ...]) -> Found:
    """The picture of this path below `root`, with these captions, and that of the .txt beside it."""
    path = os.path.join(root, relative)
    try:
        if not os.path.isfile(path):  # a broken link, a pipe
            return Found(relative, fault="unreadable file")
        image = _read(path, LARGEST_PICTURE)
        if image is None:
            return Found(relative, fault=TOO_LARGE)
        beside = os.path.splitext(path)[0]
        text = next((beside + end for end in (".txt", ".TXT", ".Txt") if os.path.isfile(beside + end)), None)
        if text is not None:
            caption = _read(text, LARGEST_TEXT)
            captions = (*captions, {"fault": LONG_TEXT} if caption is None else {"caption": caption})
    except (OSError, ValueError):
        return Found(relative, fault="unreadable file")
    return Found(relative, image, captions)


def _read(path: str, most: int) -> bytes | None:
    """A file of at most `most` bytes; None if it is larger."""
    with open(path, "rb") as file:
        data = file.read(min(most, os.fstat(file.fileno()).st_size) + 1)
    return data if len(data) <= most else None


def _in_list(root: Path, folder: str, name: str, listed: Ids) -> Iterator[Found]:
    """The pictures that a list in `folder` names, paths from there; `listed` takes their paths below `root`."""
    where = f"{folder}{name}"
    try:
        with open(os.path.join(root, where), "rb") as file:
            for number, facts in _facts(file, csv_=name.endswith(".csv")):
                said = next((facts[key] for key in _NAMES if key in facts), None)
                if not isinstance(said, str):
                    yield Found(f"{where}:{number}", fault=f"damaged line in {name}")
                    continue
                relative = _find(root, folder, said)
                if relative is None:
                    yield Found(f"{where}:{number} {said}", fault="caption without a picture")
                elif (digest := _name_digest(relative)) in listed:
                    yield Found(f"{where}:{number} {said}", fault=f"listed again in {name}")
                else:
                    listed.add(digest)
                    yield _picture(root, relative, (facts,))
    except OSError:
        yield Found(where, fault="unreadable file")


def _find(root: Path, folder: str, said: str) -> str | None:
    """The path below `root` of the picture that a list in `folder` names, however that writes it."""
    place = PurePosixPath(said.replace("\\", "/"))
    if place.is_absolute() or ".." in place.parts or not _is_picture(place.name) or is_system_file(place):
        return None
    # macOS takes accents apart in file names.
    forms = dict.fromkeys([str(place), *(unicodedata.normalize(form, str(place)) for form in ("NFC", "NFD"))])
    return next((f"{folder}{form}" for form in forms if os.path.isfile(os.path.join(root, folder, form))), None)


def _name_digest(relative: str) -> bytes:
    return hashlib.sha256(os.fsencode(relative)).digest()


def _facts(file: IO[bytes], csv_: bool) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """What each line of a list says, by its number; nothing where it cannot be read."""
    if not csv_:
        for number, line in _lines(file):
            if line.strip():
                yield number, _json(line) or {}
        return
    head = next((line for _, line in _lines(file)), b"").decode("utf-8-sig", "replace")
    columns: list[str] = []
    for delimiter in ",;\t":
        columns = [c.strip().lower() for c in next(csv.reader([head], delimiter=delimiter), [])]
        if any(name in columns for name in _NAMES):
            break
    number = 1
    texts = (line.decode("utf-8", "surrogateescape") for _, line in _lines(file))
    rows = csv.reader(texts, delimiter=delimiter)
    while True:
        number += 1
        try:
            row = next(rows, None)
        except csv.Error:  # a NUL, a field that has no end
            yield number, {}
            continue
        if row is None:
            return
        if row:
            facts = dict(zip(columns, row, strict=False))
            yield number, facts | {k: facts[k].encode("utf-8", "surrogateescape") for k in _TEXTS if k in facts}


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines by number, from 1; of a line that is too long, a piece that is no JSON."""
    number = 0
    while line := file.readline(LARGEST_TEXT):
        number += 1
        if len(line) == LARGEST_TEXT and not line.endswith(b"\n"):
            while (rest := file.readline(LARGEST_TEXT)) and not rest.endswith(b"\n"):
                pass
            line = b"\0"
        yield number, line


def _json(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ---- tars ---------------------------------------------------------------------------------------------------------


def is_tar(name: str) -> bool:
    return name.lower().endswith((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def in_tars(path: Path) -> Iterator[Found]:
    """Samples of one WebDataset tar, or of all below a folder: members with one name up to the first dot."""
    for tar in below(path, is_tar):
        try:
            yield from _in_tar(tar)
        except Exception as error:  # tarfile and the decompressors raise whatever they stumble over
            # The sample at the break may lack a member: it is given up with the rest.
            reason = " ".join(f"{error}".split())[:200] or type(error).__name__
            yield Found(f"{tar.name} ({reason})", fault="damaged archive, its rest is lost")


def below(path: Path, wanted: Any) -> list[Path]:
    """The files below a folder whose names are `wanted`, sorted; of a file, itself."""
    if not path.is_dir():
        return [path]
    found = (p for p in path.rglob("*") if wanted(p.name) and not is_system_file(p.relative_to(path)))
    return sorted(p for p in found if p.is_file())


@mutable
class _Sample:
    """Members of a tar that belong together; of several pictures, the likeliest is kept."""

    key: str
    endings: set[str] = field(factory=set)
    rank: int = 0  # of the picture that is held: the lower, the likelier it is what the caption is about
    picture: tuple[str, bytes | None] | None = None  # its ending and file; None for one that is too large
    json: bytes = b""
    captions: dict[str, Any] = field(factory=dict)
    left: list[Found] = field(factory=list)

    def takes(self, key: str, ending: str) -> bool:
        return key == self.key and ending not in self.endings and len(self.endings) < _ENDINGS

    def add(self, ending: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        self.endings.add(ending)
        if not member.isfile():  # what a link is to, a stream has passed by
            if _is_picture(ending):
                self.left.append(Found(f"{self.key}{ending}", fault="a link in an archive"))
        elif _is_picture(ending):
            rank = _rank(ending)
            if self.picture is None or rank < self.rank:
                before, self.rank = self.picture, rank
                self.picture = ending, _member(member, archive, LARGEST_PICTURE)
                ending = before[0] if before else ""
            if ending:
                self.left.append(Found(f"{self.key}{ending}", fault="another picture of a sample"))
        elif ending.endswith((".txt", ".json")) and len(self.captions) < _CAPTIONS:  # x.txt, x.v2.txt beside x.v2.png
            data = _member(member, archive, LARGEST_TEXT)
            self.captions[ending] = {"fault": LONG_TEXT} if data is None else data

    def found(self, tar: str) -> Iterator[Found]:
        name = f"{tar}:{self.key}"
        ending, image = self.picture or ("", b"")
        stem = ending.rpartition(".")[0]
        texts = [self._text(end) for end in dict.fromkeys([f"{stem}.json", ".json", f"{stem}.txt", ".txt"])]
        captions = tuple(text for text in texts if text is not None)
        if self.picture is not None and image is None:
            yield Found(name, fault=TOO_LARGE)
        elif self.picture is not None or captions:
            yield Found(name, image if self.picture else None, captions)
        for other in self.left:
            yield Found(f"{tar}:{other.name}", fault=other.fault)

    def _text(self, ending: str) -> Mapping[str, Any] | None:
        data = self.captions.get(ending)
        if not isinstance(data, bytes):
            return data
        if not ending.endswith(".json"):
            return {"caption": data}
        facts = _json(data)
        return {"fault": "damaged .json"} if facts is None else facts


def _rank(ending: str) -> int:
    """`.png` is a sample's picture before `.image.png`, and that before `.mask.png`."""
    *extra, last = ending.strip(".").split(".")
    rank = 0 if not extra else 1 if extra[-1] in _IMAGES else 2
    return rank if f".{last}" in pictures.READ else rank + 3


class _Member(tarfile.TarInfo):
    """A member of a tar. A header that is broken ends the archive with an error, where tarfile says nothing."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        try:
            made = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if type(error).__name__ in ("EOFHeaderError", "EmptyHeaderError"):  # the end, with or without its mark
                raise
            raise tarfile.ReadError(str(error)) from error
        extended = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *tarfile.GNU_TYPES[:2])
        if made.size < 0 or (made.type in extended and made.size > LARGEST_HEADER):
            raise tarfile.ReadError(f"a header of {made.size} bytes")
        return made


class _Bounded:
    """A stream of at most so many bytes."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._left = file, most

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise tarfile.ReadError(f"it expands to more than {EXPANSION} times its size")
        return data


def _in_tar(tar: Path) -> Iterator[Found]:
    sample: _Sample | None = None
    with tar.open("rb") as raw:
        stream = _expanded(raw, tar.stat().st_size)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as archive:
            for member in archive:
                if not (member.isfile() or member.islnk() or member.issym()) or is_system_file(member.name):
                    continue
                key, ending = _split(member.name)
                if sample is None or not sample.takes(key, ending):
                    if sample is not None:
                        yield from sample.found(tar.name)
                    sample = _Sample(key)
                sample.add(ending, member, archive)
                archive.members.clear()  # tarfile keeps every header it has read
    if sample is not None:
        yield from sample.found(tar.name)


def _split(name: str) -> tuple[str, str]:
    """A member's key and its ending in lower case: `x/000.v2.png` is (`x/000`, `.v2.png`)."""
    folder, slash, file = name.rpartition("/")
    hidden = "." if file.startswith(".") else ""
    stem, dot, ending = file.removeprefix(".").partition(".")
    return f"{folder}{slash}{hidden}{stem}", f"{dot}{ending}".lower()


def _expanded(raw: IO[bytes], size: int) -> Any:
    """The bytes of a tar, compressed or not, as a stream."""
    head = raw.read(6)
    raw.seek(0)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        raise tarfile.ReadError("compressed with zstd, which is not read; unpack it")
    most = max(EXPANSION * size, EXPANDED)
    if head.startswith(b"\x1f\x8b"):
        import gzip

        return _Bounded(gzip.GzipFile(fileobj=raw), most)  # type: ignore[arg-type]
    if head.startswith(b"BZh"):
        import bz2

        return _Bounded(bz2.BZ2File(raw), most)
    if head.startswith(b"\xfd7zXZ\0"):
        import lzma

        return _Bounded(lzma.LZMAFile(raw), most)
    return raw


def _member(member: tarfile.TarInfo, archive: tarfile.TarFile, most: int) -> bytes | None:
    """A member's bytes; None if there are more than `most`, as in a sparse file, which need not be so large itself."""
    if member.size > most:
        return None
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


# ---- parquet ------------------------------------------------------------------------------------------------------


def is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def in_parquet(path: Path, image_column: str = "", text_column: str = "") -> Iterator[Found]:
    """Rows of one parquet file, or of all below a folder. Raises ConfigError if the first file that can be read has
    no such columns; others of that kind are counted."""
    import pyarrow.parquet as pq

    first = True
    for file in below(path, is_parquet):
        try:
            reader = pq.ParquetFile(file, buffer_size=1024**2, page_checksum_verification=True)
            schema = reader.schema_arrow
        except Exception:  # pyarrow raises whatever it stumbles over: OSError, ValueError, its own
            yield Found(file.name, fault="damaged parquet file")
            continue
        with reader:
            try:
                image, texts = _columns(file, schema, image_column, text_column)
            except ConfigError:
                if first:
                    raise
                yield Found(file.name, fault="parquet file without the columns of the first")
                continue
            first = False
            names = {key: "text" if key == text_column else key.lower() for key in texts}
            yield from _in_parquet(reader, file.name, image, names)


def _in_parquet(reader: Any, name: str, image: str, texts: Mapping[str, str]) -> Iterator[Found]:
    start = 0
    for group in range(reader.num_row_groups):
        about, row = reader.metadata.row_group(group), start
        size = sum(
            about.column(i).total_uncompressed_size
            for i in range(about.num_columns)
            if about.column(i).path_in_schema.partition(".")[0] in (image, *texts)
        )
        start += about.num_rows
        if size > max(about.num_rows, 1) * LARGEST_PICTURE:
            yield Found(f"{name}:{row} to {start - 1}", fault=TOO_LARGE)
            continue
        # A batch is held whole, so it has as many rows as make about 64 MiB; but in a large group one cell may be most
        # of it, and pyarrow doubles the room of a batch until it fits.
        rows = 1 if size > 2 * LARGEST_PICTURE else min(64, max(1, 64 * 1024**2 * about.num_rows // max(size, 1)))
        try:
            for batch in reader.iter_batches(rows, row_groups=[group], columns=[image, *texts], use_threads=False):
                cells = {key: _binary(batch, column) for column, key in texts.items()}
                files = _binary(batch, image)
                for at in range(batch.num_rows):
                    data = _cell(files, at, LARGEST_PICTURE)
                    told = {key: _cell(column, at, LARGEST_TEXT) for key, column in cells.items()}
                    if any(text is False for text in told.values()):
                        told = {**{key: text for key, text in told.items() if text is not False}, "fault": LONG_TEXT}
                    if data is False:
                        yield Found(f"{name}:{row}", fault=TOO_LARGE)
                    else:
                        yield Found(f"{name}:{row}", data, (told,))
                    row += 1
        except Exception:
            yield Found(f"{name}:{row}", fault="damaged row group, its rest is lost")


def _binary(batch: Any, name: str) -> Any:
    """A column of a batch as bytes: a text may not be UTF-8, whatever its type says."""
    import pyarrow as pa

    column = batch.column(batch.schema.get_all_field_indices(name)[0])
    if pa.types.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column if _is_bytes(column.type) else column.cast(pa.large_binary())


def _cell(column: Any, at: int, most: int) -> bytes | bool | None:
    """Bytes; None where there are none; False where there are more than `most`."""
    buffer = column[at].as_buffer()
    return None if buffer is None else buffer.size <= most and buffer.to_pybytes()


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_bytes(kind))


def _columns(file: Path, schema: Any, image: str, text: str) -> tuple[str, list[str]]:
    """The columns of pictures and of captions. Raises ConfigError, also where it is not clear which is meant."""
    import pyarrow as pa

    def holds_files(kind: Any) -> bool:
        return _is_bytes(kind) or (
            pa.types.is_struct(kind)
            and kind.get_field_index("bytes") >= 0
            and _is_bytes(kind.field(kind.get_field_index("bytes")).type)
        )

    kinds = {f.name: f.type for f in schema}
    for name, option in ((image, "image"), (text, "text")):
        if name and name not in kinds:
            raise ConfigError(f"{file}: has no column {name!r} among {', '.join(kinds)}; correct --{option}-column")
    if not image:
        image = _image_column(file, {name: kind for name, kind in kinds.items() if holds_files(kind)}, kinds)
    elif not holds_files(kinds[image]):
        raise ConfigError(f"{file}: its column {image!r} is {str(kinds[image])[:80]}, not image files; name another")
    texts = [text] if text else [n for key in _TEXTS for n in kinds if n.lower() == key and _is_text(kinds[n])]
    if not texts:
        raise ConfigError(f"{file}: has no caption column among {', '.join(kinds)}; name it with --text-column")
    if text and not _is_text(kinds[text]):
        raise ConfigError(f"{file}: its column {text!r} is {str(kinds[text])[:80]}, not text; name another")
    return image, texts


def _image_column(file: Path, able: Mapping[str, Any], among: Iterable[str]) -> str:
    import pyarrow as pa

    for name in _IMAGES:
        for column in able:
            if column.lower() == name:
                return column
    structs = [name for name, kind in able.items() if pa.types.is_struct(kind)]
    if len(structs) == 1:
        return structs[0]
    what = f"several image columns, {', '.join(structs)}" if structs else f"no image column among {', '.join(among)}"
    raise ConfigError(f"{file}: has {what}; name it with --image-column")


def _is_picture(name: str) -> bool:
    return os.path.splitext(f"x{name}")[1].lower() in pictures.SUFFIXES
