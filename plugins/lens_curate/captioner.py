"""Captions by a vision language model: what is asked, how an answer is checked, and asking again where it fails.

An answer is kept as soon as it has come, by the llm's own cache, which lies in the store unless the recipe names
another; so a run that was killed does not pay for it again.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
from attrs import evolve, frozen
from PIL import Image

from lens_core.catalog import Catalog
from lens_core.config import unstructure
from lens_core.io import readers
from lens_core.io.captions import clean_caption
from lens_core.io.images import ImageError, read_rgb
from lens_core.recipe import build
from lens_core.types import ConfigError, LensError, Message
from lens_curate.recipe import Captioning

CACHE = "caption_cache"
"""Folder in the store for answers of an llm whose recipe names no cache."""
VERSION = "1"
"""Changes when `flaw_of` or the question does: captions are then checked and made anew."""

_LARGEST_PROMPT = 1 << 16  # bytes
_REFUSALS = re.compile(
    r"\b(i(?:'|’)?m sorry|i am sorry|i can(?:'|’)?t|i cannot|i(?:'|’)?m unable|i am unable|as an ai|i apologi[sz]e|"
    r"unable to (?:assist|help|describe)|can(?:'|’)?t (?:assist|help) with)\b",
    re.I,
)
_QUOTED = re.compile(r'"[^"]*"|“[^”]*”')
_OPENINGS = re.compile(
    r"^\W*(?:(?:the|this|an?) (?:image|picture|photo|photograph|illustration) (?:shows|depicts|features|is|displays|"
    r"presents|captures|contains)|in (?:the|this) (?:image|picture|photo)|here is|sure[,!]|certainly[,!])",
    re.I,
)


@frozen
class Caption:
    """One caption of a picture; `flaw` says what is wrong with the last attempt, "" where nothing is."""

    id: str
    style: str
    text: str
    flaw: str
    attempts: int


class Captioner:
    """Asks an llm for captions, several pictures at a time where it can."""

    def __init__(self, config: Captioning, catalog: Catalog, store: str) -> None:
        self.config = config
        use = config.llm
        name, cls, options = build(catalog, "llm", use, "$.captions.llm")
        if "cache" in {a.name for a in attrs.fields(type(options))} and not options.cache and "://" not in store:
            options = evolve(options, cache=str(Path(store) / CACHE))
        self.llm = cls(options)
        self.name = name
        self.styles = ("dense", "brief") if config.style == "both" else (config.style,)
        self.prompts = {style: system_prompt(style, config) for style in self.styles}
        self._options = {k: v for k, v in unstructure(options).items() if k in ("model", "temperature", "request")}

    def identity(self, style: str) -> str:
        """What decides a caption of this style, as a hash: those made by anything else are made anew."""
        c = self.config
        parts = (VERSION, self.name, self._options, self.prompts[style], getattr(c, f"{style}_words"), c.regenerations,
                 c.side)  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    @property
    def concurrency(self) -> int:
        wanted = getattr(getattr(self.llm, "config", None), "concurrency", 1)
        return wanted if isinstance(wanted, int) and 1 <= wanted <= 1000 else 1

    def caption(self, pictures: Sequence[tuple[str, bytes, str]]) -> Iterator[Caption | LensError]:
        """(id, image file, style) each -> captions in the order of the pictures, as they are ready. A LensError takes
        the place of one for which no answer came: the budget is spent, or the endpoint is down."""

        def one(picture: tuple[str, bytes, str]) -> Caption | LensError:
            try:
                return self._one(*picture)
            except LensError as error:
                return error
            except Exception as error:  # a third party's llm may raise anything; the other pictures go on
                return LensError(f"{self.name} raised {type(error).__name__}: {readers.one_line(error, 120)}")

        with ThreadPoolExecutor(self.concurrency) as pool:
            yield from pool.map(one, pictures)

    def _one(self, key: str, file: bytes, style: str) -> Caption:
        try:
            image = shown(file, self.config.side)
        except ImageError as error:
            return Caption(key, style, "", error.reason, 0)
        words = getattr(self.config, f"{style}_words")
        messages = [Message("system", self.prompts[style]), Message("user", "Describe this picture.", (image,))]
        text, flaw = "", ""
        for attempt in range(1, self.config.regenerations + 2):
            answer = self.llm.chat(messages)
            text, flaw = checked(answer, words)
            if not flaw:
                return Caption(key, style, text, "", attempt)
            messages += [
                Message("assistant", str(answer)[:4000]),
                Message("user", f"That cannot be used: {flaw}. Describe the picture again, by the same rules."),
            ]
        return Caption(key, style, text, flaw, self.config.regenerations + 1)


def system_prompt(style: str, config: Captioning) -> str:
    """The text that tells a model how to describe: the recipe's file, or the one that comes with Lens."""
    path = Path(config.prompt).expanduser() if config.prompt else Path(__file__).parent / "prompts" / f"{style}.txt"
    if config.prompt and config.style == "both":
        raise ConfigError("$.captions.prompt: is one file, and style is both; leave it out, or choose a style")
    text = readers.read_text(path, _LARGEST_PROMPT).strip()
    if not text:
        raise ConfigError(f"{path}: is empty; write the system prompt of the captions into it")
    return text


def shown(file: bytes, side: int) -> bytes:
    """A picture as the model sees it: upright, at most `side` px long, PNG. Raises ImageError."""
    image = read_rgb(file)
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def checked(answer: object, words: tuple[int, int]) -> tuple[str, str]:
    """(the caption in an answer, what is wrong with it or "")."""
    text, fault = clean_caption(answer)
    if not text:
        return "", fault or "it is empty"
    text = " ".join(text.split())
    if len(text) > 2 and text[0] in "\"“'" and text[-1] in "\"”'" and not re.search(r'["“”]', text[1:-1]):
        text = text[1:-1].strip()
    return text, flaw_of(text, words)


def flaw_of(text: str, words: tuple[int, int]) -> str:
    """What is wrong with a caption, or "": a refusal, an opening about the picture, its length, or repetition."""
    # What is written in the picture may say anything.
    if _REFUSALS.search(_QUOTED.sub("", text)[:200]):
        return "it is a refusal"
    if _OPENINGS.search(text):
        return 'it begins with words about the picture ("the image shows"), not with what is in it'
    count = len(text.split())
    low, high = words
    if not low <= count <= high:
        return f"it has {count} words; {low} to {high} are wanted"
    if repeats(text):
        return "it repeats itself"
    return ""


def repeats(text: str) -> bool:
    """Whether a sentence stands twice, or the same five words three times."""
    sentences = [" ".join(re.findall(r"\w+", s.lower())) for s in re.split(r"[.!?]+\s", text)]
    long = [s for s in sentences if len(s.split()) >= 4]
    if len(set(long)) < len(long):
        return True
    words = re.findall(r"\w+", text.lower())
    counts: dict[tuple[str, ...], int] = {}
    for start in range(len(words) - 4):
        run = tuple(words[start : start + 5])
        counts[run] = counts.get(run, 0) + 1
    return max(counts.values(), default=0) >= 3


def spend_of(llm: Any) -> dict[str, float]:
    """What an llm has cost so far, as far as it tells."""
    spend = getattr(llm, "spend", None)
    names = ("calls", "cached", "tokens_in", "tokens_out", "usd")
    return {name: float(getattr(spend, name, 0)) for name in names}
