"""Pictures with text in them, drawn by Lens: the fourth source of the paper's data, for models that shall write.

Words of several scripts in several fonts, straight or turned, on colours, gradients or pictures, with a caption that
quotes them. Without fonts named in the recipe those of matplotlib (DejaVu) are used, or else Pillow's own.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import field, frozen
from PIL import Image, ImageColor, ImageDraw, ImageFont

from lens_core.io.images import ImageError, read_rgb
from lens_core.io.sources import SourceItem, files_below, is_picture
from lens_core.types import ConfigError
from lens_core.validators import PIXELS, SEED, each, integer, one_of, optional, text
from lens_curate.parts import Part

if TYPE_CHECKING:
    from lens_core.catalog import Catalog
AT_ONCE = 64  # pictures of a part

WORDS: Mapping[str, tuple[str, ...]] = {
    "latin": (
        "open", "morning", "market", "river", "coffee", "garden", "number", "winter", "library", "station", "bread",
        "music", "harbour", "seven", "island", "letter", "mountain", "paper", "green", "silver", "welcome", "today",
        "corner", "museum", "bicycle", "lantern", "orange", "school", "theatre", "bridge", "holiday", "kitchen",
    ),
    "greek": (
        "θάλασσα", "δρόμος", "βιβλίο", "νερό", "ψωμί", "φως", "πόλη", "σχολείο", "μουσική", "ουρανός", "κήπος",
        "γέφυρα", "χρώμα", "ήλιος", "καφές", "νησί",
    ),
    "cyrillic": (
        "море", "город", "книга", "хлеб", "музыка", "река", "школа", "зима", "утро", "остров", "мост", "письмо", "чай",
        "свет", "сад", "вокзал",
    ),
    "han": ("早安", "书店", "河流", "音乐", "咖啡", "花园", "车站", "面包", "学校", "冬天", "海岛", "博物馆"),
    "digits": ("1984", "24", "365", "7:30", "12.50", "2026", "100", "50", "404", "3.14"),
}  # fmt: skip
COLOURS = ("black", "white", "red", "navy", "darkgreen", "orange", "purple", "gold", "teal", "crimson", "ivory", "gray")
_NAMES = {"navy": "dark blue", "darkgreen": "dark green", "gray": "grey"}
PLACES = ("top", "middle", "bottom")
_CONTRAST = 4.5  # least ratio of luminances of text and background, as WCAG asks for
_NOWHERE = "\U0010ffff"  # no font has a glyph for it


@frozen
class Style:
    """What one picture shows, drawn from a generator."""

    words: str
    script: str
    font: int
    size: tuple[int, int]  # height, width, px
    colour: str
    background: str
    gradient: str | None
    place: str
    angle: float  # degrees
    picture: int | None  # number of the background picture


class TextPictures:
    """`count` pictures; picture n depends on the Config and n alone."""

    @frozen
    class Config:
        count: int = field(validator=integer(at_least=1))
        seed: int = field(default=0, validator=SEED)
        scripts: tuple[str, ...] = field(
            default=("latin", "latin", "greek", "cyrillic", "digits"),  # as often as they stand here
            validator=each(one_of(*WORDS), at_least=1),
        )
        fonts: tuple[str, ...] = ()  # files; none: matplotlib's DejaVu, or Pillow's own
        backgrounds: str | None = field(default=None, validator=optional(text()))  # folder of pictures to write on
        # (height, width) px, one drawn for each picture.
        sizes: tuple[tuple[int, int], ...] = field(
            default=((512, 512), (384, 640), (640, 384)), validator=each(each(PIXELS), at_least=1)
        )
        max_words: int = field(default=4, validator=integer(at_least=1, at_most=12))

        def __attrs_post_init__(self) -> None:
            if any(min(size) < 64 or max(size) > 4096 for size in self.sizes):
                raise ConfigError("sizes have sides below 64 or above 4096 px; text needs room, and memory has an end")

    def __init__(self, config: Config, catalog: Catalog) -> None:
        self.config = config

    def check(self) -> None:
        for script in dict.fromkeys(self.config.scripts):
            if not self._able[script]:
                raise ConfigError(
                    f"text_pictures: no font here has the letters of {script!r}; name one in `fonts`, or leave the "
                    "script out of `scripts`"
                )
        if self.config.backgrounds is not None and not self._pictures:
            raise ConfigError(f"{self.config.backgrounds}: holds no picture to write on; check `backgrounds`")

    def parts(self) -> Iterator[Part]:
        for start in range(0, self.config.count, AT_ONCE):
            count = min(AT_ONCE, self.config.count - start)
            yield Part(f"{start}", f"{count}", count, {"start": start})

    def read(self, part: Part) -> Iterator[SourceItem]:
        for number in range(part.payload["start"], part.payload["start"] + part.count):
            yield self.draw(number)

    def draw(self, number: int) -> SourceItem:
        style = self._style(np.random.default_rng([self.config.seed, number]))
        image = self._canvas(style)
        boxes = _write(image, style, self._fonts[style.font])
        file = io.BytesIO()
        image.save(file, "PNG")
        name = f"text-{self.config.seed}-{number}.png"
        return SourceItem(name, file.getvalue(), ({"brief": brief(style), "dense": dense(style, boxes)},))

    def _style(self, rng: np.random.Generator) -> Style:
        c = self.config
        script = c.scripts[rng.integers(len(c.scripts))]
        count = 1 if script == "digits" else int(rng.integers(1, c.max_words + 1))
        words = [WORDS[script][rng.integers(len(WORDS[script]))] for _ in range(count)]
        form = (str, str.upper, str.capitalize)[rng.integers(3)]
        background = COLOURS[rng.integers(len(COLOURS))]
        able = [colour for colour in COLOURS if contrast(colour, background) >= _CONTRAST]
        gradient = COLOURS[rng.integers(len(COLOURS))] if rng.random() < 0.3 else None
        colour = able[rng.integers(len(able))]
        if gradient is not None and contrast(colour, gradient) < _CONTRAST:
            gradient = None
        return Style(
            form(("" if script == "han" else " ").join(words)), script,
            self._able[script][rng.integers(len(self._able[script]))], c.sizes[rng.integers(len(c.sizes))],
            colour, background, gradient, PLACES[rng.integers(3)],
            float(rng.uniform(-12, 12)) if rng.random() < 0.3 else 0.0,
            int(rng.integers(len(self._pictures))) if self._pictures else None,
        )  # fmt: skip

    @cached_property
    def _fonts(self) -> list[Path | None]:
        """Font files; None is Pillow's own."""
        if self.config.fonts:
            return [_font_file(path) for path in self.config.fonts]
        try:
            from matplotlib import get_data_path
        except ImportError:
            return [None]
        wanted = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono")
        files = [Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf" for name in wanted]
        return [file for file in files if file.is_file()] or [None]

    @cached_property
    def _able(self) -> Mapping[str, list[int]]:
        """For each script, the numbers of the fonts that have all letters of its words, in small and in capitals."""
        letters = {s: sorted(set("".join(w + w.upper() for w in words))) for s, words in WORDS.items()}
        return {
            script: [n for n, font in enumerate(self._fonts) if _has_letters(font, letters[script])] for script in WORDS
        }

    @cached_property
    def _pictures(self) -> list[Path]:
        if self.config.backgrounds is None:
            return []
        folder = Path(self.config.backgrounds).expanduser()
        return files_below(folder, is_picture) if folder.is_dir() else []

    def _canvas(self, style: Style) -> Image.Image:
        height, width = style.size
        if style.picture is not None:
            try:
                from PIL import ImageOps

                below = read_rgb(self._pictures[style.picture])
                return ImageOps.fit(below, (width, height), Image.Resampling.LANCZOS)
            except ImageError:
                pass  # a damaged one: a colour instead
        if style.gradient is None:
            return Image.new("RGB", (width, height), style.background)
        ramp = np.linspace(0, 1, height)[:, None, None]
        ends = [np.array(ImageColor.getrgb(c), float) for c in (style.background, style.gradient)]
        rows = (1 - ramp) * ends[0] + ramp * ends[1]
        return Image.fromarray(np.broadcast_to(rows, (height, width, 3)).round().astype(np.uint8).copy())


def _write(image: Image.Image, style: Style, font_file: Path | None) -> int:
    """Write the words into a picture, as large as they fit; how many lines they take."""
    width, height = image.size
    lines = [style.words]
    if " " in style.words and len(style.words) > 14:
        words = style.words.split(" ")
        half = (len(words) + 1) // 2
        lines = [" ".join(words[:half]), " ".join(words[half:])]
    room = (0.86 * width, 0.42 * height)
    text_block = "\n".join(lines)
    size = 8
    measure = ImageDraw.Draw(image)
    for trial in (8, 12, 16, 20, 26, 32, 40, 50, 64, 80, 100, 128):
        box = measure.multiline_textbbox((0, 0), text_block, font=_font(font_file, trial), align="center")
        if box[2] - box[0] > room[0] or box[3] - box[1] > room[1]:
            break
        size = trial
    font = _font(font_file, size)
    left, top, right, bottom = (math.ceil(v) for v in measure.multiline_textbbox((0, 0), text_block, font, spacing=4))
    pad = max(6, size // 4)
    label = Image.new("RGBA", (right - left + 2 * pad, bottom - top + 2 * pad))
    if style.picture is not None:  # a plate, for the words must be read on any picture
        label.paste(ImageColor.getrgb(style.background), (0, 0, *label.size))
    ImageDraw.Draw(label).multiline_text(
        (pad - left, pad - top), text_block, style.colour, font, align="center", spacing=4
    )
    if style.angle:
        label = label.rotate(style.angle, Image.Resampling.BICUBIC, expand=True)
    if label.width > width or label.height > height:
        label.thumbnail((width, height))
    y = {"top": 0.04, "middle": 0.5, "bottom": 0.96}[style.place] * (height - label.height)
    image.paste(label, ((width - label.width) // 2, round(y)), label)
    return len(lines)


def brief(style: Style) -> str:
    return f'The {"number" if style.script == "digits" else "text"} "{style.words}" on {_ground(style)}.'


def dense(style: Style, lines: int) -> str:
    """The long caption: what is written, letter by letter, and how."""
    what = "number" if style.script == "digits" else "word" if " " not in style.words else "words"
    script = "" if style.script in ("latin", "digits") else f" in {style.script.capitalize()} script"
    turned = ", slightly turned" if style.angle else ""
    rows = " in two lines" if lines == 2 else ""
    plate = f" on a {_colour(style.background)} label" if style.picture is not None else ""
    return (
        f'The {what} "{style.words}"{script}, written{rows} in {_colour(style.colour)} letters{plate}, at the '
        f"{style.place} of the picture{turned}, on {_ground(style)}. Nothing else is written there."
    )


def contrast(first: str, second: str) -> float:
    """Ratio of the relative luminances of two colours, 1 to 21 (WCAG 2.1)."""

    def luminance(colour: str) -> float:
        parts = [c / 255 for c in ImageColor.getrgb(colour)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _colour(name: str) -> str:
    return _NAMES.get(name, name)


def _ground(style: Style) -> str:
    if style.picture is not None:
        return "a picture"
    if style.gradient is None or style.gradient == style.background:
        return f"a plain {_colour(style.background)} background"
    return f"a background that fades from {_colour(style.background)} to {_colour(style.gradient)}"


def _font_file(path: str) -> Path:
    file = Path(path).expanduser()
    try:
        ImageFont.truetype(file, 16)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: is no font that can be read; name a TrueType or OpenType file") from error
    return file


def _font(file: Path | None, size: int) -> Any:
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)


def _has_letters(file: Path | None, letters: list[str]) -> bool:
    """Whether a font has a glyph of its own for each letter, and not the box that stands for a missing one."""
    font = _font(file, 20)
    missing = bytes(font.getmask(_NOWHERE)), font.getmask(_NOWHERE).size
    return all((bytes(mask := font.getmask(letter)), mask.size) != missing for letter in letters if letter.strip())
