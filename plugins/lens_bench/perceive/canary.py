"""Pictures with a known content, on which a perceiver proves itself before anything that it sees is believed.

The commonest failure in the field is silent: a wrong version of a library or an operation that the GPU lacks makes a
detector or an OCR engine see nothing, and the benchmark shows zeros. Each check here returns None, or in one line what
was seen instead. Pictures are drawn, but for the detector's: it knows photos, and matplotlib brings one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_bench.geneval import COLORS, iou
from lens_core.io import images, readers
from lens_core.types import ConfigError, LensError

if TYPE_CHECKING:
    from PIL.Image import Image

LINES = ("The quick brown fox", "jumps 42 times")
SENTENCE = " ".join(LINES)
FLAT = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "yellow": (255, 235, 0)}
QUESTIONS = {"Is there a red circle in the image?": "Yes", "Is there a blue square in the image?": "No"}
# matplotlib's sample photo is a portrait of Grace Hopper (public domain), who fills this box of its 512 x 600 px.
PORTRAIT, PORTRAIT_BOX = "sample_data/grace_hopper.jpg", (12, 22, 512, 600)
LEAST_SCORE, LEAST_IOU = 0.9, 0.7


def drawn_text(lines: Sequence[str] = LINES, size: int = 56) -> Image:
    """Black lines of text on white."""
    from PIL import Image as pil
    from PIL import ImageDraw, ImageFont

    picture = pil.new("RGB", (768, 128 + 96 * len(lines)), "white")
    font = ImageFont.load_default(size)
    for i, line in enumerate(lines):
        ImageDraw.Draw(picture).text((64, 64 + 96 * i), line, "black", font)
    return picture


def sentence(perceiver: Any, question: Any = None) -> str | None:
    """An OCR engine, or a model that is asked `question`, reads a drawn sentence, every word of it."""
    answer = _first(perceiver.perceive([drawn_text()], [question]))
    if isinstance(answer, LensError):
        return str(answer)
    read = answer if isinstance(answer, str) else " ".join(answer)
    lacking = [word for word in SENTENCE.lower().split() if word not in read.lower().split()]
    return f"a picture of {SENTENCE!r} was read as {readers.shown(read)}" if lacking else None


def questions(perceiver: Any, prompt: str) -> str | None:
    """A model that answers questions says exactly Yes and No of a drawn red circle."""
    from PIL import Image as pil
    from PIL import ImageDraw

    picture = pil.new("RGB", (448, 448), "white")
    ImageDraw.Draw(picture).ellipse((112, 112, 336, 336), fill="red")
    answers = perceiver.perceive([picture] * len(QUESTIONS), [prompt.format(question=q) for q in QUESTIONS])
    for (question, expected), answer in zip(QUESTIONS.items(), answers, strict=True):
        if isinstance(answer, LensError):
            return str(answer)
        if answer != expected:
            return f"of a red circle, {question!r} was answered with {readers.shown(answer)}, not {expected!r}"
    return None


def _flat() -> list[Image]:
    from PIL import Image as pil

    return [pil.new("RGB", (256, 256), color) for color in FLAT.values()]


def flat_colors_by_name(perceiver: Any) -> str | None:
    """A colour classifier names four flat colours."""
    thing = {"class": "car", "objects": [{"box": [0, 0, 256, 256], "mask": None}]}
    answers = perceiver.perceive(_flat(), [thing] * len(FLAT))
    for color, answer in zip(FLAT, answers, strict=True):
        if isinstance(answer, LensError):
            return str(answer)
        if list(answer) != [color] or color not in COLORS:
            return f"flat {color} was taken for {readers.shown(answer)}"
    return None


def flat_colors_by_similarity(perceiver: Any) -> str | None:
    """Of four texts, each of four flat colours is most similar to its own."""
    texts = [f"a plain {color} background" for color in FLAT]
    for color, picture in zip(FLAT, _flat(), strict=True):
        answers = list(perceiver.perceive([picture] * len(texts), texts))
        for answer in answers:
            if isinstance(answer, LensError):
                return str(answer)
        best = list(FLAT)[max(range(len(texts)), key=lambda i: answers[i])]
        if best != color:
            return f"flat {color} is more similar to the text of {best}"
    return None


def object_in_photo(perceiver: Any, photo: str, name: str) -> str | None:
    """A detector sees an object of the class `name` in a photo, with a score above 0.9; `photo` "": the portrait that
    matplotlib brings, with a person in the known box."""
    path = Path(photo).expanduser() if photo else _portrait()
    objects = _first(perceiver.perceive([images.read_rgb(path)], [None]))
    if isinstance(objects, LensError):
        return str(objects)
    expected = name if photo else "person"
    rows = [(*thing["box"], thing["score"]) for thing in objects.get(expected, ())]
    best = max(rows, key=lambda row: row[4], default=None)
    if best is None or best[4] <= LEAST_SCORE:
        best_one = "none" if best is None else f"the best with score {best[4]:.2f}"
        return (
            f"{path.name} shows a {expected}, of which {best_one} was detected; the score must be above {LEAST_SCORE}"
        )
    if not photo and iou(best, PORTRAIT_BOX) < LEAST_IOU:
        return f"{path.name} shows a person at {list(PORTRAIT_BOX)}, detected at {[round(v) for v in best[:4]]}"
    return None


def check_photo(photo: str) -> None:
    """Raise ConfigError where `object_in_photo` would have no photo."""
    if photo and not Path(photo).expanduser().is_file():
        raise ConfigError(f"{photo}: there is no such photo; name another, or leave photo out")
    if not photo and importlib.util.find_spec("matplotlib") is None:
        problem = "the detector is proved on a photo that matplotlib brings; pip install matplotlib"
        raise ConfigError(f"{problem}, or name a photo and its class in photo and photo_class")


def _portrait() -> Path:
    check_photo("")
    import matplotlib

    return Path(matplotlib.get_data_path()) / PORTRAIT


def scenes() -> tuple[Image, Image, Image]:
    """A drawn scene, the same a little darker, and another one, for models of the similarity of pictures."""
    from PIL import Image as pil
    from PIL import ImageDraw

    first, other = pil.new("RGB", (256, 256), (200, 220, 255)), pil.new("RGB", (256, 256), (40, 20, 10))
    ImageDraw.Draw(first).rectangle((48, 96, 208, 224), fill=(190, 60, 40))
    ImageDraw.Draw(first).polygon([(32, 96), (128, 24), (224, 96)], fill=(110, 30, 30))
    for i in range(0, 256, 16):
        ImageDraw.Draw(other).line((i, 0, 256 - i, 256), fill=(230, 200, 40), width=3)
    return first, first.point(lambda value: int(value * 0.93)), other


def _first(answers: Sequence[Any]) -> Any:
    (answer,) = answers
    return answer
