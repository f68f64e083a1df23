"""The folders that the page shows: nothing above them is read, whatever a name or a link says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from lens_core.io import readers
from lens_core.types import ConfigError

MOST = 1000  # entries that a list shows
DEEPEST = 5  # levels below the folder that are searched
LARGEST_TABLE = 2**20  # bytes of a table


@frozen
class Shown:
    """A folder of the user's, such as runs/: the sub-folders with one of the files `marks` are its entries."""

    root: Path
    marks: tuple[str, ...]

    def names(self) -> list[str]:
        """The entries, the newest first, by their paths below the folder."""
        if not self.root.is_dir():
            return []
        dated = sorted(((self._changed(folder), folder) for folder in self._walk(self.root, 0)), reverse=True)
        return [folder.relative_to(self.root).as_posix() for _, folder in dated[:MOST]]

    def entry(self, name: str) -> Path:
        """The folder of an entry. Raises ConfigError for a name that is none."""
        folder = self.root / name
        if not name or not any(self.inside(folder / mark) is not None for mark in self.marks):
            raise ConfigError(f"{readers.shown(name)} is no entry of {self.root}; choose one of the list")
        return folder

    def inside(self, path: Path) -> Path | None:
        """The path, if it is a file within the folder; a link that leads out of it is none."""
        try:
            real = path.resolve(strict=True)
            return path if real.is_file() and real.is_relative_to(self.root.resolve()) else None
        except (OSError, ValueError):
            return None

    def text(self, path: Path) -> str:
        """A table's text, or "" where there is none within the folder."""
        place = self.inside(path)
        return readers.read_text(place, LARGEST_TABLE) if place is not None else ""

    def _walk(self, folder: Path, depth: int) -> Iterator[Path]:
        if any(self.inside(folder / mark) is not None for mark in self.marks):
            yield folder
        elif depth < DEEPEST:
            inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and p.name[:1] != ".")
            for path in inner[:MOST]:
                yield from self._walk(path, depth + 1)

    def _changed(self, folder: Path) -> float:
        return max((p.stat().st_mtime for mark in self.marks if (p := folder / mark).is_file()), default=0.0)
