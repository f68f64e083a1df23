"""Prompt to picture: text encoder, sampler, guided velocity over the backbone, VAE."""

from __future__ import annotations

import json
import math
import secrets
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from attrs import field, frozen
from torch import Tensor, nn

from lens_core import flow
from lens_core.arguments import number, texts, whole
from lens_core.attribution import (
    building,
    calling,
    check_fit,
    checked_tensor,
    latents_of,
    pixels_of,
    text_of,
    times_of,
    walk_of,
)
from lens_core.catalog import Catalog
from lens_core.checkpoints import hub, integrity, manifest, model_card
from lens_core.inference import lora
from lens_core.inference import offload as offloads
from lens_core.inference.image_to_image import Source, to_mask, to_tensor
from lens_core.inference.offload import Accelerator, MemoryEstimate, OffloadManager, Workload
from lens_core.inference.prompt_cache import Entry, TextCache
from lens_core.io import atomic_files
from lens_core.io.images import to_rgb
from lens_core.io.readers import shown
from lens_core.protocols import PrecomputesModulation, dtype_of
from lens_core.recipe import ComponentSpec, Parts, build, unstructure
from lens_core.types import CheckpointError, ConfigError, LensError, NumericalError, TextFeatures, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image


MAX_SIDE = 16384
"""Of a picture's sides the longest, px."""
MAX_COUNT = 2**16
"""Of steps, and of pictures a prompt."""
MAX_SEED = 2**63 - 1
MODEL_PARTS = ("vae", "text_encoder", "backbone")
PIPELINE_PARTS = (*MODEL_PARTS, "sampler")


@frozen
class Result:
    """What a pipeline returns: `.images` (PIL pictures, or what `output_type` asked for), seeds and settings."""

    images: Any
    seeds: tuple[int | None, ...]
    settings: Mapping[str, Any] = field(factory=dict)


def to_images(pixels: Tensor) -> Tensor:
    """Pixels [B,3,H,W] in [-1, 1] -> Images uint8."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pixels(images: Tensor) -> Tensor:
    """Images uint8 [B,3,H,W] -> Pixels float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_pil(images: Tensor) -> list[Image]:
    """Images uint8 [B,3,H,W] -> PIL pictures."""
    from PIL import Image as pil

    return [pil.fromarray(i.permute(1, 2, 0).cpu().numpy()) for i in images]


def _dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if name is None or name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(name, torch.dtype):
        return name
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"no dtype is called {name!r}.{did_you_mean(name, known)}")
    return known[name]


def _part(kind: str) -> Any:
    """A part of a pipeline as an attribute. One that is assigned was built by nobody knows whom: see `put`."""

    def get(pipeline: LensPipeline) -> Any:
        if kind in pipeline._waiting:
            pipeline._arrive(kind)
        return pipeline._parts[kind]

    return property(get, lambda pipeline, component: pipeline.put(kind, component))


