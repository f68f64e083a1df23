"""Weights in 8 and 4 bits, as published files hold them: blocks of small floats that share a scale. Pure functions.

| format | a value | a block | where |
|---|---|---|---|
| MXFP4 | 4 bits (e2m1), the low half of a byte first | 32, scale 2^(u8 - 127) | GPT-OSS on the Hub |
| nvfp4 | 4 bits (e2m1), the high half first | 16, scale e4m3, times a float32 a matrix | Comfy |
| mxfp8 | 8 bits (e4m3) | 32, scale 2^(u8 - 127) | Comfy |

Blocks run along a row, the input axis. Comfy's scales are swizzled: cut into tiles of 128 rows by 4 columns, padded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from lens_core.checkpoints.lazy_tensors import LazyTensor
from lens_core.checkpoints.tensor_files import refuse_bare_float8
from lens_core.io.readers import one_line, parse_json, shown
from lens_core.types import CheckpointError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
LARGEST = 252  # the largest exponent byte whose block of MXFP4, up to 6 * 2^125, is finite in float32; 255 means NaN
LONGEST_NOTE = 4096  # bytes that a layer's `comfy_quant` may take


@functools.lru_cache(maxsize=8)
def _pairs(high_first: bool, device: torch.device) -> Tensor:
    """float32 [256,2]: the two values of every byte, in their order."""
    low, high = torch.arange(256) & 15, torch.arange(256) >> 4
    # The table is cached: one made in inference mode could never be used where gradients are wanted.
    with torch.inference_mode(False):
        order = [high, low] if high_first else [low, high]
        return torch.tensor(E2M1)[torch.stack(order, dim=1)].to(device)


def _values(packed: Tensor, high_first: bool) -> Tensor:
    """uint8 [...,n] -> float32 [...,2n]."""
    values: Tensor = torch.nn.functional.embedding(packed.int(), _pairs(high_first, packed.device)).flatten(-2)
    return values


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks uint8 [out,G,16], scales uint8 [out,G] -> float32 [out,32 G]. What it is given is not checked."""
    # E8M0 scales are powers of two with a bias of 127: ldexp is exact, and faster than a product of two floats.
    return torch.ldexp(_values(blocks, False), scales.int()[..., None] - 127).flatten(-2)


def nvfp4(packed: Tensor, scales: Tensor, scale: Tensor) -> Tensor:
    """uint8 [out,in/2], scales e4m3 [out,in/16], not swizzled, and a float32 [] for all -> float32 [out,in]."""
    # The first value of a byte is in its high half here, and in its low half in MXFP4.
    blocks = _values(packed, True).reshape(*scales.shape, 16)
    return (blocks * (scale * scales.float())[..., None]).flatten(-2)


def mxfp8(values: Tensor, scales: Tensor) -> Tensor:
    """e4m3 [out,in], scales uint8 [out,in/32], not swizzled -> float32 [out,in]."""
    blocks = values.float().reshape(*scales.shape, 32)
    return torch.ldexp(blocks, scales.int()[..., None] - 127).flatten(-2)


