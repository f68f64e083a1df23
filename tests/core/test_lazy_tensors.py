"""Tensors on disk, piece by piece: what is written reads back, little is held at once, damage is one clear line."""

from __future__ import annotations

import contextlib
import json
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lens_core.checkpoints import lazy_tensors
from lens_core.checkpoints.lazy_tensors import DTYPES, LazyTensor, read_lazy, write_lazy
from lens_core.checkpoints.tensor_files import read_tensors
from lens_core.types import CheckpointError


def error(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def raw(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    """A file with this very header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def zoo() -> dict[str, Tensor]:
    """A tensor of every kind, a scalar and an empty one."""
    rng = torch.Generator().manual_seed(0)
    floats = {n: torch.randn(3, 5, generator=rng).to(d) for n, d in DTYPES.items() if d.is_floating_point}
    whole = {n: torch.arange(7).to(d) for n, d in DTYPES.items() if not d.is_floating_point}
    return floats | whole | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_every_kind_reads_back_bit_for_bit_and_safetensors_agrees(tmp_path: Path) -> None:
    save_file(zoo(), tmp_path / "a.safetensors", {"who": "ü"})
    tensors, texts = read_lazy(tmp_path / "a.safetensors")
    write_lazy(tmp_path / "b.safetensors", tensors, texts={"who": texts["who"]})
    theirs = load_file(tmp_path / "b.safetensors")
    for name, tensor in zoo().items():
        for value in (tensors[name].read(), theirs[name]):
            assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
            assert torch.equal(bits(value), bits(tensor)), name
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "ü"}


def test_a_cast_changes_floats_alone_and_rounds_as_torch_does(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), "n": torch.arange(5)}
    write_lazy(tmp_path / "a.safetensors", {k: LazyTensor.of(v) for k, v in tensors.items()}, torch.bfloat16)
    written = load_file(tmp_path / "a.safetensors")
    assert torch.equal(written["w"], tensors["w"].bfloat16()) and torch.equal(written["n"], tensors["n"])
    assert torch.equal(
        read_lazy(tmp_path / "a.safetensors")[0]["w"].read(torch.float32), tensors["w"].bfloat16().float()
    )


def test_shards_are_one(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "2.safetensors")
    assert read_lazy(tmp_path / "1.safetensors", tmp_path / "2.safetensors")[0].keys() == {"a", "b"}
    said = error(lambda: read_lazy(tmp_path / "1.safetensors", tmp_path / "1.safetensors"))
    assert "holds 'a', which another shard holds too" in said


def test_a_copy_holds_one_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large the tensors are: the reader's buffers that are alive never exceed one piece and its cast."""
    monkeypatch.setattr(lazy_tensors, "PIECE", 4096)
    shapes = {"tall": (5000, 8), "wide": (3, 900), "deep": (40, 10, 10)}
    save_file({k: torch.rand(s, generator=torch.Generator().manual_seed(0)) for k, s in shapes.items()}, tmp_path / "a")
    alive, most, empty = [0], [0], torch.empty

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        buffer = empty(*args, **kwargs)
        size = buffer.nbytes
        alive[0] += size
        most[0] = max(most[0], alive[0])
        weakref.finalize(buffer.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - size))
        return buffer

    def pieces(tensor: LazyTensor) -> LazyTensor:
        def rows(dtype: torch.dtype) -> Iterator[Tensor]:
            for block in tensor.rows(dtype):
                most[0] = max(most[0], block.nbytes)
                yield block

        return LazyTensor(tensor.shape, tensor.dtype, rows)

    monkeypatch.setattr(torch, "empty", counted)
    tensors, _ = read_lazy(tmp_path / "a")
    write_lazy(tmp_path / "b", {k: pieces(v) for k, v in tensors.items()}, torch.bfloat16)
    assert 0 < most[0] <= 2 * 4096
    written = load_file(tmp_path / "b")
    assert all(torch.equal(written[k], v.bfloat16()) for k, v in load_file(tmp_path / "a").items())


def test_what_is_read_is_aligned_and_read_once(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(5)}, tmp_path / "a")
    for tensor in read_lazy(tmp_path / "a")[0].values():
        assert tensor.read().data_ptr() % 64 == 0


