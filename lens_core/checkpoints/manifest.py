"""`lens.json`, the manifest of a checkpoint: read it, validate it, resolve the parts it shares, hash its files.

A checkpoint is the published diffusers folder layout plus `lens.json`:
`{"format": 1, "components": {kind: {"use", "config"}}, "presets": {"steps", "guidance_scale"}, "plugins": {name: …},
"files": {path: SHA-256}}`; `files` is what `lens_core.checkpoints.integrity` checks.
A component with `"from"` is shared: its files are those of another checkpoint, a Hub name or a plugin's, such as
`tiny:`, and `"hash"` identifies them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lens_core.catalog import Catalog
from lens_core.checkpoints import hub
from lens_core.checkpoints.tensor_files import refuse_foreign
from lens_core.io.atomic_files import read_json
from lens_core.io.progress import progress
from lens_core.io.readers import shown
from lens_core.types import CheckpointError, LensError
from lens_core.validators import GUIDANCE, PIXELS, STEPS

FORMAT = 1
"""The version of `lens.json`."""
PREVIEW_FILE = "latent_preview.json"
"""In `vae/`, the map of step previews. It decides no picture, so it may be fitted later: no hash counts it."""
SINGLE_FILES = (".safetensors", ".gguf")
"""How the names of files end that may hold a model alone."""
DECIDING = (*SINGLE_FILES, ".json", ".jinja")
"""How the names of files end that decide what a checkpoint draws."""


def hash_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(folder: Path) -> str:
    """A short hash of a checkpoint: of all that decides what it draws, names included, or of one file."""
    return combined(hashes(folder))


def hashes(folder: Path, under: tuple[str, ...] = ("",)) -> dict[str, str]:
    """The hash of every file of weights, JSON or chat template below `folder`, by its path; of a file, its own.
    A preview's map is not counted.

    `under`: of those alone whose path begins so. Large files of the Hub's cache are named by their hash there, and are
    not read for it."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in DECIDING and p.name != PREVIEW_FILE and p.is_file())
    paths = {str(path.relative_to(folder)): path for path in (files if folder.is_dir() else [folder])}
    wanted = {name: path for name, path in paths.items() if name.startswith(under)}
    entries = progress(wanted.items(), "file", desc=f"hash {folder.name}", delay=1)
    return {name: hub.known_hash(path) or hash_of(path) for name, path in entries}


def file_prefixes(part: str, component: Mapping[str, Any]) -> tuple[str, ...]:
    """What the paths of a part's files begin with: its folders, and its single file if it has one."""
    return (*hub.FOLDERS[part], *([component["file"]] if "file" in component else ()))


def resolve_shared_part(
    part: str, component: Mapping[str, Any], where: Path, catalog: Catalog
) -> tuple[Path, dict[str, str]]:
    """Find the checkpoint whose `part` the one in `where` shares: its folder, and the hashes of the part's files there.

    Of the Hub, only what the part needs is fetched. Raises CheckpointError, also if the files are not those that were
    meant.
    """
    claim = f"{where / 'lens.json'}: its {part.replace('_', ' ')} is that of {component['from']}"
    under = file_prefixes(part, component)
    try:
        folder = resolve_uri(component["from"], catalog, shared=True, under=under)
        origin = read_manifest(folder, catalog)["components"].get(part)
    except LensError as error:
        raise CheckpointError(f"{claim}, which cannot be had: {error}") from error
    # Only one step: a chain of references could be a circle, and would change behind the reader's back.
    if origin is None or "from" in origin:
        raise CheckpointError(f"{claim}, which has none of its own; name the checkpoint that has")
    files = hashes(folder, under)
    if not files:
        raise CheckpointError(f"{claim}, which has no file in {' or '.join(under)}; fetch it again")
    if combined(files) != component["hash"]:
        raise CheckpointError(
            f"{claim} as it was at {component['hash']}, and it is at {combined(files)} now; "
            "name the revision that was meant, or take a checkpoint that has the part itself"
        )
    return folder, files


def combined(files: Mapping[str, str]) -> str:
    """One short hash of several files'."""
    total = hashlib.sha256()
    for name, each in files.items():
        total.update(name.encode())
        total.update(bytes.fromhex(each))
    return total.hexdigest()[:16]


