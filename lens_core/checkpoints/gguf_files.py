"""GGUF files: what the header says, checked by hand, and the tensors, dequantised a piece at a time as they are read.

A file is: `GGUF`, a version, the numbers of tensors and of keys; the keys with their values; for each tensor its name,
dimensions (the innermost first), type and offset; and, from the next multiple of `general.alignment`, the values.

The package `gguf` has a reader too, but it maps the file, takes every number in it at its word, and walks arrays
element by element: a header of a few bytes keeps it busy for ever. Only its formats are used (`gguf_types`).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from lens_core.checkpoints import gguf_types
from lens_core.checkpoints.lazy_tensors import LARGEST_EMPTY, PIECE, LazyTensor, file_rows
from lens_core.io.readers import one_line, shown
from lens_core.types import CheckpointError

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
LONGEST_HEADER = 2**26  # bytes; GPT-OSS's, with its tokenizer, has 13 million
MOST_TENSORS = 100_000
MOST_KEYS = 100_000
MOST_TEXTS = 2_000_000  # in arrays that are asked for; GPT-OSS has 446,189 merges
LONGEST_NAME = 1024  # bytes of a key or a tensor's name; ggml allows 64
MOST_DIMENSIONS = 4  # ggml's
LARGEST_ALIGNMENT = 2**20
SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
"""ggml's types of values in a header -> numpy's."""
TEXT, ARRAY = 8, 9
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""ComfyUI-GGUF's key for a tensor that it flattened, since its rows do not divide into blocks."""


@frozen
class GgufTensor(LazyTensor):
    """A tensor in one of ggml's formats of blocks. `rows` dequantises; `packed` has the bytes, uint8 [..., row]."""

    form: str  # ggml's name, such as Q4_K
    packed: LazyTensor


@frozen
class _Entry:
    """One tensor as the header describes it; `size` in bytes, `start` from the beginning of the values."""

    name: str
    shape: tuple[int, ...]
    form: str
    start: int
    size: int


def read_gguf(path: Path, arrays: Collection[str] = ()) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """The tensors of a GGUF file, and its keys: numbers, texts, and of arrays those whose keys are in `arrays`, lists
    of texts or numpy arrays. No tensor is read.

    Raises CheckpointError, in one line, for what is no whole GGUF file, and for types that cannot be dequantised.
    """
    gguf_types.package()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = _Header(file, size)
            keys, entries = _read_header(header, arrays)
        start = _aligned(header.at, keys)
        _check_places(entries, start, size, keys)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise CheckpointError(
            f"{path}: not a GGUF file that can be read ({reason}); fetch it again, or another one"
        ) from error
    shapes = {key.removeprefix(ORIGINAL_SHAPE): keys.pop(key) for key in list(keys) if key.startswith(ORIGINAL_SHAPE)}
    return {e.name: _tensor(path, e, start + e.start, shapes) for e in entries}, keys


