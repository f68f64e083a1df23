"""Dequantise ggml's block formats: as the package `gguf` does, bit for bit, but on any device. Pure functions.

A tensor [..., in] is stored as rows of blocks: `block` values of a row share scales, and take `size` bytes together
(`block_of`). The formats of `_UNPACK` are written in torch here, so that a layer may stay quantised on a GPU and be
dequantised when it runs; `gguf.quants`, which is numpy, does the others when a file is read. Letters: n blocks.

Every product and sum of floats is made in the package's order: other orders round otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lens_core.types import CheckpointError

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
PLAIN = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
"""ggml's types that are plain numbers -> torch's."""


def package() -> Any:
    """The package `gguf`. Raises CheckpointError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "GGUF files need the package gguf, which is missing; pip install 'lens-t2i[quant]'"
        ) from (error)
    return gguf


def type_name(number: int) -> str:
    """ggml's name of a type, such as Q4_K. Raises ValueError for a number that the package does not know, and for a
    type that it cannot dequantise."""
    gguf = package()
    try:
        name: str = gguf.GGMLQuantizationType(number).name
    except ValueError as error:
        raise ValueError(f"the type {number}, which this version of the package gguf does not know") from error
    if name not in PLAIN and not _dequantises(name):
        raise ValueError(f"the type {name}, which the package gguf does not dequantise")
    return name


@functools.cache
def _dequantises(form: str) -> bool:
    """Whether the package can: its table of formats is private, so a block of zeros is tried."""
    import numpy as np

    try:
        package().quants.dequantize(np.zeros((1, block_of(form)[1]), np.uint8), _number(form))
    except NotImplementedError:
        return False
    return True


def _number(form: str) -> Any:
    return package().GGMLQuantizationType[form]


def block_of(form: str) -> tuple[int, int]:
    """(values in a block, its bytes)."""
    values, size = package().GGML_QUANT_SIZES[_number(form)]
    return int(values), int(size)


def stays_packed(form: str) -> bool:
    """Whether a layer may be held in this format, and dequantised on its device."""
    return form in _UNPACK


def dequantize(form: str, packed: Tensor) -> Tensor:
    """uint8 [..., bytes] of whole blocks -> float32 [..., values], as `gguf.quants.dequantize` gives it."""
    if form not in _UNPACK:
        # The package reads f16 scales that may be infinite: what it warns of is checked by whoever reads a file.
        import numpy as np

        with np.errstate(all="ignore"):
            return torch.from_numpy(package().quants.dequantize(packed.cpu().numpy(), _number(form))).to(packed.device)
    size, unpack = _UNPACK[form]
    return unpack(packed.reshape(-1, size)).reshape(*packed.shape[:-1], -1)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, float32 [n,1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Cached, because a copy from the host in each layer would make it wait for the device. Made outside inference mode:
    # a tensor made inside could not be used where gradients are wanted.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype).to(device)


def _table(codes: Tensor, values: Sequence[int]) -> Tensor:
    """What the codes stand for, float32."""
    return _constant(tuple(values), torch.float32, codes.device)[codes.int()]


def _fields(packed: Tensor, width: int, run: int) -> Tensor:
    """The fields of `width` bits in bytes [n,b]: of each `run` bytes first all lowest fields, then the next
    -> uint8 [n, b * 8 / width]."""
    shifts = _constant(tuple(range(0, 8, width)), torch.uint8, packed.device)
    fields = (packed.reshape(len(packed), -1, 1, run) >> shifts[:, None]) & ((1 << width) - 1)
    return fields.reshape(len(packed), -1)


def _bits(packed: Tensor) -> Tensor:
    """Bytes [n,b] -> their bits in order, the lowest of each byte first, uint8 [n,8 b]."""
    return (packed[..., None] >> _constant(tuple(range(8)), torch.uint8, packed.device) & 1).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b, 0) * (_fields(b[:, 2:], 4, 16).to(torch.int8) - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b, 0) * _fields(b[:, 4:], 4, 16) + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    codes = _fields(b[:, 6:], 4, 16) | (_bits(b[:, 2:6]) << 4)
    return _half(b, 0) * (codes.to(torch.int8) - 16)


