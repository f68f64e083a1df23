"""Weights and descriptions on disk: safetensors and JSON only, checked at the border, written atomically.

A checkpoint is the published diffusers folder layout plus `lens.json`:
`{"format": 1, "components": {kind: {"use", "config"}}, "presets": {"steps", "guidance_scale"}, "plugins": {name: …}}`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_core.catalog import Catalog
from lens_core.types import CheckpointError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ALIGNMENT = 64  # bytes, at which torch puts tensors of its own
FORMAT = 1
"""The version of `lens.json`."""


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then move it there: whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}; choose another output") from error
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    write_atomic(path, lambda p: p.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"))


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_twins)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing; fetch the checkpoint again, this file included") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(data).__name__}")
    return data


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to one safetensors file, atomically."""
    from safetensors.torch import save_file

    plain = {k: v.detach().contiguous().cpu() for k, v in tensors.items()}
    write_atomic(path, lambda p: save_file(plain, p, metadata={"format": "pt", **(metadata or {})}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file; anything else is refused by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointError(f"{path}: missing; fetch the checkpoint again, this file included")
    with path.open("rb") as file:
        head = file.read(9)
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
        raise CheckpointError(f"{path}: is a pickle, which can run code; only safetensors are read")
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({size} bytes; {error}); fetch it again"
        ) from error


def read_header(path: Path) -> dict[str, str]:
    """The free text that a safetensors file carries beside its tensors; call `read_tensors` first, which checks it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _files(folder: Path, stem: str) -> list[Path]:
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
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: names {name!r}, which is not a safetensors file of its own folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: this shard is missing; fetch it again")
    return [folder / name for name in names]


def read_weights(folder: Path, stem: str = "diffusion_pytorch_model") -> dict[str, Tensor]:
    """The tensors of `folder/stem.safetensors`, or of the shards that its index names."""
    tensors: dict[str, Tensor] = {}
    for path in _files(folder, stem):
        part = read_tensors(path)
        twins = tensors.keys() & part.keys()
        if twins:
            raise CheckpointError(f"{path}: holds {min(twins)!r}, which another shard holds too")
        tensors |= part
    return tensors


def load_module(
    module: nn.Module,
    folder: Path,
    stem: str = "diffusion_pytorch_model",
    dtype: torch.dtype | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Fill `module` (on the meta device, say) from files, strictly: every name, every shape, floats as `dtype`."""
    import torch

    tensors = read_weights(folder, stem) if tensors is None else tensors
    expected = module.state_dict()
    where = folder / f"{stem}.safetensors"
    for name, tensor in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: lacks {name!r}.{did_you_mean(name, set(tensors) - set(expected))[:200]}")
        if tensors[name].shape != tensor.shape:
            got, want = list(tensors[name].shape), list(tensor.shape)
            raise CheckpointError(f"{where}: {name!r} has the shape {got}; its config asks for {want}")
        if tensor.dtype.is_floating_point != tensors[name].dtype.is_floating_point:
            raise CheckpointError(f"{where}: {name!r} is {tensors[name].dtype}, which is not a plain weight")
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise CheckpointError(f"{where}: holds {extra[0]!r} ({len(extra)} such), which the model does not have")
    for name in expected:
        value = tensors[name]
        if value.dtype.is_floating_point:
            stored = expected[name].device == torch.device("meta")
            value = value.to(dtype or (value.dtype if stored else expected[name].dtype))
        # In a file, tensors lie at any byte. Kernels may take another path there, and round otherwise: a model would
        # not draw what its own copy draws.
        tensors[name] = value if value.data_ptr() % ALIGNMENT == 0 else value.clone()
    module.load_state_dict(tensors, assign=True)


def save_module(module: nn.Module, folder: Path, stem: str = "diffusion_pytorch_model") -> None:
    """Write a module's state to `folder/stem.safetensors`."""
    save_tensors(folder / f"{stem}.safetensors", module.state_dict())


def hash_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(folder: Path) -> str:
    """A short hash of a checkpoint: of every safetensors and JSON file below it, names included."""
    return combined(hashes(folder))


def hashes(folder: Path) -> dict[str, str]:
    """The hash of every safetensors and JSON file below `folder`, by its path from there."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json") and p.is_file())
    return {str(path.relative_to(folder)): hash_of(path) for path in paths}


def combined(files: Mapping[str, str]) -> str:
    """One short hash of several files'."""
    total = hashlib.sha256()
    for name, each in files.items():
        total.update(name.encode())
        total.update(bytes.fromhex(each))
    return total.hexdigest()[:16]


def fetch(uri: str, catalog: Catalog) -> Path:
    """Where the checkpoint `uri` lies: a plugin's answer (`tiny:`), a folder, or a Hub name `org/name[@revision]`."""
    answer = catalog.first("lens_fetch", uri)
    if answer is not None:
        return Path(answer)
    folder = Path(uri).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{uri}: is a file; a checkpoint is a folder with a lens.json or a model_index.json")
    name, _, revision = uri.partition("@")
    if name.count("/") != 1 or any(c in name for c in ": \\~") or name.startswith((".", "/")):
        raise CheckpointError(
            f"{uri}: no such folder, and not a Hub name (org/name[@revision]); `tiny:` is always there"
        )
    return _from_hub(name, revision or None)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the Hub's client raises its own, httpx's and plain OSErrors
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{name}: cannot be fetched from the Hub ({type(error).__name__}: {reason}); with a network run "
            f"`hf download {name}`, or pass a folder that holds model_index.json and its sub-folders"
        ) from error


def describe(folder: Path, catalog: Catalog) -> dict[str, Any]:
    """The checkpoint's `lens.json`, or what a plugin says it would be."""
    path = folder / "lens.json"
    if path.is_file():
        data = read_json(path)
    else:
        data = catalog.first("lens_describe", folder)
        if data is None:
            raise CheckpointError(f"{folder}: has neither lens.json nor a layout that an installed plugin knows")
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: is of format {data.get('format')!r}; this Lens reads {FORMAT}: upgrade lens-t2i"
        )
    components = data.get("components")
    if not isinstance(components, dict) or not all(
        isinstance(c, dict) and isinstance(c.get("use"), str) and isinstance(c.get("config", {}), dict)
        for c in components.values()
    ):
        raise CheckpointError(f"{path}: has no components that each name what they use")
    return data
