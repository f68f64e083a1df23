"""How much an OCR perceiver reads of sentences drawn with real fonts, at several sizes and angles: a table.

The fonts are those that matplotlib brings. Words count as in LongText-Bench: without punctuation and case, each as
often as it was drawn, in any order. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lens_bench.longtext import normalise
from lens_bench.text import overlap
from lens_core.evaluation.statistics import ClusteredScores, Estimate
from lens_core.types import ConfigError, LensError

if TYPE_CHECKING:
    from PIL.Image import Image

FONTS = ("DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneral")
SIZES = (16, 24, 40, 64)  # px
ANGLES = (0, 5, 15, 30, 90, 180)  # degrees, counterclockwise
SENTENCES = (
    "Fresh bread and coffee every morning at seven",
    "The library opens on Sunday, 9 May 2027",
    "Please keep off the grass behind the old mill",
    "Train 418 to Harwich leaves from platform 6",
    "Winter sale: boots, scarves and gloves half price",
    "Never stop asking why the sky turns red",
)


@frozen
class Drawn:
    """A picture of sentences, and how they were drawn."""

    font: str
    size: int
    angle: int
    sentences: tuple[str, ...]


def drawings(fonts: Sequence[str] = FONTS, sizes: Sequence[int] = SIZES, angles: Sequence[int] = ANGLES) -> list[Drawn]:
    """Every font, size and angle, each with three of the sentences in turn."""
    made = []
    for place, (font, size, angle) in enumerate((f, s, a) for f in fonts for s in sizes for a in angles):
        chosen = tuple(SENTENCES[(place + i) % len(SENTENCES)] for i in range(3))
        made.append(Drawn(font, size, angle, chosen))
    return made


def draw(drawn: Drawn) -> Image:
    """Black sentences on white, one below the other, turned about the centre; no word is cut off."""
    from PIL import Image as pil
    from PIL import ImageDraw, ImageFont

    font = ImageFont.truetype(str(_font(drawn.font)), drawn.size)
    step = 2 * drawn.size
    width = int(max(font.getlength(sentence) for sentence in drawn.sentences)) + 4 * drawn.size
    flat = pil.new("RGB", (width, step * (len(drawn.sentences) + 1)), "white")
    for i, sentence in enumerate(drawn.sentences):
        ImageDraw.Draw(flat).text((2 * drawn.size, drawn.size + step * i), sentence, "black", font)
    return flat.rotate(drawn.angle, pil.Resampling.BICUBIC, expand=True, fillcolor="white")


def _font(name: str) -> Path:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("the fonts of this table are matplotlib's; pip install matplotlib") from error
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


def words_read(drawn: Drawn, lines: Sequence[str]) -> tuple[int, int]:
    """How many of the words that were drawn are in the lines that were read, and how many were drawn."""
    reference = normalise(" ".join(drawn.sentences)).split()
    return overlap(reference, normalise(" ".join(lines)).split()), len(reference)


def measure(perceiver: Any, drawn: Sequence[Drawn]) -> Iterator[tuple[Drawn, int, int]]:
    """(drawing, words read, words drawn), one after the other. Raises LensError where a picture has no answer."""
    for one in drawn:
        (answer,) = perceiver.perceive([draw(one)], [None])
        if isinstance(answer, LensError):
            raise answer
        yield one, *words_read(one, answer)


def recall(results: Sequence[tuple[Drawn, int, int]]) -> Estimate:
    """The share of words that were read; the words of one picture are one draw."""
    pairs = [(float(i < read), place) for place, (_, read, words) in enumerate(results) for i in range(words)]
    return ClusteredScores([value for value, _ in pairs], [place for _, place in pairs]).estimate()


def table(results: Sequence[tuple[Drawn, int, int]]) -> str:
    """Recall by font and size (rows) and angle (columns), as Markdown, with the 95 % interval of everything."""
    angles = sorted({drawn.angle for drawn, _, _ in results})
    rows = [f"| font | px | {' | '.join(f'{angle}°' for angle in angles)} |", f"|---|---|{'---|' * len(angles)}"]
    for font, size in dict.fromkeys((drawn.font, drawn.size) for drawn, _, _ in results):
        cells = []
        for angle in angles:
            some = [r for r in results if (r[0].font, r[0].size, r[0].angle) == (font, size, angle)]
            cells.append(f"{recall(some).value:.2f}" if some else "")
        rows.append(f"| {font} | {size} | {' | '.join(cells)} |")
    columns = [recall([r for r in results if r[0].angle == angle]).value for angle in angles]
    rows.append(f"| all | | {' | '.join(f'{value:.2f}' for value in columns)} |")
    whole, words = recall(results), sum(words for _, _, words in results)
    interval = f"95 % interval [{whole.low:.3f}, {whole.high:.3f}]"
    return "\n".join([*rows, "", f"Recall {whole.value:.3f} of {words} words in {len(results)} pictures, {interval}."])
