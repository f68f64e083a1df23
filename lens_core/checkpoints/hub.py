"""The Hugging Face Hub: checkpoints from it, never when offline, and to it, whole in one commit."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lens_core.checkpoints import model_card
from lens_core.io import readers
from lens_core.io.progress import hub_bars
from lens_core.io.system_files import is_system_file
from lens_core.types import CheckpointError, ConfigError, LensError

FILES = ("*.json", "*.safetensors", "*.jinja", model_card.FILE)
"""What a checkpoint consists of; nothing else is fetched."""
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
ABOUT = (
    "config.json", "generation_config.json", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "latent_preview.json", "*.jinja",
)  # fmt: skip
"""What the folders of parts hold by custom: their weights, and what describes them."""
FOLDERS = {"vae": ("vae/",), "text_encoder": ("text_encoder/", "tokenizer/"), "backbone": ("transformer/",)}
"""Where the files of a part with weights lie in a checkpoint."""

SHARD = re.compile(r"(diffusion_pytorch_model|model)-\d{5}-of-\d{5}\.safetensors")


def _is_usual(name: str) -> bool:
    """Whether a file in the folder of a part is, by its name, its weights or what describes them."""
    return name in WEIGHTS or any(fnmatch(name, pattern) for pattern in ABOUT)


def is_layout_file(name: str) -> bool:
    """Whether a file in the folder of a part is one that checkpoints hold by custom, as far as it decides pictures."""
    return (_is_usual(name) and name != "latent_preview.json") or SHARD.fullmatch(name) is not None


def is_name(text: str) -> bool:
    """Whether `text` can be a repository, org/name."""
    return text.count("/") == 1 and not re.search(r"[:\\~\s]", text) and not text.startswith((".", "/"))


def origin(uri: str) -> dict[str, str]:
    """What a checkpoint's provenance says if it was read from `uri`: a folder's path is nobody's business."""
    name, _, _ = uri.partition("@")
    return {"base_model": name} if is_name(name) and not Path(uri).exists() else {}


def known_hash(path: Path) -> str | None:
    """The SHA-256 of a large file in the Hub's cache, which is its name there; None for any other file."""
    if not path.is_symlink() or not re.fullmatch("[0-9a-f]{64}", (file := path.resolve()).name):
        return None
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).resolve()
    return file.name if file.parent.name == "blobs" and file.is_relative_to(cache) else None


