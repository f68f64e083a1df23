"""Curators with weights: classifiers by name (NSFW, watermarks), aesthetics, text in pictures, captions that mismatch.

Weights are named in the recipe, at a pinned revision, and looked for before the first picture is read. Each process
loads them when it scores its first picture.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from lens_core.catalog import Catalog
from lens_core.checkpoints.manifest import hash_of
from lens_core.config import ComponentSpec
from lens_core.io.readers import shown
from lens_core.recipe import build
from lens_core.types import CheckpointError, ConfigError, Prompt, Record, did_you_mean
from lens_core.validators import integer, one_of, text
from lens_curate.recipe import COLUMN
from lens_curate.weights import ModelOptions, device_of, load_model, load_processor, model_config, weights_id


class Classifier:
    """The probability of one label by an image classifier: NSFW, watermarks, or others.

    The classifier is one of the transformers library.

    The column is called as `column` says, so that a threshold reads `keep: {nsfw: {max: 0.5}}`.
    """

    version: ClassVar[str] = "1"

    @frozen
    class Config(ModelOptions):
        label: str = field(kw_only=True, validator=text())  # one of the model's own labels
        column: str = field(default="probability", validator=COLUMN)  # what its number is called

    def __init__(self, config: Config) -> None:
        self.config = config
        self.columns = (config.column,)

    def weights_id(self) -> str:
        return weights_id(self.config)

    def prepare(self) -> None:
        """Fetch the model and look for its label. Raises LensError."""
        _ = self._label
        load_processor(self.config)

    @cached_property
    def _label(self) -> int:
        labels = model_config(self.config).get("id2label")
        if not isinstance(labels, dict) or not labels:
            raise CheckpointError(f"{self.config.model}: its config.json names no labels; it is no classifier")
        numbers = {str(label): int(number) for number, label in labels.items() if number.isdecimal()}
        if self.config.label not in numbers:
            hint = did_you_mean(self.config.label, numbers)
            raise ConfigError(f"{self.config.model}: has no label {shown(self.config.label)}.{hint}")
        return numbers[self.config.label]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModelForImageClassification

        return load_model(AutoModelForImageClassification, self.config), load_processor(self.config)

    def score(self, records: Sequence[Record]) -> Mapping[str, Sequence[float]]:
        import torch

        model, processor = self._loaded
        values: list[float] = []
        for inputs in _inputs(records, self.config.batch, processor, model.device):
            with torch.no_grad():
                logits = model(**inputs).logits.float()
            values += torch.softmax(logits, dim=-1)[:, self._label].tolist()
        return {self.config.column: values}


def _inputs(records: Sequence[Record], batch: int, processor: Any, device: Any) -> Iterator[Any]:
    """What a model takes, on its device, `batch` pictures at a time."""
    for start in range(0, len(records), batch):
        pictures = [np.ascontiguousarray(record.pixels) for record in records[start : start + batch]]
        yield processor(images=pictures, return_tensors="pt").to(device)


class Aesthetics:
    """The LAION aesthetic score of a picture, about 1 to 10.

    Five linear layers over the image embedding of CLIP ViT-L/14.

    `model` is a CLIP model in the layout of the transformers library; `head` a safetensors file with the weights of
    the five layers, `layers.0` to `layers.7` as the published head numbers them. That head is published as a pickle,
    which Lens does not read: convert it once where you trust it.
    """

    version: ClassVar[str] = "1"
    columns: ClassVar[tuple[str, ...]] = ("aesthetics",)

    @frozen
    class Config(ModelOptions):
        head: str = field(kw_only=True, validator=text())  # safetensors file

    def __init__(self, config: Config) -> None:
        self.config = config

    def weights_id(self) -> str:
        return f"{weights_id(self.config)} {hash_of(Path(self.config.head).expanduser())}"

    def prepare(self) -> None:
        """Fetch CLIP, and check the head against it. Raises LensError."""
        width = model_config(self.config).get("projection_dim")
        if not isinstance(width, int):
            raise CheckpointError(f"{self.config.model}: its config.json has no projection_dim; name a CLIP model")
        read_head(Path(self.config.head), width)
        load_processor(self.config)

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        from transformers import CLIPModel

        model = load_model(CLIPModel, self.config)
        head = read_head(Path(self.config.head), model.config.projection_dim).to(device_of(self.config.device))
        return model, load_processor(self.config), head

    def score(self, records: Sequence[Record]) -> Mapping[str, Sequence[float]]:
        import torch
        from torch.nn.functional import normalize

        model, processor, head = self._loaded
        values: list[float] = []
        for inputs in _inputs(records, self.config.batch, processor, model.device):
            with torch.no_grad():
                pooled = model.vision_model(**inputs).pooler_output
                values += head(normalize(model.visual_projection(pooled), dim=-1)).squeeze(-1).tolist()
        return {"aesthetics": values}


def read_head(path: Path, width: int) -> Any:
    """The aesthetic head for embeddings of `width` numbers: five linear layers, nothing between them in use. Raises
    CheckpointError where the file has other tensors."""
    import torch
    from safetensors.torch import load_file

    sizes = [width, 1024, 128, 64, 16, 1]
    # The published head counts its dropout layers too, which do nothing in use.
    names = [f"layers.{number}" for number in (0, 2, 4, 6, 7)]
    try:
        tensors = load_file(path.expanduser())
    except Exception as error:  # safetensors raises its own, and OSError
        raise CheckpointError(f"{path}: cannot be read as safetensors ({shown(str(error))}); check the path") from error
    expected = {f"{name}.{part}": size for name, ins, outs in zip(names, sizes, sizes[1:], strict=False)
                for part, size in (("weight", (outs, ins)), ("bias", (outs,)))}  # fmt: skip
    for name, size in expected.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != size:
            raise CheckpointError(f"{path}: {name} must be of shape {size}, not {shape}; convert the published head")
    head = torch.nn.Sequential(*(torch.nn.Linear(i, o) for i, o in pairwise(sizes)))
    for layer, name in zip(head, names, strict=True):
        layer.weight.data, layer.bias.data = tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()
    return head.eval().requires_grad_(False)


class TextArea:
    """The share of a picture that is text, and the number of text boxes, by RapidOCR.

    The share is that of the area in boxes.

    The wheel of rapidocr ships its models; nothing is fetched. Overlapping boxes count once.
    """

    version: ClassVar[str] = "1"
    columns: ClassVar[tuple[str, ...]] = ("text_area", "text_boxes")

    @frozen
    class Config:
        side: int = field(default=736, validator=integer(at_least=64, at_most=4096))  # px, longer side looked at
        threads: int = field(default=1, validator=integer(at_least=1, at_most=256))  # of each process

    def __init__(self, config: Config) -> None:
        self.config = config

    def prepare(self) -> None:
        """Raises ConfigError where rapidocr is missing."""
        for package in ("rapidocr", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"text_area needs {package}, which is missing; pip install 'lens-t2i[curate]'")

    @cached_property
    def _engine(self) -> Any:
        import logging

        from rapidocr import RapidOCR

        logging.getLogger("RapidOCR").setLevel(logging.ERROR)
        threads = {"EngineConfig.onnxruntime.intra_op_num_threads": self.config.threads}
        return RapidOCR(params={**threads, "Global.log_level": "error"})

    def score(self, records: Sequence[Record]) -> Mapping[str, Sequence[float]]:
        made = [self._measure(record.pixels) for record in records]
        return {"text_area": [area for area, _ in made], "text_boxes": [count for _, count in made]}

    def _measure(self, pixels: NDArray[np.uint8]) -> tuple[float, float]:
        from PIL import Image, ImageDraw

        image = Image.fromarray(pixels)
        if max(image.size) > self.config.side:
            image.thumbnail((self.config.side, self.config.side), Image.Resampling.BOX)
        result = self._engine(
            np.ascontiguousarray(np.asarray(image)[..., ::-1]), use_det=True, use_cls=False, use_rec=False
        )
        boxes = getattr(result, "boxes", None)
        if boxes is None or not len(boxes):
            return 0.0, 0.0
        covered = Image.new("1", image.size)
        draw = ImageDraw.Draw(covered)
        for box in boxes:
            draw.polygon([(float(x), float(y)) for x, y in box], fill=1)
        return float(np.asarray(covered).mean()), float(len(boxes))


QUESTIONS = (
    ("subject", "Is the main subject that the description names in the picture?", 2.0),
    ("attributes", "Are the numbers, colours and materials that the description names right?", 1.0),
    ("places", "Are things where the description says that they are?", 1.0),
    ("text", "Is all writing that the description quotes in the picture, letter by letter?", 1.0),
)
WHOLE = "Is this a description of this picture, and not of another one?"


class CaptionMatch:
    """How well the caption fits the picture, 0 to 1, by a reward such as an LLM judge.

    Asked last, about pictures that everything else keeps. A reward that needs facts which a caption does not carry
    abstains, and its pictures fail to be measured.
    """

    version: ClassVar[str] = "1"
    columns: ClassVar[tuple[str, ...]] = ("match",)
    reads_captions: ClassVar[bool] = True
    costly: ClassVar[bool] = True

    @frozen
    class Config:
        reward: ComponentSpec  # what judges, such as `rubric` with an llm
        caption: str = field(default="dense", validator=one_of("dense", "brief"))  # the one that is judged

    def __init__(self, config: Config) -> None:
        self.config = config
        _, cls, options = build(Catalog.installed(), "reward", config.reward, "$.reward")
        self._reward = cls(options)

    def score(self, records: Sequence[Record]) -> Mapping[str, Sequence[float]]:
        import torch

        values = []
        for record in records:  # of any size, so one at a time
            caption = getattr(record, self.config.caption) or record.dense or record.brief
            rubrics = [{"id": name, "q": question, "weight": weight} for name, question, weight in QUESTIONS]
            data = {"rubrics": rubrics, "global": {"id": "whole", "q": WHOLE, "weight": 1.0}}
            image = torch.from_numpy(np.ascontiguousarray(record.pixels)).permute(2, 0, 1)[None]
            (score,) = self._reward.score(image, [Prompt(caption, data=data)])
            if score.status == "failed":
                raise RuntimeError(score.evidence or "the reward failed")
            values.append(float("nan") if score.value is None else float(score.value))
        return {"match": values}


CURATORS: Mapping[str, type[Any]] = {
    "aesthetics": Aesthetics,
    "caption_match": CaptionMatch,
    "classifier": Classifier,
    "text_area": TextArea,
}
