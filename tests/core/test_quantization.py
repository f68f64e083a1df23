"""Small floats in blocks: each codec against the library whose files we read, and what is wrong with a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_kitchen import float_utils as comfy_floats
from comfy_kitchen.backends.eager import quantization as comfy
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lens_core.checkpoints.lazy_tensors import read_lazy
from lens_core.checkpoints.quantization import from_mxfp4, lazy_mxfp4, mxfp8, nvfp4, plain, unswizzle
from lens_core.types import CheckpointError

ODD = (150, 96)  # rows are no multiple of 128, scales in a row no multiple of 4


def draw(*shape: int) -> Tensor:
    """Values over many orders of magnitude, of which every 7th row is 0."""
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(*shape, generator=rng) * torch.exp(4 * torch.randn(*shape[:-1], 1, generator=rng))
    values[..., ::7, :] = 0
    return values


def as_nvfp4(values: Tensor) -> dict[str, Tensor]:
    """A matrix as Comfy stores it."""
    scale = values.abs().amax() / (448 * 6)
    packed, scales = comfy.quantize_nvfp4(values, scale)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": scale}


def as_mxfp8(values: Tensor) -> dict[str, Tensor]:
    packed, scales = comfy.quantize_mxfp8(values)
    return {"weight": packed, "weight_scale": scales}


def note(**fields: Any) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def write(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> Path:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, dict(texts or {}))
    return path


def layer(parts: Mapping[str, Tensor], **fields: Any) -> dict[str, Tensor]:
    """The tensors of the layer `a`, with its note."""
    return {f"a.{k}": v for k, v in parts.items()} | ({"a.comfy_quant": note(**fields)} if fields else {})


def read(path: Path) -> dict[str, Tensor]:
    tensors, texts = read_lazy(path)
    return {k: v.read(torch.float32) for k, v in plain(tensors, texts, str(path)).items()}


def error(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- codecs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_equals_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8, generator=rng)
    scales = torch.randint(0, 253, (3, 8, 2), dtype=torch.uint8, generator=rng)
    ours = from_mxfp4(blocks, scales, dtype)
    assert ours.shape == (3, 64, 8) and ours.dtype == dtype and bool(ours.isfinite().all())
    assert torch.equal(ours, convert_moe_packed_tensors(blocks, scales, dtype=dtype))


def test_every_byte_of_nvfp4_equals_comfys() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    scales = torch.arange(32, dtype=torch.uint8).add(40).reshape(4, 8).view(torch.float8_e4m3fn)
    blocked = comfy_floats.to_blocked(scales, flatten=False)
    theirs = comfy.dequantize_nvfp4(packed, torch.tensor(0.37), blocked, torch.float32)
    assert torch.equal(nvfp4(packed, scales, torch.tensor(0.37)), theirs)


def test_every_byte_and_every_scale_of_mxfp8_equals_comfys() -> None:
    values = torch.arange(256, dtype=torch.uint8).repeat(254, 1).view(torch.float8_e4m3fn)
    scales = torch.arange(1, 255, dtype=torch.uint8)[:, None].repeat(1, 8)  # theirs reads the smallest, 2^-127, as 0
    blocked = comfy_floats.to_blocked(scales, flatten=False).view(torch.float8_e8m0fnu)
    ours, theirs = mxfp8(values, scales), comfy.dequantize_mxfp8(values, blocked, torch.float32)
    assert torch.equal(ours.nan_to_num(3.0), theirs.nan_to_num(3.0)) and torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (150, 6), (300, 9)])
def test_unswizzling_undoes_comfys_swizzle(shape: tuple[int, int]) -> None:
    scales = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    assert torch.equal(unswizzle(comfy_floats.to_blocked(scales), *shape), scales)


def test_unswizzling_asks_for_the_padded_size() -> None:
    with pytest.raises(ValueError, match=r"\[128, 8\] go with its shape"):
        unswizzle(torch.zeros(128, 4), 100, 6)


# ---- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "make"), [("nvfp4", as_nvfp4), ("mxfp8", as_mxfp8)])
def test_a_quantised_layer_reads_as_comfy_reads_it(
    form: str, make: Callable[[Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    parts, bias = make(draw(*ODD)), torch.arange(3.0)
    theirs = (
        comfy.dequantize_nvfp4(parts["weight"], parts["weight_scale_2"], parts["weight_scale"], torch.float32)
        if form == "nvfp4"
        else comfy.dequantize_mxfp8(parts["weight"], parts["weight_scale"], torch.float32)
    )
    by_layer = read(write(tmp_path / "a.safetensors", layer(parts, format=form) | {"a.bias": bias}))
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {"a": {"format": form}}})}
    by_header = read(write(tmp_path / "b.safetensors", layer(parts) | {"a.bias": bias}, header))
    for tensors in (by_layer, by_header):
        assert tensors.keys() == {"a.weight", "a.bias"} and torch.equal(tensors["a.bias"], bias)
        assert torch.equal(tensors["a.weight"], theirs)
    assert torch.nn.functional.cosine_similarity(theirs.flatten(), draw(*ODD).flatten(), dim=0) > 0.99


def test_scales_may_be_stored_as_plain_bytes(tmp_path: Path) -> None:
    for name, parts in {"nvfp4": as_nvfp4(draw(*ODD)), "mxfp8": as_mxfp8(draw(*ODD))}.items():
        native = read(write(tmp_path / "a.safetensors", layer(parts, format=name)))
        parts["weight_scale"] = parts["weight_scale"].view(torch.uint8)
        assert torch.equal(
            read(write(tmp_path / "b.safetensors", layer(parts, format=name)))["a.weight"], native["a.weight"]
        )


def test_experts_are_read_each_with_its_own_scales(tmp_path: Path) -> None:
    values = draw(3, *ODD)
    each = [as_nvfp4(v) for v in values]
    parts = {k: torch.stack([e[k] for e in each]) for k in each[0]}
    assert parts["weight_scale"].shape == (3, 256, 8) and parts["weight_scale_2"].shape == (3,)
    experts = read(write(tmp_path / "a.safetensors", layer(parts, format="nvfp4", num_experts=3)))["a.weight"]
    for one, e in zip(experts, each, strict=True):
        assert torch.equal(
            one, comfy.dequantize_nvfp4(e["weight"], e["weight_scale_2"], e["weight_scale"], torch.float32)
        )


def test_padding_is_cut_to_the_shape_that_the_file_tells(tmp_path: Path) -> None:
    padded = torch.nn.functional.pad(draw(10, 40), (0, 8, 0, 6))
    path = write(tmp_path / "a.safetensors", layer(as_nvfp4(padded), format="nvfp4", orig_shape=[10, 40]))
    whole = write(tmp_path / "b.safetensors", layer(as_nvfp4(padded), format="nvfp4"))
    assert torch.equal(read(path)["a.weight"], read(whole)["a.weight"][:10, :40])


# ---- bad input --------------------------------------------------------------------------------------------------

NV, MX = as_nvfp4(draw(*ODD)), as_mxfp8(draw(*ODD))


def nan_scale(parts: Mapping[str, Tensor], byte: int) -> Tensor:
    scales = parts["weight_scale"].clone()
    scales.view(torch.uint8).view(-1)[0] = byte
    return scales


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (layer(NV, format="nf4"), "a has the format 'nf4'; nvfp4, mxfp8, mxfp8_block32 are read"),
        (layer(NV, form="nvfp4"), "a has the format None"),
        ({k: v for k, v in layer(NV, format="nvfp4").items() if k != "a.weight_scale_2"}, "but has no weight_scale_2"),
        ({k: v for k, v in layer(MX, format="mxfp8").items() if k != "a.weight_scale"}, "but has no weight_scale"),
        ({"a.comfy_quant": note(format="mxfp8"), "b": torch.ones(1)}, "is mxfp8 but has no weight;"),
        (layer(MX, format="nvfp4"), "but has no weight_scale_2"),
        (layer(NV, format="mxfp8"), "torch.uint8 for [150, 48], which cannot be mxfp8"),
        (layer({**NV, "weight": NV["weight"][:, :-4]}, format="nvfp4"), "which cannot be nvfp4"),
        (layer({**NV, "weight": NV["weight"][:100]}, format="nvfp4"), "1024 of torch.float8_e4m3fn go with it"),
        (layer({**NV, "weight": NV["weight"].flatten()}, format="nvfp4"), "cannot be nvfp4"),
        (layer({**MX, "weight_scale": MX["weight_scale"][:128]}, format="mxfp8"), "go with it"),
        (layer({**MX, "weight_scale": torch.ones(256, 4)}, format="mxfp8"), "of torch.float32; 1024 of"),
        (layer({**NV, "weight_scale_2": torch.ones(3)}, format="nvfp4"), "weight_scale_2 [3] of torch.float32"),
        (layer(NV, format="nvfp4", orig_shape=[151, 96]), "for [151, 96], which cannot be nvfp4"),
        (layer(NV, format="nvfp4", orig_shape=[2**63, 96]), "which cannot be nvfp4"),
        (layer(NV, format="nvfp4", orig_shape="big"), "which cannot be nvfp4"),
        (layer({**NV, "weight_scale": nan_scale(NV, 0x7F)}, format="nvfp4"), "a has a scale that is NaN or infinite"),
        (layer({**NV, "weight_scale": nan_scale(NV, 0xFF)}, format="nvfp4"), "a has a scale that is NaN or infinite"),
        (layer({**NV, "weight_scale_2": torch.tensor(math.nan)}, format="nvfp4"), "scale that is NaN or infinite"),
        (layer({**MX, "weight_scale": nan_scale(MX, 0xFF)}, format="mxfp8"), "a has a scale that is NaN or infinite"),
        (
            layer({**MX, "weight": torch.full(ODD, math.nan).to(torch.float8_e4m3fn)}, format="mxfp8"),
            "a has values that are NaN or infinite",
        ),
        ({"a.weight": MX["weight"]}, "a.weight is torch.float8_e4m3fn in a format that the file does not tell"),
        ({**layer(MX), "a.comfy_quant": torch.tensor([123], dtype=torch.uint8)}, "cannot be read"),
        ({**layer(MX), "a.comfy_quant": torch.tensor([91, 93], dtype=torch.uint8)}, "a layer's note is no object"),
        ({**layer(MX), "a.comfy_quant": torch.zeros(5000, dtype=torch.uint8)}, "a.comfy_quant is [5000]"),
        ({**layer(MX), "a.comfy_quant": torch.tensor([255], dtype=torch.uint8)}, "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_quantised_layer_is_one_line(
    tensors: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", tensors)
    assert words in (said := error(lambda: read(path))) and said.startswith(str(path))


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": [1]}', '{"layers": {"a": 3}}', "[" * 100_000])
def test_a_header_that_says_nonsense_of_its_formats_is_refused(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": torch.ones(1)}, {"_quantization_metadata": text})
    assert "what it says of its formats cannot be read" in error(lambda: read(path))


@pytest.mark.parametrize(
    ("blocks", "scales", "words"),
    [
        (torch.zeros(2, 4, 3, 15, dtype=torch.uint8), torch.zeros(2, 4, 3, dtype=torch.uint8), "[2, 4, 3, 15]"),
        (torch.zeros(2, 4, 3, 16, dtype=torch.uint8), torch.zeros(2, 4, 2, dtype=torch.uint8), "[2, 4, 2]"),
        (torch.zeros(2, 4, 48, dtype=torch.uint8), torch.zeros(2, 4, 3, dtype=torch.uint8), "[2, 4, 48]"),
        (torch.zeros(2, 4, 3, 16), torch.zeros(2, 4, 3, dtype=torch.uint8), "torch.float32"),
        (torch.zeros(2, 4, 3, 16, dtype=torch.uint8), torch.full((2, 4, 3), 255, dtype=torch.uint8), "NaN or infinite"),
        (torch.zeros(2, 4, 3, 16, dtype=torch.uint8), torch.full((2, 4, 3), 253, dtype=torch.uint8), "NaN or infinite"),
    ],
)
def test_blocks_of_mxfp4_are_checked(blocks: Tensor, scales: Tensor, words: str, tmp_path: Path) -> None:
    tensors, _ = read_lazy(write(tmp_path / "a.safetensors", {"b": blocks, "s": scales}))
    said = error(lambda: lazy_mxfp4("gate", tensors["b"], tensors["s"], "file")[1].read())
    assert said.startswith("file: gate") and words in said
