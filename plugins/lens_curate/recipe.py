"""Curation recipes: where pictures come from, which are kept, and how they are captioned. docs/curate.md has examples.

A filter is a curator by name with the options of its Config, and `keep`: for each of its columns that decides, the
smallest and the largest value of a picture that is kept, both included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from lens_core.catalog import Catalog
from lens_core.config import ComponentSpec, structure, unstructure
from lens_core.io import readers
from lens_core.recipe import build
from lens_core.types import ConfigError, LensError, PluginError, did_you_mean
from lens_core.validators import each, integer, matching, one_of, optional, real, text
from lens_curate.hashes import BITS
from lens_curate.parts import text_digest

NAME = matching(r"[a-z0-9][a-z0-9_.-]{0,63}", "a name of at most 64 lower-case letters, digits, _ . and -")
COLUMN = matching(r"(?!(id|fault)$)[a-z][a-z0-9_]{0,40}", "a name of lower-case letters, digits and _, not id or fault")
RESERVED = ("captions", "decode", "exact", "mirrored", "near")
"""Stages that are not filters; verdicts name them."""


@frozen
class Limits:
    """The values of a column that are kept."""

    min: float | None = field(default=None, validator=optional(real()))
    max: float | None = field(default=None, validator=optional(real()))

    def __attrs_post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise ConfigError("needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ConfigError(f"min is {self.min:g}, more than max, {self.max:g}")


@frozen
class Duplicates:
    """Which pictures count as the same. Of equal or near ones the best is kept: most pixels, then sharpest."""

    exact: bool = True  # equal pixels
    # Bits of 256 in which perceptual hashes of near duplicates differ at most; null: near duplicates are kept.
    distance: int | None = field(default=32, validator=optional(integer(at_least=0, at_most=BITS // 4)))
    # Levels of 255 by which the mean colour of some of 8 x 8 cells of near duplicates differs at most.
    colour_distance: int = field(default=56, validator=integer(at_least=0, at_most=255))
    mirrored: str = field(default="drop", validator=one_of("drop", "keep"))  # near duplicates of a mirror image


@frozen
class Captioning:
    """Captions by a vision language model. Captions that came with the pictures are kept beside them."""

    llm: ComponentSpec
    style: str = field(default="dense", validator=one_of("dense", "brief", "both"))
    prompt: str | None = field(default=None, validator=optional(text()))  # file with another system prompt
    regenerations: int = field(default=2, validator=integer(at_least=0, at_most=16))  # where a caption fails its checks
    dense_words: tuple[int, int] = (40, 250)  # the fewest and most words of a dense caption
    brief_words: tuple[int, int] = (3, 40)
    side: int = field(default=1024, validator=integer(at_least=64, at_most=4096))  # px, of the picture that is sent
    only_missing: bool = False  # keep the captions that came with pictures, and caption the others alone

    def __attrs_post_init__(self) -> None:
        for name in ("dense_words", "brief_words"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 10_000:
                raise ConfigError(f"{name} is {low} to {high}; it must be an ascending pair of 1 to 10,000")


@frozen
class CurationSpec:
    """A curation recipe as it is written."""

    sources: tuple[ComponentSpec, ...] = field(validator=each(None, at_least=1))
    filters: tuple[ComponentSpec, ...] = ()
    duplicates: Duplicates = Duplicates()
    captions: Captioning | None = None
    thumbnail: int = field(default=96, validator=integer(at_least=16, at_most=512))  # px, longer side, for the report


@frozen
class Filter:
    """A scorer with its thresholds."""

    name: str  # unique in the recipe
    component: str  # qualified name of the curator
    curator: Any
    config: Any
    keep: Mapping[str, Limits]

    @property
    def costly(self) -> bool:
        return bool(getattr(self.curator, "costly", False))

    def score_id(self, file_id: str, brief: str, dense: str) -> str:
        """What its numbers on a picture are kept under: the file's id, or a hash of it and the captions that it reads,
        for equal files may have come with other captions."""
        return text_digest(file_id, brief, dense) if getattr(self.curator, "reads_captions", False) else file_id

    @property
    def identity(self) -> str:
        """What decides its scores, as text: scores are kept under it. A curator whose Config does not pin its weights
        has `weights_id() -> str`."""
        weights = self.curator.weights_id() if hasattr(self.curator, "weights_id") else ""
        return f"{self.component} {self.curator.version} {weights} {unstructure(self.config)}"


def read_spec(path: Path) -> CurationSpec:
    """The recipe in a YAML file, without its components built. Raises ConfigError with every problem."""
    data, problems = readers.read_yaml(path, "a curation recipe")
    try:
        spec = structure(CurationSpec, data)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return spec


def for_each(uses: Sequence[ComponentSpec], path: str, add: Callable[[ComponentSpec, str], None]) -> None:
    """Call `add` with every component of a list of a recipe and its place. Raises ConfigError with all problems."""
    problems: list[str] = []
    for place, use in enumerate(uses):
        where = f"{path}[{place}]"
        try:
            add(use, where)
        except ConfigError as error:
            problems += error.problems
        except LensError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise ConfigError(problems)


def build_filters(spec: CurationSpec, catalog: Catalog) -> list[Filter]:
    """The curators that the recipe names, built, in its order. Raises ConfigError with every problem."""
    filters: list[Filter] = []

    def add(use: ComponentSpec, where: str) -> None:
        made = _filter(use, catalog, where)
        if made.name in {*RESERVED, *(f.name for f in filters)}:
            raise ConfigError(f"{where}.name: {made.name!r} is taken; give this filter another name")
        filters.append(made)

    for_each(spec.filters, "$.filters", add)
    return filters


def _filter(use: ComponentSpec, catalog: Catalog, where: str) -> Filter:
    options = dict(use.options)
    name, keep = options.pop("name", None), options.pop("keep", {})
    component, cls, config = build(catalog, "curator", ComponentSpec(use.use, options), where)
    if name is None:
        name = component.rpartition(":")[2]
        name = f"{name}_filter" if name in RESERVED else name
    if not NAME.allows(name):
        raise ConfigError(list(NAME.problems(name, f"{where}.name")))
    curator = cls(config)
    names, version = getattr(curator, "columns", None), getattr(curator, "version", None)
    if not isinstance(names, tuple) or not names or not all(COLUMN.allows(name) for name in names):
        raise PluginError(f"{component}: its columns must be a tuple of names, not {readers.shown(names)}")
    if not isinstance(version, str) or not version:
        raise PluginError(f"{component}: its version must be a text, not {readers.shown(version)}")
    if not isinstance(keep, Mapping):
        raise ConfigError(f"{where}.keep: must be a mapping of columns to limits, not {readers.shown(keep)}")
    limits: dict[str, Limits] = {}
    problems: list[str] = []
    for column, bounds in keep.items():
        if column not in curator.columns:
            hint = did_you_mean(str(column)[:80], curator.columns)
            problems.append(f"{where}.keep: {component} has no column {readers.shown(column)}.{hint}")
            continue
        try:
            limits[column] = structure(Limits, bounds, f"{where}.keep.{column}")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return Filter(name, component, curator, config, limits)
