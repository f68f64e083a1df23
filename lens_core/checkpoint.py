"""Weights and descriptions on disk: safetensors and JSON only, checked at the border, written atomically.

A checkpoint is the published diffusers folder layout plus `lens.json`:
`{"format": 1, "components": {kind: {"use", "config"}}, "presets": {"steps", "guidance_scale"}, "plugins": {name: …},
"files": {path: SHA-256}}`; `files` is what `lens_core.integrity` checks.
A component with `"from"` is lent: its files are those of another checkpoint, a Hub name or a plugin's such as `tiny:`,
and `"hash"` says which they were.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lens_core import hub, reading
from lens_core.catalog import Catalog
from lens_core.reading import shown
from lens_core.types import CheckpointError, LensError, did_you_mean
from lens_core.validators import GUIDANCE, PIXELS, STEPS

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Module = TypeVar("Module", bound="nn.Module")
ALIGNMENT = 64  # bytes, at which torch puts tensors of its own
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LONGEST_HEADER = 2**24  # bytes of a safetensors header that is read: 100 for each of 160,000 tensors
FORMAT = 1
"""The version of `lens.json`."""
_DTYPES = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64", "F32": "float32", "U32": "uint32",
    "I32": "int32", "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""safetensors' names of dtypes -> torch's, in the order in which its files hold them: wide elements first."""


class WriteError(CheckpointError):
    """Something could not be written: no room, no permission."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong with the disk inside becomes a WriteError about `path`, in one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = re.search(r"os error (\d+)", str(error))  # how safetensors, which raises an error of its own, tells it
        code = int(number[1]) if number else getattr(error, "errno", None)
        why = os.strerror(code) if code else " ".join(str(error).split())
        room = "make room, or " if code in FULL else ""
        raise WriteError(f"{path}: cannot be written: {why}; {room}choose another output") from error


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then move it there: whole or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def append(path: Path, data: Mapping[str, Any]) -> None:
    """Add a line of JSON to a log. A power failure or a full disk may leave the last line torn, never one before."""
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(data, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_log(path: Path, last: float = math.inf) -> list[dict[str, Any]]:
    """The lines of a log about steps up to `last`. Lines that are torn, or about no step, are left out.

    A step is a whole number from 0 on; other values are as they stand, NaN and infinite ones included."""
    found = []
    for data in reading.json_lines(path, CheckpointError) if path.is_file() else ():
        step: Any = data.get("step") if isinstance(data, dict) else None
        if type(step) in (int, float) and 0 <= step < 2**53 and step == int(step) and step <= last:
            found.append(data)
    return found


def rewrite_log(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """These lines and no others."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    write_atomic(path, lambda p: p.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"))


def read_json(path: Path, *, finite: bool = True, most: int = reading.LARGEST_TEXT) -> dict[str, Any]:
    """The JSON object in `path`, a file of at most `most` bytes; `finite`: without NaN and infinite numbers."""
    missing = "missing; fetch the checkpoint again, this file included"
    text = reading.read_bytes(path, most, CheckpointError, missing)
    try:
        data = reading.parse_json(text, finite=finite)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({reading.one_line(error)})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(data).__name__}")
    return data


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
    header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for piece in (len(text).to_bytes(8, "little"), text):
                digest.update(piece)
                file.write(piece)
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
        raise not_whole(path, error) from error


def refuse_foreign(path: Path) -> None:
    """Raise CheckpointError for a file that is missing, or of another format that can be told by its first bytes."""
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
        raise CheckpointError(f"{path}: is a GGUF file; only safetensors are read: fetch the model in that format")