def test_rows_that_do_not_add_up_are_not_written(tmp_path: Path) -> None:
    liar = LazyTensor((4, 2), torch.float32, lambda dtype: iter([torch.ones(3, 2)]))
    assert "other rows than its shape tells" in error(lambda: write_lazy(tmp_path / "a", {"x": liar}))
    assert list(tmp_path.iterdir()) == []


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (
            b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}",
            b"1234",
            "a key stands twice",
        ),
        ({"a": ONE | {"shape": [2**63]}}, b"1234", "not a whole safetensors file"),
        ({"a": ONE | {"shape": [2**62, 2**62]}}, b"1234", "not a whole safetensors file"),
        ({"a": ONE | {"shape": [-1]}}, b"1234", "not a whole safetensors file"),
        ({"a": ONE | {"shape": [2]}}, b"1234", "not a whole safetensors file"),
        ({"a": ONE | {"data_offsets": [4, 8]}}, b"12345678", "not a whole safetensors file"),
        ({"a": ONE}, b"12345678", "not a whole safetensors file"),
        ({"a": ONE}, b"12", "not a whole safetensors file"),
        ({"a": ONE | {"dtype": "Q4_K"}}, b"1234", "not a whole safetensors file"),
        ({"a": ONE | {"dtype": "F4", "shape": [8]}}, b"1234", "'a' is F4; F64, I64, F32"),
        ({"a": 3}, b"", "not a whole safetensors file"),
        (b"[" * 50_000, b"", "not a whole safetensors file"),
        (b"\xff\xfe", b"", "not a whole safetensors file"),
    ],
)
def test_a_damaged_header_is_reported(header: dict[str, Any] | bytes, data: bytes, words: str, tmp_path: Path) -> None:
    path = raw(tmp_path / "a.safetensors", header, data)
    assert words in (said := error(lambda: read_lazy(path))) and said.startswith(str(path))


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1, 100])
def test_a_header_longer_than_its_file_is_not_read(length: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(length.to_bytes(8, "little") + b"{}")
    assert "not a whole safetensors file (10 bytes" in error(lambda: read_lazy(tmp_path / "a"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF\x03\0\0\0", "is a GGUF file"),
        (pickle.dumps({"a": 1}, protocol=2), "is a pickle, which can run code"),
        (b"PK\x03\x04archive", "is a pickle, which can run code"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a whole safetensors file"),
        (b"", "not a whole safetensors file (0 bytes"),
    ],
)
def test_files_of_other_kinds_are_recognised(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data)
    assert words in error(lambda: read_lazy(tmp_path / "a"))
    assert "missing" in error(lambda: read_lazy(tmp_path / "b"))


def test_a_file_that_shrinks_while_it_is_read_is_reported(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "a")
    tensors, _ = read_lazy(tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-4])
    assert "ends early" in error(tensors["a"].read)


@pytest.mark.parametrize("shape", [[0], [0, 4], [4, 0], [3, 0, 2], [2**31, 0]])
def test_an_empty_tensor_is_read_at_once_in_its_shape(shape: list[int], tmp_path: Path) -> None:
    _with_empty(tmp_path / "a.safetensors", shape)
    tensors, _ = read_lazy(tmp_path / "a.safetensors")
    assert list(tensors["x"].read(torch.bfloat16).shape) == shape
    write_lazy(tmp_path / "b.safetensors", tensors)
    assert list(read_lazy(tmp_path / "b.safetensors")[0]["x"].shape) == shape


@pytest.mark.parametrize("shape", [[2**62, 0], [0, 2**63], [2**40, 2**40, 0], [2**64 - 1, 0]])
def test_an_empty_tensor_of_endless_rows_is_refused_by_its_name(shape: list[int], tmp_path: Path) -> None:
    _with_empty(tmp_path / "a.safetensors", shape)
    assert "a.safetensors: " in error(lambda: read_lazy(tmp_path / "a.safetensors"))
    with contextlib.suppress(CheckpointError):  # torch has some of these shapes, and then nothing walks along them
        assert read_tensors(tmp_path / "a.safetensors")["x"].numel() == 0


def _with_empty(path: Path, shape: list[int]) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def test_a_header_longer_than_any_models_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**25).to_bytes(8, "little") + b"{")
    with path.open("r+b") as file:
        file.truncate(2**26)
    for read in (read_lazy, read_tensors):
        with pytest.raises(CheckpointError, match="header of 33554432 bytes"):
            read(path)
