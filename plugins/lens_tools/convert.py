"""A checkpoint from one layout to another, or to another dtype, a piece of a tensor at a time.

`diffusers` is the folder that Lens reads and writes; `single` is one file a part, where Comfy looks for it. Peak memory
is that of the largest layer that has to be unpacked, not that of the model.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from lens_core.catalog import Catalog
from lens_core.checkpoints import hub, manifest, model_card, tensor_files
from lens_core.checkpoints.lazy_tensors import LazyTensor, read_lazy, write_lazy
from lens_core.inference.parts import DEFAULT_PRESETS, MODEL_PARTS, PIPELINE_PARTS
from lens_core.inference.saving import CheckpointContent, save_about
from lens_core.io import atomic_files
from lens_core.recipe import ComponentSpec, build, unstructure
from lens_core.types import CheckpointError, ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = ("diffusers", "single")
STRAY = ("dtype", "torch_dtype", "architectures", "transformers_version", "local_files_only")
"""What transformers notes in a JSON file of how it was called, beside names that begin with _."""


@frozen
class _Part:
    """One part of a checkpoint on disk: its component, that on the meta device, and its tensors."""

    name: str
    component: Any
    model: Any  # None: the part comes from a folder, `root`, where files describe it
    use: ComponentSpec
    tensors: dict[str, LazyTensor]
    root: Path


def convert(
    source: Path, out: Path, layout: str, dtype: str | None, catalog: Catalog, share: str | None = None
) -> list[Path]:
    """Write the parts of `source`, a folder of either layout or a single file, to `out` -> the files with weights.

    `out` is a folder, or, for a `source` of one part, a .safetensors file. Quantised weights of Comfy become plain
    ones; experts in MXFP4, which transformers reads, stay. `dtype`: bf16, fp32 or None, floats as they are. `share` is
    a checkpoint by its name: parts that are the same there, weight for weight, are named and not written. Raises
    CheckpointError and ConfigError; then nothing is left of `out`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"no dtype is called {dtype!r}; use bf16 or fp32")
    if layout not in LAYOUTS:
        raise ConfigError(f"no layout is called {layout!r}; use diffusers or single")
    described = manifest.read_manifest(source, catalog)
    parts = [
        _open(source, name, described["components"], catalog) for name in MODEL_PARTS if name in described["components"]
    ]
    if share is not None and (layout != "diffusers" or dtype is not None or len(parts) != len(MODEL_PARTS)):
        raise ConfigError(f"{share}: parts are shared by whole checkpoints as they are; leave --layout and --dtype out")
    if share is not None and not manifest.is_shareable_uri(share):
        raise ConfigError(f"{share}: is no name that holds everywhere; use a Hub id org/name@revision, or tiny:")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out}: is there already; choose a new name")
    one_file = out.suffix == ".safetensors"
    if one_file and (len(parts) != 1 or layout != "single"):
        held = ", ".join(part.name for part in parts)
        raise ConfigError(f"{out}: one file is for one part, with --layout single; {source} has {held}: give a folder")
    shared = _shared(parts, described["components"], share, catalog) if share is not None else {}
    kind = DTYPES[dtype] if dtype else None
    _check_space(out, [part for part in parts if part.name not in shared], kind)
    if one_file:
        _write_single(parts[0], out, kind)
        return [out]
    if layout == "diffusers" and len(parts) == len(MODEL_PARTS):
        described["provenance"] = described.get("provenance", {}) | model_card.licence(source)
    return _write_checkpoint(parts, described, out, layout, kind, catalog, shared)


def _check_space(out: Path, parts: list[_Part], kind: torch.dtype | None) -> None:
    """Raise CheckpointError where the disk has not enough room for the weights of `parts`."""
    need = sum(math.prod(t.shape) * t.kind(kind).itemsize for part in parts for t in part.tensors.values())
    parent = next(p for p in out.absolute().parents if p.is_dir())
    if (free := shutil.disk_usage(parent).free) < need:
        raise CheckpointError(
            f"{parent}: {need / 1e9:.1f} GB are needed and {free / 1e9:.1f} free; choose another disk"
        )


def _write_checkpoint(
    parts: list[_Part], described: dict[str, Any], out: Path, layout: str, kind: torch.dtype | None, catalog: Catalog,
    shared: dict[str, dict[str, str]],
) -> list[Path]:  # fmt: skip
    """Write a folder with every part that is not `shared`; it appears whole or not at all -> the files with weights."""
    place = out.absolute()  # "." has no name
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        files = []
        for part in parts:
            if part.name in shared:
                continue
            folder, stem = part.component.place
            files.append(part.component.single if layout == "single" else f"{folder}/{stem}.safetensors")
            (_write_single if layout == "single" else _write_folder)(part, partial / files[-1], kind)
        if layout == "diffusers" and len(parts) == len(MODEL_PARTS):
            _describe(parts, described, partial, catalog, shared)
        if out.is_dir():  # and empty; it may be the one that we are in, so it stays, and lens.json comes last
            for path in sorted(partial.iterdir(), key=lambda p: p.name == "lens.json"):
                path.rename(out / path.name)
        else:
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [out / file for file in files]


def _open(source: Path, part: str, components: dict[str, Any], catalog: Catalog) -> _Part:
    about = components[part]
    use = ComponentSpec(about["use"], dict(about.get("config", {})))
    name, component, config = build(catalog, part, use, f"{source}: components.{part}")
    if not hasattr(component, "from_header"):
        raise ConfigError(f"{source}: {name} is known in one layout alone and cannot be converted")
    home = manifest.resolve_shared_part(part, about, source, catalog)[0] if "from" in about else source
    root = home if home.is_dir() else home.parent
    if "file" in about:
        model, config, tensors = component.from_header(root / about["file"], config, root, plain=True)
        return _Part(part, component, model, ComponentSpec(name, unstructure(config)), tensors, root)
    folder, stem = component.place
    tensors, _ = read_lazy(*tensor_files.files(root / folder, stem))
    tensor_files.refuse_bare_float8(tensors, root / folder)
    return _Part(part, component, None, ComponentSpec(name, use.options), tensors, root)


