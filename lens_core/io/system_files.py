"""Which files are the file system's own, and not a user's."""

from __future__ import annotations

from pathlib import PurePath

_NAMES = frozenset({"__macosx", ".ds_store", "thumbs.db", "desktop.ini", "lost+found"})


def is_system_file(path: str | PurePath) -> bool:
    """Whether an operating system put this file there, not a person: macOS's `._NAME` beside `NAME` (AppleDouble), its
    `__MACOSX` and `.DS_Store`, Windows's `Thumbs.db` and `desktop.ini`, the `lost+found` of a disk.

    Give a path as it stands below the folder or archive at hand: every part of it counts. Such files are no part of a
    model, of its hash, or of a data set, and are never copied on.
    """
    parts = PurePath(path).parts
    return any((part.startswith("._") and part != "._") or part.lower() in _NAMES for part in parts)
