"""The perceiver `dreamsim`: embeddings whose cosine distance is DreamSim's (Fu et al., 2023, arXiv:2306.09344).

The package is not a dependency of Lens: it needs torchvision, timm and open_clip, and its weights are torch files,
which the package itself loads. Both are installed by whoever wants OneIG's diversity; nothing is downloaded here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attrs import field, frozen

from lens_bench.perceive import canary
from lens_core.checkpoints.manifest import combined, hash_of
from lens_core.inference.parts import resolve_device
from lens_core.types import ConfigError, LensError
from lens_core.validators import integer, text

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own switch
NEEDED = ("dino_vitb16_pretrain.pth", "clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar")
"""Files of the weights without which the package would download them."""


class DreamSim:
    """DreamSim embedding of a picture, for OneIG's diversity.

    Question None -> the picture's embedding, a list of floats of length 1 in sum of squares.

    DreamSim's distance of two pictures is 1 - the cosine of their embeddings.
    """

    perceives: ClassVar[str] = "embedding"

    @frozen
    class Config:
        folder: str = field(validator=text())  # with the weights, as the package unpacks them
        batch_size: int = field(default=16, validator=integer(at_least=1, at_most=1024))
        device: str = field(default="auto", validator=text())

    def __init__(self, config: Config) -> None:
        self.config = config
        self.batch_size = config.batch_size
        self._folder = Path(config.folder).expanduser()
        self._loaded: tuple[Any, Any, str] | None = None

    def check_requirements(self) -> None:
        """Raise ConfigError where the package or a file of its weights is missing."""
        if importlib.util.find_spec("dreamsim") is None:
            raise ConfigError(
                "the package dreamsim is not installed; pip install dreamsim==0.2.1, or name no diversity"
            )
        lacking = [name for name in NEEDED if not (self._folder / name).is_file()]
        if lacking:
            problem = "is missing, and nothing is downloaded; unpack DreamSim's weights there"
            raise ConfigError(f"{self._folder / lacking[0]}: {problem}")

    def describe(self) -> dict[str, str]:
        self.check_requirements()
        files = sorted(path for path in self._folder.rglob("*") if path.is_file() and path.suffix != ".zip")
        revision = combined({str(path.relative_to(self._folder)): hash_of(path) for path in files})
        package = importlib.metadata.version("dreamsim")
        return {"model": "dreamsim-ensemble", "revision": revision, "version": f"dreamsim-{package}"}

    def close(self) -> None:
        self._loaded = None

    def canary(self) -> str | None:
        first, darker, other = self.perceive(canary.scenes(), [None] * 3)
        near, far = (sum(a * b for a, b in zip(first, each, strict=True)) for each in (darker, other))
        return None if near > far else f"a scene is as similar to another ({far:.3f}) as to itself darker ({near:.3f})"

    def perceive(self, images: Sequence[Image], questions: Sequence[Any]) -> list[list[float]]:
        import torch

        if self._loaded is None:
            package = importlib.import_module("dreamsim")
            device = str(resolve_device(self.config.device))
            with _weights_only():
                self._loaded = *package.dreamsim(pretrained=True, device=device, cache_dir=str(self._folder)), device
        model, preprocess, device = self._loaded
        with torch.inference_mode():
            batch = torch.cat([preprocess(image) for image in images]).to(device)
            vectors = model.embed(batch).reshape(len(images), -1).float()
        if not bool(vectors.isfinite().all()) or not bool((vectors.norm(dim=-1) > 0).all()):
            raise LensError("DreamSim's embeddings are not finite, or zero; check the weights and the driver")
        return [[float(v) for v in row] for row in (vectors / vectors.norm(dim=-1, keepdim=True)).tolist()]


@contextmanager
def _weights_only() -> Iterator[None]:
    """While this lasts, torch reads tensors alone from torch files, whoever asks: their pickles run no code."""
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = before
