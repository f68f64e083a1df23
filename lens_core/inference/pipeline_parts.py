"""The parts of a pipeline on a device: assigned, read when needed, moved, offloaded, and adapted by LoRAs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self

import attrs
import torch
from attrs import field, frozen
from torch import Tensor, nn

from lens_core.attribution import calling, pixels_of
from lens_core.catalog import Catalog
from lens_core.checkpoints.latent_preview import LatentPreview
from lens_core.checkpoints.latent_preview import read as read_preview
from lens_core.inference import refinement
from lens_core.inference.call_arguments import picture_size
from lens_core.inference.diffusers_names import DiffusersNames, account, positional_target
from lens_core.inference.guidance import DataEstimate
from lens_core.inference.loading import CheckpointInfo
from lens_core.inference.lora import LoRAStack
from lens_core.inference.offload import Accelerator, OffloadManager
from lens_core.inference.offload_plans import MemoryEstimate, Workload, find_plan
from lens_core.inference.parts import DEFAULT_PRESETS, PartStore, check_dtype, move_whole, resolve_device
from lens_core.inference.pixels import to_images
from lens_core.inference.prompt_cache import PromptCache, weights_state
from lens_core.inference.sharing import SharingPipelines
from lens_core.inference.tiling import check_tile, decode_tiles
from lens_core.protocols import PrecomputesModulation, dtype_of
from lens_core.recipe import ComponentSpec, build, unstructure
from lens_core.types import Completion, ConfigError, LensError, Message, Refinement

NO_PREVIEW = "this checkpoint has no map for previews; lens fit-preview makes one"


@frozen
class Origin:
    """Where the parts of a pipeline come from: their checkpoint, and the catalog that their classes were found in."""

    info: CheckpointInfo = field(factory=CheckpointInfo)
    catalog: Catalog | None = None


def _part(kind: str) -> Any:
    """A part of a pipeline as an attribute: read when it is first used, and replaced by `put`."""

    def get(pipeline: PipelineParts) -> Any:
        if kind in pipeline.store.deferred:
            pipeline._read_deferred(kind)
        return pipeline.store.loaded[kind]

    return property(get, lambda pipeline, component: pipeline.put(kind, component))


class PipelineParts(DiffusersNames):
    """The parts of a text-to-image model, put together. `specs` remembers by what name and config each was built.

    A part may be assigned, as in `pipeline.vae = mine`. What was known of the one before is forgotten then: settings no
    longer name it, and `save_pretrained` asks what the new one is called:
    `pipeline.specs["vae"] = ComponentSpec("plugin:name")`.
    """

    vae, text_encoder, backbone, sampler = (_part(k) for k in ("vae", "text_encoder", "backbone", "sampler"))

    def __init__(
        self,
        vae: Any = None,
        text_encoder: Any = None,
        backbone: Any = None,
        sampler: Any = None,
        *,
        reasoner: Any = None,
        presets: Mapping[str, Any] | None = None,
        specs: Mapping[str, ComponentSpec] | None = None,
        **origin: Any,
    ) -> None:
        """`origin` are the fields of `Origin`."""
        checkpoint = Origin(**origin)
        info = checkpoint.info
        self.store = PartStore({"vae": vae, "text_encoder": text_encoder, "backbone": backbone, "sampler": sampler})
        self.presets = DEFAULT_PRESETS | dict(presets or {})
        self.specs = dict(specs or {})
        self.source, self.version, self.note = info.uri, info.version, info.note
        self.plugins, self.provenance = dict(info.plugins), dict(info.provenance)
        self.catalog = checkpoint.catalog  # where its parts came from: methods find rewards and benchmarks there
        self.device = torch.device("cpu")
        self._preview: Path | LatentPreview | None = info.preview  # a file until it is first used
        self._estimate: DataEstimate | None = None  # of the call that is drawing, where somebody watches its steps
        self.lossy_vae_tile: int | None = (
            None  # px, side of the tiles that are decoded; None: the whole picture at once
        )
        self._dtype: torch.dtype | None = None  # the last that `to` cast to, for parts that are read later
        self.prompt_cache = PromptCache()
        self._encoder_origin = ""  # identifies the text encoder's files; "" where no file holds it
        self._encoder_state: Any = None  # of its weights as they were read
        self.offload_manager: OffloadManager | None = None  # None: every part stays on the device
        self.reasoner: Any = None  # rewrites prompts before they are encoded; None: they are sent as they are
        self.progress_bar_config: dict[str, Any] = {}  # options of tqdm
        self._refined: dict[str, Refinement] = {}  # what the reasoner made of the last prompts
        self._sharing = SharingPipelines(self)
        self.use_reasoner(reasoner)

    def __repr__(self) -> str:
        return account(self)

    # ---- parts --------------------------------------------------------------------------------------------------

    def put(self, kind: str, component: Any, spec: ComponentSpec | None = None) -> None:
        """Make `component` the part `kind` from now on; `spec` says by what name and config it is built again.

        Without a `spec` this is forgotten, and the hash of the checkpoint no longer stands for what is drawn. LoRAs
        are those of the new backbone, an offload plan is made anew.
        """
        unchanged = component is self.store.loaded[kind] and kind not in self.store.deferred
        if unchanged and spec is None:
            return
        # A part without weights, such as a sampler, changes nothing about where the others are.
        weighty = any(isinstance(part, nn.Module) for part in (component, self.store.loaded[kind]))
        manager = self.offload_manager if weighty or kind in self.store.deferred else None
        if manager is not None and self._sharing.holds(self, kind):
            self.offload_manager = manager.without(kind)  # the part stays where it is, under the plan of the others
        elif manager is not None:
            self.to("cpu")
        self.store = self.store.replaced(kind, component)
        if kind == "vae":
            self._preview, self.lossy_vae_tile = None, None  # which were chosen for another
        if kind == "text_encoder":
            self._encoder_origin, self._encoder_state = "", None
            self.prompt_cache = PromptCache(self.prompt_cache.folder)  # without what another encoder gave
        self.specs = {k: s for k, s in self.specs.items() if k != kind} | ({kind: spec} if spec is not None else {})
        if spec is None and self.version:
            self.version = f"{self.version}+{kind}"
        if manager is not None:
            self._plan_anew(manager)

    def use_sampler(self, use: str, **options: Any) -> None:
        """Draw with another sampler from now on: a name such as "heun", with its options. Raises ConfigError.

        Options of the sampler before that were set, and that the new one has too, stay unless they are given: the shift
        `mu` of a checkpoint's times is kept, as with diffusers' `Other.from_config(pipe.scheduler.config)`.
        """
        catalog = self.catalog or Catalog.installed()
        spec = self._with_kept_options(ComponentSpec(use, options), catalog)
        name, cls, config = build(catalog, "sampler", spec, "sampler")
        self.put("sampler", cls(config), ComponentSpec(name, unstructure(config)))

    def _with_kept_options(self, spec: ComponentSpec, catalog: Catalog) -> ComponentSpec:
        """`spec` of a sampler, with the options of the present one that it keeps."""
        before = self.specs.get("sampler")
        if before is None:
            return spec
        try:
            classes = [catalog.find("sampler", use).cls for use in (before.use, spec.use)]
        except LensError:  # there is no such sampler; `build` says so, and where it is named
            return spec
        old, new = ({field.name: field for field in attrs.fields(cls.Config)} for cls in classes)
        kept = {
            name: value
            for name, value in before.options.items()
            if name in old and name in new and value != old[name].default and old[name].type == new[name].type
        }
        return ComponentSpec(spec.use, kept | dict(spec.options))

    def use_reasoner(self, reasoner: Any) -> None:
        """Rewrite prompts from now on with a reasoner: a component, a ComponentSpec or a name such as "chat"; None:
        with none. It is no part of the checkpoint, and is not saved. Raises ConfigError."""
        reasoner = refinement.make_reasoner(reasoner, self.catalog)
        if hasattr(reasoner, "attach"):
            with calling(reasoner, "attach"):
                reasoner.attach(self)
        self.reasoner, self._refined = reasoner, {}

    def complete(self, chats: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Completion]:
        """What the text encoder, where it is a language model that can write, says next in each conversation."""
        encoder = self.text_encoder
        if not hasattr(encoder, "complete"):
            raise ConfigError("the text encoder of this model cannot write; use another reasoner, such as chat")
        count = sum(1 for _ in encoder.parameters())
        with self._at_work("text_encoder"), calling(encoder, "complete"):
            completions = list(encoder.complete(chats, max_new_tokens))
        if self.offload_manager is not None and sum(1 for _ in encoder.parameters()) != count:
            self._plan_anew(self.offload_manager)  # it has read weights that no plan knows of
        return completions

    @property
    def latent_preview(self) -> LatentPreview | None:
        """The map of step previews that was fitted to the VAE, or None. Raises CheckpointError for a broken file."""
        if isinstance(self._preview, Path):
            self._preview = read_preview(self._preview, self.vae.channels)
        return self._preview

    @latent_preview.setter
    def latent_preview(self, preview: LatentPreview | None) -> None:
        self._preview = preview

    def preview(self, latents: Tensor) -> Tensor:
        """Latents [B,C,h,w] -> small pictures uint8 [B,3,side h,side w], by a linear map instead of the VAE.

        In `callback_on_step_end`, give it `values["denoised"]`. Raises ConfigError where the checkpoint has no map."""
        if self.latent_preview is None:
            raise ConfigError(NO_PREVIEW)
        return to_images(self.latent_preview.pixels(latents))

    def use_lossy_vae_tiles(self, side: int | None) -> None:
        """Decode from now on in overlapping tiles of `side` px, which takes less memory and changes the picture a
        little; None: the whole picture at once. Raises ConfigError, also for a VAE that is not convolutional."""
        self.lossy_vae_tile = None if side is None else check_tile(self.vae, side)

    def _pixels(self, z: Tensor) -> Tensor:
        """What the VAE makes of latents."""
        if self.lossy_vae_tile is None:
            return pixels_of(self.vae, z)
        return decode_tiles(partial(pixels_of, self.vae), z, self.lossy_vae_tile // self.vae.downscale)

    def defer(self, kinds: Iterable[str]) -> None:
        """Let go of parts with weights of the checkpoint; they are read again when they are next used. Raises
        ConfigError for a backbone with LoRAs in it."""
        kinds = list(kinds)
        if "backbone" in kinds and "backbone" in self.store.readers and self.loras:
            raise ConfigError(
                f"the backbone cannot be let go of with LoRAs in it ({', '.join(self.loras)}), which its files do "
                "not hold; call unload_lora_weights() before"
            )
        for kind in set(kinds) & self.store.readers.keys():
            self._leave_plan(kind)
        self.store = self.store.deferring(kinds)

    def _leave_plan(self, kind: str) -> None:
        """Let the offload plan go on without the part `kind`, which stays under it where another pipeline has it."""
        if self.offload_manager is not None:
            if not self._sharing.holds(self, kind):
                self.offload_manager.remove([kind])
            self.offload_manager = self.offload_manager.without(kind)

    def _read_deferred(self, kind: str) -> None:
        self.specs[kind] = self.store.read(kind)
        net = self.store.loaded[kind]
        if kind == "text_encoder":
            self._encoder_state = weights_state(net)
            if self._dtype is not None and dtype_of(net) != self._dtype:
                self._encoder_origin = ""  # rounded weights are no longer those of the file
        manager = self.offload_manager
        if manager is None:
            try:
                move_whole([net], self.device, self._dtype)
            except BaseException:
                self.defer([kind])  # it would be on another device than the rest
                raise
            return
        self._plan_anew(manager)  # one more part

    def present(self) -> dict[str, nn.Module]:
        """The parts with weights that have been read."""
        return self.store.modules()

    def to(
        self,
        target: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> Self:
        """Move every part with weights to a device, a dtype, or both. float16 is refused where the backbone refuses it,
        as is a device that is not there (ConfigError). Pipelines that share weights come along; parts that are theirs
        alone keep their dtype. Where something does not fit (LensError), all stay where they are, or go to the CPU if
        there was an offload plan."""
        device, dtype = positional_target(target, device, dtype)
        if dtype is not None and self.backbone is not None:
            check_dtype(type(self.backbone), dtype)
        if planned := self._sharing.end_plans(self):
            # Where the plan has put them is not where they belong.
            device = device if device is not None else self.device
        encoder = self.store.loaded["text_encoder"]
        if dtype is not None and isinstance(encoder, nn.Module) and dtype_of(encoder) != dtype:
            self._sharing.rounded(encoder)  # cast there and back, too
        try:
            self._sharing.move(self, device, dtype)
        except BaseException:
            if planned:
                self.to("cpu")  # the plan had some parts on the device, and others not
            raise
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

    def size(
        self,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: str | None = None,
        base_resolution: int | None = None,
    ) -> tuple[int, int]:
        """(height, width) in px: as given, or the preset bucket for width:height, or the nearest on the VAE's grid."""
        return picture_size(self.presets, self.vae.downscale, height, width, aspect_ratio, base_resolution)

    # ---- memory -------------------------------------------------------------------------------------------------

    def offload(
        self,
        plan: str = "auto",
        device: str | torch.device | None = None,
        *,
        workload: Workload | None = None,
        accelerator: Accelerator | None = None,
    ) -> MemoryEstimate:
        """Draw on `device` with less memory than all parts take: `none`, `modulation`, `model`, `encoder-cpu`, `block`
        (`offload_plans.PLANS`), or `auto`, the fastest of them that fits into what is free. Training takes `to`.

        `workload`: what will be drawn, by default one picture of the preset size. Returns what the plan comes to.
        """
        if plan != "auto":
            find_plan(plan)
        accelerator = accelerator or Accelerator(resolve_device(device))
        if workload is None and self.vae is not None:
            steps, guided = int(self.presets["steps"]), self.presets["guidance_scale"] != 1
            workload = Workload(self.size(), self.vae.downscale, steps=steps, guided=guided)
        self._sharing.end_plans(self)
        try:
            manager = OffloadManager(plan, self.present(), workload or Workload(), accelerator)
            self._sharing.plan(self, manager)
        except BaseException:
            self.to("cpu")  # out of memory, say: else some parts would be on the device, and the others not
            raise
        return manager.estimate

    def _plan_anew(self, manager: OffloadManager) -> None:
        """Make the plan of `manager` again, for other parts."""
        self.to("cpu")
        self.offload(manager.requested, workload=manager.workload, accelerator=manager.accelerator)

    def _at_work(self, part: str) -> AbstractContextManager[Any]:
        """The time in which `part` works, with its weights where they must be."""
        getattr(self, part)  # one that is deferred is read before, and the plan is made anew with it
        return self.offload_manager.parts[part].at_work() if self.offload_manager is not None else nullcontext()

    def _precomputed_modulation(self, times: Tensor) -> AbstractContextManager[Any]:
        """The time in which the backbone is called at `times` alone, for all of which it may compute in advance."""
        if not isinstance(self.backbone, PrecomputesModulation) or _is_sharded(self.backbone):
            return nullcontext()
        manager = self.offload_manager
        on_device = manager.parts["backbone"].temporarily_on_device if manager is not None else nullcontext
        return self.backbone.precomputed(times, on_device)

    # ---- LoRA ---------------------------------------------------------------------------------------------------

    @property
    def _loras(self) -> LoRAStack:
        return LoRAStack.of(self.store.loaded["backbone"])

    @property
    def loras(self) -> list[str]:
        """The LoRAs that are folded into the backbone, as NAME:WEIGHT."""
        return self._loras.names

    @property
    def lora_hashes(self) -> list[str]:
        """A short hash of the content of each of `loras`."""
        return self._loras.hashes

    def load_lora_weights(self, path: str | Path, weight: float = 1.0, *, adapter_name: str | None = None) -> None:
        """Fold a LoRA, DoRA, LoHa or LoKr, a file or its folder, into the backbone, beside those already there. Reads
        the names of diffusers, PEFT, Comfy, sd-scripts and LyCORIS (`lora_keys`); it is as strong as in PEFT's own
        forward. Sampling costs no more than before. `adapter_name`, for `set_adapters`, is the first free one of
        default_0, default_1 … if None. Raises CheckpointError, also for what cannot be honoured: Tucker's form."""
        with self._replacing_weights():
            self._loras.add(self.backbone, path, weight, adapter_name)

    def unload_lora_weights(self) -> None:
        """Take every LoRA out again: the backbone's weights are bit for bit what they were."""
        with self._replacing_weights():
            self._loras.remove(self.backbone)

    @contextmanager
    def _replacing_weights(self) -> Iterator[None]:
        """The time in which LoRAs are folded in or taken out. Quantised layers get other tensors by that, which an
        offload plan does not move: it is made anew. Raises ConfigError while a plan has the weights on the device."""
        backbone, manager = self.backbone, self.offload_manager
        if manager is not None:
            manager.check_editable("backbone")
        if manager is None or not self._loras.replaces_weights(backbone):
            yield
            return
        self.to("cpu")
        try:
            yield
        finally:
            self.offload(manager.requested, workload=manager.workload, accelerator=manager.accelerator)

    def fuse_lora(self) -> None:
        """Keep every LoRA for good: the weights before them are forgotten, and what is saved names them."""
        self._sharing.fused(self._loras)


def _is_sharded(net: Any) -> bool:
    """Whether processes hold shares of its weights, which nothing but a forward gathers."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(net, FSDPModule)
