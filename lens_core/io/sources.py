"""What the readers of pictures with captions share: what they yield, and the bounds of what they read.

A reader (`folders`, `tars`, `parquet`) yields one `SourceItem` for each picture, and for each thing that it cannot use,
with the reason. It never raises for what a file holds: decoders raise whatever they stumble over, and what is broken is
counted and skipped.

Bounds, for files that a stranger wrote: a picture's file LARGEST_PICTURE bytes, a caption's file and a line of a list
LARGEST_TEXT, a header in a tar LARGEST_HEADER, and a compressed tar EXPANSION times its own size (EXPANDED at least).
Nothing larger is held, whatever a header claims.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from lens_core.io.system_files import is_system_file

LARGEST_PICTURE = 128 * 1024**2  # bytes of one image file
LARGEST_TEXT = 1024**2  # bytes of one .txt or .json, and of one line of a list
LARGEST_HEADER = 1024**2  # bytes of one long name or extended header in a tar
EXPANSION = 200  # times its own size to which a compressed tar may expand
EXPANDED = 64 * 1024**2  # bytes to which any may

READ = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pgm", ".png",
    ".pnm", ".ppm", ".qoi", ".tif", ".tiff", ".webp",
})  # fmt: skip
SUFFIXES = READ | {".heic", ".heif", ".jxl", ".psd", ".svg"}
"""Files with these endings are taken for pictures; those that are not in READ are counted as unsupported."""
CAPTION_KEYS = ("brief", "dense", "caption", "text")
IMAGE_NAMES = ("image", "img", "jpg", "png", "jpeg", "webp")
"""Names of what holds the picture, in columns and in tars, the likeliest first."""

# Answers that another attempt would not change. EINVAL: a name that the file system cannot have.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
UNREADABLE = "unreadable file"
TOO_LARGE = f"image file larger than {LARGEST_PICTURE >> 20} MiB"
LONG_TEXT = f"caption file larger than {LARGEST_TEXT >> 20} MiB"


@frozen
class SourceItem:
    """One picture as its source has it.

    `captions` are texts, or their UTF-8 bytes, by key, the better source first. `fault` says why the picture cannot be
    used; with `retry` it is one of the disk or the net, which may pass.
    """

    name: str
    image: bytes | None = None
    captions: tuple[Mapping[str, Any], ...] = ()
    fault: str = ""
    retry: bool = False


def broken(name: str, error: Exception, fault: str) -> SourceItem:
    """The item for what could not be read: unreadable for now where the system said so, else with `fault`."""
    if isinstance(error, OSError) and error.errno is not None:  # decoders raise OSError too, without a number
        return SourceItem(name, fault=UNREADABLE, retry=True)
    return SourceItem(name, fault=fault)


def walk(root: Path, faults: list[SourceItem]) -> Iterator[tuple[str, list[str]]]:
    """For each folder below `root`, in order: its path below `root` with a slash at its end, and its files, sorted.

    `faults` gets an item for each folder that cannot be listed, and for each link to one: links are not followed.
    """

    def unlisted(error: OSError) -> None:
        faults.append(SourceItem(os.path.relpath(error.filename, root), fault="unreadable folder", retry=True))

    for here, folders, names in os.walk(root, onerror=unlisted):
        below = os.path.relpath(here, root)
        prefix = "" if below == "." else f"{below}/"
        folders[:] = sorted(name for name in folders if not is_system_file(name))
        links = [name for name in folders if os.path.islink(os.path.join(here, name))]
        faults += [SourceItem(f"{prefix}{name}", fault="link to a folder, which is not followed") for name in links]
        yield prefix, sorted(name for name in names if not is_system_file(name))


def files_below(path: Path, wanted: Callable[[str], bool], faults: list[SourceItem] | None = None) -> list[Path]:
    """The files below a folder whose names are `wanted`, sorted, also those about which the system says nothing now,
    which their reader reports; of a file, itself. `faults` as in `walk`."""
    if not path.is_dir():
        return [path]
    listing = walk(path, [] if faults is None else faults)
    files = (path / prefix / name for prefix, names in listing for name in names if wanted(name))
    return sorted(file for file in files if may_be_file(file, listed=True))


def may_be_file(path: str | Path, listed: bool = False) -> bool:
    """Whether a regular file is at `path`, or the system cannot tell at the moment: who reads it then learns why.
    `listed`: its folder names it, so that it is not absent, but a broken link, or its disk has gone."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        return listed or error.errno not in _ABSENT
    except ValueError:  # a path that no file can have
        return False


def is_picture(name: str) -> bool:
    return os.path.splitext(f"x{name}")[1].lower() in SUFFIXES


def parse_json(data: bytes) -> dict[str, Any] | None:
    """A JSON object of UTF-8, with or without a mark at its start; None for anything else."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