def not_whole(path: Path, error: Exception) -> CheckpointError:
    """What to raise where safetensors cannot read `path`."""
    size = path.stat().st_size
    return CheckpointError(
        f"{path}: not a whole safetensors file ({size} bytes; {reading.one_line(error)}); fetch it again"
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
            raise CheckpointError(f"{reading.one_line(folder / name, 1000)}: this shard is missing; fetch it again")
    return [folder / name for name in names]


def read_weights(folder: Path, stem: str = "diffusion_pytorch_model") -> dict[str, Tensor]:
    """The tensors of `folder/stem.safetensors`, or of the shards that its index names."""
    tensors: dict[str, Tensor] = {}
    for path in files(folder, stem):
        part = read_tensors(path)
        twins = tensors.keys() & part.keys()
        if twins:
            raise CheckpointError(f"{path}: holds {shown(min(twins))}, which another shard holds too")
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

    `tensors` may be given: Tensors, or Lazy ones (`lens_core.lazy`), which are read once all of them fit."""
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


def blueprint(build: Callable[[], Module], where: Path, layers: int, tensors: Mapping[str, Any]) -> Module:
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


def hash_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(folder: Path) -> str:
    """A short hash of a checkpoint: of all that decides what it draws, names included, or of one file."""
    return combined(hashes(folder))


def hashes(folder: Path, under: tuple[str, ...] = ("",)) -> dict[str, str]:
    """The hash of every file of weights, JSON or chat template below `folder`, by its path; of a file, its own.

    `under`: of those alone whose path begins so. Large files of the Hub's cache are named by their hash there, and are
    not read for it."""
    found = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".jinja") and p.is_file())
    paths = {str(path.relative_to(folder)): path for path in (found if folder.is_dir() else [folder])}
    return {name: hub.known_hash(path) or hash_of(path) for name, path in paths.items() if name.startswith(under)}


def places(part: str, component: Mapping[str, Any]) -> tuple[str, ...]:
    """What the paths of a part's files begin with: its folders, and its single file if it has one."""
    return (*hub.FOLDERS[part], *([component["file"]] if "file" in component else ()))


def lender(part: str, component: Mapping[str, Any], where: Path, catalog: Catalog) -> tuple[Path, dict[str, str]]:
    """The folder of the checkpoint that lends `part` to the one in `where`, and the hashes of the part's files there.

    Of the Hub, only what the part needs is fetched. Raises CheckpointError, also if the files are not those that were
    meant.
    """
    told = f"{where / 'lens.json'}: its {part.replace('_', ' ')} is that of {component['from']}"
    under = places(part, component)
    try:
        folder = fetch(component["from"], catalog, lent=True, under=under)
        own = describe(folder, catalog)["components"].get(part)
    except LensError as error:
        raise CheckpointError(f"{told}, which cannot be had: {error}") from error
    if own is None or "from" in own:
        raise CheckpointError(f"{told}, which has none of its own; name the checkpoint that has")
    found = hashes(folder, under)
    if not found:
        raise CheckpointError(f"{told}, which has no file in {' or '.join(under)}; fetch it again")
    if combined(found) != component["hash"]:
        raise CheckpointError(
            f"{told} as it was at {component['hash']}, and it is at {combined(found)} now; "
            "name the revision that was meant, or take a checkpoint that has the part itself"
        )
    return folder, found


def combined(files: Mapping[str, str]) -> str:
    """One short hash of several files'."""
    total = hashlib.sha256()
    for name, each in files.items():
        total.update(name.encode())
        total.update(bytes.fromhex(each))
    return total.hexdigest()[:16]


def fetch(uri: str, catalog: Catalog, *, lent: bool = False, under: tuple[str, ...] = ()) -> Path:
    """Where the checkpoint `uri` lies: a plugin's answer (`tiny:`), a folder, or a Hub name `org/name[@revision]`.

    `lent`: never a folder, which only happens to be called so. `under`: of the Hub, only JSON and files whose paths
    begin so, and all if it is empty. Raises CheckpointError.
    """
    answer = catalog.first("lens_fetch", uri)
    if answer is not None:
        return Path(answer)
    folder = Path(uri).expanduser()
    if not lent and (folder.is_dir() or (folder.is_file() and folder.suffix == ".safetensors")):
        return folder
    if not lent and folder.exists():
        raise CheckpointError(
            f"{uri}: is a file; a checkpoint is a folder with a lens.json or a model_index.json, or one .safetensors"
        )
    name, _, revision = uri.partition("@")
    if not hub.is_name(name):
        what = "no installed plugin knows that name" if lent else "no such folder"
        raise CheckpointError(f"{uri}: {what}, and not a Hub name (org/name[@revision]); `tiny:` is always there")
    return hub.snapshot(name, revision or None, under=under)


def describe(folder: Path, catalog: Catalog) -> dict[str, Any]:
    """The `lens.json` of a checkpoint, or what a plugin says that of this folder, or of this single file, would be."""
    path = folder / "lens.json"
    if path.is_file():
        data = read_json(path)
    else:
        data = catalog.first("lens_describe", folder)
        if data is None:
            refuse_foreign(folder) if folder.is_file() else None
            raise CheckpointError(f"{folder}: has neither lens.json nor a layout that an installed plugin knows")
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: is of format {shown(data.get('format'))}; this Lens reads {FORMAT}: upgrade lens-t2i"
        )
    components = data.get("components")
    if not isinstance(components, dict) or not all(
        isinstance(c, dict)
        and isinstance(c.get("use"), str)
        and isinstance(c.get("config", {}), dict)
        and isinstance(c.get("file", ""), str)
        and not Path(c.get("file", "")).is_absolute()
        and ".." not in Path(c.get("file", "")).parts
        for c in components.values()
    ):
        raise CheckpointError(f"{path}: has no components that each name what they use")
    for kind, c in components.items():
        if "from" in c and not (
            kind in hub.FOLDERS and lends(c["from"]) and re.fullmatch("[0-9a-f]{16}", str(c.get("hash")))
        ):
            raise CheckpointError(
                f"{path}: its {shown(kind)} is to come from {shown(c['from'])} at {shown(c.get('hash'))}; a vae, "
                "text_encoder or backbone comes from org/name@revision or a plugin's name such as tiny:, at a hash of "
                "16 digits"
            )
    for name, sound in {"presets": _presets, "plugins": _texts, "provenance": _provenance}.items():
        if not sound(data.get(name, {})):
            raise CheckpointError(f"{path}: its {name} cannot be meant; mend it, or fetch it again")
    if not _files(data.get("files", {})):
        raise CheckpointError(f"{path}: its files are no paths with a SHA-256 each; mend it, or fetch it again")
    if not isinstance(data.get("note", ""), str):
        raise CheckpointError(f"{path}: its note is no text; mend it, or fetch it again")
    return data