def _shared(parts: list[_Part], components: dict[str, Any], share: str, catalog: Catalog) -> dict[str, dict[str, str]]:
    """Part -> what `lens.json` says of it, for each that is the same in the checkpoint `share` or shared already."""
    source = manifest.resolve_uri(share, catalog, shared=True)
    name, _, _ = share.partition("@")
    pinned = f"{name}@{source.name}" if hub.is_name(name) else share  # the Hub's folders are called by their commits
    theirs = manifest.read_manifest(source, catalog)["components"]
    shared: dict[str, dict[str, str]] = {}
    matched = False
    for part in parts:
        if part.name in theirs and _same(part, other := _open(source, part.name, theirs, catalog)):
            about, matched = theirs[part.name], True
            shared[part.name] = _shared_entry(about)
            if "from" not in about:  # else it is passed on as it is
                hashes = manifest.hashes(other.root, manifest.file_prefixes(part.name, about))
                shared[part.name] |= {"from": pinned, "hash": manifest.combined(hashes)}
        elif "from" in components[part.name]:
            shared[part.name] = _shared_entry(components[part.name])
    if not matched:
        raise ConfigError(f"{share}: has no part that is the same in this checkpoint; there is nothing to share")
    return shared


def _shared_entry(component: dict[str, Any]) -> dict[str, str]:
    """The keys of a part in `lens.json` that name another place than its folder in this checkpoint."""
    return {name: component[name] for name in ("from", "hash", "file") if name in component}


def _same(one: _Part, two: _Part) -> bool:
    """Whether two parts are alike: their configs, every weight to the last bit, in whatever dtype, and what is beside.

    One tensor of each is in memory at a time."""
    return (one.use, one.tensors.keys(), _descriptions(one)) == (
        two.use,
        two.tensors.keys(),
        _descriptions(two),
    ) and all(_equal(tensor, two.tensors[name]) for name, tensor in one.tensors.items())


def _descriptions(part: _Part) -> dict[str, Any]:
    """The contents of the files that describe a part, without the keys that saving alone changes."""
    if part.model is not None:
        return {}
    contents: dict[str, Any] = {}
    for file in _files_about(part):
        if file.name == manifest.PREVIEW_FILE:
            continue
        name = f"{file.parent.name}/{file.name}"
        if file.suffix == ".json":
            contents[name] = {k: v for k, v in atomic_files.read_json(file).items() if k not in STRAY and k[:1] != "_"}
        else:
            contents[name] = file.read_bytes()
    return contents


def _files_about(part: _Part) -> list[Path]:
    """The files in a part's folder and those beside it that are no weights."""
    return [
        file
        for folder in (part.component.place[0], *getattr(part.component, "companion_folders", ()))
        for file in sorted((part.root / folder).glob("*"))
        if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json")
    ]


def _equal(one: LazyTensor, two: LazyTensor) -> bool:
    kinds = one.kind(torch.float32), two.kind(torch.float32)
    return one.shape == two.shape and kinds[0] == kinds[1] and torch.equal(one.read(kinds[0]), two.read(kinds[0]))


def _write_single(part: _Part, path: Path, dtype: torch.dtype | None) -> None:
    tensors, texts = dict(part.tensors), {}
    if hasattr(part.component, "extras"):
        more, texts = part.component.extras(part.model or part.root)
        tensors |= more
    write_lazy(path, tensors, dtype, texts)


def _write_folder(part: _Part, path: Path, dtype: torch.dtype | None) -> None:
    """Write the weights to `path`, in the sub-folder of the part, and beside them what describes it."""
    root = path.parent.parent
    if part.model is not None:
        part.model.save_about(root)
    else:
        for file in _files_about(part):
            (root / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, root / file.parent.name / file.name)
    about = atomic_files.read_json(path.with_name("config.json"))
    floats = {t.kind(dtype) for t in part.tensors.values() if t.dtype.is_floating_point}
    if len(floats) == 1:
        float_name = str(floats.pop()).removeprefix("torch.")
        about |= {name: float_name for name in ("dtype", "torch_dtype") if name in about}
        atomic_files.write_json(path.with_name("config.json"), about)
    write_lazy(path, part.tensors, dtype)


def _describe(
    parts: list[_Part], described: dict[str, Any], out: Path, catalog: Catalog, shared: dict[str, dict[str, str]]
) -> None:
    """Make a folder a checkpoint: `model_index.json` and `lens.json`, last."""
    others = {k: ComponentSpec(v["use"], dict(v.get("config", {}))) for k, v in described["components"].items()}
    specs = {k: others[k] for k in PIPELINE_PARTS if k in others} | {part.name: part.use for part in parts}
    names = sorted({spec.use.partition(":")[0] for spec in specs.values()})
    components = {part.name: part.component for part in parts}  # the class: the part itself is there, on disk
    for kind, spec in specs.items():
        if kind not in MODEL_PARTS:
            _, cls, config = build(catalog, kind, spec, f"components.{kind}")
            components[kind] = cls(config)
    content = CheckpointContent(
        components,
        specs,
        presets=DEFAULT_PRESETS | described.get("presets", {}),
        plugins={n: v for n in names if (v := catalog.version(n))},
        provenance=described.get("provenance", {}),
        catalog=catalog,
    )
    save_about(content, out, shared)
