"""Tensors on disk, a piece at a time: what a file holds is known at once, its values are read when asked for.

Values are read, not mapped: pages of a mapped file count as this process's memory for as long as it runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from lens_core.checkpoints import tensor_files
from lens_core.io import atomic_files, readers
from lens_core.io.progress import progress_bar
from lens_core.io.readers import shown
from lens_core.types import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "I32": torch.int32, "BF16": torch.bfloat16,
    "F16": torch.float16, "I16": torch.int16, "U8": torch.uint8, "I8": torch.int8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""safetensors' names. Wide elements come first, as they do in a file, so that each tensor lies at a multiple of its
element."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 2**26  # bytes read at once
LARGEST_EMPTY = 2**31  # the product of an empty tensor's other dimensions: code may walk along them


@frozen
class LazyTensor:
    """A tensor that is not in memory. `rows(dtype)` yields it in blocks of consecutive rows, floats as `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[torch.dtype], Iterator[Tensor]]

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor, floats as `dtype` (None: as stored). No second copy of it is made on the way."""
        kind = self.kind(dtype)
        whole = torch.empty(self.shape, dtype=kind)
        at = 0
        for block in self.rows(kind):
            if not whole.ndim:
                return block.reshape(())
            whole[at : at + len(block)] = block
            at += len(block)
        return whole

    def kind(self, dtype: torch.dtype | None) -> torch.dtype:
        """What it is read as where floats are wanted as `dtype`."""
        return dtype if dtype is not None and self.dtype.is_floating_point else self.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """A tensor that is in memory after all."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda dtype: iter([tensor.detach().to("cpu", dtype)]))


def read_lazy(*paths: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of one safetensors file, or of its shards, and the free text in their headers. No value is read.

    Raises CheckpointError, in one line, for what is no whole safetensors file, and for a name that stands twice.
    """
    tensors: dict[str, LazyTensor] = {}
    texts: dict[str, str] = {}
    for path in paths:
        header, start = _header(path)
        texts |= header.pop("__metadata__", {})
        for name, entry in header.items():
            if name in tensors:
                raise CheckpointError(f"{path}: holds {shown(name)}, which another shard holds too")
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(f"{path}: {shown(name)} is {entry['dtype']}; {', '.join(DTYPES)} are read")
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if 0 in shape and math.prod(n for n in shape if n) > LARGEST_EMPTY:
                raise CheckpointError(
                    f"{path}: {shown(name)} has the shape {list(shape)}, which no tensor has; leave it out"
                )
            tensors[name] = LazyTensor(shape, dtype, file_rows(path, start + entry["data_offsets"][0], shape, dtype))
    return tensors, texts


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header and the byte at which its values begin."""
    from safetensors import SafetensorError, safe_open

    tensor_files.refuse_foreign(path)
    try:
        # The library checks sizes, gaps and overlaps when it opens a file. Its API does not tell where values begin,
        # and its own reads map the file, so the header is parsed once more for the offsets.
        with safe_open(path, "pt"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return json.loads(
                file.read(min(size, tensor_files.LONGEST_HEADER)), object_pairs_hook=readers.reject_duplicate_keys
            ), 8 + size
    except (SafetensorError, OSError, ValueError) as error:
        raise tensor_files.incomplete_file_error(path, error) from error


def file_rows(
    path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[torch.dtype], Iterator[Tensor]]:
    """`LazyTensor.rows` of values that lie in a file, in order from the byte `start` on."""
    row = math.prod(shape[1:]) * dtype.itemsize
    count = shape[0] if shape else 1

    def rows(kind: torch.dtype) -> Iterator[Tensor]:
        if 0 in shape:  # nothing to read, however many rows of nothing there are
            yield torch.empty(shape, dtype=kind)
            return
        step = max(1, PIECE // max(1, row))
        with path.open("rb") as file:
            file.seek(start)
            # Opened for each pass and read in order, so that no file stays open and no page stays mapped.
            for first in range(0, count, step):
                part = min(step, count - first)
                block = torch.empty(part * row, dtype=torch.uint8)
                if file.readinto(block.numpy().data) != len(block):
                    raise CheckpointError(f"{path}: ends early; it was whole a moment ago, so leave it alone meanwhile")
                yield block.view(dtype).reshape(part, *shape[1:]).to(kind)

    return rows


def write_lazy(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, atomically, floats as `dtype` (None: as they are). Holds one block at a time."""
    order = sorted(tensors, key=lambda n: (list(NAMES).index(tensors[n].kind(dtype)), n))
    layout = {}
    for name in order:
        kind, shape = tensors[name].kind(dtype), tensors[name].shape
        layout[name] = (NAMES[kind], shape, math.prod(shape) * kind.itemsize)
    header = tensor_files.file_header(layout, {"format": "pt", **(texts or {})})
    size = len(header) + sum(size for _, _, size in layout.values())

    def write(temporary: Path) -> None:
        bar = progress_bar(size - len(header), "B", desc=f"write {path.name}", unit_scale=True)
        with bar, temporary.open("wb") as file:
            file.write(header)
            for name in order:
                for block in tensors[name].rows(tensors[name].kind(dtype)):
                    bar.update(file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data))
            if file.tell() != size:
                raise CheckpointError(f"{path}: a tensor yielded other rows than its shape tells; report it")

    atomic_files.write_atomic(path, write)
