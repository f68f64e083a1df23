"""Samples of WebDataset tars: members with one name up to the first dot."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from attrs import field, mutable

from lens_core.io import sources
from lens_core.io.sources import IMAGE_NAMES, SourceItem, files_below, is_picture, parse_json
from lens_core.io.system_files import is_system_file

_MOST_ENDINGS, _MOST_CAPTIONS = 1000, 8  # members of one sample, and how many of its texts are read


def is_tar(name: str) -> bool:
    return name.lower().endswith((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))


def read_tars(path: Path) -> Iterator[SourceItem]:
    """Samples of one WebDataset tar, or of all below a folder: members with one name up to the first dot."""
    faults: list[SourceItem] = []
    for tar in files_below(path, is_tar, faults):
        yield from read_tar(tar)
    yield from faults


def read_tar(tar: Path) -> Iterator[SourceItem]:
    """Samples of one tar."""
    try:
        yield from _samples(tar)
    except Exception as error:  # tarfile and the decompressors raise whatever they stumble over
        # The sample at the break may lack a member: it is given up with the rest.
        reason = " ".join(f"{error}".split())[:200] or type(error).__name__
        yield sources.broken(f"{tar.name} ({reason})", error, "damaged archive, its rest is lost")


@mutable
class _TarSample:
    """Members of a tar that belong together; of several pictures, the likeliest is kept."""

    key: str
    endings: set[str] = field(factory=set)
    rank: int = 0  # of the picture that is held: the lower, the likelier it is what the caption is about
    picture: tuple[str, bytes | None] | None = None  # its ending and file; None for one that is too large
    json: bytes = b""
    captions: dict[str, Any] = field(factory=dict)
    left: list[SourceItem] = field(factory=list)

    def takes(self, key: str, ending: str) -> bool:
        return key == self.key and ending not in self.endings and len(self.endings) < _MOST_ENDINGS

    def add(self, ending: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        self.endings.add(ending)
        if not member.isfile():  # what a link is to, a stream has passed by
            if is_picture(ending):
                self.left.append(SourceItem(f"{self.key}{ending}", fault="a link in an archive"))
        elif is_picture(ending):
            rank = _rank(ending)
            if self.picture is None or rank < self.rank:
                before, self.rank = self.picture, rank
                self.picture = ending, _member(member, archive, sources.LARGEST_PICTURE)
                ending = before[0] if before else ""
            if ending:
                self.left.append(SourceItem(f"{self.key}{ending}", fault="another picture of a sample"))
        elif (
            ending.endswith((".txt", ".json")) and len(self.captions) < _MOST_CAPTIONS
        ):  # x.txt, x.v2.txt beside x.v2.png
            data = _member(member, archive, sources.LARGEST_TEXT)
            self.captions[ending] = {"fault": sources.LONG_TEXT} if data is None else data

    def items(self, tar: str) -> Iterator[SourceItem]:
        name = f"{tar}:{self.key}"
        ending, image = self.picture or ("", b"")
        stem = ending.rpartition(".")[0]
        texts = [self._text(end) for end in dict.fromkeys([f"{stem}.json", ".json", f"{stem}.txt", ".txt"])]
        captions = tuple(text for text in texts if text is not None)
        if self.picture is not None and image is None:
            yield SourceItem(name, fault=sources.TOO_LARGE)
        elif self.picture is not None or captions:
            yield SourceItem(name, image if self.picture else None, captions)
        for other in self.left:
            yield SourceItem(f"{tar}:{other.name}", fault=other.fault)

    def _text(self, ending: str) -> Mapping[str, Any] | None:
        data = self.captions.get(ending)
        if not isinstance(data, bytes):
            return data
        if not ending.endswith(".json"):
            return {"caption": data}
        facts = parse_json(data)
        return {"fault": "damaged .json"} if facts is None else facts


def _rank(ending: str) -> int:
    """`.png` is a sample's picture before `.image.png`, and that before `.mask.png`."""
    *extra, last = ending.strip(".").split(".")
    rank = 0 if not extra else 1 if extra[-1] in IMAGE_NAMES else 2
    return rank if f".{last}" in sources.READ else rank + 3


class _Member(tarfile.TarInfo):
    """A member of a tar. A header that is broken ends the archive with an error, where tarfile says nothing."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """The next member, with the headers that extend it."""
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ in ("EOFHeaderError", "EmptyHeaderError"):  # the end, with or without its mark
                raise
            raise tarfile.ReadError(str(error)) from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        made = super().frombuf(buf, encoding, errors)
        extended = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, *tarfile.GNU_TYPES[:2])
        if made.size < 0 or (made.type in extended and made.size > sources.LARGEST_HEADER):
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
            raise tarfile.ReadError(f"it expands to more than {sources.EXPANSION} times its size")
        return data


def _samples(tar: Path) -> Iterator[SourceItem]:
    sample: _TarSample | None = None
    with tar.open("rb") as raw:
        stream = _expanded(raw, tar.stat().st_size)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as archive:
            for member in archive:
                if not (member.isfile() or member.islnk() or member.issym()) or is_system_file(member.name):
                    continue
                key, ending = _split(member.name)
                if sample is None or not sample.takes(key, ending):
                    if sample is not None:
                        yield from sample.items(tar.name)
                    sample = _TarSample(key)
                sample.add(ending, member, archive)
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has read
    if sample is not None:
        yield from sample.items(tar.name)


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
    most = max(sources.EXPANSION * size, sources.EXPANDED)
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
