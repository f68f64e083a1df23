"""Write a pipeline as a checkpoint, to a folder or to the Hub: the diffusers layout, a model card and `lens.json`."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from lens_core.catalog import Catalog
from lens_core.checkpoints import hub, integrity, manifest, model_card
from lens_core.checkpoints.latent_preview import LatentPreview
from lens_core.inference.parts import MODEL_PARTS, PIPELINE_PARTS
from lens_core.io import atomic_files
from lens_core.recipe import ComponentSpec, build, unstructure
from lens_core.types import CheckpointError, LensError

SAMPLER_FILE = "scheduler/scheduler_config.json"
"""The sampler, for other tools."""
UNFINISHED = "lens.json.unfinished"
"""What stands in a folder while a checkpoint is written: after Ctrl-C or a full disk, it may be written there again."""
FOREIGN = "foreign"
"""What the file `UNFINISHED` lists beside the description of the checkpoint that stood there before, if there was one:
the files that were no checkpoint's."""


@frozen
class CheckpointContent:
    """What a checkpoint is written from. `specs` say how each part is built again; plugins: name -> version."""

    parts: Mapping[str, Any]
    specs: Mapping[str, ComponentSpec]
    presets: Mapping[str, Any]
    plugins: Mapping[str, str]
    provenance: Mapping[str, Any]
    catalog: Catalog | None
    preview: LatentPreview | None = None  # the map of step previews that was fitted to the VAE

    def named(self) -> dict[str, ComponentSpec]:
        """The specs of all parts. Raises LensError for a part that was assigned without one."""
        present = [kind for kind in PIPELINE_PARTS if self.parts.get(kind) is not None]
        missing = [kind for kind in present if kind not in self.specs]
        if missing:
            raise LensError(
                f"{' and '.join(missing)} was put in by hand: say how to find it again before it is saved, "
                f'pipeline.specs[{missing[0]!r}] = ComponentSpec("plugin:name", {{…}})'
            )
        return {kind: self.specs[kind] for kind in present}

    def check_savable(self, kinds: Sequence[str]) -> None:
        """Raise LensError for what could not be read back: a part without a spec, or one of `kinds` without `save`."""
        named = self.named()
        for kind in kinds:
            if kind in named and not callable(getattr(self.parts[kind], "save", None)):
                raise LensError(
                    f"{kind}: {type(self.parts[kind]).__name__} has no save(folder), so no checkpoint can hold it"
                )
        if self.catalog is not None:
            for kind, spec in named.items():
                build(self.catalog, kind, spec, f"pipeline.specs[{kind!r}]")

    def plugin_versions(self) -> dict[str, str]:
        """The plugins that provide the parts -> their versions, as far as they are known."""
        names = sorted({spec.use.partition(":")[0] for spec in self.named().values() if ":" in spec.use})
        now = {n: self.catalog.version(n) if self.catalog is not None else "" for n in names}
        return {n: v for n in names if (v := self.plugins.get(n) or now[n])}


def save_pretrained(content: CheckpointContent, folder: str | Path) -> None:
    """Write a checkpoint. Raises LensError before anything is touched if a part cannot be saved."""
    root = Path(folder).expanduser()
    content.check_savable(MODEL_PARTS)
    if root.exists() and not root.is_dir():
        raise CheckpointError(f"{root}: is a file; choose a new folder")
    root.mkdir(parents=True, exist_ok=True)
    present, unfinished = root / "lens.json", root / UNFINISHED
    empty = not any(root.iterdir())
    if not empty and not present.is_file() and not unfinished.is_file():
        raise CheckpointError(f"{root}: is not empty and not a checkpoint; choose a new folder")
    # `lens.json` goes first and comes last: without it nothing is read, so that half a checkpoint is never loaded.
    before = integrity.stamps(root)
    described = {"files": {}} if empty else _described(present if present.is_file() else unfinished)
    if present.is_file() or _listed(described, FOREIGN) is None:
        # The description stays readable: a save that fails has perhaps touched nothing yet, and it can be put back.
        described |= {FOREIGN: _foreign(described, before)}
        atomic_files.write_json(unfinished, described)
        present.unlink(missing_ok=True)
    for kind in MODEL_PARTS:
        if content.parts.get(kind) is not None:
            content.parts[kind].save(root)
    if content.preview is not None:
        content.preview.write(root)
    else:
        (root / "vae" / manifest.PREVIEW_FILE).unlink(missing_ok=True)  # that of a checkpoint which stood here before
    _remove_leftovers(content, root, before, described)
    save_about(content, root, before=before)
    unfinished.unlink()


