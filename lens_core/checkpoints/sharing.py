"""A checkpoint by its name: is it whole (`check_model`), and put it on the Hugging Face Hub (`push_model`)."""

from __future__ import annotations

from attrs import frozen

from lens_core.catalog import Catalog
from lens_core.checkpoints import hub, integrity, manifest
from lens_core.io import atomic_files
from lens_core.types import LensError


@frozen
class ModelCheck:
    """`problems` and `shared` are a line each; `digest` is the checkpoint's hash, "" where there are problems."""

    problems: tuple[str, ...]
    shared: tuple[str, ...]  # parts that another checkpoint holds, and that are unchanged there
    digest: str
    hashed: int | None  # files compared with their hashes; None where the checkpoint holds none
    well_formed: int  # files without hashes that are whole as far as their formats say


def check_model(uri: str, catalog: Catalog) -> ModelCheck:
    """Read every file of a checkpoint and of the parts it shares, and compare with what was written.

    Raises CheckpointError where there is no such checkpoint.
    """
    folder = manifest.resolve_uri(uri, catalog)
    described = manifest.read_manifest(folder, catalog)
    report = integrity.check(folder, described)
    problems, shared = list(report.problems), []
    for part, component in described["components"].items():
        if "from" in component:
            try:
                manifest.resolve_shared_part(part, component, folder, catalog)
                shared.append(f"{part}: that of {component['from']}, unchanged")
            except LensError as error:
                problems.append(str(error))
    digest = "" if problems else manifest.digest(folder)
    return ModelCheck(tuple(problems), tuple(shared), digest, report.named, report.well_formed)


def push_model(uri: str, repo: str, catalog: Catalog, *, private: bool = False, message: str | None = None) -> str:
    """Upload a checkpoint to the Hub repository `repo`, made if need be, in one commit; returns its address.

    Raises CheckpointError for a checkpoint that is not whole or a Hub that refuses, ConfigError for a bad name.
    """
    folder = manifest.resolve_uri(uri, catalog)
    described = manifest.read_manifest(folder, catalog)
    # Other tools load by this file: without it nothing is made on the Hub.
    atomic_files.read_json(folder / "model_index.json")
    if "files" not in described:  # a checkpoint without hashes gets them with its first upload
        uploaded = {*hub.named(folder, described)} - {"lens.json"}
        described["files"] = {n: h for n, h in manifest.hashes(folder).items() if n in uploaded}
    hub.create(repo, private=private)
    return hub.upload(folder, described, repo, message=message)