def resolve_uri(uri: str, catalog: Catalog, *, shared: bool = False, under: tuple[str, ...] = ()) -> Path:
    """Where the checkpoint `uri` lies: a plugin's answer (`tiny:`), a folder, or a Hub name `org/name[@revision]`.

    `shared`: never a folder, which only happens to be called so. `under`: of the Hub, only JSON and files whose paths
    begin so, and all if it is empty. Raises CheckpointError.
    """
    answer = catalog.first("lens_fetch", uri)
    if answer is not None:
        return Path(answer)
    folder = Path(uri).expanduser()
    if not shared and (folder.is_dir() or (folder.is_file() and folder.suffix in SINGLE_FILES)):
        return folder
    if not shared and folder.exists():
        raise CheckpointError(
            f"{uri}: is a file; a checkpoint is a folder with a lens.json or a model_index.json, or one file, "
            ".safetensors or .gguf"
        )
    name, _, revision = uri.partition("@")
    if not hub.is_name(name):
        what = "no installed plugin knows that name" if shared else "no such folder"
        raise CheckpointError(f"{uri}: {what}, and not a Hub name (org/name[@revision]); `tiny:` is always there")
    return hub.snapshot(name, revision or None, under=under)


def read_manifest(folder: Path, catalog: Catalog) -> dict[str, Any]:
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
            kind in hub.FOLDERS and is_shareable_uri(c["from"]) and re.fullmatch("[0-9a-f]{16}", str(c.get("hash")))
        ):
            raise CheckpointError(
                f"{path}: its {shown(kind)} is to come from {shown(c['from'])} at {shown(c.get('hash'))}; a vae, "
                "text_encoder or backbone comes from org/name@revision or a plugin's name such as tiny:, at a hash of "
                "16 digits"
            )
    for name, sound in {"presets": _presets, "plugins": _texts, "provenance": _provenance}.items():
        if not sound(data.get(name, {})):
            raise CheckpointError(f"{path}: its {name} cannot be meant; fix it, or fetch it again")
    if not _files(data.get("files", {})):
        raise CheckpointError(f"{path}: its files are no paths with a SHA-256 each; fix it, or fetch it again")
    if not isinstance(data.get("note", ""), str):
        raise CheckpointError(f"{path}: its note is no text; fix it, or fetch it again")
    return data


def is_shareable_uri(uri: Any) -> bool:
    """Whether a checkpoint may name this as the origin of a shared part: no path, which differs elsewhere."""
    name = r"\w[\w.-]*"
    return isinstance(uri, str) and bool(re.fullmatch(rf"\w+:[\w-]*|{name}/{name}(@{name}(/{name})*)?", uri, re.ASCII))


def _presets(value: Any) -> bool:
    """Whether a pipeline can draw with these."""

    def table(sizes: Any) -> bool:
        return isinstance(sizes, dict) and all(
            isinstance(s, list | tuple) and len(s) == 2 and all(PIXELS.allows(n) for n in s) for s in sizes.values()
        )

    if not (isinstance(value, dict) and isinstance(value.get("sizes", {}), dict)):
        return False
    return (
        GUIDANCE.allows(value.get("guidance_scale", 1.0))
        and STEPS.allows(value.get("steps", 1))
        and PIXELS.allows(value.get("base_resolution", 1))
        and all(map(table, value.get("sizes", {}).values()))
    )


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _files(value: Any) -> bool:
    """Whether these are paths below a checkpoint's folder, each with a SHA-256 in hexadecimal digits."""
    return isinstance(value, dict) and all(
        isinstance(digest, str)
        and re.fullmatch("[0-9a-f]{64}", digest)
        and name.isprintable()
        and not re.search(r"^[/~]|^$|\\|:|(^|/)\.{1,2}(/|$)", name)
        for name, digest in value.items()
    )


def _provenance(value: Any) -> bool:
    loras = value.get("loras", []) if isinstance(value, dict) else None
    return (
        isinstance(loras, list)
        and all(isinstance(name, str) for name in loras)
        and isinstance(value.get("recipe", {}), dict)
        and _texts({key: text for key, text in value.items() if key not in ("loras", "recipe")})
    )
