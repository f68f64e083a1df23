"""GGUF files for tests, by the writer of the package `gguf` where it can, and by hand where it cannot."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

TYPES = gguf.GGMLQuantizationType
WRITABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
"""The formats of blocks that the package can quantise to."""
READABLE = (
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
    "IQ4_NL", "IQ4_XS", "NVFP4",
)  # fmt: skip
"""Those that it only dequantises."""
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the float16 scales are in a block; elsewhere at its beginning, but for IQ1_M and NVFP4."""


def quantised(values: Tensor, form: str) -> np.ndarray[Any, Any]:
    """The bytes of `values` [..., in] in a format of WRITABLE."""
    return gguf.quants.quantize(values.float().numpy(), TYPES[form])


def blocks(shape: Sequence[int], form: str, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random blocks of any format, with scales that keep values small, for a tensor of `shape`."""
    values, size = gguf.GGML_QUANT_SIZES[TYPES[form]]
    count = int(np.prod(shape)) // values
    data = np.random.default_rng(seed).integers(0, 256, (count, size), dtype=np.uint8)
    half = np.frombuffer(struct.pack("<e", 0.0005), np.uint8)
    if form == "IQ1_M":
        data[:, 49:56:2] &= 0x0F  # its float16 is spread over the highest 4 bits of four words
        data[:, 55] |= 0x10
    elif form == "NVFP4":
        data[:, :4] = np.clip(data[:, :4], 1, 60)
    else:
        for at in SCALES.get(form, (0,)):
            data[:, at : at + 2] = half
    return data.reshape(*shape[:-1], -1)


def dequantised(data: np.ndarray[Any, Any], form: str) -> Tensor:
    """What the package makes of the bytes."""
    return torch.from_numpy(gguf.quants.dequantize(data, TYPES[form]).copy())


def write(
    path: Path,
    tensors: Mapping[str, Tensor | tuple[np.ndarray[Any, Any], str]],
    keys: Mapping[str, Any] | None = None,
    architecture: str = "lens",
) -> Path:
    """A file of plain tensors, float32 or float16, and of (bytes, format)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in (keys or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=TYPES[tensor[1]])
        elif tensor.dtype == torch.bfloat16:
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), TYPES.BF16), raw_dtype=TYPES.BF16)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