def lends(uri: Any) -> bool:
    """Whether a checkpoint may name this as the one that lends it a part: no path, which is another's elsewhere."""
    name = r"\w[\w.-]*"
    return isinstance(uri, str) and bool(re.fullmatch(rf"\w+:[\w-]*|{name}/{name}(@{name}(/{name})*)?", uri, re.ASCII))


def _presets(given: Any) -> bool:
    """Whether a pipeline can draw with these."""

    def table(sizes: Any) -> bool:
        return isinstance(sizes, dict) and all(
            isinstance(s, list | tuple) and len(s) == 2 and all(PIXELS.allows(n) for n in s) for s in sizes.values()
        )

    if not (isinstance(given, dict) and isinstance(given.get("sizes", {}), dict)):
        return False
    return (
        GUIDANCE.allows(given.get("guidance_scale", 1.0))
        and STEPS.allows(given.get("steps", 1))
        and PIXELS.allows(given.get("base_resolution", 1))
        and all(map(table, given.get("sizes", {}).values()))
    )


def _texts(given: Any) -> bool:
    return isinstance(given, dict) and all(isinstance(value, str) for value in given.values())


def _files(given: Any) -> bool:
    """Whether these are paths below a checkpoint's folder, each with a SHA-256 in hexadecimal digits."""
    return isinstance(given, dict) and all(
        isinstance(digest, str)
        and re.fullmatch("[0-9a-f]{64}", digest)
        and name.isprintable()
        and not re.search(r"^[/~]|^$|\\|:|(^|/)\.{1,2}(/|$)", name)
        for name, digest in given.items()
    )


def _provenance(given: Any) -> bool:
    loras = given.get("loras", []) if isinstance(given, dict) else None
    return (
        isinstance(loras, list)
        and all(isinstance(name, str) for name in loras)
        and isinstance(given.get("recipe", {}), dict)
        and _texts({key: value for key, value in given.items() if key not in ("loras", "recipe")})
    )
