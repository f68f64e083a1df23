"""GGUF: every format bit for bit as the package has it, a piece at a time; and headers that lie cost nothing."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import torch
from fuzzing import CASES, little_memory

from lens_core.checkpoints import gguf_types, lazy_tensors
from lens_core.checkpoints.gguf_files import LONGEST_HEADER, GgufTensor, read_gguf
from lens_core.types import CheckpointError, LensError

SHAPE = (5, 512)


@pytest.fixture(autouse=True, scope="module")
def _little_memory() -> Iterator[None]:
    yield from little_memory()


def error(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def bits(values: Any) -> np.ndarray[Any, Any]:
    return np.asarray(values).view(np.uint32)


# ---- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*gguf_files.WRITABLE, *gguf_files.READABLE])
def test_any_blocks_are_what_the_package_makes_of_them_bit_for_bit(form: str) -> None:
    values, size = gguf_types.block_of(form)
    data = np.random.default_rng(1).integers(0, 256, (37, 4 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf_files.gguf.quants.dequantize(data, gguf_files.TYPES[form])
    got = gguf_types.dequantize(form, torch.from_numpy(data)).numpy()
    assert got.dtype == np.float32 and got.shape == (37, 4 * values)
    # A NaN, of a scale that is none, may have any bits.
    assert np.array_equal(bits(got)[~np.isnan(expected)], bits(expected)[~np.isnan(expected)])
    assert np.array_equal(np.isnan(got), np.isnan(expected))


def test_each_format_that_a_layer_may_stay_in_is_one_of_the_package() -> None:
    named = {form for form in gguf_files.TYPES.__members__ if gguf_types.stays_packed(form)}
    assert named == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
                     "MXFP4"}  # fmt: skip


@pytest.mark.parametrize("form", gguf_files.WRITABLE)
def test_a_file_of_the_packages_writer_is_read(form: str, tmp_path: Path) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    data = gguf_files.quantised(weight, form)
    plain = {"f32": torch.randn(3), "f16": torch.randn(2, 3, 4).half(), "bf16": torch.randn(4, 2).bfloat16()}
    path = gguf_files.write(tmp_path / "a.gguf", {"w": (data, form), **plain}, {"general.name": "x", "n": 3})
    tensors, keys = read_gguf(path)
    assert keys["general.architecture"] == "lens" and (keys["general.name"], keys["n"]) == ("x", 3)
    stored = tensors["w"]
    assert isinstance(stored, GgufTensor) and stored.form == form and stored.shape == SHAPE
    assert torch.equal(stored.read(torch.float32), gguf_files.dequantised(data, form))
    assert torch.equal(stored.read(torch.bfloat16), gguf_files.dequantised(data, form).bfloat16())
    assert np.array_equal(stored.packed.read().numpy(), data)
    for name, value in plain.items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name].read(), value)


@pytest.mark.parametrize("form", gguf_files.READABLE)
def test_blocks_that_the_package_only_reads_are_read(form: str, tmp_path: Path) -> None:
    data = gguf_files.blocks(SHAPE, form)
    tensors, _ = read_gguf(gguf_files.write(tmp_path / "a.gguf", {"w": (data, form)}))
    values = tensors["w"].read(torch.float32)
    assert values.abs().max() > 0 and torch.equal(values, gguf_files.dequantised(data, form))


def test_a_tensor_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf_files.quantised(torch.randn(64, 256), "Q8_0")
    tensors, _ = read_gguf(gguf_files.write(tmp_path / "a.gguf", {"w": (data, "Q8_0")}))
    monkeypatch.setattr("lens_core.checkpoints.gguf_files.PIECE", 4 * 256 * 4)
    monkeypatch.setattr(lazy_tensors, "PIECE", 8 * 272)
    pieces = list(tensors["w"].rows(torch.float32))
    assert [len(piece) for piece in pieces] == [4] * 16
    assert torch.equal(torch.cat(pieces), gguf_files.dequantised(data, "Q8_0"))


def test_comfys_flattened_tensors_have_their_shape_again(tmp_path: Path) -> None:
    data = gguf_files.quantised(torch.randn(6, 64), "Q8_0")
    keys = {"comfy.gguf.orig_shape.w": np.array([12, 4, 8], np.int32).tolist()}
    tensors, rest = read_gguf(gguf_files.write(tmp_path / "a.gguf", {"w": (data, "Q8_0")}, keys))
    assert tensors["w"].shape == (12, 4, 8) and "comfy.gguf.orig_shape.w" not in rest
    assert torch.equal(tensors["w"].read(torch.float32), gguf_files.dequantised(data, "Q8_0").reshape(12, 4, 8))
    keys = {"comfy.gguf.orig_shape.w": [12, 4, 9]}
    path = gguf_files.write(tmp_path / "b.gguf", {"w": (data, "Q8_0")}, keys)
    assert "'w' is [6, 64], and said to have been" in error(lambda: read_gguf(path))


def test_a_scale_that_is_no_number_is_refused_when_it_is_read(tmp_path: Path) -> None:
    data = gguf_files.quantised(torch.randn(2, 64), "Q4_0")
    data[0, :2] = np.frombuffer(struct.pack("<e", float("inf")), np.uint8)
    tensors, _ = read_gguf(gguf_files.write(tmp_path / "a.gguf", {"w": (data, "Q4_0")}))
    assert "'w' has values that are NaN or infinite; fetch the file again" in error(lambda: tensors["w"].read())


def test_arrays_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "a.gguf", {"w": torch.ones(1)}, {"a": ["x", "ü"], "b": [1, 2], "c": 1})
    assert set(read_gguf(path)[1]) == {"general.architecture", "c"}
    _, keys = read_gguf(path, ("a", "b"))
    assert keys["a"] == ["x", "ü"] and keys["b"].tolist() == [1, 2]


# ---- headers that lie ---------------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def entry(name: bytes, shape: tuple[int, ...], kind: int = 0, start: int = 0, dimensions: int | None = None) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack("<I", count) + sizes + struct.pack("<IQ", kind, start)


def file(
    *parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF", values: int = 64
) -> bytes:
    head = magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)
    return head + bytes(-len(head) % 32) + bytes(values)


ONE = entry(b"w", (4, 2))
LIES = {
    "an empty file": (b"", "its first word would take the header"),
    "another format": (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
    "cut in the counts": (file()[:20], "would take the header to byte"),
    "a version to come": (file(version=4), "has version 4; 2 and 3 are read"),
    "the first version": (file(version=1), "has version 1"),
    "big-endian": (file(version=3 << 24), "is big-endian"),
    "2^60 tensors": (file(ONE, tensors=2**60), f"claims {2**60} tensors"),
    "2^63 keys": (file(keys=2**63), f"{2**63} keys; at most 100000"),
    "more tensors than fit": (file(ONE, tensors=50_000), "50000 tensors and 0 keys would take the header to byte"),
    "one more than there is": (file(ONE, tensors=2), "a tensor has no name"),
    "a name of 2^40 bytes": (
        file(struct.pack("<Q", 2**40), tensors=1, values=4096), f"is {2**40} bytes long; at most 1024"
    ),
    "a text of 2^40 bytes": (
        file(key(b"k", 8, struct.pack("<Q", 2**40)), keys=1), f"the value of 'k' is {2**40} bytes long; at most"
    ),
    "a text of 2^64 - 1 bytes": (file(key(b"k", 8, b"\xff" * 8), keys=1), "bytes long; at most"),
    "an array of 2^60 numbers": (
        file(key(b"k", 9, struct.pack("<IQ", 4, 2**60)), keys=1), "the value of 'k' would take the header"
    ),
    "an array of 2^60 texts": (
        file(key(b"k", 9, struct.pack("<IQ", 8, 2**60)), keys=1), "the value of 'k' would take the header"
    ),
    "an array in an array": (
        file(key(b"k", 9, struct.pack("<IQIQ", 9, 1, 9, 1)), keys=1), "is an array of the type 9, which is not read"
    ),
    "a key of no type": (file(key(b"k", 99, bytes(8)), keys=1), "has the type 99, which GGUF does not have"),
    "a key twice": (file(*[key(b"k", 4, bytes(4))] * 2, keys=2), "the key 'k' stands twice"),
    "a key that is no UTF-8": (file(key(b"\xff\xfe", 4, bytes(4)), keys=1), "a key is no UTF-8"),
    "a tensor twice": (file(ONE, entry(b"w", (4, 2), start=32), tensors=2, values=128), "holds 'w' twice"),
    "an unknown type": (file(entry(b"w", (4, 2), 77), tensors=1), "'w' has the type 77, which this version of"),
    "a type nobody dequantises": (file(entry(b"w", (256,), 15), tensors=1), "the type Q8_K, which the package gguf"),
    "a type of old": (file(entry(b"w", (32,), 4), tensors=1), "the type 4, which"),
    "2^31 dimensions": (file(entry(b"w", (4,), dimensions=2**31), tensors=1), "dimensions; at most 4"),
    "a size of 2^63": (file(entry(b"w", (2**63, 2)), tensors=1), "which no tensor has"),
    "sizes that overflow": (file(entry(b"w", (2**32, 2**32)), tensors=1), "which no tensor has"),
    "sizes that overflow to 0": (file(entry(b"w", (2**62, 4, 4)), tensors=1), "which no tensor has"),
    "nothing, 2^60 times": (file(entry(b"w", (0, 2**60)), tensors=1), "which no tensor has"),
    "rows that are no blocks": (file(entry(b"w", (33, 2), 2), tensors=1), "rows of 33 values; Q4_0 has blocks of 32"),
    "a scalar in blocks": (file(entry(b"w", (), 2), tensors=1), "rows of 1 values"),
    "larger than the file": (file(entry(b"w", (400, 200)), tensors=1), "would end at byte"),
    "a start beyond the file": (file(entry(b"w", (4, 2), start=2**40), tensors=1), "would end at byte"),
    "a start of 2^64 - 32": (file(entry(b"w", (4, 2), start=2**64 - 32), tensors=1), "would end at byte"),
    "off its alignment": (file(entry(b"w", (4, 2), start=8), tensors=1), "begins at 8, off its alignment"),
    "one in the other": (
        file(entry(b"a", (16,)), entry(b"b", (4,), start=32), tensors=2), "the tensors 'a' and 'b' overlap"
    ),
    "both in one place": (file(ONE, entry(b"v", (4, 2)), tensors=2), "overlap"),
    "an alignment of 0": (
        file(key(b"general.alignment", 4, struct.pack("<I", 0)), ONE, tensors=1, keys=1), "its alignment is 0"
    ),
    "an alignment of 2^30": (
        file(key(b"general.alignment", 4, struct.pack("<I", 2**30)), ONE, tensors=1, keys=1), "no power of two up to"
    ),
    "an alignment that is a text": (
        file(key(b"general.alignment", 8, text(b"32")), ONE, tensors=1, keys=1), "its alignment is '32'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_in_one_line_and_no_time(lie: str, tmp_path: Path) -> None:
    data, words = LIES[lie]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    before = time.perf_counter()
    message = error(lambda: read_gguf(path, ("k",)))
    assert words in message and message.startswith(f"{path}: not a GGUF file that can be read (")
    assert len(message) < 500 and time.perf_counter() - before < 1


def test_a_header_longer_than_any_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    length = LONGEST_HEADER + 2**20
    with path.open("wb") as out:  # sparse: the file has the bytes that its header claims
        out.write(file(key(b"k", 8, struct.pack("<Q", length)), keys=1))
        out.truncate(2 * length)
    assert "the value of 'k'" in error(lambda: read_gguf(path))


def test_a_sound_file_made_by_hand_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    values = np.arange(8, dtype=np.float32).tobytes()
    path.write_bytes(file(ONE, tensors=1, values=0) + values)
    tensors, _ = read_gguf(path)
    assert torch.equal(tensors["w"].read(), torch.arange(8.0).reshape(2, 4))


@pytest.mark.parametrize("shape", [(32, 0), (0, 4), (32, 0, 3)])
@pytest.mark.parametrize("kind", [0, 2, 34])
def test_a_tensor_of_nothing_is_read(shape: tuple[int, ...], kind: int, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(file(entry(b"w", tuple(256 if n == 32 else n for n in shape), kind), tensors=1))
    tensor = read_gguf(path)[0]["w"]
    assert tensor.read(torch.float32).numel() == 0 and tensor.shape[::-1][1:] == shape[1:]


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_files.write(tmp_path / "a.gguf", {"w": torch.ones(1)})
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "pip install 'lens-t2i[quant]'" in error(lambda: read_gguf(path))


# ---- broken files -------------------------------------------------------------------------------------------------


def test_truncated_and_changed_files_are_read_or_refused(tmp_path: Path) -> None:
    weight = torch.randn(4, 64)
    tensors = {f"w{n}": (gguf_files.quantised(weight, form), form) for n, form in enumerate(gguf_files.WRITABLE[:5])}
    keys = {"a": ["x", "yy"], "b": [1, 2, 3], "comfy.gguf.orig_shape.w0": [8, 32], "c": "text", "d": 1.5}
    path = gguf_files.write(tmp_path / "a.gguf", {**tensors, "b": torch.ones(4)}, keys)
    sound, rng, refused = path.read_bytes(), random.Random(0), 0
    end = sound.index(bytes(24))  # most changes in the header; values are any bytes
    for _ in range(CASES or 1500):
        data = bytearray(sound)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 8))):
            if data:
                data[rng.randrange(min(len(data), end + 64))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        path.write_bytes(data)
        try:
            for tensor in read_gguf(path, ("a", "b"))[0].values():
                tensor.read(torch.float32)
        except LensError as fault:
            refused += 1
            if "\n" in str(fault) or str(path) not in str(fault):
                pytest.fail(str(fault))
    assert refused > (CASES or 1500) / 3
