"""Parts of a recipe that take their sizes from elsewhere: `backbone: {use: mmdit, like: start, num_layers: 6}`.

`like: start` takes the options of the same component in the start checkpoint, then the sizes that fit the VAE and the
text encoder; `like: neighbours` the sizes alone. Options that the recipe writes itself always count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import evolve

from lens_core.attribution import building
from lens_core.catalog import Catalog
from lens_core.checkpoints import manifest
from lens_core.inference.parts import MODEL_PARTS, PIPELINE_PARTS
from lens_core.recipe import LIKE, ComponentSpec, PipelineSpec, build
from lens_core.types import ConfigError


def resolve_sizes(
    parts: PipelineSpec, catalog: Catalog, start: Mapping[str, ComponentSpec] | None = None
) -> PipelineSpec:
    """The same with every option written out, in place of `like`. `start`: the parts of the start checkpoint, where the
    caller knows them. Raises ConfigError where there is nothing to take the sizes from."""
    waiting = [kind for kind in MODEL_PARTS if LIKE in _options(parts, kind)]
    if not waiting:
        return parts
    if start is None:
        start = start_parts(parts.start, catalog) if parts.start is not None else {}
    # The backbone comes last: its sizes follow from those of the other two.
    for kind in sorted(waiting, key=lambda kind: kind == "backbone"):
        resolved: dict[str, Any] = {kind: _resolved(kind, parts, start, catalog)}
        parts = evolve(parts, **resolved)
    return parts


def start_parts(uri: str, catalog: Catalog) -> dict[str, ComponentSpec]:
    """The parts of a checkpoint, with their options."""
    return specs_of(manifest.read_manifest(manifest.resolve_uri(uri, catalog), catalog))


def specs_of(description: Mapping[str, Any]) -> dict[str, ComponentSpec]:
    """The parts that a manifest names, with their options."""
    components = description["components"]
    return {k: ComponentSpec(c["use"], dict(c.get("config", {}))) for k, c in components.items() if k in PIPELINE_PARTS}


def _options(parts: PipelineSpec, kind: str) -> Mapping[str, Any]:
    spec = getattr(parts, kind)
    return {} if spec is None else spec.options


def _resolved(kind: str, parts: PipelineSpec, start: Mapping[str, ComponentSpec], catalog: Catalog) -> ComponentSpec:
    spec: ComponentSpec = getattr(parts, kind)
    written = {k: v for k, v in spec.options.items() if k != LIKE}
    entry = catalog.find(kind, spec.use)
    path = f"$.pipeline.{kind}.{LIKE}"
    taken: dict[str, Any] = {}
    if spec.options[LIKE] == "start":
        if kind not in start:
            raise ConfigError(f"{path}: pipeline.start names no checkpoint with a {kind}; name one, or write the sizes")
        there = catalog.find(kind, start[kind].use).name
        if there != entry.name:
            hint = ", or use like: neighbours" if hasattr(entry.cls, "fitting") else ""
            raise ConfigError(f"{path}: {parts.start} has the {kind} {there}, not {entry.name}; write the sizes{hint}")
        taken = dict(start[kind].options)
    elif not hasattr(entry.cls, "fitting"):
        raise ConfigError(
            f"{path}: no size of {entry.name} follows from its neighbours; write them, or use like: start"
        )
    if hasattr(entry.cls, "fitting"):
        sizes = _neighbours(path, parts, start, catalog)
        with building(entry.name):
            taken |= entry.cls.fitting(taken | written, *sizes)
    return ComponentSpec(spec.use, taken | written)


def _neighbours(
    path: str, parts: PipelineSpec, start: Mapping[str, ComponentSpec], catalog: Catalog
) -> tuple[int, int, int]:
    """(C, L, D) of the VAE and the text encoder beside the backbone."""
    import torch

    built: dict[str, Any] = {}
    for kind in ("vae", "text_encoder"):
        spec = getattr(parts, kind) or start.get(kind)
        if spec is None:
            raise ConfigError(f"{path}: the pipeline has no {kind} to take sizes from; name one, or a start")
        name, cls, config = build(catalog, kind, spec, f"$.pipeline.{kind}")
        with building(name), torch.device("meta"):
            built[kind] = cls(config)
    return built["vae"].channels, built["text_encoder"].layers, built["text_encoder"].width
