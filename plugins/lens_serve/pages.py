"""What a page may ask of the engine, in plain types, and how `--ui` finds the page. A page imports nothing of this."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lens_core.catalog import Catalog, resolve
from lens_core.types import ConfigError
from lens_serve.engine import Engine
from lens_serve.jobs import DrawnImage, ImageRequest, Job
from lens_serve.outputs import Outputs

if TYPE_CHECKING:
    from fastapi import FastAPI
    from PIL.Image import Image


@frozen(kw_only=True)
class PageSettings:
    """What a page may show beside the model: folders of the user's, and checkpoints that it may load to compare."""

    runs: Path = Path("runs")
    results: Path = Path("runs")
    models: tuple[str, ...] = ()
    scratch: Path  # a folder of the page's, which alone it serves files from
    max_upload: int = 32 * 2**20  # bytes


class Drawing:
    """The engine as a page sees it. Events of a job have the names of `lens_serve.jobs`."""

    def __init__(self, engine: Engine, outputs: Outputs | None) -> None:
        self.engine, self.outputs = engine, outputs

    @property
    def name(self) -> str:
        return self.engine.name

    @property
    def model_hash(self) -> str:
        """Of the checkpoint, as pictures record it."""
        return self.engine.model_hash

    @property
    def presets(self) -> Mapping[str, Any]:
        return self.engine.presets

    @property
    def grid(self) -> int:
        """Sides of a picture are multiples of this, px."""
        return self.engine.grid

    @property
    def samplers(self) -> list[str]:
        return self.engine.samplers

    @property
    def loras(self) -> Mapping[str, Path]:
        return self.engine.loras

    @property
    def lossy_vae_tile(self) -> int | None:
        """Side of the tiles in which pictures are decoded, px; None: whole."""
        return self.engine.lossy_vae_tile

    @property
    def dtype(self) -> str:
        """The dtype in which pictures are drawn, as they record it."""
        return self.engine.dtype

    def lora_hash(self, name: str) -> str:
        """The hash of an offered LoRA's content, as pictures record it. Raises LensError."""
        return self.engine.lora_hash(name)

    def sampler_facts(self, name: str) -> Mapping[str, Any]:
        """The sampler of this name with the options that it has here, as pictures record it. Raises ConfigError."""
        return self.engine.sampler_facts(name)

    @property
    def max_images(self) -> int:
        """Pictures of one request."""
        return self.engine.limits.max_images

    @property
    def max_previews(self) -> int:
        return self.engine.limits.max_previews

    def start(self, **fields: Any) -> Job:
        """Submit a request with the fields of `ImageRequest`. Raises ConfigError, or Busy, in one line."""
        return self.engine.submit(ImageRequest(**fields))

    def draw_with(self, model: str, **fields: Any) -> DrawnImage:
        """Draw one picture with another checkpoint, within the same limits; it is loaded for this and let go again.
        Waits for the picture. Raises LensError, in one line."""
        engine = self.engine.another(model)
        try:
            (drawn,) = engine.submit(ImageRequest(**fields)).result()
        finally:
            engine.close(0)
        return drawn

    def keep(self, image: Image, job: str, index: int, facts: Mapping[str, Any]) -> None:
        """Write a finished picture into the outputs folder, if there is one."""
        if self.outputs is not None:
            self.outputs.save(image, job, index, facts)


def check_installed() -> None:
    """Raise ConfigError where no plugin brings a page, or what it needs is missing."""
    catalog = Catalog.installed()
    if not catalog.pages():
        raise ConfigError(f"--ui: no plugin brings a page; lens_studio does, see lens plugins.{catalog.disabled()}")
    if find_spec("gradio") is None:
        raise ConfigError("--ui needs gradio: pip install 'lens-t2i[ui]'")


def add_page(
    app: FastAPI, engine: Engine, outputs: Outputs | None, options: Any, max_upload: int, place: str
) -> None:  # fmt: skip
    """Mount the page on the app and print where it is; `options` are those of `lens serve`, `place` its address."""
    # The page serves files from a folder that it alone writes, so a link in the outputs folder leads nowhere.
    scratch = Path(tempfile.mkdtemp(prefix=".page-", dir=None if outputs is None else outputs.folder))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    settings = PageSettings(
        runs=options.runs, results=options.results, models=tuple(options.compare or ()), scratch=scratch.resolve(),
        max_upload=max_upload,
    )  # fmt: skip
    path = mount_page(app, Drawing(engine, outputs), settings)
    print(f"lens: the page is at {place}{path}", file=sys.stderr, flush=True)
    if options.open_page:
        opening = threading.Timer(1.0, webbrowser.open, [f"{place}{path}"])
        opening.daemon = True
        opening.start()


def mount_page(app: FastAPI, drawing: Drawing, settings: PageSettings, catalog: Catalog | None = None) -> str:
    """Mount the page that a plugin brings, the first by name -> its path."""
    pages = (catalog or Catalog.installed()).pages()
    return str(resolve(pages[min(pages)])(app, drawing, settings))
