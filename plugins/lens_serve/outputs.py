"""The outputs folder: finished pictures, and nothing else that can be read over HTTP."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_core.inference import png_metadata
from lens_core.io.atomic_files import write_atomic
from lens_core.types import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{12}-[0-9]{1,4}\.(png|jpeg|webp)")
"""The names that `save` and `add` give, and the only ones that are read: no separator, no dot but one."""


class Outputs:
    """A folder of pictures, made if it is not there. Raises ConfigError where it cannot be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Files are opened relative to the folder as it is now, whatever its path names later.
            self._handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be the outputs folder ({error.strerror}); choose another") from error

    def save(self, image: Image, job: str, index: int, facts: Mapping[str, Any]) -> str:
        """Write a picture with its facts; returns its name. Raises WriteError."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{job[:12]}-{index}.png"
        png_metadata.save(image, self.folder / name, dict(facts))
        return name

    def add(self, name: str, kind: str, data: bytes) -> str:
        """Write the same picture as jpeg or webp beside the PNG that `save` called `name`; returns the new file's name.
        Raises WriteError."""
        other = f"{name.removesuffix('.png')}.{kind}"
        write_atomic(self.folder / other, lambda path: path.write_bytes(data))
        return other

    def names(self) -> list[str]:
        """The pictures in the folder, the newest first."""
        return sorted((name for name in os.listdir(self._handle) if NAME.fullmatch(name)), reverse=True)

    def read(self, name: str) -> bytes | None:
        """A picture that was written here, or None: another name, a link and whatever is no file are not read."""
        if not NAME.fullmatch(name):
            return None
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self._handle)
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            return None
        with open(file, "rb") as stream:
            return stream.read()
