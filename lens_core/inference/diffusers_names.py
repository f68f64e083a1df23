"""The names that pipelines of diffusers have for what a LensPipeline has under its own: docs/from-diffusers.md.

Each is a short way to a method or attribute of the pipeline; none has behaviour of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_core.arguments import texts
from lens_core.inference.parts import PIPELINE_PARTS, resolve_device, resolve_dtype
from lens_core.io.readers import shown
from lens_core.types import ConfigError

if TYPE_CHECKING:
    import torch

    from lens_core.types import TextFeatures

NAMES = {"vae": "vae", "text_encoder": "text_encoder", "transformer": "backbone", "scheduler": "sampler"}
"""diffusers' name of a part -> ours."""


def _renamed(kind: str) -> Any:
    return property(lambda pipeline: getattr(pipeline, kind), lambda pipeline, part: pipeline.put(kind, part))


class DiffusersNames:
    """Names for those who know diffusers: `transformer`, `scheduler`, `components`, `encode_prompt` and the like."""

    transformer, scheduler = _renamed("backbone"), _renamed("sampler")

    @property
    def tokenizer(self: Any) -> Any:
        """The text encoder's tokenizer; None where it has none."""
        return getattr(self.text_encoder, "tokenizer", None)

    @property
    def components(self: Any) -> dict[str, Any]:
        """Every part, by diffusers' name; `LensPipeline.from_pipe` makes another pipeline of them."""
        return {name: getattr(self, kind) for name, kind in NAMES.items()} | {"tokenizer": self.tokenizer}

    @classmethod
    def from_single_file(cls: Any, path: str | Path, **options: Any) -> Any:
        """`from_pretrained` of one .safetensors or .gguf file, with the options of that."""
        return cls.from_pretrained(path, **options)

    @classmethod
    def from_pipe(cls: Any, pipeline: Any, **parts: Any) -> Any:
        """Another pipeline with the same parts, which are shared, not copied; `parts` by name replace some.

        LoRAs, device and offload plan are those of the shared weights: a change through one pipeline holds for both,
        and the other's own parts follow to the device. Raises ConfigError for a part that there is not.
        """
        if not hasattr(pipeline, "_sharing"):
            raise ConfigError(f"from_pipe takes a pipeline, not {shown(pipeline)}; from_pretrained reads a checkpoint")
        unknown = sorted(parts.keys() - NAMES.keys() - set(PIPELINE_PARTS))
        if unknown:
            raise ConfigError(f"a pipeline has no part {unknown[0]!r}; parts are {', '.join(PIPELINE_PARTS)}")
        replaced = {NAMES.get(name, name) for name in parts}
        if len(replaced) < len(parts):
            raise ConfigError(f"one part has two names among {', '.join(sorted(parts))}; give each part once")
        for kind in PIPELINE_PARTS:
            if kind not in replaced:
                getattr(pipeline, kind)  # read now, if it is deferred, so that it is read once for both
        manager = pipeline.offload_manager
        new = pipeline._sharing.another(cls, pipeline)
        try:
            for name, part in parts.items():
                new.put(NAMES.get(name, name), part)
        except BaseException:
            pipeline._sharing.pipelines.discard(new)
            if manager is not None and pipeline.offload_manager is None:
                pipeline._plan_anew(manager)  # which ended for both, when the new part did not fit
            raise
        return new

    def encode_prompt(
        self: Any, prompt: str | Sequence[str], negative_prompt: str | Sequence[str] | None = None
    ) -> tuple[TextFeatures, TextFeatures | None]:
        """Prompts -> (prompt_embeds, negative_prompt_embeds), which a call takes instead of the texts."""
        prompts = texts("prompt", prompt)
        if not prompts:
            raise ConfigError("there is no prompt")
        negative = None if negative_prompt is None else texts("negative_prompt", negative_prompt)
        negative = negative * len(prompts) if negative is not None and len(negative) == 1 else negative
        if negative is not None and len(negative) != len(prompts):
            raise ConfigError(f"{len(negative)} negative prompts do not fit {len(prompts)}; give one, or one each")
        return self.encode_once(prompts)[0], self._encode_negative(negative)

    def enable_model_cpu_offload(self: Any, device: str | torch.device | None = None) -> None:
        """`offload("model", device)`: each part comes to the device when it works."""
        self.offload("model", device)

    def enable_sequential_cpu_offload(self: Any, device: str | torch.device | None = None) -> None:
        """`offload("block", device)`: the backbone's blocks come one by one."""
        self.offload("block", device)

    def set_adapters(self: Any, adapter_names: str | Sequence[str], adapter_weights: Any = 1.0) -> None:
        """Give the LoRAs that are loaded other weights; those that are not named get 0.

        `adapter_names`: of `load_lora_weights(adapter_name=…)`. Raises ConfigError for a name that is not loaded.
        """
        names = texts("adapter_names", adapter_names)
        plain = adapter_weights.tolist() if hasattr(adapter_weights, "tolist") else adapter_weights  # numpy's
        several = isinstance(plain, Sequence) and not isinstance(plain, str)
        weights = list(plain) if several else [plain] * len(names)
        if len(set(names)) != len(names):
            raise ConfigError("an adapter is named twice; name each once, with its weight")
        if len(weights) != len(names):
            raise ConfigError(f"{len(names)} adapters and {len(weights)} weights; give one weight, or one each")
        with self._replacing_weights():
            self._loras.reweight(self.backbone, dict(zip(names, weights, strict=True)))

    def unfuse_lora(self: Any) -> None:
        """Refuse: `fuse_lora` forgets the weights before it. ConfigError says what to call instead."""
        raise ConfigError(
            "fuse_lora keeps LoRAs for good. A LoRA that is loaded costs nothing while sampling: leave fuse_lora out, "
            "and take LoRAs out with unload_lora_weights()"
        )

    def set_progress_bar_config(self: Any, **options: Any) -> None:
        """Options of tqdm for the bar of a call, such as `disable=True` or `desc="drawing"`."""
        self.progress_bar_config = {**self.progress_bar_config, **options}


