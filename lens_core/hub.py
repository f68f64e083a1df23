"""The Hugging Face Hub: checkpoints from it, never when offline, and to it, whole in one commit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from lens_core.types import CheckpointError

FILES = ("*.json", "*.safetensors", "*.jinja")
"""What a checkpoint consists of; nothing else is fetched."""


def is_name(text: str) -> bool:
    """Whether `text` can be a repository, org/name."""
    return text.count("/") == 1 and not any(c in text for c in ": \\~") and not text.startswith((".", "/"))


def snapshot(name: str, revision: str | None = None, *, local: bool = False) -> Path:
    """The folder of the repository `name` at a branch, tag or commit.

    Offline (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE), or if `local`, it is what the Hub's cache holds, if that is whole.
    HF_ENDPOINT names another Hub. Raises CheckpointError, which names what is missing.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    where = f"{name}@{revision}" if revision else name
    local = local or constants.is_offline_mode()
    cure = f"with a network, `hf download {name}{f' --revision {revision}' if revision else ''}` brings it"
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*FILES], local_files_only=local))
        lacking = _lacking(folder, _sharded(folder)) if local else []
    except IncompleteSnapshotError as error:
        from huggingface_hub import get_cached_repo_tree

        folder = Path(error.snapshot_path)
        listed = [f.path for f in get_cached_repo_tree(name, revision=revision)]
        lacking = _lacking(folder, [p for p in listed if any(fnmatch(p, pattern) for pattern in FILES)])
    except Exception as error:  # the Hub's client raises its own, httpx's and plain OSErrors
        if not (local and isinstance(error, LocalEntryNotFoundError)):
            raise CheckpointError(f"{where}: cannot be fetched from the Hub: {_reason(error)}; {cure}") from error
        lacking = ["model_index.json"]
    if lacking:
        more = f" and {len(lacking) - 1} more are" if len(lacking) > 1 else " is"
        raise CheckpointError(f"{where}: {lacking[0]}{more} not in the cache, and nothing is fetched offline; {cure}")
    return folder


def _lacking(folder: Path, files: list[str]) -> list[str]:
    return [name for name in files if not (folder / name).is_file()]


def _sharded(folder: Path) -> list[str]:
    """What a snapshot whose listing is not known must hold, as far as its own files tell."""
    files = [] if (folder / "lens.json").is_file() else ["model_index.json"]
    for index in sorted(folder.rglob("*.safetensors.index.json")):
        try:
            shards = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            continue  # whoever reads it says what is wrong with it
        files += [str(index.relative_to(folder).with_name(n)) for n in sorted(shards) if Path(n).name == n != ""]
    return files


def _reason(error: Exception, token: str | None = None) -> str:
    """One line, without the token, that says what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cures: Mapping[type[Exception], str] = {  # the first match counts
        GatedRepoError: "it is gated; accept its terms on its page, and run `hf auth login`",
        RepositoryNotFoundError: "there is none of that name, or it is private; then run `hf auth login`",
        RevisionNotFoundError: "it has no such branch, tag or commit",
    }
    cure = next((cure for kind, cure in cures.items() if isinstance(error, kind)), None)
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return cure or (text.replace(token, "(token)") if token else text)