def snapshot(
    name: str,
    revision: str | None = None,
    *,
    local: bool = False,
    under: tuple[str, ...] = (),
    index: str = "model_index.json",
) -> Path:
    """The folder of the repository `name` at a branch, tag or commit. `under`: without the weights whose paths do not
    begin so. `index`: the file without which a repository that is no Lens checkpoint is not whole.

    Offline (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE), or if `local`, it is what the Hub's cache holds, if that is whole.
    HF_ENDPOINT names another Hub. Raises CheckpointError, which names what is missing.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    where = f"{name}@{revision}" if revision else name
    local = local or constants.is_offline_mode()
    patterns = [*FILES]
    if under:
        whole = tuple(u for u in under if u.endswith(".safetensors"))
        patterns = ["*.json", *whole, *(u + e for u in under if u not in whole for e in ("*.safetensors", "*.jinja"))]
    cure = f"with a network, `hf download {name}{f' --revision {revision}' if revision else ''}` brings it"
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local))
        lacking = _lacking(folder, [p for p in _sharded(folder, index) if p.startswith(under or "")]) if local else []
    except IncompleteSnapshotError as error:
        from huggingface_hub import get_cached_repo_tree

        folder = Path(error.snapshot_path)
        listed = [f.path for f in get_cached_repo_tree(name, revision=revision)]
        lacking = _lacking(folder, [p for p in listed if any(fnmatch(p, pattern) for pattern in patterns)])
    except Exception as error:  # the Hub's client raises its own, httpx's and plain OSErrors
        if not (local and isinstance(error, LocalEntryNotFoundError)):
            raise CheckpointError(f"{where}: cannot be fetched from the Hub: {_reason(error)}; {cure}") from error
        lacking = [index]
    if lacking:
        more = f" and {len(lacking) - 1} more are" if len(lacking) > 1 else " is"
        raise CheckpointError(f"{where}: {lacking[0]}{more} not in the cache, and nothing is fetched offline; {cure}")
    return folder


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _lacking(folder: Path, files: list[str]) -> list[str]:
    return [name for name in files if not is_file(folder / name)]


def _sharded(folder: Path, index: str = "model_index.json") -> list[str]:
    """What a snapshot whose listing is not known must hold, as far as its own files tell."""
    files = [] if (folder / "lens.json").is_file() else [index]
    for table in sorted(folder.rglob("*.safetensors.index.json")):
        try:
            shards = {str(name) for name in readers.parse_json(readers.read_bytes(table))["weight_map"].values()}
        except (LensError, ValueError, LookupError, AttributeError, TypeError):
            continue  # whoever reads it says what is wrong with it
        files += [str(table.relative_to(folder).with_name(n)) for n in sorted(shards) if Path(n).name == n != ""]
    return files


def named(folder: Path, described: Mapping[str, Any]) -> list[str]:
    """The files in `folder` that are the checkpoint's, by their paths: those that its `lens.json` names, those that are
    usual in the folders of its parts (weights by their names or an index, WEIGHTS, ABOUT), its card and its licences.
    """
    parts = tuple(p for part in described["components"] for p in FOLDERS.get(part, ()))
    weights = {*_sharded(folder), *(c["file"] for c in described["components"].values() if "file" in c)}
    names = ["lens.json", "model_index.json", "scheduler/scheduler_config.json", model_card.FILE, *weights]
    names += [p.name for pattern in ("LICENSE*", "NOTICE*") for p in folder.glob(pattern)]
    names += described.get("files", ())
    for path in folder.glob("*/*"):
        name = path.relative_to(folder).as_posix()
        if name.startswith(parts) and _is_usual(path.name):
            names.append(name)
    ours = {n for n in names if is_file(folder / n) and not is_system_file(n) and not _is_shared_file(n, described)}
    return sorted(ours)


def _is_shared_file(name: str, described: Mapping[str, Any]) -> bool:
    """Whether a file belongs to a part that another checkpoint shares."""
    shared = (p for part, c in described["components"].items() if "from" in c for p in FOLDERS[part])
    return name.startswith(tuple(shared))


def create(name: str, *, private: bool = False, token: str | None = None) -> None:
    """Make the repository `name`, unless it is there. Raises CheckpointError; so does a public one, if `private`."""
    from huggingface_hub import HfApi, constants

    if not is_name(name):
        raise ConfigError(f"{name!r} is no name for a repository; it must be org/name")
    if constants.is_offline_mode():
        raise CheckpointError(f"{name}: nothing is uploaded offline; unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE")
    try:
        api = HfApi(token=token)
        api.create_repo(name, private=private or None, exist_ok=True)
        public = private and not api.repo_info(name).private
    except Exception as error:  # as in `snapshot`
        raise CheckpointError(f"{name}: cannot be made on the Hub: {_reason(error, token)}") from error
    if public:
        raise CheckpointError(f"{name}: is there and public; make it private on its page, or choose another name")


def upload(
    folder: Path,
    described: Mapping[str, Any],
    name: str,
    *,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Make the checkpoint in `folder` the content of the repository `name`, in one commit; returns where it is.

    Only files that the checkpoint names go (`named`), and none if the repository has changed meanwhile.

    Weights of an earlier commit beside the new ones go, and parts that are shared now. The card says how
    to load `name`; one that a person wrote, there or here, stays as it is. Raises CheckpointError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    ours = named(folder, described)
    held = {n.rpartition("/")[0] for n in ours if n.endswith(".safetensors")}  # where weights are, by whatever name
    listed = [
        n for n in described.get("files", ()) if n.rpartition("/")[0] not in held and not _is_shared_file(n, described)
    ]
    lacking = _lacking(folder, [*_sharded(folder), *sorted(listed)])
    if lacking:
        raise CheckpointError(f"{folder / lacking[0]}: missing; only a whole checkpoint is uploaded")
    content: dict[str, Any] = {name: folder / name for name in ours}
    if "lens.json" not in content:  # its presets may hang on the name that the folder had here
        content["lens.json"] = json.dumps(described, indent=2).encode()
    if model_card.may_replace(folder / model_card.FILE):
        content[model_card.FILE] = model_card.text(described, name).encode()
    try:
        api = HfApi(token=token)
        head = api.repo_info(name).sha
        there = api.list_repo_files(name, revision=head)
        if model_card.FILE in there:
            with tempfile.TemporaryDirectory() as place:
                old = Path(api.hf_hub_download(name, model_card.FILE, revision=head, local_dir=place))
                if not model_card.may_replace(old):
                    del content[model_card.FILE]
        folders = {path.rpartition("/")[0] for path in content} - {""}
        shared = tuple(p for part, c in described["components"].items() if "from" in c for p in FOLDERS[part])
        stale = [
            path
            for path in there
            if path not in content
            and (path.startswith(shared) or (path.rpartition("/")[0] in folders and ".safetensors" in path))
        ]
        steps = [CommitOperationAdd(path, source) for path, source in content.items()]
        steps += [CommitOperationDelete(path) for path in stale]
        # What somebody else has put there since is not overwritten: the Hub refuses a commit on another parent.
        with hub_bars():
            api.create_commit(
                name, steps, commit_message=message or "Upload a checkpoint with Lens", parent_commit=head
            )
    except Exception as error:  # as in `snapshot`
        raise CheckpointError(f"{name}: cannot be uploaded: {_reason(error, token)}") from error
    return f"{api.endpoint}/{name}"


def _reason(error: Exception, token: str | None = None) -> str:
    """One line, without the token, that says what to do."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cures: Mapping[type[Exception], str] = {  # the first match counts
        GatedRepoError: "it is gated; accept its terms on its page, and run `hf auth login`",
        RepositoryNotFoundError: "there is none of that name, or it is private; then run `hf auth login`",
        RevisionNotFoundError: "it has no such branch, tag or commit",
    }
    cure = next((cure for kind, cure in cures.items() if isinstance(error, kind)), None)
    if getattr(getattr(error, "response", None), "status_code", 0) == 412:
        cure = "somebody has changed it meanwhile; look at what is there now, and push again"
    if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
        cure = cure or "your token may not do that; run `hf auth login` with one that can write"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for secret in {token, get_token()} - {None, ""}:
        text = text.replace(str(secret), "(token)")
    return cure or text[:200]
