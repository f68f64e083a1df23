"""What a recipe would need, before anything is loaded: its parts on the meta device, and memory by part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor, nn

from lens_core.attribution import check_on_meta
from lens_core.catalog import Catalog
from lens_core.checkpoints import hub, manifest
from lens_core.inference import lora
from lens_core.inference.loading import CheckpointInfo
from lens_core.inference.parts import MODEL_PARTS, PIPELINE_PARTS
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.sizes import resolve_sizes, specs_of
from lens_core.recipe import ComponentSpec, PipelineSpec, Recipe, build, unstructure
from lens_core.training import frozen_weights
from lens_core.training.muon import block_matrices
from lens_core.training.optimizers import check_module_names
from lens_core.training.trackers import check_trackers
from lens_core.types import ConfigError, LensError

PUBLISHED = "published:"
"""The name under which a plugin describes the published model (`lens_describe`)."""

STANDS_IN = "the published model stands in for it"
"""The note of a pipeline whose start is not on this disk, so that its parts may be others."""


def published(catalog: Catalog, name: str = PUBLISHED) -> dict[str, Any]:
    """The description of the checkpoint `name`, which need not be on this disk, as the plugin that knows it gives it;
    of the published model, where none does. What else is installed does not count. Raises LensError without one.
    """
    description = catalog.first("lens_describe", Path(name)) or catalog.first("lens_describe", Path(PUBLISHED))
    if description is None:
        raise LensError(
            "no plugin here describes the published model; install lens_mmdit, or set LENS_PLUGINS to let it in"
        )
    return dict(description)


def parts(spec: PipelineSpec, catalog: Catalog) -> tuple[dict[str, ComponentSpec], dict[str, Any], list[str]]:
    """(what each part will be, presets, notes): as the recipe's `pipeline` names it, or as its start does.

    For a start that is not on this disk the published model stands in, and a note says so.
    """
    start, notes = spec.start, []
    uses: dict[str, ComponentSpec] = {}
    presets: dict[str, Any] = {}
    if start is not None:
        here = _here(start, catalog)
        described = published(catalog, start) if here is None else manifest.read_manifest(here, catalog)
        uses = specs_of(described)
        presets = dict(described.get("presets", {}))
        if here is None:
            names = ", ".join(use.use for kind, use in uses.items() if kind in MODEL_PARTS)
            notes.append(f"{start} is not on this disk; the sizes are those of the published model ({names})")
    written = resolve_sizes(spec, catalog, uses)
    uses |= {kind: use for kind in PIPELINE_PARTS if (use := getattr(written, kind)) is not None}
    wanted = ("steps", "guidance_scale", "base_resolution")
    presets |= {k: v for k in wanted if (v := getattr(spec, k)) is not None}
    return uses, presets, notes


def _here(start: str, catalog: Catalog) -> Path | None:
    """Where a checkpoint lies on this disk; None where it does not. Fetches nothing."""
    try:
        if not hub.is_name(start) or Path(start).is_dir():
            return manifest.resolve_uri(start, catalog)
        name, _, revision = start.partition("@")
        return hub.snapshot(name, revision or None, local=True)
    except LensError:
        return None


def on_meta(recipe: Recipe, catalog: Catalog) -> tuple[LensPipeline, list[str]]:
    """The recipe's pipeline with every shape and no weights, and what was assumed."""
    pipeline, notes = pipeline_on_meta(recipe.pipeline, catalog)
    if pipeline.note != STANDS_IN:
        check_sizes(recipe, catalog, pipeline)
    return pipeline, notes


def pipeline_on_meta(spec: PipelineSpec, catalog: Catalog) -> tuple[LensPipeline, list[str]]:
    """As `on_meta`, of a recipe's `pipeline` alone. Its `note` is STANDS_IN where nothing here knows the start."""
    uses, presets, notes = parts(spec, catalog)
    built: dict[str, Any] = {}
    for kind, use in uses.items():
        _, cls, config = build(catalog, kind, use, f"$.pipeline.{kind}")
        with torch.device("meta"):
            built[kind] = cls(config)
        if kind in MODEL_PARTS:
            built[kind].requires_grad_(False)
    # Where nothing here knows the start, the recipe's own parts need not fit the published ones that stand in for it.
    known = not notes or catalog.first("lens_describe", Path(spec.start or "")) is not None
    if known:
        check_on_meta(*(built.get(kind) for kind in ("vae", "text_encoder", "backbone")))
    info = CheckpointInfo(note="" if known else STANDS_IN)
    return LensPipeline(**built, presets=presets, specs=uses, catalog=catalog, info=info), notes


