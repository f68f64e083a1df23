"""The perceiver `clip_style`: how similar a picture's style is to reference pictures of a named style.

OneIG's style score is the mean of two such similarities, by CSD (Somepalli et al., 2024, arXiv:2404.01292) and by the
benchmark's own encoder. Both are CLIP vision towers with a projection, and both are read here as transformers'
CLIPVisionModelWithProjection, with their reference embeddings in one safetensors file: `{style: [n, D]}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from attrs import field, frozen

from lens_bench.perceive import canary, clip, weights
from lens_core.checkpoints.manifest import hash_of
from lens_core.checkpoints.tensor_files import read_tensors
from lens_core.inference.parts import resolve_device
from lens_core.types import CheckpointError, ConfigError, did_you_mean
from lens_core.validators import integer, one_of, text

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class ClipStyle:
    """CSD style similarity of a picture to reference pictures, for OneIG.

    Question: a style -> the largest cosine between the picture's embedding and the references of that style.
    """

    perceives: ClassVar[str] = "style similarity"

    @frozen
    class Config:
        model: str = field(validator=text())  # a folder or org/name[@revision]: a CLIP vision tower with a projection
        references: str = field(validator=text())  # a safetensors file with a tensor [n, D] for each style
        # OneIG's published numbers: float32 for CSD, bfloat16 for its own encoder.
        dtype: str = field(default="float32", validator=one_of("float32", "bfloat16"))
        batch_size: int = field(default=32, validator=integer(at_least=1, at_most=1024))
        device: str = field(default="auto", validator=text())

    def __init__(self, config: Config) -> None:
        self.config = config
        self.batch_size = config.batch_size
        self._loaded: tuple[Any, dict[str, Tensor]] | None = None

    def describe(self) -> dict[str, str]:
        path = self._path()
        revision = f"{weights.revision_of(self.config.model)}+references-{hash_of(path)[:12]}"
        version = f"{clip.version()}-{self.config.dtype}"
        return {"model": weights.name_of(self.config.model), "revision": revision, "version": version}

    def check_requirements(self) -> None:
        """Raise LensError where transformers, the model or the references are missing."""
        weights.check_requirements(self.config.model)
        self._path()

    def close(self) -> None:
        self._loaded = None

    def canary(self) -> str | None:
        """That embeddings are finite, and tell a scene from another more than from itself a little darker."""
        first, darker, other = self.embed(canary.scenes())
        near, far = float(first @ darker), float(first @ other)
        return None if near > far else f"a scene is as similar to another ({far:.3f}) as to itself darker ({near:.3f})"

    def perceive(self, images: Sequence[Image], questions: Sequence[Any]) -> list[float]:
        _, references = self._load()
        for question in questions:
            if question not in references:
                raise ConfigError(f"{self._path()}: has no style {question!r}.{did_you_mean(question, references)}")
        embeddings = self.embed(images)
        return [
            float((references[question] @ embedding).max())
            for embedding, question in zip(embeddings, questions, strict=True)
        ]

    def embed(self, images: Sequence[Image]) -> Tensor:
        """RGB pictures -> float32 [n, D] of length 1."""
        import torch

        model, _ = self._load()
        pixels = torch.from_numpy(np.stack([clip.preprocess(image, model.config.image_size) for image in images]))
        with torch.inference_mode():
            vectors = model(pixel_values=pixels.to(model.device, model.dtype)).image_embeds
        return clip.unit(vectors)

    def _path(self) -> Path:
        path = Path(self.config.references).expanduser()
        if not path.is_file():
            raise ConfigError(f"{path}: there are no reference embeddings; convert them once, see docs/benchmarks.md")
        return path

    def _load(self) -> tuple[Any, dict[str, Tensor]]:
        if self._loaded is None:
            import torch
            from transformers import CLIPVisionModelWithProjection

            model = weights.load(CLIPVisionModelWithProjection, self.config.model, "clip_vision_model", "clip")
            references = read_tensors(self._path())
            for name, each in references.items():
                if each.ndim != 2 or each.shape[1] != model.config.projection_dim or not len(each):
                    shape = list(each.shape)
                    problem = (
                        f"the references of {name!r} have the shape {shape}, not [n, {model.config.projection_dim}]"
                    )
                    raise CheckpointError(f"{self._path()}: {problem}; convert them again")
                if not bool(each.isfinite().all()):
                    raise CheckpointError(
                        f"{self._path()}: the references of {name!r} are not finite; convert them again"
                    )
            device = resolve_device(self.config.device)
            model = model.to(device, getattr(torch, self.config.dtype))
            self._loaded = model, {name: clip.unit(each.to(device)) for name, each in references.items()}
        return self._loaded
