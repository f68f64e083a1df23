"""CLIP: preprocessing, embeddings, and the perceivers `clip_colors` and `clip_similarity`.

Pictures are preprocessed as open_clip and OpenAI's own code do it with Pillow: the shorter side to the model's size,
bicubic with antialiasing, the centre cut out. Results depend on the resize, so its version is part of what identifies
a perception.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from attrs import field, frozen

from lens_bench.geneval import COLORS
from lens_bench.perceive import canary, masks, weights
from lens_core.inference.parts import resolve_device
from lens_core.types import LensError
from lens_core.validators import integer, text

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

MODEL = "openai/clip-vit-large-patch14"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BACKGROUND = "#999"  # of an object cut out by its mask
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
LONGEST_TEXT = 77  # tokens; what is longer is cut off
CROPS_AT_ONCE = 64


def preprocess(image: Image, size: int) -> NDArray[np.float32]:
    """An RGB picture -> float32 [3, size, size], normalised."""
    from PIL.Image import Resampling

    short = min(image.size)
    width, height = (size if side == short else max(int(size * side / short), size) for side in image.size)
    image = image.resize((width, height), Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / np.float32(255)
    mean, std = (np.array(values, np.float32) for values in (MEAN, STD))
    normalised: NDArray[np.float32] = (pixels - mean) / std
    return normalised.transpose(2, 0, 1)


def version() -> str:
    """Names the preprocessing, with the version of Pillow, whose resize it is."""
    import PIL

    return f"pillow-{PIL.__version__}-bicubic-center"


class Clip:
    """A CLIP model of the transformers library, loaded at its first use. Embeddings are float32 and of length 1."""

    def __init__(self, model: str, device: str) -> None:
        self.model, self.device = model, device
        self._loaded: tuple[Any, Any] | None = None

    def describe(self) -> dict[str, str]:
        name, revision = weights.name_of(self.model), weights.revision_of(self.model)
        return {"model": name, "revision": revision, "version": version()}

    def check_requirements(self) -> None:
        weights.check_requirements(self.model)

    def close(self) -> None:
        self._loaded = None

    def images(self, images: Sequence[Image]) -> Tensor:
        """RGB pictures -> [n, D]."""
        import torch

        model, _ = self._load()
        size = model.config.vision_config.image_size
        pixels = torch.from_numpy(np.stack([preprocess(image, size) for image in images])).to(model.device)
        with torch.inference_mode():
            return unit(model.get_image_features(pixel_values=pixels).pooler_output)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> [n, D]."""
        import torch

        model, tokenizer = self._load()
        most = min(LONGEST_TEXT, model.config.text_config.max_position_embeddings)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        with torch.inference_mode():
            return unit(model.get_text_features(**tokens.to(model.device)).pooler_output)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import CLIPModel, CLIPTokenizer

            model = weights.load(CLIPModel, self.model, "clip").to(resolve_device(self.device))
            tokenizer = weights.tokenizer(CLIPTokenizer, self.model, model.config.text_config.vocab_size)
            self._loaded = model, tokenizer
        return self._loaded


def unit(vectors: Tensor) -> Tensor:
    if not bool(vectors.isfinite().all()) or not bool((vectors.norm(dim=-1) > 0).all()):
        raise LensError("CLIP's embeddings are not finite, or zero; check the weights and the driver")
    lengths: Tensor = vectors.float().norm(dim=-1, keepdim=True)
    return vectors.float() / lengths


# ---- colours ------------------------------------------------------------------------------------------------------


def cut_out(image: Image, box: Sequence[float], mask: str | None) -> Image:
    """The object in `box`, on flat grey where it has a mask, as GenEval shows it to CLIP. Raises ValueError where the
    mask is none of this box."""
    from PIL import Image as pil

    if mask is not None:
        shape = masks.whole(mask, box, image.height, image.width)
        image = pil.composite(image, pil.new("RGB", image.size, BACKGROUND), pil.fromarray(shape))
    return image.crop(tuple(round(value) for value in box[:4]))  # type: ignore[arg-type]  # four numbers


class ClipColors:
    """CLIP names the colour of each object box, for GenEval.

    Question {"class", "objects": [{"box", "mask"}]} -> the colour of each object, one of GenEval's ten.

    A colour's vector is the mean of three prompts' embeddings, normalised before and after; the nearest one wins.
    """

    perceives: ClassVar[str] = "colors"

    @frozen
    class Config:
        model: str = field(default=MODEL, validator=text())  # a folder or org/name[@revision]
        batch_size: int = field(default=16, validator=integer(at_least=1, at_most=256))  # pictures read at once
        device: str = field(default="auto", validator=text())  # auto, cpu, cuda, cuda:1 …

    def __init__(self, config: Config) -> None:
        self.config = config
        self.batch_size = config.batch_size
        self._clip = Clip(config.model, config.device)
        self._vectors: dict[str, Tensor] = {}
        self.close = self._clip.close
        self.check_requirements = self._clip.check_requirements

    def describe(self) -> dict[str, str]:
        described = self._clip.describe()
        return described | {"version": f"geneval-grey-{described['version']}"}

    def canary(self) -> str | None:
        return canary.flat_colors_by_name(self)

    def perceive(self, images: Sequence[Image], questions: Sequence[Any]) -> list[list[str]]:
        things = [(i, thing) for i, question in enumerate(questions) for thing in question["objects"]]
        answers: list[list[str]] = [[] for _ in images]
        for start in range(0, len(things), CROPS_AT_ONCE):
            some = things[start : start + CROPS_AT_ONCE]
            crops = [cut_out(images[i], thing["box"], thing.get("mask")) for i, thing in some]
            embeddings = self._clip.images(crops)
            for (i, _), embedding in zip(some, embeddings, strict=True):
                best = int((self._of(questions[i]["class"]) @ embedding).argmax())
                answers[i].append(COLORS[best])
        return answers

    def _of(self, name: str) -> Tensor:
        """The vectors of the ten colours for a class, [10, D]."""
        if name not in self._vectors:
            prompts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            means = self._clip.texts(prompts).reshape(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._vectors[name] = unit(means)
        return self._vectors[name]


# ---- similarity ---------------------------------------------------------------------------------------------------


class ClipSimilarity:
    """CLIP similarity of a picture and a text (cosine), for CVTG-2K.

    Question text -> the cosine of picture and text. CVTG-2K's CLIPScore is 2.5 times it, at least 0.

    The text is prefixed with `A photo depicts `, as the metric's authors do it.
    """

    perceives: ClassVar[str] = "similarity"

    @frozen
    class Config:
        model: str = field(default=MODEL, validator=text())  # a folder or org/name[@revision]
        prefix: str = "A photo depicts "
        batch_size: int = field(default=32, validator=integer(at_least=1, at_most=1024))
        device: str = field(default="auto", validator=text())

    def __init__(self, config: Config) -> None:
        self.config = config
        self.batch_size = config.batch_size
        self._clip = Clip(config.model, config.device)
        self.close = self._clip.close
        self.check_requirements = self._clip.check_requirements

    def describe(self) -> dict[str, str]:
        described = self._clip.describe()
        return described | {"version": f"{described['version']}-prefix{self.config.prefix!r}"}

    def canary(self) -> str | None:
        return canary.flat_colors_by_similarity(self)

    def perceive(self, images: Sequence[Image], questions: Sequence[Any]) -> list[float]:
        texts = self._clip.texts([self.config.prefix + question for question in questions])
        return [float(value) for value in (self._clip.images(images) * texts).sum(-1)]