def check_sizes(recipe: Recipe, catalog: Catalog, pipeline: LensPipeline) -> None:
    """Raise ConfigError for a picture size of the recipe that is not on the VAE's grid."""
    if pipeline.vae is None or pipeline.backbone is None:
        return
    sizes = _sizes_of("dataset", recipe.dataset, "$.dataset", catalog)
    sizes += _sizes_of("method", recipe.method, "$.method", catalog)
    if recipe.evaluation is not None:
        sizes += [("$.evaluation.size", recipe.evaluation.size)] if recipe.evaluation.size else []
        sizes += _sizes_of("dataset", recipe.evaluation.validation, "$.evaluation.validation", catalog)
    for path, size in sizes:
        try:
            pipeline.size(*size)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _sizes_of(kind: str, spec: ComponentSpec | None, path: str, catalog: Catalog) -> list[tuple[str, tuple[int, int]]]:
    """The (height, width) in the options `sizes` and `buckets` of a component and of the datasets that it names."""
    if spec is None:
        return []
    config = build(catalog, kind, spec, path)[2]
    sizes = [(f"{path}.sizes", size) for size in _pairs(getattr(config, "sizes", ()))]
    groups = getattr(config, "buckets", ())
    for group in groups if isinstance(groups, tuple | list) else ():
        sizes += [(f"{path}.buckets", size) for size in _pairs(group)]
    for place, inner, use in getattr(config, "uses", tuple)():
        sizes += _sizes_of(inner, use, f"{path}.{place}", catalog) if inner == "dataset" else []
    return sizes


def _pairs(sizes: Any) -> list[tuple[int, int]]:
    """The (height, width) in an option, which another plugin may use for something else."""
    if not isinstance(sizes, tuple | list):
        return []
    return [(s[0], s[1]) for s in sizes if isinstance(s, tuple | list) and [type(n) for n in s] == [int, int]]


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes that a run holds tensors in that learn, or follow what learns: float32, whatever its precision."""
    return sum(4 * t.numel() for t in tensors)


class Weigher:
    """How many bytes a run holds the tensors of its networks in, each of which it counts once.

    What learns is float32. What does not is bfloat16 where the run computes in it, buffers excepted. An encoder whose
    published file has its experts in 4 bits keeps them so, and holds nothing that encoding does not read.
    """

    def __init__(self, half: bool) -> None:
        self.half = half
        self.seen: set[int] = set()
        self.packed: dict[int, int] = {}
        self.unheld: set[int] = set()

    def as_published(self, net: Any) -> None:
        """`net` is read from the published file."""
        config = getattr(net, "config", None)
        if hasattr(net, "sizes_in_4_bits") and getattr(config, "experts", "") == "auto":
            self.packed |= net.sizes_in_4_bits()
            self.unheld |= {id(p) for module in net.unused_modules() for p in module.parameters()}

    def weigh(self, net: nn.Module, learns: bool) -> int:
        """The bytes of those of its tensors that were not counted yet."""
        total = 0
        for tensor in (*net.parameters(), *net.buffers()):
            if id(tensor) in self.seen or id(tensor) in self.unheld:
                continue
            self.seen.add(id(tensor))
            frozen = self.half and not learns and isinstance(tensor, nn.Parameter)
            total += self.packed.get(id(tensor), tensor.numel() * (2 if frozen else 4))
        return total


def memory(recipe: Recipe, catalog: Catalog) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """(bytes by part, parameters that learn by module, notes) of a process that holds everything, without activations.

    Raises ConfigError where the method cannot be built without weights.
    """
    pipeline, notes = on_meta(recipe, catalog)
    _, cls, config = build(catalog, "method", recipe.method, "$.method")
    with torch.device("meta"):
        method = cls(config, pipeline)
    trainable: Mapping[str, nn.Module] = method.trainable_modules()
    unread = frozen_weights.unread(recipe, catalog)
    if unread:
        notes.append(f"{' and '.join(unread)} are read for nothing but to check the cache, and held by nobody")
    names = {id(net): module_name for module_name, net in trainable.items()}
    modules = {kind: getattr(pipeline, kind) for kind in MODEL_PARTS if getattr(pipeline, kind) is not None}
    held = {names.get(id(net), kind): net for kind, net in modules.items() if kind not in unread} | dict(trainable)
    known = {id(net) for net in held.values()}
    held |= {k: v for k, v in vars(method).items() if isinstance(v, nn.Module) and id(v) not in known}
    sizes, learns = cost(
        held, trainable, list(modules.values()), recipe, published=any("is not on this disk" in n for n in notes)
    )
    return sizes, learns, notes


def cost(
    held: Mapping[str, nn.Module],
    trainable: Mapping[str, nn.Module],
    parts: Sequence[nn.Module],
    recipe: Recipe,
    published: bool = False,
) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes by part, parameters that learn by module) of networks on the meta device, to which the recipe's LoRAs are
    put. `held` are all of them by name; `parts` are those of the pipeline, which alone have moving averages.
    `published`: they are read from the published files."""
    check_module_names(recipe.train, trainable)
    sizes: dict[str, int] = {}
    learns: dict[str, int] = {}
    weigher = Weigher(recipe.train.precision == "bf16")
    for net in held.values() if published else ():
        weigher.as_published(net)
    for name, net in held.items():
        full = name in trainable and name not in recipe.train.lora
        sizes[f"{name}: weights"] = weigher.weigh(net, full)
    for module_name, net in trainable.items():
        adapter = recipe.train.lora.get(module_name)
        if adapter is not None:
            with torch.device("meta"):
                lora.attach(net, adapter)
        learned = [p for name, p in net.named_parameters() if adapter is None or lora.owned(name)]
        grows = size_of(learned)
        learns[module_name] = sum(p.numel() for p in learned)
        sizes |= {f"{module_name}: adapter": grows} if adapter is not None else {}
        muon = recipe.train.optimizer == "muon"
        moments = 2 * grows - (size_of(block_matrices(net, learned)) if muon else 0)  # Muon keeps one of a matrix
        optimizer = "Muon" if muon else "AdamW"
        sizes |= {f"{module_name}: gradients": grows, f"{module_name}: {optimizer}'s moments": moments}
        if recipe.train.ema_decay and any(net is part for part in parts):
            sizes[f"{module_name}: moving average"] = grows
    return {k: v for k, v in sizes.items() if v}, learns


