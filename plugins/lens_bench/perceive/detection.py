"""Mask2Former's preprocessing and decoding as mmdet 2.27 has them, on which GenEval's published scores stand.

transformers' own image processor is not used: it resizes to 384 x 384 with antialiasing, and its decoding takes one
class a query, thresholds differently and returns masks that were enlarged by nearest neighbours. The rules:

- The picture is resized to fit 1333 x 800 px (longer x shorter side), enlarged too, with OpenCV's bilinear
  interpolation, which has no antialiasing. It is padded at the right and the bottom with 128 to multiples of 32, and
  normalised after that, so that the padding is not zero.
- A query may give several detections: the best `top` of all pairs of a query and a class count, by softmax over the
  classes and "no object".
- Mask logits are enlarged twice, both times bilinearly: to the padded size and, cut to the resized picture, to the
  original one. The mask is where they are above 0.
- A detection's score is its class probability times the mean of the mask's sigmoids. Its box holds the mask tightly,
  right and bottom exclusive. A query whose mask is empty has no detection: mmdet gives it the score 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen

from lens_core.types import LensError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

LONG, SHORT = 1333, 800  # px of the resized picture
MULTIPLE, PADDING = 32, 128
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, of ImageNet
VERSION = "mmdet-2.27-1333x800-bilinear-pad128-top100"
"""Names this preprocessing and decoding; another one has another name, so that caches never mix them."""
# Of the masks that are enlarged together: 8 of 1024 x 1024 px, which are 32 MiB and a few copies.
PIXELS_AT_ONCE = 2**23

Size = tuple[int, int]  # height, width


@frozen(eq=False)
class Detection:
    """`label` counts classes from 0; `box` is (x1, y1, x2, y2) in px, ends exclusive; `mask` bool, cropped to it."""

    label: int
    score: float
    box: tuple[int, int, int, int]
    mask: NDArray[np.bool_]


def resized(height: int, width: int) -> Size:
    """The size that a picture is resized to."""
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def preprocess(image: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Size]:
    """RGB uint8 [H,W,3] -> the detector's input float32 [3,h,w], and the part of h, w that is no padding."""
    import cv2

    height, width = resized(*image.shape[:2])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    bottom, right = -height % MULTIPLE, -width % MULTIPLE
    padded = np.pad(small, ((0, bottom), (0, right), (0, 0)), constant_values=PADDING).astype(np.float32)
    mean, std = (np.array(values, np.float32) for values in (MEAN, STD))
    return ((padded - mean) / std).transpose(2, 0, 1), (height, width)


def best_pairs(class_logits: Tensor, top: int = 100) -> list[tuple[int, int, float]]:
    """The `top` pairs (query, class, probability), the most probable first, from logits [queries, classes + 1]."""
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    values, places = probabilities.flatten().topk(min(top, probabilities.numel()))
    classes = probabilities.shape[1]
    return [(p // classes, p % classes, v) for v, p in zip(values.tolist(), places.tolist(), strict=True)]


def decode(
    class_logits: Tensor, mask_logits: Tensor, padded: Size, fitted: Size, original: Size, top: int = 100
) -> list[Detection]:
    """The detections in one picture, in the order of their class probabilities.

    `class_logits` [Q, classes + 1], `mask_logits` [Q, h, w]; sizes are those of the input, of its part that is no
    padding, and of the picture. Raises LensError for logits that are not finite. Memory is that of masks of
    PIXELS_AT_ONCE, and of the masks that are returned.
    """
    if not (bool(class_logits.isfinite().all()) and bool(mask_logits.isfinite().all())):
        raise LensError("the detector's output is not finite; compute in float32, and check the weights and the driver")
    pairs = best_pairs(class_logits, top)
    queries = sorted({query for query, _, _ in pairs})
    masks: dict[int, tuple[float, tuple[int, int, int, int], NDArray[np.bool_]]] = {}
    at_once = max(1, PIXELS_AT_ONCE // max(original[0] * original[1], padded[0] * padded[1]))
    for start in range(0, len(queries), at_once):
        some = queries[start : start + at_once]
        for query, logits in zip(some, _enlarged(mask_logits[some], padded, fitted, original), strict=True):
            inside = logits > 0
            count = inside.sum()
            if not count:
                continue
            mean = float(((logits.sigmoid() * inside).sum() / (count + 1e-6)).item())
            rows, columns = (inside.any(axis).nonzero() for axis in (1, 0))
            box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            masks[query] = mean, box, inside[box[1] : box[3], box[0] : box[2]].cpu().numpy()
    return [Detection(label, p * masks[q][0], masks[q][1], masks[q][2]) for q, label, p in pairs if q in masks]


def _enlarged(logits: Tensor, padded: Size, fitted: Size, original: Size) -> Iterator[Any]:
    """Mask logits [n, h, w] -> float32 [H, W] each, of the original picture."""
    from torch.nn.functional import interpolate

    def to(size: Size, maps: Tensor) -> Tensor:
        return interpolate(maps, size=size, mode="bilinear", align_corners=False)

    whole = to(padded, logits.float().unsqueeze(1))[..., : fitted[0], : fitted[1]]
    yield from to(original, whole).squeeze(1)
