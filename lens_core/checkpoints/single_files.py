"""Models in one file, as other tools keep them: which files those are, and what shapes and names tell of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from attrs import evolve

from lens_core.checkpoints import gguf_files, manifest
from lens_core.checkpoints.lazy_tensors import LazyTensor, read_lazy
from lens_core.io.readers import shown
from lens_core.protocols import HasWeights
from lens_core.types import CheckpointError, ConfigError


def read_single_file(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a .safetensors or .gguf file, and the free text in the former's header. No value is read.

    Raises CheckpointError, in one line."""
    if path.suffix == gguf_files.SUFFIX:
        return gguf_files.read_gguf(path)[0], {}
    return read_lazy(path)


def fit(config: Any, published: Any, seen: Mapping[str, Any], telling: Iterable[str], where: str) -> Any:
    """The config of a file whose shapes tell the fields `seen`, and no others: those are taken from `config`, that of
    the model the file is for, or from `published`, whichever first agrees with the file in the fields `telling`.

    Raises CheckpointError where neither agrees, or the fields together are no config."""
    for known in (config, published):
        if all(getattr(known, name) == seen[name] for name in telling if name in seen):
            try:
                return evolve(known, **seen)
            except ConfigError as error:
                raise CheckpointError(f"{where}: {error.problems[0]}") from error
    name = next(n for n in telling if n in seen and getattr(config, n) != seen[n])
    raise CheckpointError(
        f"{where}: its {name} is {shown(seen[name])}, but that of the model it is for is "
        f"{shown(getattr(config, name))}; "
        "give --model a folder that it fits"
    )


def another_model(tensors: Iterable[str], where: str, expected: str) -> CheckpointError:
    """The error for a file that is no `expected`; it names a few of the file's tensors."""
    some = ", ".join(sorted(tensors)[:3]) or "nothing"
    return CheckpointError(f"{where}: holds {some} …, not a {expected}")


def numbered(names: Iterable[str], before: str) -> int:
    """How many of `before`0, `before`1, … there are among names of tensors. Counts no further than the first gap."""
    numbers = {name[len(before) :].partition(".")[0] for name in names if name.startswith(before)}
    return next(n for n in range(len(numbers) + 1) if str(n) not in numbers)


def shape_of(tensors: Mapping[str, LazyTensor], name: str, ndim: int, where: str) -> tuple[int, ...]:
    """The shape of a tensor that must be there. Raises CheckpointError."""
    if name not in tensors:
        some = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise CheckpointError(f"{where}: lacks {shown(name)}; it holds {some} …: is it another part, or another model?")
    shape = tensors[name].shape
    if len(shape) != ndim or not all(shape):
        raise CheckpointError(f"{where}: {shown(name)} has the shape {list(shape)}, which is not that of such a weight")
    return shape


def describe_file(
    path: Path, holds: Callable[[Mapping[str, LazyTensor]], bool], part: str, use: str
) -> dict[str, Any] | None:
    """An answer to the hook `lens_describe`: a model of one part, if `path` is a single file that `holds` it."""
    if path.suffix not in manifest.SINGLE_FILES or not path.is_file() or not holds(read_single_file(path)[0]):
        return None
    return {"format": manifest.FORMAT, "components": {part: {"use": use, "file": path.name}}}


@runtime_checkable
class SingleFile(HasWeights, Protocol):
    """A component with weights that a single file may hold too; `lens convert` carries it between the two layouts."""

    place: ClassVar[tuple[str, str]]  # its sub-folder in a checkpoint, and the stem of its weights there
    single: ClassVar[str]  # where a folder of single files keeps it, in Comfy's layout

    @classmethod
    def from_header(
        cls, file: Path, config: Any, folder: Path, *, plain: bool = False
    ) -> tuple[Self, Any, dict[str, LazyTensor]]:
        """A single file -> the component on the meta device, the config that the file's shapes tell, given what the
        checkpoint in `folder` says, and the file's tensors under the names of a checkpoint. Reads headers alone.
        `plain`: tensors that only Comfy can use quantised are not."""

    def load_weights(self, tensors: Mapping[str, LazyTensor], file: Path, dtype: torch.dtype | None = None) -> None:
        """Read the tensors of `from_header`, floats as `dtype`."""

    def save_about(self, folder: Path) -> None:
        """Write all that `save` writes, but for the weights."""