def bytes_per_process(
    recipe: Recipe, catalog: Catalog, sizes: Mapping[str, int], learns: Mapping[str, int]
) -> float | None:
    """Bytes of one process of `train.fsdp_shards`: trainable modules are sharded, and so are frozen networks of the
    method that share no weight with one. None where nothing is sharded."""
    if recipe.train.fsdp_shards <= 1:
        return None
    _, cls, _ = build(catalog, "method", recipe.method, "$.method")
    names = {*learns, *(("teacher",) if hasattr(cls, "frozen") and "teacher: weights" in sizes else ())}
    share = sum(size for name, size in sizes.items() if name.partition(":")[0] in names)
    return sum(sizes.values()) - share + share / recipe.train.fsdp_shards


def describe(recipe: Recipe, catalog: Catalog) -> str:
    """The recipe with its defaults, who learns how much, and memory by part, as text."""
    import yaml

    check_trackers(recipe.train.trackers)
    _, method, config = build(catalog, "method", recipe.method, "$.method")
    uses, _, _ = parts(recipe.pipeline, catalog)
    pipeline: dict[str, Any] = {
        kind: uses[kind] for kind in PIPELINE_PARTS if getattr(recipe.pipeline, kind) is not None
    }
    resolved = unstructure(evolve(recipe, pipeline=evolve(recipe.pipeline, **pipeline)))
    resolved["method"] = {"use": recipe.method.use, **unstructure(config)}
    text = yaml.safe_dump(_plain(resolved), sort_keys=False, allow_unicode=True, width=120)
    if recipe.dataset is not None:
        _, dataset, options = build(catalog, "dataset", recipe.dataset, "$.dataset")
        text += f"\n{dataset.estimate(options)}\n" if hasattr(dataset, "estimate") else ""
    if hasattr(method, "estimate"):
        return f"{text}\n{method.estimate(config, recipe, catalog)}"
    sizes, learns, notes = memory(recipe, catalog)
    lines = ["learns"] + [
        f"  {module_name:28}{count / 1e6:12,.2f} M parameters" for module_name, count in learns.items()
    ]
    lines += ["memory, GB (10^9 bytes)"] + [f"  {name:28}{size / 1e9:12,.3f}" for name, size in sizes.items()]
    lines += [f"  {'all of it':28}{sum(sizes.values()) / 1e9:12,.3f}"]
    each = bytes_per_process(recipe, catalog, sizes, learns)
    if each is not None:
        lines += [f"  {f'of a process of {recipe.train.fsdp_shards}':28}{each / 1e9:12,.3f}"]
    return "\n".join([text, *lines, *(f"note: {note}" for note in ("activations come on top", *notes))])


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