def _q5_1(b: Tensor) -> Tensor:
    codes = _fields(b[:, 8:], 4, 16) | (_bits(b[:, 4:8]) << 4)
    return _half(b, 0) * codes + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b, 0)


def _scaled(codes: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Codes [n,256] times the scale of each of their groups [n,groups], minus its offset."""
    values = scales[..., None] * codes.reshape(*scales.shape, -1)
    return (values if offsets is None else values - offsets[..., None]).flatten(1)


def _q2_k(b: Tensor) -> Tensor:
    scales, codes = b[:, :16], _fields(b[:, 16:80], 2, 32)
    return _scaled(codes, _half(b, 80) * (scales & 15), _half(b, 82) * (scales >> 4))


def _q3_k(b: Tensor) -> Tensor:
    # 16 scales of 6 bits: the low 4 in 8 bytes, the high 2 in 4 bytes.
    scales = _fields(b[:, 96:104], 4, 8) | (_fields(b[:, 104:108], 2, 4) << 4)
    # The high bit of a code is stored inverted: a bit that is not set means minus 4.
    high = _fields(b[:, :32], 1, 32) ^ 1
    codes = _fields(b[:, 32:96], 2, 32).to(torch.int8) - (high << 2).to(torch.int8)
    return _scaled(codes, _half(b, 108) * (scales.to(torch.int8) - 32))


def _k_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's scales and offsets [n,8] of 6 bits: 4 of each whole in 8 bytes, whose spare bits, with 4 bytes
    more, make the other 4."""
    low, offset, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat([low & 63, (rest & 15) | ((low >> 2) & 48)], dim=1)
    offsets = torch.cat([offset & 63, (rest >> 4) | ((offset >> 2) & 48)], dim=1)
    return _half(b, 0) * scales, _half(b, 2) * offsets


def _q4_k(b: Tensor) -> Tensor:
    return _scaled(_fields(b[:, 16:], 4, 32), *_k_scales(b))


def _q5_k(b: Tensor) -> Tensor:
    return _scaled(_fields(b[:, 48:], 4, 32) | (_fields(b[:, 16:48], 1, 32) << 4), *_k_scales(b))


def _q6_k(b: Tensor) -> Tensor:
    codes = _fields(b[:, :128], 4, 64) | (_fields(b[:, 128:192], 2, 32) << 4)
    scales = b[:, 192:208].contiguous().view(torch.int8).float()
    return _scaled(codes.to(torch.int8) - 32, _half(b, 208) * scales)


def _iq4_nl(b: Tensor) -> Tensor:
    return _half(b, 0) * _table(_fields(b[:, 2:], 4, 16), IQ4_VALUES)


def _iq4_xs(b: Tensor) -> Tensor:
    # 8 scales of 6 bits: the high 2 in 2 bytes, the low 4 in 4.
    scales = _fields(b[:, 4:8], 4, 1) | (_fields(b[:, 2:4], 2, 1) << 4)
    return _scaled(_table(_fields(b[:, 8:], 4, 16), IQ4_VALUES), _half(b, 0) * (scales.to(torch.int8) - 32))


def _mxfp4(b: Tensor) -> Tensor:
    # Values are doubled, so that they are whole numbers, and scales halved.
    return torch.ldexp(_table(_fields(b[:, 1:], 4, 16), E2M1_DOUBLED), b[:, :1].int() - 128)


_UNPACK: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Q4_0": (18, _q4_0), "Q4_1": (20, _q4_1), "Q5_0": (22, _q5_0), "Q5_1": (24, _q5_1), "Q8_0": (34, _q8_0),
    "Q2_K": (84, _q2_k), "Q3_K": (110, _q3_k), "Q4_K": (144, _q4_k), "Q5_K": (176, _q5_k), "Q6_K": (210, _q6_k),
    "IQ4_NL": (18, _iq4_nl), "IQ4_XS": (136, _iq4_xs), "MXFP4": (17, _mxfp4),
}  # fmt: skip
"""Format -> (bytes of a block, blocks uint8 [n,bytes] -> float32 [n,values])."""
