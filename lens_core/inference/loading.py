"""Read the parts of a checkpoint: from its folder, from the checkpoints it shares parts with, or from single files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from attrs import field, fields, frozen
from torch import nn

from lens_core.arguments import texts
from lens_core.catalog import Catalog
from lens_core.checkpoints import hub, integrity, manifest, model_card
from lens_core.inference.offload_plans import Workload
from lens_core.inference.parts import MODEL_PARTS, PIPELINE_PARTS, PartReader, PartStore, check_dtype
from lens_core.io.progress import progress_bar
from lens_core.io.readers import shown
from lens_core.recipe import ComponentSpec, build, unstructure
from lens_core.types import CheckpointError, ConfigError, did_you_mean

KEYWORDS = ("catalog", "device", "dtype", "offload", "reasoner")
"""The keywords of `from_pretrained` beside the fields of `LoadOptions`."""


def _part_names(option: str, value: Any) -> tuple[str, ...]:
    """One name of a part, or several, in the option of this name. Raises ConfigError."""
    names = tuple(value) if isinstance(value, Set) else tuple(texts(option, value))
    for name in names:
        if name not in PIPELINE_PARTS:
            raise ConfigError(f"a pipeline has no part {name!r}.{did_you_mean(name, PIPELINE_PARTS)}")
    return names


def _parts(value: Any) -> tuple[str, ...]:
    return _part_names("parts", value)


def _deferred(value: Any) -> tuple[str, ...]:
    return _part_names("deferred", value)


@frozen(kw_only=True)
class LoadOptions:
    """What `LensPipeline.from_pretrained` takes besides the checkpoint, its dtype and its device.

    parts: which parts to read.
    backbone, text_encoder, vae: a single .safetensors or .gguf file that replaces that part, or adds one that is not
        there.
    torch_dtype: what diffusers calls `dtype`.
    prompt_cache: a folder that keeps features of prompts; the text encoder is then read when a new prompt comes.
    verify: first compare every file with its hash in `lens.json`.
    deferred: parts with weights that are read when they are first used.
    workload: the pipeline -> what will be drawn, for the offload plan.
    sampler: the name or spec of a sampler to draw with instead of the checkpoint's.
    variant, revision: of diffusers; None alone, since files of a variant differ in dtype, which `dtype` chooses, and a
        revision is written into the name, `org/name@revision`.
    """

    parts: Sequence[str] = field(default=PIPELINE_PARTS, converter=_parts)
    backbone: str | Path | None = None
    text_encoder: str | Path | None = None
    vae: str | Path | None = None
    torch_dtype: str | torch.dtype | None = None
    prompt_cache: str | Path | None = None
    verify: bool = False
    deferred: Collection[str] = field(default=(), converter=_deferred)
    workload: Callable[[Any], Workload] | None = None
    sampler: str | ComponentSpec | None = None
    variant: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """The options by name. Raises ConfigError for a name that there is not, and for a wrong value."""
        names = [attribute.name for attribute in fields(cls)]
        for name in options:
            if name not in names:
                raise ConfigError(f"from_pretrained has no option {name!r}.{did_you_mean(name, [*names, *KEYWORDS])}")
        return cls(**options)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.sampler, str | ComponentSpec | None):
            raise ConfigError(
                f"sampler must be a name or a ComponentSpec, not {shown(self.sampler)}; assign pipeline.sampler instead"
            )
        if self.variant is not None:
            raise ConfigError(f"variant={self.variant!r}: Lens reads one set of files; choose the precision by dtype")
        if self.revision is not None:
            raise ConfigError(f"revision={self.revision!r}: write it into the name, org/name@{self.revision}")

    @property
    def files(self) -> dict[str, Path]:
        """Part -> the single file that it is read from."""
        named = {kind: getattr(self, kind) for kind in ("backbone", "text_encoder", "vae")}
        return {kind: Path(path).expanduser() for kind, path in named.items() if path is not None}


@frozen
class CheckpointInfo:
    """Where a pipeline comes from.

    `version` is a short hash of the checkpoint, `plugins` name -> version, `provenance` holds base_model, license and
    recipe as far as they are known, and `note` says where presets come from that the checkpoint does not hold.
    `preview` is the file of the map of step previews, if the folder of the VAE has one.
    """

    uri: str = ""
    version: str = ""
    plugins: Mapping[str, str] = field(factory=dict)
    provenance: Mapping[str, Any] = field(factory=dict)
    note: str = ""
    preview: Path | None = None


@frozen
class LoadedCheckpoint:
    """A checkpoint as it was read. `encoder_origin` identifies the text encoder's files, for the prompt cache."""

    parts: PartStore
    specs: Mapping[str, ComponentSpec]
    presets: Mapping[str, Any]
    info: CheckpointInfo
    encoder_origin: str


@frozen
class _PartSource:
    """A component of a checkpoint and where its files are."""

    spec: ComponentSpec
    component: Any
    config: Any
    folder: Path
    file: Path | None  # a single file that holds the part
    hashes: Mapping[str, str] | None  # of the other checkpoint that the part is shared with

    def read(self, dtype: torch.dtype) -> tuple[nn.Module, ComponentSpec]:
        """The module with its weights, and the spec that builds it again."""
        if self.file is None:
            net: nn.Module = self.component.load(self.folder, self.config, dtype=dtype).eval()
            return net, self.spec
        if not hasattr(self.component, "from_header"):
            raise ConfigError(
                f"{self.file}: {self.spec.use} reads no single files; give --model a folder with this part in it"
            )
        part, config, tensors = self.component.from_header(self.file, self.config, _root(self.folder))
        part.load_weights(tensors, self.file, dtype)
        return part.eval(), ComponentSpec(self.spec.use, unstructure(config))