def positional_target(target: Any, device: Any, dtype: Any) -> tuple[torch.device | None, torch.dtype | None]:
    """(device, dtype) of `to(target, dtype)`, where the first may be a dtype as in torch. ConfigError for a device that
    this machine does not have, and for a dtype that weights cannot have."""
    import torch

    if isinstance(target, torch.dtype):
        if dtype is not None and dtype != target:
            raise ConfigError(f"to({target}, {dtype}): give one dtype")
        target, dtype = None, target
    device = target if target is not None else device
    where = None if device is None else resolve_device(device)
    return where, None if dtype is None else resolve_dtype(dtype, where or torch.device("cpu"))


def account(pipeline: Any) -> str:
    """A readable account of a pipeline: its parts with their classes, parameters and dtypes, and its presets."""
    lines = [f"{type(pipeline).__name__}({pipeline.source or 'put together by hand'}) on {pipeline.device}"]
    for kind in PIPELINE_PARTS:
        part = pipeline.store.loaded[kind]
        if part is None:
            lines.append(f"  {kind:13} {'read when it is used' if kind in pipeline.store.deferred else 'none'}")
            continue
        spec = pipeline.specs.get(kind)
        weights = list(part.parameters()) if hasattr(part, "parameters") else []
        count = sum(weight.numel() for weight in weights)
        held = f", {_millions(count)} parameters, {str(weights[0].dtype).removeprefix('torch.')}" if weights else ""
        lines.append(f"  {kind:13} {type(part).__name__} ({spec.use if spec else 'no name'}){held}")
    if pipeline.reasoner is not None:
        lines.append(f"  {'reasoner':13} {type(pipeline.reasoner).__name__}")
    lines += [f"  {'loras':13} {', '.join(pipeline.loras)}"] if pipeline.loras else []
    lines.append(f"  {'presets':13} {_presets(pipeline.presets)}")
    return "\n".join(lines)


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e5 else str(count)


def _presets(presets: Mapping[str, Any]) -> str:
    words = [f"{presets['steps']} steps", f"guidance {presets['guidance_scale']:g}"]
    return ", ".join([*words, f"{presets['base_resolution']} px"] if "base_resolution" in presets else words)