def _described(path: Path) -> dict[str, Any]:
    """What a JSON file says; nothing where it cannot be read."""
    try:
        return atomic_files.read_json(path)
    except (LensError, OSError):
        return {}


def _listed(described: Mapping[str, Any], key: str) -> Collection[str] | None:
    """The names of files that a description holds; None where it has no such list."""
    names = described.get(key)
    return names if isinstance(names, Mapping | list) else None


def _foreign(described: Mapping[str, Any], there: Collection[str]) -> list[str]:
    """The files that are `there` beside those of a checkpoint. One that names none has all of them."""
    named = _listed(described, "files")
    return [name for name in there if named is not None and name not in named]


def _remove_leftovers(
    content: CheckpointContent, root: Path, before: integrity.Stamps, described: Mapping[str, Any]
) -> None:
    """Remove, of the parts that have been written, what a checkpoint held that stood here before: shards, an index or a
    config that the new part does not have; of every part, what a save that was not finished added to that checkpoint.
    The sampler's config goes; `save_about` writes that of the new one. Foreign files stay: somebody else put them
    there."""
    now, foreign, complete = integrity.stamps(root), _listed(described, FOREIGN) or (), _listed(described, "files")
    parts = {folder: kind for kind in MODEL_PARTS for folder in hub.FOLDERS[kind]}
    for name in (name for name, stamp in before.items() if now.get(name) == stamp and name not in foreign):
        folder, _, file = name.rpartition("/")
        kind = parts.get(f"{folder}/")
        written = kind is not None and content.parts.get(kind) is not None
        added = kind is not None and complete is not None and name not in complete
        if name == SAMPLER_FILE or ((written or added) and hub.is_layout_file(file)):
            (root / name).unlink()


def save_about(
    content: CheckpointContent,
    root: Path,
    shared: Mapping[str, Mapping[str, str]] | None = None,
    before: integrity.Stamps | None = None,
) -> None:
    """Write what describes a checkpoint in `root`, beside the sub-folders of its parts.

    shared: part -> `from` and `hash`, for each that belongs to another checkpoint.
    before: the files that were there before the parts were written, and are not the checkpoint's.
    """
    shared = shared or {}
    content.check_savable(())
    sampler: Any = content.parts.get("sampler")
    if hasattr(sampler, "save"):  # one that other tools have too
        sampler.save(root)
    atomic_files.write_json(root / "model_index.json", model_index(content.parts, shared))
    description = {
        "format": manifest.FORMAT,
        "components": {
            kind: {"use": spec.use, "config": unstructure(spec.options), **shared.get(kind, {})}
            for kind, spec in content.named().items()
        },
        "presets": content.presets,
        "plugins": content.plugin_versions(),
        "provenance": content.provenance,
        "files": integrity.recorded(root, before or {}),
    }
    card = root / model_card.FILE
    if model_card.may_replace(card):  # a card that a person wrote or changed stays
        atomic_files.write_text(card, model_card.text(description))
    atomic_files.write_json(root / "lens.json", description)


def model_index(parts: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' index: all that other tools can find here, by the names that each component gives itself."""
    index: dict[str, Any] = {"_class_name": "LensPipeline"}
    for kind in PIPELINE_PARTS:
        if kind not in shared:
            entries = getattr(parts.get(kind), "model_index", {})
            index |= {folder: list(names) for folder, names in entries.items()}
    return index


def push_to_hub(
    content: CheckpointContent, repo_id: str, *, private: bool = False, token: str | None = None, message: str | None
) -> str:
    """Upload a checkpoint in one commit, to a repository that is made if need be; return its address.

    Raises CheckpointError, for one if `private` and the repository is public.
    """
    hub.create(repo_id, private=private, token=token)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_pretrained(content, folder)
        description = atomic_files.read_json(folder / "lens.json")
        return hub.upload(folder, description, repo_id, token=token, message=message)