class LensPipeline:
    """The parts of a text-to-image model, put together. `uses` remembers by what name and config each was built.

    A part may be assigned, as in `pipeline.vae = mine`. What was known of the one before is forgotten then: settings no
    longer name it, and `save_pretrained` asks what the new one is called:
    `pipeline.uses["vae"] = ComponentSpec("plugin:name")`.
    """

    vae, backbone, sampler = _part("vae"), _part("backbone"), _part("sampler")

    def __init__(
        self,
        vae: Any = None,
        text_encoder: Any = None,
        backbone: Any = None,
        sampler: Any = None,
        *,
        presets: Mapping[str, Any] | None = None,
        uses: Mapping[str, ComponentSpec] | None = None,
        source: str = "",
        version: str = "",
        plugins: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
        note: str = "",
        catalog: Catalog | None = None,
    ) -> None:
        self._parts = {"vae": vae, "backbone": backbone, "sampler": sampler}
        self._waiting: dict[
            str, Callable[[], tuple[nn.Module, ComponentSpec]]
        ] = {}  # reads parts that nobody has touched yet
        self._readers: dict[
            str, Callable[[], tuple[nn.Module, ComponentSpec]]
        ] = {}  # reads parts of the checkpoint again
        self._encoder = text_encoder
        self._later: Callable[[], tuple[nn.Module, ComponentSpec]] | None = (
            None  # reads the text encoder when it is first needed
        )
        self._origin = ""  # what the text encoder was read from, as a text; "" where no file has it
        self._whole: Any = None  # the state of its weights as they were read
        self.texts = TextCache()
        self.presets: dict[str, Any] = {"steps": 20, "guidance_scale": 5.0, **(presets or {})}
        self.uses = dict(uses or {})
        self.source, self.version = source, version
        self.plugins = dict(plugins or {})
        self.provenance = dict(provenance or {})  # base_model, license, recipe, as far as they are known
        self.note = note  # where the presets come from, if the checkpoint itself does not say them
        self.catalog = catalog  # where its parts came from: methods find rewards and benchmarks there
        self.device = torch.device("cpu")
        self._dtype: torch.dtype | None = None  # what `to` cast to last
        self.loras: list[str] = []  # what is folded into the backbone, as NAME:WEIGHT
        self._plain: dict[str, Tensor] = {}  # the backbone's layers as they were before
        self.placement: OffloadManager | None = None  # who is on the accelerator when; None: everything, always
        self._asked: tuple[str, Workload, Accelerator] | None = None  # what it was asked for with

    @classmethod
    def from_pretrained(
        cls,
        uri: str | Path,
        *,
        catalog: Catalog | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        parts: Sequence[str] = PIPELINE_PARTS,
        backbone: str | Path | None = None,
        text_encoder: str | Path | None = None,
        vae: str | Path | None = None,
        offload: str | None = None,
        load: Callable[[Self], Workload] | None = None,
        text_cache: str | Path | None = None,
        verify: bool = False,
        later: Collection[str] = (),
    ) -> Self:
        """Read a checkpoint: a folder, a Hub id `org/name[@revision]`, a plugin's name such as `tiny:`, or one file.

        `backbone`, `text_encoder`, `vae`: a single .safetensors file each, in the place of that part (or for one that
        `uri` lacks). `dtype` defaults to float32 on CPUs and bfloat16 elsewhere. `offload` is a plan of
        `LensPipeline.offload`, and `load` tells what will be drawn under it. `text_cache` is a folder that keeps
        features of prompts; the text encoder is then read when the first prompt comes that is not there. `verify` reads
        every file first and compares it with its hash in `lens.json`.
        `later` are parts with weights that are read when they are first asked for.

        Raises CheckpointError or ConfigError, in one line.
        """
        if offload not in (None, "auto"):
            offloads.find(offload)
        catalog = catalog or Catalog.installed()
        where = _device(device)
        kind = _dtype(dtype or torch_dtype, where)
        folder = manifest.resolve_uri(str(uri), catalog)
        described = manifest.read_manifest(folder, catalog)
        if verify:
            integrity.verify(folder, described, catalog)
        given = {"backbone": backbone, "text_encoder": text_encoder, "vae": vae}
        files = {part: Path(path).expanduser() for part, path in given.items() if path is not None}
        components = described["components"] | {
            part: _alone(path, part, described, catalog) for part, path in files.items()
        }
        found: dict[str, Any] = {}
        uses: dict[str, ComponentSpec] = {}
        reading, about = None, []
        store = TextCache(Path(text_cache).expanduser() if text_cache is not None else None)
        built: dict[str, tuple[str, Any, Any]] = {}
        shared: dict[str, tuple[Path, dict[str, str]]] = {}  # where parts are that this checkpoint shares with another
        for part in PIPELINE_PARTS:
            if part not in components or part not in parts:
                continue
            use = ComponentSpec(components[part]["use"], dict(components[part].get("config", {})))
            built[part] = build(catalog, part, use, f"{folder}/lens.json: components.{part}")
            uses[part] = ComponentSpec(built[part][0], use.options)
            if part in MODEL_PARTS:
                _refuse(built[part][1], kind)
            # A single file has the VAE and the backbone whole; an encoder's tokenizer may still be where it was.
            if "from" in components[part] and (part not in files or part == "text_encoder"):
                shared[part] = manifest.resolve_shared_part(part, components[part], folder, catalog)
        readers: dict[str, Callable[[], tuple[nn.Module, ComponentSpec]]] = {}
        for part, (name, component, config) in built.items():
            if part not in MODEL_PARTS:
                found[part] = component(config)
                continue
            home, _ = shared.get(part, (folder, {}))
            held = components[part].get("file")
            file = files.get(part) or (_root(home) / held if held is not None else None)
            read = partial(_read, component, home, config, kind, uses[part], file)
            if part == "text_encoder":
                reading, about = read, [name, unstructure(config), catalog.version(name.partition(":")[0]), str(kind)]
            readers[part] = read
            if part not in later and (part != "text_encoder" or text_cache is None):
                found[part], uses[part] = read()
        hashes = manifest.hashes(folder)
        own = {p: manifest.combined(manifest.hashes(path)) for p, path in sorted(files.items())}
        pipeline = cls(
            **found,
            presets=described.get("presets", {}),
            uses=uses,
            source=str(uri),
            version=manifest.combined(hashes | own),
            plugins=described.get("plugins", {}),
            provenance=described.get("provenance", {}) | model_card.licence(folder) | hub.origin(str(uri)),
            note=described.get("note", ""),
            catalog=catalog,
        )
        pipeline.texts = store
        pipeline._readers = readers
        pipeline._waiting = {part: readers[part] for part in later if part in readers and part != "text_encoder"}
        if reading is not None:
            under = manifest.file_prefixes("text_encoder", components["text_encoder"])
            _, around = shared.get("text_encoder", (folder, hashes))
            encoders = {k: v for k, v in around.items() if k.startswith(under)} or hashes
            encoders |= {k: v for k, v in own.items() if k == "text_encoder"}
            pipeline._origin = json.dumps([manifest.combined(encoders), *about])
            pipeline._later, pipeline._whole = reading, _state(pipeline._encoder)
        if offload is None:
            return pipeline.to(where)
        pipeline.offload(offload, where, load=load(pipeline) if load is not None else None)
        return pipeline

    @classmethod
    def from_parts(cls, parts: Parts, catalog: Catalog, later: Collection[str] = ()) -> Self:
        """What a recipe's `pipeline` describes: parts of a checkpoint, new parts by name, or both. Weights float32.
        Parts of a checkpoint that are `later`, or that a new part takes the place of, are not read."""
        later = {*later, *(kind for kind in MODEL_PARTS if getattr(parts, kind) is not None)}
        start = (
            cls.from_pretrained(parts.start, catalog=catalog, dtype=torch.float32, device="cpu", later=later)
            if parts.start
            else cls(catalog=catalog)
        )
        for kind in PIPELINE_PARTS:
            use = getattr(parts, kind)
            if use is not None:
                name, component, config = build(catalog, kind, use, f"$.pipeline.{kind}")
                with building(name):
                    setattr(start, kind, component(config))
                start.uses[kind] = ComponentSpec(name, unstructure(config))
        check_fit(start._parts["vae"], start._encoder, start.backbone)
        wanted = {k: getattr(parts, k) for k in ("steps", "guidance_scale", "base_resolution")}
        start.presets |= {k: v for k, v in wanted.items() if v is not None}
        start.plugins = {
            n: v for n in sorted({u.use.partition(":")[0] for u in start.uses.values()}) if (v := catalog.version(n))
        }
        return start

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move every part with weights. float16 is refused where the backbone refuses it."""
        if dtype is not None and self.backbone is not None:
            _refuse(type(self.backbone), dtype)
        if self.placement is not None:
            # Where the plan has put them is not where they belong.
            device = device if device is not None else self.device
            self.placement.remove()
            self.placement = self._asked = None
        if dtype is not None:
            self._dtype = dtype
            if isinstance(self._encoder, nn.Module) and dtype_of(self._encoder) != dtype:
                self._origin = ""  # cast there and back, weights are rounded: no longer those of the file
        for module in self.present().values():
            module.to(device=device, dtype=dtype)
        if device is not None:
            self.device = torch.device(device)
        return self

    @property
    def dtype(self) -> str:
        """The precision of the backbone's weights, such as "float32"; "" for a pipeline without one."""
        first = next(self.backbone.parameters(), None) if isinstance(self.backbone, nn.Module) else None
        return "" if first is None else str(first.dtype).removeprefix("torch.")

    @property
    def notes(self) -> list[str]:
        """What a user should know of how the parts are held, a line each."""
        return [note for net in self.present().values() if (note := getattr(net, "note", ""))]

    @property
    def text_encoder(self) -> Any:
        """The text encoder; read now if it has been waiting for its first prompt."""
        if self._encoder is None and self._later is not None:
            with torch.random.fork_rng(devices=[]):
                self._encoder, self.uses["text_encoder"] = self._later()
            self._whole = _state(self._encoder)
            if self._asked is not None:
                plan, load, accelerator = self._asked
                self.to("cpu")
                self.offload(plan, load=load, accelerator=accelerator)
            else:
                self.to(self.device, self._dtype)
        return self._encoder

    @text_encoder.setter
    def text_encoder(self, encoder: Any) -> None:
        self.put("text_encoder", encoder)

    def put(self, kind: str, component: Any, use: ComponentSpec | None = None) -> None:
        """Make `component` the part `kind` from now on; `use` says by what name and config it is built again.

        Without a `use` this is forgotten, and the hash of the checkpoint no longer stands for what is drawn. LoRAs that
        were folded into another backbone go with it; a plan of `offload` is made anew.
        """
        now = self._encoder if kind == "text_encoder" else self._parts[kind]
        if component is now and use is None and (component is not None or self._later is None):
            return
        plan = self._asked
        if self.placement is not None:
            self.to("cpu")
        self._waiting.pop(kind, None)
        self._readers = {k: read for k, read in self._readers.items() if k != kind}
        if kind == "text_encoder":
            self._encoder, self._later, self._origin, self._whole = component, None, "", None
            self.texts.kept.clear()  # what another encoder gave
        else:
            self._parts = self._parts | {kind: component}  # a copy of the pipeline keeps its own
        if kind == "backbone":
            self._plain, self.loras = {}, []
        self.uses = {k: u for k, u in self.uses.items() if k != kind} | ({kind: use} if use is not None else {})
        if use is None and self.version:
            self.version = f"{self.version}+{kind}"
        if plan is not None:
            asked, load, accelerator = plan
            self.offload(asked, load=load, accelerator=accelerator)

    def put_off(self, kinds: Iterable[str]) -> None:
        """Let go of parts with weights of the checkpoint; they are read again when they are next asked for."""
        for kind in kinds:
            if kind not in self._readers:
                continue
            if kind == "text_encoder":
                self._encoder, self._later = None, self._readers[kind]
            else:
                self._parts = self._parts | {kind: None}
                self._waiting[kind] = self._readers[kind]

    def _arrive(self, kind: str) -> None:
        with torch.random.fork_rng(devices=[]):  # when it is read must not matter to what else is drawn
            net, self.uses[kind] = self._waiting.pop(kind)()
        self._parts = self._parts | {kind: net.to(self.device, self._dtype)}

    def present(self) -> dict[str, nn.Module]:
        """The parts with weights that have been read."""
        nets = {"text_encoder": self._encoder, "backbone": self._parts["backbone"], "vae": self._parts["vae"]}
        return {part: net for part, net in nets.items() if isinstance(net, nn.Module)}

    def offload(
        self,
        plan: str = "auto",
        device: str | torch.device | None = None,
        *,
        load: Workload | None = None,
        accelerator: Accelerator | None = None,
    ) -> MemoryEstimate:
        """Draw on `device` with less memory than all parts take: `none`, `modulation`, `model`, `encoder-cpu`, `block`
        (`offload.PLANS`), or `auto`, the fastest of them that fits into what is free. Training takes `to`.

        `load`: what will be drawn, by default one picture of the preset size. Returns what the plan comes to.
        """
        if plan != "auto":
            offloads.find(plan)
        to = accelerator or Accelerator(_device(device))
        load = load or (
            Workload(self.size(), self.vae.downscale, steps=int(self.presets["steps"]))
            if self.vae is not None
            else Workload()
        )
        if self.placement is not None:
            self.placement.remove()
        modules = self.present()
        free = to.free()
        if free is not None and to.device.type != "cpu":  # what is there already will be placed anew
            tensors = (t for net in modules.values() for t in (*net.parameters(), *net.buffers()))
            free += sum(t.numel() * t.element_size() for t in tensors if t.device.type == to.device.type)
        told = offloads.choose(modules, load, free) if plan == "auto" else offloads.estimate_memory(plan, modules, load)
        self.placement, self.device = OffloadManager(told, modules, to, free, plan == "auto"), to.device
        self._asked = plan, load, to
        return told

    def _at_work(self, part: str) -> AbstractContextManager[Any]:
        """The time in which `part` works, with its weights where they must be."""
        return self.placement.parts[part].at_work() if self.placement is not None else nullcontext()

    def use_sampler(self, use: str, **options: Any) -> None:
        """Draw with another sampler from now on: a name such as "heun", with its options. Raises ConfigError."""
        name, cls, config = build(
            self.catalog or Catalog.installed(), "sampler", ComponentSpec(use, options), "sampler"
        )
        self.put("sampler", cls(config), ComponentSpec(name, unstructure(config)))

    def load_lora_weights(self, path: str | Path, weight: float = 1.0) -> None:
        """Fold a LoRA, a file or its folder, into the backbone, beside those already there. Reads the names of
        diffusers, PEFT, Comfy and sd-scripts (`lora_keys`); it is as strong as in PEFT's own forward. Sampling
        costs no more than before. Raises CheckpointError, also for what cannot be honoured, such as DoRA."""
        if not math.isfinite(weight):
            raise ConfigError(f"{path}: its weight is {weight}; give a finite number")
        lora.fold(self.backbone, lora.read(Path(path).expanduser(), self.backbone), weight, self._plain)
        self.loras.append(f"{Path(path).name}:{weight:g}")

    def unload_lora_weights(self) -> None:
        """Take every LoRA out again: the backbone's weights are bit for bit what they were."""
        lora.unfold(self.backbone, self._plain)
        self.loras.clear()

    def fuse_lora(self) -> None:
        """Keep every LoRA that is in for good: the weights before them are forgotten, and what is saved names them."""
        if self.loras:
            self.version = f"{self.version}+{'+'.join(self.loras)}"
        self.provenance |= self._folded()
        self._plain.clear()
        self.loras.clear()

    def _folded(self) -> dict[str, list[str]]:
        names = [*self.provenance.get("loras", ()), *self.loras]
        return {"loras": names} if names else {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the diffusers folder layout, a model card and `lens.json`. That comes last: without it nothing is read.
        A README.md that a person wrote or changed stays as it is."""
        root = Path(folder)
        self._check_savable(MODEL_PARTS)  # before anything is touched
        root.mkdir(parents=True, exist_ok=True)
        before = integrity.stamps(root)
        if any(root.iterdir()) and not (root / "lens.json").is_file():
            raise CheckpointError(f"{root}: is not empty and not a checkpoint; choose a new folder")
        (root / "lens.json").unlink(missing_ok=True)
        for part in MODEL_PARTS:
            if getattr(self, part) is not None:
                getattr(self, part).save(root)
        self.save_about(root, before=before)

    def save_about(
        self,
        root: Path,
        shared: Mapping[str, Mapping[str, str]] | None = None,
        before: integrity.Stamps | None = None,
    ) -> None:
        """Write what describes a checkpoint in `root`, beside the sub-folders of its parts; `shared` says of each part
        that is another checkpoint's `from` where, and its `hash`. `before`: what was there before the parts were
        written, and is no part of the checkpoint."""
        shared = shared or {}
        self._check_savable(())
        if hasattr(self.sampler, "save"):  # one that other tools have too
            self.sampler.save(root)
        index: dict[str, Any] = {"_class_name": "LensPipeline"}
        for part in PIPELINE_PARTS:  # all that other tools can find here, by the names that each component gives itself
            if part not in shared:
                entries = getattr(getattr(self, part), "model_index", {})
                index |= {folder: list(names) for folder, names in entries.items()}
        atomic_files.write_json(root / "model_index.json", index)
        described = {
            "format": manifest.FORMAT,
            "components": {
                k: {"use": u.use, "config": unstructure(u.options), **shared.get(k, {})}
                for k, u in self._named().items()
            },
            "presets": self.presets,
            "plugins": self._plugins(),
            "provenance": self.provenance | self._folded(),
            "files": integrity.recorded(root, before or {}),
        }
        if model_card.may_replace(root / model_card.FILE):
            atomic_files.write_atomic(
                root / model_card.FILE, lambda p: p.write_text(model_card.text(described), encoding="utf-8")
            )
        atomic_files.write_json(root / "lens.json", described)

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, commit_message: str | None = None
    ) -> str:
        """Put the checkpoint into the Hub's repository `repo_id`, made if need be, in one commit; returns its address.

        `token`: what `hf auth login` or HF_TOKEN gave, unless given. A card that a person wrote there stays. Raises
        CheckpointError, if `private` and the repository is public for one.
        """
        hub.create(repo_id, private=private, token=token)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder)
            described = atomic_files.read_json(folder / "lens.json")
            return hub.upload(folder, described, repo_id, token=token, message=commit_message)

    def _named(self) -> dict[str, ComponentSpec]:
        missing = [p for p in PIPELINE_PARTS if getattr(self, p) is not None and p not in self.uses]
        if missing:
            raise LensError(
                f"{' and '.join(missing)} was put in by hand: say how to find it again before it is saved, "
                f'pipeline.uses[{missing[0]!r}] = ComponentSpec("plugin:name", {{…}})'
            )
        return {p: self.uses[p] for p in PIPELINE_PARTS if getattr(self, p) is not None}

    def _check_savable(self, kinds: Sequence[str]) -> None:
        """Raise LensError for what could not be read back: a part without a name, or one of `kinds` without `save`."""
        named = self._named()
        for kind in kinds:
            if kind in named and not callable(getattr(getattr(self, kind), "save", None)):
                raise LensError(
                    f"{kind}: {type(getattr(self, kind)).__name__} has no save(folder), so no checkpoint can hold it"
                )
        if self.catalog is not None:
            for kind, use in named.items():
                build(self.catalog, kind, use, f"pipeline.uses[{kind!r}]")

    def _plugins(self) -> dict[str, str]:
        """The plugins that the parts are of -> their versions, as far as they are known."""
        names = sorted({use.use.partition(":")[0] for use in self._named().values() if ":" in use.use})
        now = {n: self.catalog.version(n) if self.catalog is not None else "" for n in names}
        return {n: v for n in names if (v := self.plugins.get(n) or now[n])}

    # ---- generation -------------------------------------------------------------------------------------------

    def size(
        self,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        base_resolution: int | None = None,
    ) -> tuple[int, int]:
        """(height, width) in px: as given, or the preset bucket for width:height, or the nearest on the VAE's grid."""
        grid = self.vae.downscale
        if height is not None or width is not None:
            if aspect_ratio is not None:
                raise ConfigError("give height and width, or an aspect ratio, not both")
            given = {"height": height, "width": width}
            sides = {k: whole(k, side, -MAX_SIDE, MAX_SIDE) for k, side in given.items() if side is not None}
            for label, value in sides.items():
                if value < grid or value % grid:
                    near = max(grid, round(value / grid) * grid)
                    raise ConfigError(f"{label} {value} is not a multiple of {grid} px, the VAE's grid; use {near}")
            return sides.get("height", value), sides.get("width", value)
        wanted = self.presets.get("base_resolution", 1024) if base_resolution is None else base_resolution
        base = whole("base_resolution", wanted, 1, MAX_SIDE)
        if aspect_ratio is not None and not isinstance(aspect_ratio, str):
            raise ConfigError(f'aspect_ratio must be a text, width:height, such as "3:2", not {shown(aspect_ratio)}')
        ratio = "1:1" if aspect_ratio is None else aspect_ratio
        table = self.presets.get("sizes", {}).get(str(base), {})
        if ratio in table:
            return int(table[ratio][0]), int(table[ratio][1])
        try:
            across, down = (float(p) for p in ratio.split(":"))
            shape = math.sqrt(across / down)
            if not 0.1 <= shape * shape <= 10:
                raise ValueError
        except (ValueError, ZeroDivisionError) as error:
            raise ConfigError(
                f"aspect ratio {ratio!r} must be width:height between 1:10 and 10:1, such as 3:2"
            ) from error
        return max(grid, round(base / shape / grid) * grid), max(grid, round(base * shape / grid) * grid)

    def noise(self, generators: Sequence[torch.Generator], size: tuple[int, int]) -> Tensor:
        """Initial noise [B,C,h,w] float32, one generator a row, drawn packed as [h*w, C]: the reference's order."""
        h, w = size
        rows = [
            torch.randn(h * w, self.vae.channels, generator=g, device=g.device, dtype=torch.float32).to(self.device)
            for g in generators
        ]
        return torch.stack(rows).transpose(1, 2).reshape(len(rows), self.vae.channels, h, w)

    def velocity(
        self,
        text: TextFeatures,
        negative: TextFeatures | None,
        guidance_scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """(x, t) -> v, guided where low < t <= high. At scale 1, and elsewhere, the unconditional pass is not run."""
        dtype = dtype_of(self.backbone)

        def predict(x: Tensor, t: Tensor, words: TextFeatures) -> Tensor:
            with calling(self.backbone, "forward"):
                out = self.backbone(x.to(dtype), t, words)
            must = f"v must be a float tensor {list(x.shape)}, as x is"
            return checked_tensor(self.backbone, "forward", out, x.shape, must).float()

        always = tuple(interval) == (0.0, 1.0)  # then nobody need ask the device what time it is

        def guided(x: Tensor, t: Tensor) -> Tensor:
            cond = predict(x, t, text)
            if guidance_scale == 1.0 or not (always or interval[0] < flow.known(t)[0] <= interval[1]):
                return cond
            unwanted = negative or TextFeatures.empty(
                len(text), text.features.shape[1], text.features.shape[3], text.features
            )
            return flow.guide(cond, predict(x, t, unwanted), guidance_scale)

        return guided

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Prompts -> TextFeatures in the backbone's dtype, on the pipeline's device."""
        encoder = self.text_encoder
        with self._at_work("text_encoder"):
            text = text_of(encoder, prompts)
        return text.to(self.device, dtype_of(self.backbone))

    def encode_once(self, prompts: Sequence[str]) -> tuple[TextFeatures, dict[str, Any]]:
        """As `encode`, but each prompt by itself, and none that is kept: (TextFeatures, what a picture must record).

        The features of a prompt are bit for bit those of `encode([prompt])`, whatever it stands beside.
        """
        found = self._kept(prompts)
        if self._encoder is None and len(found) < len(set(prompts)):
            found |= self._kept(prompts) if self.text_encoder is not None else {}  # now read: the plan may be another
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if missing:
            told = dict(self._encoder.provenance()) if hasattr(self._encoder, "provenance") else {}
            ((origin, lasting),) = self._origins()
            with self._at_work("text_encoder"):
                for prompt in missing:
                    found[prompt] = Entry(self.encode([prompt]).to("cpu"), told)
                    self.texts.put(prompt, origin, lasting, found[prompt])
        entries = [found[prompt] for prompt in prompts]
        return TextFeatures.cat([entry.text for entry in entries]).to(self.device), dict(entries[0].provenance)

    def _kept(self, prompts: Sequence[str]) -> dict[str, Entry]:
        """The prompts that need not be encoded."""
        found = {}
        for origin, lasting in reversed(self._origins()):
            for prompt in dict.fromkeys(prompts):
                if (entry := self.texts.get(prompt, origin, lasting)) is not None:
                    found[prompt] = entry
        return found

    def _origins(self) -> list[tuple[str, bool]]:
        """What features would be made of, as a text, and whether that means the same in another process. Where they
        are made is part of it; as long as the encoder has not been read, `auto` may yet choose the CPU."""
        state = _state(self._encoder) if self._encoder is not None else self._whole
        lasting = bool(self._origin) and state == self._whole
        told = self.placement.told if self.placement is not None else None
        on_host = told is not None and offloads.PLANS[told.plan]["text_encoder"] == "host"
        kinds = ["cpu" if on_host else self.device.type]
        if self._encoder is None and self.placement is not None and self.placement.auto:
            kinds += ["cpu"]
        dtype = dtype_of(self.backbone)
        rest = "" if lasting else str(state)
        return [(f"{self._origin} {dtype} {kind} {rest}", lasting) for kind in dict.fromkeys(kinds)]

    @torch.no_grad()
    def sample(
        self,
        text: TextFeatures,
        noise: Tensor,
        steps: int,
        guidance_scale: float,
        negative: TextFeatures | None = None,
        *,
        interval: tuple[float, float] = (0.0, 1.0),
        source: Source | None = None,
        draw: Callable[[], Tensor] | None = None,
    ) -> Iterator[tuple[float, Tensor]]:
        """(t, x) after each step, ending at t = 0. Raises NumericalError rather than go on with non-finite latents, on
        a GPU at the last step, which is the only one that waits for it."""
        velocity = self.velocity(text, negative, guidance_scale, interval)
        begin, start = noise, 0
        if source is not None:
            begin, start, velocity = source.enter(self.sampler, noise, steps, velocity)
        if start == steps:  # strength 0: the picture as it is
            yield 0.0, begin
            return
        more: dict[str, Any] = {"start": start} if start else {}  # samplers that only begin at noise are samplers too
        more |= {"draw": draw} if getattr(self.sampler, "stochastic", False) else {}
        times = times_of(self.sampler, (noise.shape[-2], noise.shape[-1]), steps)[start:-1]
        finite: list[Tensor] = []
        with self._at_work("backbone"), self._tabled(times):
            for step, (t, x) in enumerate(walk_of(self.sampler, velocity, begin, steps, **more), start + 1):
                finite.append(torch.isfinite(x).all())
                if x.device.type == "cpu" or step == steps:  # elsewhere the answer would have to be waited for
                    self._refuse_non_finite(finite, step, steps)
                yield t, source.settle(x) if source is not None and step == steps else x

    def _refuse_non_finite(self, finite: Sequence[Tensor], number: int, steps: int) -> None:
        """Raise NumericalError where one of the flags, of the steps up to `number`, is false."""
        flags = torch.stack(list(finite)).tolist()
        if not all(flags):
            dtype, bad = dtype_of(self.backbone), number - len(flags) + 1 + flags.index(False)
            wide = dtype in (torch.float32, torch.float64)
            cure = "its weights, or what it was given, are broken: run lens check" if wide else "try float32"
            raise NumericalError(f"the latents left the finite numbers at step {bad} of {steps} in {dtype}; {cure}")

    def _tabled(self, times: Tensor) -> AbstractContextManager[Any]:
        """While this lasts the backbone is asked at `times`: what it can work out for all of them at once, it does."""
        if not isinstance(self.backbone, PrecomputesModulation) or _divided(self.backbone):
            return nullcontext()
        on_device = (
            self.placement.parts["backbone"].temporarily_on_device if self.placement is not None else nullcontext
        )
        return self.backbone.precomputed(times, on_device)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        base_resolution: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        image: Image | None = None,
        mask_image: Image | None = None,
        strength: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], Any] | None = None,
    ) -> Result:
        """Draw. Image i of a call with `seed=s` has the seed s + i, and is the picture that `seed=s + i` alone draws.

        `seeds` of the result says which seed alone draws image i; None where none does: from `latents`, or where a
        generator had been drawn from before, as for all but the first picture of a single one.

        `image`: a PIL picture to begin at, in the size of the result unless `height` and `width` ask for another;
        `strength` in [0, 1]: how much of it goes (0.6 if not given, 1 with a mask); `mask_image`: white is drawn anew,
        all else stays as it is. `guidance_interval` (low, high): guidance is at work where low < t <= high alone.
        `output_type`: "pil", "pt" (uint8 [B,3,H,W]), "np" (uint8 [B,H,W,3]) or "latent" ([B,C,h,w]).
        Raises ConfigError for sizes, counts and types; NumericalError for non-finite latents; warns of what has no
        effect.
        """
        if output_type not in ("pil", "pt", "np", "latent"):
            raise ConfigError(f"output_type must be pil, pt, np or latent, not {output_type!r}")
        held = {
            **self._parts,
            **self._waiting,
            "text_encoder": self._encoder if self._encoder is not None else self._later,
        }
        absent = [f"no {p.replace('_', ' ')}" for p in PIPELINE_PARTS if held[p] is None]
        if absent:
            raise LensError(f"there is {' and '.join(absent)} in this pipeline; add what it takes to draw")
        prompts = texts("prompt", prompt)
        if not prompts:
            raise ConfigError("there is no prompt")
        if negative_prompt is not None:
            texts("negative_prompt", negative_prompt)
        num_images_per_prompt = whole("num_images_per_prompt", num_images_per_prompt, 1, MAX_COUNT)
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        count = len(prompts)
        wanted = self.presets["steps"] if num_inference_steps is None else num_inference_steps
        steps = whole("num_inference_steps", wanted, 1, MAX_COUNT)
        wanted = self.presets["guidance_scale"] if guidance_scale is None else guidance_scale
        scale = number("guidance_scale", wanted, -(2**16), 2**16)
        low, top = _interval(guidance_interval)
        if not 0 <= low < top <= 1:
            raise ConfigError(f"guidance_interval is two times, 0 <= low < high <= 1, not {low:g} and {top:g}")
        for name, given in (("image", image), ("mask_image", mask_image)):
            if given is not None and not hasattr(given, "getbands"):
                raise ConfigError(f"{name} must be a PIL picture, not {type(given).__name__}")
        if image is not None and height is None and width is None and aspect_ratio is None:
            width, height = to_rgb(image).size
        high, wide = self.size(height, width, aspect_ratio, base_resolution)
        source = self._source(image, mask_image, strength, (high, wide))
        idle = [("a negative prompt", any(negative_prompt or ())), ("a guidance interval", (low, top) != (0, 1))]
        for name in (name for name, asked in idle if asked and scale == 1.0):
            warnings.warn(f"{name} has no effect at guidance 1; give a guidance scale above 1", stacklevel=3)
        if base_resolution is not None and (height is not None or width is not None):
            warnings.warn("a base resolution has no effect beside a size or a picture; give one of them", stacklevel=3)
        grid = (high // self.vae.downscale, wide // self.vae.downscale)
        generators, seeds = self._generators(generator, seed, count)
        text, told = self.encode_once(prompts)
        negative = None
        if negative_prompt and scale != 1.0:
            unwanted = [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
            if len(unwanted) not in (count, count // num_images_per_prompt):
                raise ConfigError(
                    f"{len(unwanted)} negative prompts do not fit {count} pictures; give one, or one each"
                )
            if len(unwanted) != count:
                unwanted = [p for p in unwanted for _ in range(num_images_per_prompt)]
            negative, _ = self.encode_once(unwanted)
            there = torch.tensor([bool(p) for p in unwanted], device=self.device)[:, None]
            negative = TextFeatures(
                negative.features * there[:, None, :, None], negative.mask & there
            )  # "" has no tokens
        if latents is not None and not isinstance(latents, Tensor):
            raise ConfigError(f"latents must be a tensor, not {type(latents).__name__}")
        noise = self.noise(generators, grid) if latents is None else latents.to(self.device, torch.float32)
        seeds = seeds if latents is None else (None,) * count  # which decide nothing then
        if tuple(noise.shape) != (count, self.vae.channels, *grid):
            raise ConfigError(f"latents must be {[count, self.vae.channels, *grid]}, not {list(noise.shape)}")
        x = noise
        walk = self.sample(
            text, noise, steps, scale, negative,
            interval=(low, top), source=source, draw=lambda: self.noise(generators, grid),
        )  # fmt: skip
        for step, (t, x) in enumerate(walk):
            if callback_on_step_end is not None:
                callback_on_step_end(self, step, t, {"latents": x})
        settings = {
            "height": high, "width": wide, "steps": steps, "guidance_scale": scale,
            "negative_prompt": negative_prompt or "", "model": self.source, "model_hash": self.version,
            **({"sampler": unstructure(self.uses["sampler"])} if "sampler" in self.uses else {}),
            **({"guidance_interval": [low, top]} if (low, top) != (0, 1) else {}),
            **(source.facts() if source is not None else {}),
            **({"loras": list(self.loras)} if self.loras else {}),
            **told,
        }  # fmt: skip
        if output_type == "latent":
            return Result(x, seeds, settings)
        images = to_images(self.decode(x))
        images = source.paste(images) if source is not None else images
        if output_type == "np":
            return Result(images.permute(0, 2, 3, 1).cpu().numpy(), seeds, settings)
        return Result(images if output_type == "pt" else to_pil(images), seeds, settings)

    @torch.no_grad()
    def _source(
        self, image: Image | None, mask: Image | None, strength: float | None, size: tuple[int, int]
    ) -> Source | None:
        """What `__call__` begins at, resized to `size` (height, width) px, or None."""
        if image is None:
            if mask is not None or strength is not None:
                given = "a mask" if mask is not None else "a strength"
                raise ConfigError(f"{given} without a picture has no effect; give an image too")
            return None
        share = number("strength", strength, finite=False) if strength is not None else 0.6 if mask is None else 1.0
        if not 0 <= share <= 1:
            raise ConfigError(f"strength is {share}; it must be in [0, 1]")
        whole = to_rgb(image)
        where = to_mask(mask, whole) if mask is not None else None
        high, wide = size
        picture = to_tensor(whole if whole.size == (wide, high) else whole.resize((wide, high)))
        if where is not None and tuple(where.shape[-2:]) != size:
            where = torch.nn.functional.interpolate(where.float(), size) >= 0.5
        pixels = to_pixels(picture).to(self.device, dtype_of(self.vae))
        with self._at_work("vae"):
            return Source(picture, latents_of(self.vae, pixels).float(), share, where)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents [B,C,h,w] -> pixels [B,3,H,W], in the VAE's dtype."""
        with self._at_work("vae"):
            return pixels_of(self.vae, z.to(dtype_of(self.vae)))

    def _generators(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        seed: int | Sequence[int] | None,
        count: int,
    ) -> tuple[list[torch.Generator], tuple[int | None, ...]]:
        """One generator a picture, and the seed that alone would give each its noise, or None."""
        if generator is not None:
            if seed is not None:
                raise ConfigError("give a generator or a seed, not both")
            several = [generator] * count if isinstance(generator, torch.Generator) else list(generator)
            if any(not isinstance(g, torch.Generator) for g in several):
                raise ConfigError(f"generator must be a torch.Generator, or a list of them, not {shown(generator)}")
            if len(several) != count:
                raise ConfigError(f"{len(several)} generators do not fit {count} pictures; give one, or one each")
            new = [g.device.type == "cpu" and _untouched(g) and all(g is not h for h in several[:i])
                   for i, g in enumerate(several)]  # fmt: skip
            return several, tuple(g.initial_seed() if fresh else None for g, fresh in zip(several, new, strict=True))
        if seed is None:
            seed = secrets.randbelow(2**32)
        seed = seed.tolist() if hasattr(seed, "tolist") else seed  # numpy's and torch's
        if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
            seeds = tuple(whole("seed", s, 0, MAX_SEED) for s in seed)
        else:
            seeds = tuple(whole("seed", seed, 0, MAX_SEED) + i for i in range(count))
        if len(seeds) != count:
            raise ConfigError(f"{len(seeds)} seeds do not fit {count} pictures; give one, or one each")
        return [torch.Generator().manual_seed(s) for s in seeds], seeds


def _untouched(generator: torch.Generator) -> bool:
    """Whether nothing has been drawn since it was seeded."""
    return torch.equal(generator.get_state(), torch.Generator().manual_seed(generator.initial_seed()).get_state())


def _interval(given: Any) -> tuple[float, float]:
    if not isinstance(given, Sequence) or len(given) != 2:
        raise ConfigError(f"guidance_interval is two times, 0 <= low < high <= 1, not {shown(given)}")
    low, top = (number("guidance_interval", value, finite=False) for value in given)
    return low, top


def _device(device: str | torch.device | None) -> torch.device:
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"no device is called {str(device)!r}; use cpu, cuda or cuda:1") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{device}: this machine has no CUDA device that torch can use; use cpu")
    return found


def _root(path: Path) -> Path:
    """A checkpoint's folder: that of the file, if it is one."""
    return path if path.is_dir() else path.parent


def _alone(path: Path, part: str, described: Mapping[str, Any], catalog: Catalog) -> dict[str, Any]:
    """How to read a single file in the place of `part`: as the checkpoint reads it, else as a plugin says."""
    if part in described["components"]:
        known: dict[str, Any] = described["components"][part]
        return known
    found: dict[str, Any] = manifest.read_manifest(path, catalog)["components"]
    if part not in found:
        raise CheckpointError(f"{path}: is no {part.replace('_', ' ')}, but a {' and '.join(found).replace('_', ' ')}")
    return dict(found[part])


def _read(
    component: Any, folder: Path, config: Any, dtype: torch.dtype, use: ComponentSpec, file: Path | None
) -> tuple[nn.Module, ComponentSpec]:
    """A part, from the checkpoint in `folder` or from a single `file`, and how it is found again."""
    if file is None:
        net: nn.Module = component.load(folder, config, dtype=dtype).eval()
        return net, use
    if not hasattr(component, "from_header"):
        raise ConfigError(f"{file}: {use.use} reads no single files; give --model a folder with this part in it")
    part, config, tensors = component.from_header(file, config, _root(folder))
    part.load_weights(tensors, file, dtype)
    return part.eval(), ComponentSpec(use.use, unstructure(config))


def _divided(net: Any) -> bool:
    """Whether processes hold shares of its weights, which nothing but a forward gathers."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(net, FSDPModule)


def _state(module: Any) -> Any:
    """What changes when a weight is changed in place or replaced, or a config that says which layers are read and how
    they attend, and does not where weights only move."""
    if not isinstance(module, nn.Module):
        return None
    configs = {id(c): repr(c) for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    weights = [(id(p), str(p.dtype), 0 if p.is_inference() else p._version) for p in module.parameters()]
    return weights, list(configs.values())


def _refuse(component: Any, dtype: torch.dtype) -> None:
    reason = component.refuses(dtype) if hasattr(component, "refuses") else None
    if reason:
        raise ConfigError(reason)
