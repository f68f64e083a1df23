"""The generator `folder`: pictures that exist, drawn by whatever system, under names made from their prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Formatter

from attrs import field, frozen

from lens_core.io import readers
from lens_core.types import (
    ConfigError,
    GenerationEstimate,
    LensError,
    PictureOutcome,
    PictureRequest,
    SystemInfo,
)
from lens_core.validators import text

LARGEST = 2**28  # bytes of a picture's file
ENDINGS = ("png", "jpg", "jpeg", "webp")
FIELDS = ("id", "number", "index")


def _fields(pattern: str) -> set[str]:
    """The fields that a pattern names. Raises ValueError for one that cannot be parsed."""
    return {name for _, name, _, _ in Formatter().parse(pattern) if name is not None}


class Folder:
    """Take pictures that are there already from a folder, by file name.

    A name is made from the prompt's id and the picture's number.

    A picture that is not there has failed ("missing"), so that coverage and the strict score tell of it.
    """

    @frozen
    class Config:
        folder: str = field(validator=text())
        # {number}: the prompt's number in the benchmark, from 0; {index}: the picture's, of one prompt, from 0. By
        # Python's format rules GenEval's own layout is "{number:05d}/samples/{index:04d}". The ending is found.
        pattern: str = field(default="{id}_{index}", validator=text())
        name: str = field(default="folder", validator=text())  # of the system that drew them
        revision: str = ""
        prompts: str = field(default="raw", validator=text())  # raw, refined: what the system got, for the report

        def __attrs_post_init__(self) -> None:
            try:
                names = _fields(self.pattern)
                self.pattern.format(id="000000", number=0, index=0)
            except (ValueError, LookupError, AttributeError) as error:
                raise ConfigError(f"pattern: {readers.shown(self.pattern)} is no pattern ({error})") from error
            if not names <= set(FIELDS) or not names & {"id", "number"}:
                raise ConfigError(
                    f"pattern: use {{id}} or {{number}}, and {{index}}, not {readers.shown(self.pattern)}: each prompt "
                    "needs a picture of its own"
                )
            place = Path(self.pattern)
            if place.is_absolute() or ".." in place.parts:
                raise ConfigError(f"pattern: {readers.shown(self.pattern)} leaves the folder; name files within it")

    most_failures = None  # a folder may lack any number of pictures

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.folder).expanduser()

    def describe(self) -> SystemInfo:
        """The name and revision that the config gives. Raises LensError where there is no such folder."""
        if not self.folder.is_dir():
            raise LensError(f"{self.folder}: there is no such folder of pictures; check the path")
        c = self.config
        # A hash tells folders apart; results are published, and a path of this disk is nobody's business.
        place = hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:12]
        settings = {"folder": place, "pattern": c.pattern, "prompts": c.prompts}
        return SystemInfo(c.name, c.revision, settings, seeded=False)

    def generate(self, requests: Sequence[PictureRequest]) -> Iterator[PictureOutcome]:
        for request in requests:
            if request.index and "index" not in _fields(self.config.pattern):
                raise ConfigError(
                    f"pattern: {readers.shown(self.config.pattern)} has no {{index}}, and each prompt has several "
                    "pictures; add it, or ask for one (--num-images 1)"
                )
            path = self._find(request)
            if path is None:
                words = f"missing: there is no {self._stem(request)}.png, .jpg or .webp in {self.folder}"
                yield PictureOutcome(request, "failed", reason=words)
                continue
            data = readers.read_bytes(path, LARGEST)
            if data:
                yield PictureOutcome(request, "ok", data)
            else:
                yield PictureOutcome(request, "failed", reason=f"missing: {path} is empty")

    def estimate(self, count: int, size: tuple[int, int] | None = None) -> GenerationEstimate:
        """Nothing is drawn."""
        return GenerationEstimate(0, 0.0, 0.0)

    def _stem(self, request: PictureRequest) -> str:
        return self.config.pattern.format(id=request.prompt_id, number=int(request.prompt_id), index=request.index)

    def _find(self, request: PictureRequest) -> Path | None:
        stem = self.folder / self._stem(request)
        names = (stem.with_name(f"{stem.name}.{ending}") for ending in ENDINGS)
        return next((path for path in names if path.is_file()), None)
