"""The perceiver `mask2former`: objects of COCO's 80 classes, with their boxes, scores and masks."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from attrs import field, frozen

from lens_bench.geneval import CLASSES
from lens_bench.perceive import canary, detection, masks, weights
from lens_core.inference.parts import resolve_device
from lens_core.types import CheckpointError, ConfigError
from lens_core.validators import integer, one_of, text, within

if TYPE_CHECKING:
    from PIL.Image import Image


class Mask2Former:
    """Mask2Former finds objects with boxes, scores and masks, for GenEval.

    Question None -> {class: [{"box": [x1, y1, x2, y2], "score", "mask"}]}, the most probable first in each class.

    Boxes are in px of the picture, ends exclusive; `mask` is text (`lens_bench.perceive.masks`). Objects with a score
    below `min_score` are left out: no threshold of a later decision may be lower.
    """

    perceives: ClassVar[str] = "objects"

    @frozen
    class Config:
        # A folder or org/name[@revision], with 80 classes in COCO's order.
        model: str = field(default="facebook/mask2former-swin-small-coco-instance", validator=text())
        min_score: float = field(default=0.1, validator=within(0, 1))
        batch_size: int = field(default=4, validator=integer(at_least=1, at_most=256))  # pictures in one pass
        # What proves the detector: a photo file, and the class of an object in it; "": the photo in matplotlib.
        photo: str = ""
        photo_class: str = field(default="person", validator=one_of(*CLASSES))
        device: str = field(default="auto", validator=text())  # auto, cpu, cuda, cuda:1 …

    def __init__(self, config: Config) -> None:
        self.config = config
        self.batch_size = config.batch_size
        self._model: Any = None

    def describe(self) -> dict[str, str]:
        model = self.config.model
        return {
            "model": weights.name_of(model),
            "revision": weights.revision_of(model),
            "version": f"{detection.VERSION}-min{self.config.min_score:g}",
        }

    def check_requirements(self) -> None:
        """Raise LensError where a package, the model or the photo of the canary is missing."""
        _check_packages()
        weights.check_requirements(self.config.model)
        canary.check_photo(self.config.photo)

    def close(self) -> None:
        """Free the memory; the next picture loads the model again."""
        self._model = None

    def canary(self) -> str | None:
        return canary.object_in_photo(self, self.config.photo, self.config.photo_class)

    def perceive(self, images: Sequence[Image], questions: Sequence[Any]) -> list[dict[str, Any]]:
        import torch

        model = self._loaded()
        inputs = [detection.preprocess(np.asarray(image)) for image in images]
        same_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (pixels, _) in enumerate(inputs):
            same_size[pixels.shape].append(i)
        by_picture: dict[int, dict[str, Any]] = {}
        for shape, places in same_size.items():
            batch = torch.from_numpy(np.stack([inputs[i][0] for i in places]))
            with torch.inference_mode():
                output = model(pixel_values=batch.to(model.device))
                for row, i in enumerate(places):
                    detections = detection.decode(
                        output.class_queries_logits[row], output.masks_queries_logits[row],
                        padded=(shape[1], shape[2]), fitted=inputs[i][1], original=(images[i].height, images[i].width),
                    )  # fmt: skip
                    by_picture[i] = _by_class(d for d in detections if d.score >= self.config.min_score)
        return [by_picture[i] for i in range(len(images))]

    def _loaded(self) -> Any:
        if self._model is None:
            _check_packages()
            from transformers import Mask2FormerForUniversalSegmentation

            model = weights.load(Mask2FormerForUniversalSegmentation, self.config.model, "mask2former")
            classes = model.config.num_labels
            if classes != len(CLASSES):
                folder = weights.folder_of(self.config.model)
                raise CheckpointError(
                    f"{folder}: detects {classes} classes, not COCO's {len(CLASSES)}; name another model"
                )
            self._model = model.to(resolve_device(self.config.device))
        return self._model


def _check_packages() -> None:
    for package, needed in (("scipy", "scipy"), ("cv2", "opencv-python-headless")):
        if importlib.util.find_spec(package) is None:  # transformers needs scipy to build the model
            raise ConfigError(f"mask2former needs {needed}; pip install 'lens-t2i[bench]'")


def _by_class(detections: Iterable[detection.Detection]) -> dict[str, list[dict[str, Any]]]:
    objects: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in detections:
        objects[CLASSES[one.label]].append({"box": list(one.box), "score": one.score, "mask": masks.encode(one.mask)})
    return dict(objects)
