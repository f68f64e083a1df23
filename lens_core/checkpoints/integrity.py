"""Whether the files of a checkpoint are those that were written: `lens.json` holds the SHA-256 of each, as `files`.

The files are all that decides what a checkpoint draws: weights, JSON and chat templates, by their paths below its
folder. `lens.json` itself is not among them, nor are the map of step previews, the model card, which people edit, and
what systems leave behind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from lens_core.catalog import Catalog
from lens_core.checkpoints import hub, manifest, single_files
from lens_core.io import atomic_files
from lens_core.io.system_files import is_system_file
from lens_core.types import CheckpointError, LensError

Stamps = dict[str, tuple[int, int, int]]  # a file's path below a folder -> what changes when it is written


def _names(folder: Path) -> list[str]:
    """Of the files that `lens.json` may name, those that are there."""
    there = (p for p in folder.rglob("*") if p.suffix in manifest.DECIDING and p.is_file())
    names = sorted(p.relative_to(folder).as_posix() for p in there)
    uncounted = ("lens.json", f"vae/{manifest.PREVIEW_FILE}")
    return [name for name in names if name not in uncounted and not is_system_file(name)]


def stamps(folder: Path) -> Stamps:
    """What is in a folder before something is saved there, for `recorded`."""
    stats = {name: (folder / name).stat() for name in _names(folder)}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def recorded(folder: Path, before: Mapping[str, tuple[int, int, int]]) -> dict[str, str]:
    """The SHA-256 of each file below `folder` that has been written since `before`."""
    now = stamps(folder)
    return {name: manifest.hash_of(folder / name) for name, stamp in now.items() if before.get(name) != stamp}


@frozen
class IntegrityReport:
    """`named` is how many files the checkpoint holds hashes of, None where it holds none; the rest are paths."""

    named: int | None
    differ: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()  # that its hash counts, and it does not name
    broken: tuple[str, ...] = ()  # what is wrong with files that nothing is known of, a line each
    well_formed: int = 0  # files that nothing is known of and that are whole, as far as their formats say

    @property
    def problems(self) -> list[str]:
        """A line each."""
        return [
            *(f"{name}: differs from the file that was written" for name in self.differ),
            *(f"{name}: is missing" for name in self.missing),
            *(f"{name}: is extra, and no part of what was written" for name in self.extra),
            *self.broken,
        ]


def check(folder: Path, described: Mapping[str, Any], under: Collection[str] = ("",)) -> IntegrityReport:
    """Read every file of a checkpoint, of those whose paths begin with one of `under`, and compare."""
    begins = tuple(under)
    files: Mapping[str, str] | None = described.get("files")
    there = [name for name in _names(folder) if name.startswith(begins)] if folder.is_dir() else [folder.name]
    root = folder if folder.is_dir() else folder.parent
    if files is None:
        broken = [line for name in there if (line := _broken(root / name, name))]
        return IntegrityReport(None, broken=tuple(broken), well_formed=len(there) - len(broken))
    ours = {name: digest for name, digest in files.items() if name.startswith(begins)}
    return IntegrityReport(
        len(ours),
        tuple(n for n, digest in sorted(ours.items()) if n in there and manifest.hash_of(root / n) != digest),
        tuple(sorted(n for n in ours if n not in there)),
        tuple(n for n in there if n not in ours),
    )


def _broken(path: Path, name: str) -> str:
    """What is wrong with a file as its format says, or as its name in the Hub's cache does, which is its hash."""
    try:
        known = hub.known_hash(path)
        if known is not None and manifest.hash_of(path) != known:
            return f"{name}: differs from the file that the Hub has"
        if path.suffix in manifest.SINGLE_FILES:
            single_files.read_single_file(path)
        elif path.suffix == ".json":
            atomic_files.read_json(path)
    except LensError as error:
        return f"{name}: {error}"
    return ""


def verify(folder: Path, described: Mapping[str, Any], catalog: Catalog) -> None:
    """Raise CheckpointError unless every file of a checkpoint, and of the parts it shares, is as it was written."""
    places: list[tuple[Path, Mapping[str, Any], tuple[str, ...]]] = [(folder, described, ("",))]
    for part, component in described["components"].items():
        if "from" in component:
            source, _ = manifest.resolve_shared_part(part, component, folder, catalog)
            places.append((source, manifest.read_manifest(source, catalog), manifest.file_prefixes(part, component)))
    for place, about, under in places:
        report = check(place, about, under)
        if report.problems:
            more = f" ({len(report.problems)} such)" if len(report.problems) > 1 else ""
            raise CheckpointError(f"{place}: {report.problems[0]}{more}; fetch it again, or run lens check")
        if report.named is None and place == folder:
            raise CheckpointError(f"{place}: its lens.json holds no hashes, so nothing can be verified; save it anew")