class _Header:
    """Reads a header front to back. No number in it is believed: nothing is read beyond the file or LONGEST_HEADER."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file, self.at, self.end = file, 0, min(size, LONGEST_HEADER)
        self.size = size

    def check(self, count: int, what: str) -> None:
        """Raise ValueError unless `count` more bytes can be there."""
        if count > self.end - self.at:
            bound = (
                f"the file's {self.size}" if self.end == self.size else f"{LONGEST_HEADER}, more than any header has"
            )
            raise ValueError(f"{what} would take the header to byte {shown(self.at + count)} of {bound}")

    def take(self, count: int, what: str) -> bytes:
        self.check(count, what)
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError(f"{what} ends early")
        self.at += count
        return data

    def number(self, form: str, what: str) -> int:
        value: int = struct.unpack(f"<{form}", self.take(struct.calcsize(form), what))[0]
        return value

    def text(self, what: str, longest: int = LONGEST_HEADER) -> str:
        length = self.number("Q", f"the length of {what}")
        if length > longest:
            raise ValueError(f"{what} is {length} bytes long; at most {longest} are read")
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is no UTF-8") from error

    def skip_texts(self, count: int, what: str) -> None:
        for _ in range(count):
            length = self.number("Q", what)
            self.check(length, what)
            self.file.seek(length, 1)  # within the buffer, as a rule
            self.at += length


def _read_header(header: _Header, arrays: Collection[str]) -> tuple[dict[str, Any], list[_Entry]]:
    if header.take(4, "its first word") != MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = header.number("I", "its version")
    if version not in VERSIONS:
        swapped = version & 0xFFFF == 0
        raise ValueError("it is big-endian" if swapped else f"it has version {version}; 2 and 3 are read")
    tensors, count = header.number("Q", "its number of tensors"), header.number("Q", "its number of keys")
    if tensors > MOST_TENSORS or count > MOST_KEYS:
        raise ValueError(f"it claims {tensors} tensors and {count} keys; at most {MOST_TENSORS} of each are read")
    header.check(24 * tensors + 13 * count, f"its {tensors} tensors and {count} keys")
    keys: dict[str, Any] = {}
    seen: set[str] = set()
    for _ in range(count):
        key = header.text("a key", LONGEST_NAME)
        if key in seen:
            raise ValueError(f"the key {shown(key)} stands twice")
        seen.add(key)
        value = _value(header, f"the value of {shown(key)}", key in arrays or key.startswith(ORIGINAL_SHAPE))
        if value is not None:
            keys[key] = value
    if keys.get("split.count", 0) not in (0, 1):
        raise ValueError(f"it is one of {keys['split.count']} parts; join them first: llama-gguf-split --merge")
    entries = [_entry(header) for _ in range(tensors)]
    if len({entry.name for entry in entries}) != tensors:
        names = sorted(entry.name for entry in entries)
        raise ValueError(f"it holds {shown(next(a for a, b in itertools.pairwise(names) if a == b))} twice")
    return keys, entries


def _value(header: _Header, what: str, wanted: bool) -> Any:
    """One value of a header; None for an array that is not wanted."""
    kind = header.number("I", f"the type of {what}")
    if kind in SCALARS:
        return np.frombuffer(header.take(np.dtype(SCALARS[kind]).itemsize, what), f"<{SCALARS[kind]}")[0].item()
    if kind == TEXT:
        return header.text(what)
    if kind != ARRAY:
        raise ValueError(f"{what} has the type {kind}, which GGUF does not have")
    inner, count = header.number("I", what), header.number("Q", what)
    if inner in SCALARS:
        # A few gigabytes of numbers fit no header: `take` refuses them before it reads.
        data = header.take(count * np.dtype(SCALARS[inner]).itemsize, what)
        return np.frombuffer(data, f"<{SCALARS[inner]}") if wanted else None
    if inner != TEXT:  # arrays in arrays, which no tool writes, could be nested without end
        raise ValueError(f"{what} is an array of the type {inner}, which is not read")
    header.check(8 * count, what)
    if wanted and count > MOST_TEXTS:
        raise ValueError(f"{what} has {count} texts; at most {MOST_TEXTS} are read")
    return [header.text(what) for _ in range(count)] if wanted else header.skip_texts(count, what)


def _entry(header: _Header) -> _Entry:
    name = header.text("a tensor's name", LONGEST_NAME)
    if not name:
        raise ValueError("a tensor has no name")
    what = f"the tensor {shown(name)}"
    count = header.number("I", what)
    if count > MOST_DIMENSIONS:
        raise ValueError(f"{what} has {count} dimensions; at most {MOST_DIMENSIONS} are read")
    # Innermost first in a file; torch has it last.
    shape = tuple(header.number("Q", what) for _ in range(count))[::-1]
    try:
        form = gguf_types.type_name(header.number("I", what))
    except ValueError as error:
        raise ValueError(f"{what} has {error}") from error
    start = header.number("Q", what)
    block, size = gguf_types.block_of(form)
    elements = math.prod(shape)
    if max((elements, *shape)) >= 2**63 or (0 in shape and math.prod(n for n in shape if n) > LARGEST_EMPTY):
        raise ValueError(f"{what} has the shape {shown(shape)}, which no tensor has")
    if (shape[-1] if shape else 1) % block:
        raise ValueError(f"{what} has rows of {shape[-1] if shape else 1} values; {form} has blocks of {block}")
    return _Entry(name, shape, form, start, elements // block * size)


def _alignment(keys: Mapping[str, Any]) -> int:
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {shown(alignment)}, which is no power of two up to {LARGEST_ALIGNMENT}")
    return alignment


def _aligned(at: int, keys: Mapping[str, Any]) -> int:
    return -(-at // _alignment(keys)) * _alignment(keys)


def _check_places(entries: list[_Entry], start: int, size: int, keys: Mapping[str, Any]) -> None:
    """Raise ValueError unless each tensor is in the file, at a multiple of the alignment, and none is in another."""
    end, before = 0, ""
    for entry in sorted(entries, key=lambda e: (e.start, e.size)):
        if entry.start % _alignment(keys):
            raise ValueError(f"the tensor {shown(entry.name)} begins at {entry.start}, off its alignment")
        if entry.start < end and entry.size:
            raise ValueError(f"the tensors {shown(before)} and {shown(entry.name)} overlap")
        if entry.start + entry.size > size - start:
            raise ValueError(
                f"the tensor {shown(entry.name)} would end at byte {start + entry.start + entry.size} of the file's "
                f"{size}"
            )
        end, before = max(end, entry.start + entry.size), entry.name


def _tensor(path: Path, entry: _Entry, start: int, shapes: Mapping[str, Any]) -> LazyTensor:
    shape = _original_shape(path, entry, shapes)
    if entry.form in gguf_types.PLAIN or 0 in shape:  # nothing is to be dequantised of an empty tensor
        dtype = gguf_types.PLAIN.get(entry.form, torch.bfloat16)
        return LazyTensor(shape, dtype, file_rows(path, start, shape, dtype))
    block, size = gguf_types.block_of(entry.form)
    stored = (*entry.shape[:-1], entry.shape[-1] // block * size)
    packed = LazyTensor(stored, torch.uint8, file_rows(path, start, stored, torch.uint8))
    where = f"{path}: {shown(entry.name)}"
    rows = _whole(where, entry.form, packed, shape) if shape != entry.shape else _rows(where, entry.form, packed)
    return GgufTensor(shape, torch.bfloat16, rows, entry.form, packed)


def _original_shape(path: Path, entry: _Entry, shapes: Mapping[str, Any]) -> tuple[int, ...]:
    """A tensor's shape before ComfyUI-GGUF flattened it."""
    if entry.name not in shapes:
        return entry.shape
    known = shapes[entry.name]
    shape = tuple(known.tolist()) if isinstance(known, np.ndarray) and known.dtype.kind in "iu" else ()
    if len(shape) > 8 or any(n < 1 for n in shape) or math.prod(shape) != math.prod(entry.shape) or not shape:
        raise CheckpointError(
            f"{path}: {shown(entry.name)} is {list(entry.shape)}, and said to have been {shown(known)[:80]}; "
            "fetch it again"
        )
    return shape


def _rows(where: str, form: str, packed: LazyTensor) -> Callable[[torch.dtype], Iterator[Tensor]]:
    """Dequantise a few rows at a time: of the values in float32 about PIECE bytes are held."""
    block, size = gguf_types.block_of(form)
    row = max(1, math.prod(packed.shape[1:]) // size * block * 4)

    def rows(dtype: torch.dtype) -> Iterator[Tensor]:
        for part in packed.rows(torch.uint8):
            for some in part.split(max(1, PIECE // row)):  # type: ignore[no-untyped-call]  # torch leaves it untyped
                yield _finite(where, gguf_types.dequantize(form, some)).to(dtype)

    return rows


def _whole(
    where: str, form: str, packed: LazyTensor, shape: tuple[int, ...]
) -> Callable[[torch.dtype], Iterator[Tensor]]:
    """Dequantise at once a tensor whose stored rows are not its own."""
    rows = _rows(where, form, packed)
    return lambda dtype: iter([torch.cat([part.flatten() for part in rows(dtype)]).reshape(shape)])


def _finite(where: str, values: Tensor) -> Tensor:
    # A broken scale makes a whole block NaN or infinite.
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{where} has values that are NaN or infinite; fetch the file again")
    return values
