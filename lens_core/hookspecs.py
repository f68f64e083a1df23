"""The hooks, on one page. `from lens_core import hookimpl` marks an implementation.

Providers take no arguments, are called once, on the first look-up of their kind, and return `{short name: class}`.
Heavy imports belong inside their bodies. Of a resolver, the first return value that is not None is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pluggy

ENTRY_POINTS = "lens.v1"
"""The entry-point group; the API version is in its name."""

spec = pluggy.HookspecMarker("lens")
hookimpl = pluggy.HookimplMarker("lens")


@spec
def lens_vaes() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Autoencoders between pixels and latents."""


@spec
def lens_text_encoders() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Encoders from prompts to features."""


@spec
def lens_backbones() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Networks that predict the velocity."""


@spec
def lens_samplers() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Integrators from noise to data."""


@spec
def lens_rewards() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Scores of single pictures, for reinforcement learning."""


@spec
def lens_reasoners() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Rewriters of prompts."""


@spec
def lens_methods() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Training algorithms."""


@spec
def lens_datasets() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Sources of training batches."""


@spec
def lens_curators() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Measurements of pictures and captions, for the filters of a training store."""


@spec
def lens_benchmarks() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Held-out prompts with their scoring."""


@spec
def lens_generators() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Anything that turns prompts into pictures, a remote API for instance."""


@spec
def lens_perceivers() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Models that read pictures for benchmarks: detectors, OCR engines, encoders."""


@spec
def lens_llms() -> dict[str, type[Any]]:  # type: ignore[empty-body]  # a spec has no body
    """Language models to chat with."""


@spec
def lens_commands() -> dict[str, str]:  # type: ignore[empty-body]  # a spec has no body
    """Commands of your own, as `lens NAME`: name -> "module:attribute" of a function or a cyclopts App; "bench NAME" is
    `lens bench NAME`. `lens --help` reads the docstring from the source, without importing the module."""


@spec
def lens_pages() -> dict[str, str]:  # type: ignore[empty-body]  # a spec has no body
    """Pages for a browser: name -> "module:function", called as `function(app, drawing, settings)`. `lens serve --ui`
    mounts the first one by name on its app. `drawing` starts jobs: `lens_serve.pages.Drawing`; `settings` are the
    folders and models that the page may show."""


@spec(firstresult=True)
def lens_fetch(uri: str) -> Path | None:
    """Where the checkpoint called `uri` lies on this disk, or None. Local paths and Hub names are the core's, last."""


@spec(firstresult=True)
def lens_describe(folder: Path) -> dict[str, Any] | None:
    """The `lens.json` that `folder`, which has none, would have had; None if its layout is unknown to you. It may be a
    single file too. A component's `file`, a path in the folder, says that a single file holds it.

    Where only sizes are wanted it may be a name, of a checkpoint that is not on this disk, or `published:`, the
    published model. Who describes that decides what stands in for it, however many components are installed."""