def read_checkpoint(uri: str | Path, catalog: Catalog, dtype: torch.dtype, options: LoadOptions) -> LoadedCheckpoint:
    """Read a checkpoint: a folder, a Hub id `org/name[@revision]`, a plugin's name such as `tiny:`, or one file.

    Everything is checked before the first weight is read. Raises CheckpointError or ConfigError, in one line.
    """
    folder = manifest.resolve_uri(str(uri), catalog)
    description = manifest.read_manifest(folder, catalog)
    if options.verify:
        integrity.verify(folder, description, catalog)
    files = options.files
    components = description["components"] | {
        kind: _component_of_file(path, kind, description, catalog) for kind, path in files.items()
    }
    chosen = {kind: components[kind] for kind in PIPELINE_PARTS if kind in components and kind in options.parts}
    sources = {kind: _find_part(kind, about, folder, files, catalog) for kind, about in chosen.items()}
    # Before any weight is read: loading 40 GB to refuse them would waste minutes.
    for kind in sources.keys() & set(MODEL_PARTS):
        check_dtype(sources[kind].component, dtype)
    # With a prompt cache most runs never need the encoder, the largest part.
    deferred = {*options.deferred, *(["text_encoder"] if options.prompt_cache is not None else [])}
    specs = {kind: source.spec for kind, source in sources.items()}
    loaded: dict[str, Any] = {}
    readers: dict[str, PartReader] = {}
    for kind, source in sources.items():
        if kind not in MODEL_PARTS:
            loaded[kind] = source.component(source.config)
        else:
            readers[kind] = partial(source.read, dtype)
    eager = [kind for kind in readers if kind not in deferred]
    with progress_bar(len(eager), "part", desc=f"load {uri}") as bar:
        for kind in eager:
            bar.set_description(f"load {uri} ({kind.replace('_', ' ')})")
            loaded[kind], specs[kind] = readers[kind]()
            bar.update()
    hashes = manifest.hashes(folder)
    file_hashes = {kind: manifest.combined(manifest.hashes(path)) for kind, path in sorted(files.items())}
    origin = ""
    if (encoder := sources.get("text_encoder")) is not None:
        # A shared encoder is identified by the files where it is, so that both checkpoints use one cache.
        # A file that replaces it counts as well.
        near = encoder.hashes if encoder.hashes is not None else hashes
        under = manifest.file_prefixes("text_encoder", components["text_encoder"])
        used = {name: digest for name, digest in near.items() if name.startswith(under)} or hashes
        used = used | {k: v for k, v in file_hashes.items() if k == "text_encoder"}
        origin = _encoder_origin(encoder, used, catalog, dtype)
    info = CheckpointInfo(
        uri=str(uri),
        # Replaced parts are part of the identity: another backbone draws other pictures.
        version=manifest.combined(hashes | file_hashes),
        plugins=description.get("plugins", {}),
        provenance=description.get("provenance", {}) | model_card.licence(folder) | hub.origin(str(uri)),
        note=description.get("note", ""),
        preview=_preview_file(sources.get("vae")),
    )
    waiting = {kind: read for kind, read in readers.items() if kind not in loaded}
    return LoadedCheckpoint(PartStore(loaded, waiting, readers), specs, description.get("presets", {}), info, origin)


def _find_part(
    kind: str, about: Mapping[str, Any], folder: Path, files: Mapping[str, Path], catalog: Catalog
) -> _PartSource:
    """Build the config of a part and find its files. `about` is its entry in the manifest."""
    spec = ComponentSpec(about["use"], dict(about.get("config", {})))
    name, component, config = build(catalog, kind, spec, f"{folder}/lens.json: components.{kind}")
    home, hashes = folder, None
    # A single file holds the whole VAE or backbone; an encoder's tokenizer is still where the shared part was.
    if "from" in about and (kind not in files or kind == "text_encoder"):
        home, hashes = manifest.resolve_shared_part(kind, about, folder, catalog)
    file = files.get(kind) or (_root(home) / about["file"] if about.get("file") is not None else None)
    return _PartSource(ComponentSpec(name, spec.options), component, config, home, file, hashes)


def _encoder_origin(source: _PartSource, hashes: Mapping[str, str], catalog: Catalog, dtype: torch.dtype) -> str:
    """Identify a text encoder, across processes, by all that decides which features it gives."""
    version = catalog.version(source.spec.use.partition(":")[0])
    # The plugin's version too: its code decides how a prompt is rendered and which layers are read.
    about = [source.spec.use, unstructure(source.config), version, str(dtype)]
    return json.dumps([manifest.combined(dict(hashes)), *about])


def _preview_file(vae: _PartSource | None) -> Path | None:
    """The map of step previews beside the VAE that is read; another file's VAE has other latents."""
    file = vae.folder / "vae" / manifest.PREVIEW_FILE if vae is not None and vae.file is None else None
    return file if file is not None and file.is_file() else None


def _root(path: Path) -> Path:
    """A checkpoint's folder: that of the file, if it is one."""
    return path if path.is_dir() else path.parent


def _component_of_file(path: Path, kind: str, description: Mapping[str, Any], catalog: Catalog) -> dict[str, Any]:
    """How to read a single file as the part `kind`: as the checkpoint reads that part, else as a plugin says."""
    if kind in description["components"]:
        known: dict[str, Any] = description["components"][kind]
        return known
    entries: dict[str, Any] = manifest.read_manifest(path, catalog)["components"]
    if kind not in entries:
        others = " and ".join(entries).replace("_", " ")
        raise CheckpointError(f"{path}: is no {kind.replace('_', ' ')}, but a {others}")
    return dict(entries[kind])