def unswizzle(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales in the order of NVIDIA's block-scaled kernels -> [rows,columns].

    A tile of 128 x 4 lies as 32 lines of 16: line r holds rows r, r + 32, r + 64 and r + 96, 4 columns each. Raises
    ValueError where the padded size is not that of rows and columns.
    """
    down, across = -(-rows // 128), -(-columns // 4)
    if scales.numel() != down * across * 512:
        raise ValueError(f"has {list(scales.shape)} scales; {[down * 128, across * 4]} go with its shape")
    tiles = scales.reshape(down, across, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * 128, across * 4)[:rows, :columns]


def from_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks uint8 [E,out,G,16], scales uint8 [E,out,G] -> weights [E,in,out], in = 32 G, transposed as GPT-OSS has
    them. One expert at a time, so that a published layer needs no second float32 copy."""
    weights = blocks.new_empty(blocks.shape[0], blocks.shape[2] * 32, blocks.shape[1], dtype=dtype)
    for weight, block, scale in zip(weights, blocks, scales, strict=True):
        weight.copy_(mxfp4(block, scale).T)
    return weights


def lazy_mxfp4(name: str, blocks: LazyTensor, scales: LazyTensor, where: str) -> tuple[LazyTensor, LazyTensor]:
    """The pair, once it fits; its scales are checked as they are read. Raises CheckpointError."""
    if (blocks.dtype, scales.dtype) != (torch.uint8, torch.uint8):
        raise CheckpointError(f"{where}: {name} is {blocks.dtype} with {scales.dtype}; MXFP4 is uint8; fetch it again")
    if not all(blocks.shape) or len(blocks.shape) != 4 or blocks.shape[3] != 16 or blocks.shape[:3] != scales.shape:
        raise CheckpointError(
            f"{where}: {name} has blocks {list(blocks.shape)} with scales {list(scales.shape)}; "
            "MXFP4 has [E, out, in/32, 16] with [E, out, in/32]"
        )

    # Values of 4 bits are always finite; only a scale can make a weight NaN or infinite.
    def rows(dtype: torch.dtype) -> Iterator[Tensor]:
        for block in scales.rows(dtype):
            if block.numel() and int(block.max()) > LARGEST:
                raise CheckpointError(f"{where}: {name} has a scale that is NaN or infinite; fetch it again")
            yield block

    return blocks, LazyTensor(scales.shape, scales.dtype, rows)


@frozen
class _Layer:
    """One quantised matrix [out,in] of a Comfy file, or one an expert, [E,out,in]. Shapes are checked when it is made,
    values when they are read."""

    where: str
    format: str
    weight: LazyTensor
    scales: LazyTensor
    scale: LazyTensor | None  # nvfp4's float32, one or [E]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, where: str, note: Mapping[str, Any], parts: Mapping[str, LazyTensor | None]) -> _Layer:
        kind = FORMATS.get(str(note.get("format")))
        if kind is None:
            raise CheckpointError(
                f"{where} has the format {shown(note.get('format'), 40)}; {', '.join(FORMATS)} are read"
            )
        stored, width, block = kind
        weight, scales, scale = (parts[p] for p in NVFP4_TENSORS)
        if weight is None or scales is None or (scale is None and width == 2):
            missing = next(p for p in NVFP4_TENSORS if parts[p] is None)
            raise CheckpointError(f"{where} is {note['format']} but has no {missing}; fetch the file again")
        shape = (*weight.shape[:-1], weight.shape[-1] * width) if weight.shape else ()
        experts = shape[0] if len(shape) == 3 else 1
        # The file pads matrices to whole tiles; the note holds the shape before that.
        original = note.get("orig_shape", list(shape))
        fits = len(shape) in (2, 3) and weight.dtype == stored and shape[-1] % block == 0
        fits = fits and isinstance(original, list) and len(original) == len(shape) and original[:-2] == list(shape[:-2])
        if not fits or not all(type(n) is int and 0 < n <= most for n, most in zip(original, shape, strict=True)):
            raise CheckpointError(
                f"{where} is {list(weight.shape)} of {weight.dtype} for {shown(original, 60)}, "
                f"which cannot be {note['format']}"
            )
        padded = experts * -(-shape[-2] // 128) * -(-shape[-1] // block // 4) * 512
        if scales.dtype not in (torch.uint8, SCALES[width]) or math.prod(scales.shape) != padded:
            raise CheckpointError(
                f"{where} has scales {list(scales.shape)} of {scales.dtype}; {padded} of {SCALES[width]} go with it"
            )
        if scale is not None and (scale.dtype != torch.float32 or math.prod(scale.shape) not in (1, experts)):
            raise CheckpointError(f"{where} has weight_scale_2 {list(scale.shape)} of {scale.dtype}; one float32 each")
        return cls(where, str(note["format"]), weight, scales, scale, tuple(original))

    def _scales(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each matrix: its scales uint8 [out,in/block], and the scale for all, float32 []."""
        _, width, block = FORMATS[self.format]
        *lead, rows, columns = self.weight.shape
        swizzled = self.scales.read().view(torch.uint8).reshape(math.prod(lead), -1)
        scale = torch.ones(1) if self.scale is None else self.scale.read().reshape(-1)
        for part, one in zip(swizzled, scale.expand(len(swizzled)), strict=True):
            scales = unswizzle(part, rows, columns * width // block)
            # NaN in e4m3 is every bit but the sign; in e8m0 it is 255.
            bad = (scales & 127) == 127 if width == 2 else scales == 255
            if bool(bad.any()) or not bool(one.isfinite()):
                raise CheckpointError(f"{self.where} has a scale that is NaN or infinite; fetch the file again")
            yield scales, one

    def plain(self) -> LazyTensor:
        def rows(dtype: torch.dtype) -> Iterator[Tensor]:
            # Matrix by matrix: of a published layer with its experts only one is ever held in float32.
            alone = len(self.shape) == 2
            stored = self.weight.rows(self.weight.dtype)
            matrices = [self.weight.read()] if alone else (matrix for part in stored for matrix in part)
            for matrix, (scales, one) in zip(matrices, self._scales(), strict=True):
                nv = self.format == "nvfp4"
                values = nvfp4(matrix, scales.view(torch.float8_e4m3fn), one) if nv else mxfp8(matrix, scales)
                if not bool(values.isfinite().all()):
                    raise CheckpointError(f"{self.where} has values that are NaN or infinite; fetch the file again")
                values = values[: self.shape[-2], : self.shape[-1]].to(dtype)
                yield values if alone else values[None]

        return LazyTensor(self.shape, torch.bfloat16, rows)

    def packed(self) -> dict[str, LazyTensor]:
        """nvfp4 as it is: `blocks` uint8 [E,out,in/2], `scales` uint8 [E,out,in/16] not swizzled, the bytes of e4m3,
        and `scale` int32 [E], those of float32. No cast of a module's floats changes them."""
        experts, out, width = self.shape
        return {
            "blocks": self.weight,
            "scales": LazyTensor(
                (experts, out, width // 16), torch.uint8, lambda _: (s[None] for s, _ in self._scales())
            ),
            "scale": LazyTensor(
                (experts,), torch.int32, lambda _: (o[None].view(torch.int32) for _, o in self._scales())
            ),
        }


NVFP4_TENSORS = ("weight", "weight_scale", "weight_scale_2")
FORMATS = {
    "nvfp4": (torch.uint8, 2, 16),
    "mxfp8": (torch.float8_e4m3fn, 1, 32),
    "mxfp8_block32": (torch.float8_e4m3fn, 1, 32),
}
"""Comfy's name -> (what is stored, values an element of it, values a scale)."""
SCALES = {2: torch.float8_e4m3fn, 1: torch.float8_e8m0fnu}


def plain(
    tensors: Mapping[str, LazyTensor],
    texts: Mapping[str, str],
    where: str,
    *,
    prefix: str = "",
    keep: tuple[str, ...] = (),
) -> dict[str, LazyTensor]:
    """A Comfy file's tensors with its quantised layers as plain weights: `L.weight` [out,in] or [E,out,in].

    Layers are named by the header's `_quantization_metadata`, or by `L.comfy_quant`, JSON in bytes, for each. `prefix`
    is what has been taken off the names in a file; layers elsewhere in it are none of ours. Experts in nvfp4 whose name
    ends in one of `keep` stay packed, as `L.blocks`, `L.scales` and `L.scale`. Values are checked as they are read.
    Raises CheckpointError for unknown formats, parts that are missing, and shapes.
    """
    rest = dict(tensors)
    notes = _notes(rest, texts, where, prefix)
    for name, note in notes.items():
        parts = {part: rest.pop(f"{name}.{part}", None) for part in NVFP4_TENSORS}
        for unused in ("comfy_quant", "input_scale"):  # the latter is for products of quantised matrices
            rest.pop(f"{name}.{unused}", None)
        layer = _Layer.of(f"{where}: {name}", note, parts)
        whole = layer.weight.shape == (*layer.shape[:-1], layer.shape[-1] // 2)
        if keep and name.endswith(keep) and len(layer.shape) == 3 and layer.format == "nvfp4" and whole:
            rest |= {f"{name}.{part}": tensor for part, tensor in layer.packed().items()}
        else:
            rest[f"{name}.weight"] = layer.plain()
    refuse_bare_float8(rest, where)
    return rest


def _notes(
    tensors: Mapping[str, LazyTensor], texts: Mapping[str, str], where: str, prefix: str
) -> dict[str, dict[str, Any]]:
    """Layer -> what the file says about its format."""
    try:
        header = parse_json(texts.get("_quantization_metadata", "{}"), allow_duplicate_keys=True)
        layers = dict(header.get("layers", {}))
        ours = [n for n in layers if n.startswith(prefix) or f"{n}.weight" in tensors]
        notes = {n.removeprefix(prefix): layers[n] for n in ours}
        for name in [n for n in tensors if n.endswith(".comfy_quant")]:
            note = tensors[name]
            if note.dtype != torch.uint8 or len(note.shape) != 1 or note.shape[0] > LONGEST_NOTE:
                raise ValueError(f"{name} is {list(note.shape)} of {note.dtype}")
            notes[name.removesuffix(".comfy_quant")] = parse_json(
                bytes(note.read().tolist()), allow_duplicate_keys=True
            )
        if not all(isinstance(note, dict) for note in notes.values()):
            raise ValueError("a layer's note is no object")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        reason = one_line(error)
        raise CheckpointError(
            f"{where}: what it says of its formats cannot be read ({reason}); fetch it again"
        ) from error
    return notes
