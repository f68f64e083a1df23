"""Read and write safetensors files and shards, and fill modules from them; no other format is read, no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lens_core.checkpoints import hub
from lens_core.io import readers
from lens_core.io.readers import shown
from lens_core.types import CheckpointError, LensError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

from lens_core.io.atomic_files import read_json, write_atomic

Module = TypeVar("Module", bound="nn.Module")
ALIGNMENT = 64  # bytes, at which torch puts tensors of its own
LONGEST_HEADER = 2**24  # bytes of a safetensors header that is read: 100 for each of 160,000 tensors
_DTYPES = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64", "F32": "float32", "U32": "uint32",
    "I32": "int32", "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""safetensors' names of dtypes -> torch's, in the order in which its files hold them: wide elements first."""


def file_header(layout: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the values in a safetensors file: its length, and name -> dtype, shape and place as JSON.

    `layout`: name -> (safetensors' dtype, shape, bytes), in the order of the values.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, size) in layout.items():
        begin, end = end, end + size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that values begin at a multiple of the widest element
    return len(text).to_bytes(8, "little") + text


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors to one safetensors file, atomically; the SHA-256 of the file, taken while it is written.

    Equal tensors and metadata are equal files. One tensor at a time is copied to the host, wherever they lie, and two
    names may share one."""
    import torch

    names = {getattr(torch, attribute): name for name, attribute in _DTYPES.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in names:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype}, which no safetensors file can hold; cast it first"
            )
    rank = {dtype: place for place, dtype in enumerate(names)}
    order = sorted(tensors, key=lambda n: (rank[tensors[n].dtype], n))
    layout = {
        name: (names[tensors[name].dtype], tensors[name].shape, tensors[name].numel() * tensors[name].element_size())
        for name in order
    }
    header = file_header(layout, dict(sorted({"format": "pt", **(metadata or {})}.items())))
    digest = hashlib.sha256(header)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(header)
            for name in order:
                host = tensors[name].detach().cpu().contiguous().reshape(-1)
                values = host.view(torch.uint8).numpy().data
                digest.update(values)
                file.write(values)

    write_atomic(path, write)
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file; anything else is refused by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_foreign(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except (
        SafetensorError,
        OSError,
        ValueError,
        RuntimeError,
        TypeError,
    ) as error:  # the last two: shapes beyond torch's
        raise incomplete_file_error(path, error) from error


def refuse_foreign(path: Path) -> None:
    """Raise CheckpointError for a file that is missing, or of another format, recognised by its first bytes."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name the .safetensors file in it")
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; fetch the checkpoint again, this file included")
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file begins with its header's length, which may be any bytes, and then the header's brace.
    if head[8:] != b"{" and head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
        raise CheckpointError(f"{path}: is a pickle, which can run code; only safetensors are read")
    length = int.from_bytes(head[:8], "little")
    if head[8:] == b"{" and LONGEST_HEADER < length <= path.stat().st_size:
        raise CheckpointError(f"{path}: its header of {length} bytes is longer than that of any model; fetch it again")
    if head[:4] == b"GGUF":
        raise CheckpointError(f"{path}: is a GGUF file; let its name end in .gguf, so that it is read as one")


def incomplete_file_error(path: Path, error: Exception) -> CheckpointError:
    """What to raise where safetensors cannot read `path`."""
    size = path.stat().st_size
    return CheckpointError(
        f"{path}: not a whole safetensors file ({size} bytes; {readers.one_line(error)}); fetch it again"
    )


def read_header(path: Path) -> dict[str, str]:
    """The free text that a safetensors file carries beside its tensors; call `read_tensors` first, which checks it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def files(folder: Path, stem: str) -> list[Path]:
    """`folder/stem.safetensors`, or the shards that its index names."""
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if single.is_file() or not index.is_file():
        if not single.is_file():
            pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pth", ".pkl"))
            if pickles:
                raise CheckpointError(
                    f"{folder / pickles[0]}: is a pickle, which can run code; only safetensors are read"
                )
        return [single]
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensor names to files")
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
            raise CheckpointError(f"{index}: names {shown(name)}, which is not a safetensors file of its own folder")
        if not hub.is_file(folder / name):
            raise CheckpointError(f"{readers.one_line(folder / name, 1000)}: this shard is missing; fetch it again")
    return [folder / name for name in names]


def read_weights(folder: Path, stem: str = "diffusion_pytorch_model") -> dict[str, Tensor]:
    """The tensors of `folder/stem.safetensors`, or of the shards that its index names."""
    tensors: dict[str, Tensor] = {}
    for path in files(folder, stem):
        part = read_tensors(path)
        allow_duplicate_keys = tensors.keys() & part.keys()
        if allow_duplicate_keys:
            raise CheckpointError(f"{path}: holds {shown(min(allow_duplicate_keys))}, which another shard holds too")
        tensors |= part
    return tensors


def load_module(
    module: nn.Module,
    folder: Path,
    stem: str = "diffusion_pytorch_model",
    dtype: torch.dtype | None = None,
    tensors: dict[str, Any] | None = None,
) -> None:
    """Fill `module` (on the meta device, say) from files, strictly: every name, every shape, floats as `dtype`.

    `tensors` may be given: Tensors, or LazyTensors, which are read once all of them fit."""
    import torch

    tensors = dict(read_weights(folder, stem) if tensors is None else tensors)
    expected = module.state_dict()
    where = folder / f"{stem}.safetensors"
    for name, tensor in expected.items():
        if name not in tensors:
            raise CheckpointError(
                f"{where}: lacks {shown(name)}.{did_you_mean(name, set(tensors) - set(expected))[:200]}"
            )
        if tuple(tensors[name].shape) != tuple(tensor.shape):
            got, want = list(tensors[name].shape), list(tensor.shape)
            raise CheckpointError(f"{where}: {shown(name)} has the shape {got}; its config asks for {want}")
        if tensor.dtype.is_floating_point != tensors[name].dtype.is_floating_point:
            raise CheckpointError(f"{where}: {shown(name)} is {tensors[name].dtype}, which is not a plain weight")
    refuse_bare_float8({n: t for n, t in tensors.items() if n in expected and expected[n].dtype != t.dtype}, where)
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise CheckpointError(f"{where}: holds {shown(extra[0])} ({len(extra)} such), which the model does not have")
    for name in expected:
        value = tensors[name]
        value = value if isinstance(value, torch.Tensor) else value.read(dtype)
        if value.dtype.is_floating_point:
            stored = expected[name].device == torch.device("meta")
            value = value.to(dtype or (value.dtype if stored else expected[name].dtype))
        # In a file, tensors lie at any byte. Kernels may take another path there, and round otherwise: a model would
        # not draw what its own copy draws.
        tensors[name] = value if value.data_ptr() % ALIGNMENT == 0 else value.clone()
    module.load_state_dict(tensors, assign=True)


def refuse_bare_float8(tensors: Mapping[str, Any], where: object) -> None:
    """Raise CheckpointError for a float of 8 bits: without its scales, nobody knows what number it stands for."""
    for name, tensor in tensors.items():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
            raise CheckpointError(
                f"{where}: {name} is {tensor.dtype} in a format that the file does not tell: its scales are missing; "
                "fetch the model in bfloat16"
            )


def build_on_meta(build: Callable[[], Module], where: Path, layers: int, tensors: Mapping[str, Any]) -> Module:
    """The module that a config describes, without memory for its weights. Raises CheckpointError, which names the file
    `where` it stands, for sizes that no module can have, and for more `layers` than the checkpoint has tensors."""
    import torch

    if layers > len(tensors):
        raise CheckpointError(f"{where}: asks for {layers} layers; the checkpoint holds {len(tensors)} tensors")
    try:
        with torch.device("meta"):
            return build()
    except LensError:
        raise
    except Exception as error:  # a library's own checks, and sizes beyond torch's integers
        reason = " ".join(f"{error}".split())[:200]
        raise CheckpointError(f"{where}: no model can be built of it ({reason}); fetch it again") from error


def save_module(module: nn.Module, folder: Path, stem: str = "diffusion_pytorch_model") -> None:
    """Write a module's state to `folder/stem.safetensors`."""
    about = {"modelspec.architecture": type(module).__name__}
    save_tensors(folder / f"{stem}.safetensors", module.state_dict(), about)
