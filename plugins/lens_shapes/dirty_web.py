"""A dirty web that we make: scenes with captions as the net would have them, a known share of them spoiled.

`write` makes a folder `pictures` and, beside it, `truth.jsonl`, which says of every file what is wrong with it. A
curation reads the pictures alone; the truth then says how good each of its stages is (docs/dirty-web.md), and a
training on them before and after what it is worth (docs/does-it-pay.md).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from attrs import evolve, field, frozen
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from lens_core.types import ConfigError
from lens_shapes import splits
from lens_shapes.captions import caption, dense
from lens_shapes.matching import caption_facts, caption_match
from lens_shapes.reading import Reading, Seen
from lens_shapes.render import render
from lens_shapes.scenes import OPPOSITE, TASKS, Scene

SIZES = ((160, 160), (160, 208), (208, 160), (176, 192), (192, 176))
"""Height and width of a clean picture, px."""
TRUTH = "truth.jsonl"
WATERMARKS = ("SAMPLE", "stock photo", "PREVIEW", "(c) pictures", "do not copy")
_SCENE, _SPOIL = range(2)  # separate streams of randomness

Picture = Image.Image
Rng = np.random.Generator
Captions = Mapping[str, str]  # `brief` and `dense`, or one `text` that is either


@frozen
class Scenes:
    """Which scenes a dirty web shows, and how their captions are written."""

    tasks: Mapping[str, float] = field(factory=lambda: TASKS)  # weight of each kind of scene
    largest: bool = False  # things as large as their number allows, instead of any size
    sizes: tuple[tuple[int, int], ...] = SIZES  # height and width px; one is drawn for each picture
    # Each picture has a brief and a dense caption, in a list; False: one of both, in a .txt beside it.
    both_captions: bool = False


@frozen
class Truth:
    """What is wrong with one file. `of`: the file that it is a copy of."""

    file: str
    damage: str = ""  # "" for a clean picture, or a key of DAMAGES
    of: str = ""


@frozen
class _Made:
    """A picture of a scene with its caption, before it is a file."""

    scene: Scene
    image: Picture
    captions: Captions
    jpeg: bool


def _blur(image: Picture, rng: Rng) -> Picture:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(2, 6)))


def _dark(image: Picture, rng: Rng) -> Picture:
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.03, 0.2))


def _overexposed(image: Picture, rng: Rng) -> Picture:
    return ImageEnhance.Brightness(image).enhance(rng.uniform(3.5, 6))


def _noise(image: Picture, rng: Rng) -> Picture:
    pixels = np.asarray(image, np.float32)
    noisy = pixels + rng.normal(0, rng.uniform(12, 40), pixels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _tiny(image: Picture, rng: Rng) -> Picture:
    return _scaled(image, rng.uniform(0.15, 0.5))


def _extreme_ratio(image: Picture, rng: Rng) -> Picture:
    long = round(max(image.size) * rng.uniform(4, 8))
    return image.resize((long, image.height) if rng.random() < 0.5 else (image.width, long))


def _border(image: Picture, rng: Rng) -> Picture:
    """A frame, or two opposite bars, whose brightness is at least 40 levels from all that it meets."""
    edges = np.asarray(image.convert("L"))
    met = np.concatenate([edges[0], edges[-1], edges[:, 0], edges[:, -1]]).astype(int)
    free = [level for level in range(256) if np.abs(met - level).min() >= 40]
    colour = (free[int(rng.integers(len(free)))],) * 3
    across, down = (round(side * rng.uniform(0.06, 0.16)) for side in image.size)
    kind = int(rng.integers(3))
    framed = Image.new("RGB", (image.width + 2 * across * (kind != 1), image.height + 2 * down * (kind != 2)), colour)
    framed.paste(image, (across * (kind != 1), down * (kind != 2)))
    return framed


def _watermark(image: Picture, rng: Rng) -> Picture:
    text = WATERMARKS[int(rng.integers(len(WATERMARKS)))]
    font = ImageFont.load_default(round(min(image.size) * rng.uniform(0.12, 0.18)))
    mask = Image.new("L", image.size)
    at = (image.width / 2, image.height * rng.uniform(0.3, 0.7))
    ImageDraw.Draw(mask).text(at, text, fill=round(255 * rng.uniform(0.45, 0.8)), font=font, anchor="mm")
    bright = np.asarray(image.convert("L")).mean() > 170
    return Image.composite(Image.new("RGB", image.size, "black" if bright else "white"), image, mask)


def _resized(image: Picture, rng: Rng) -> Picture:
    return _scaled(image, rng.choice([rng.uniform(0.7, 0.95), rng.uniform(1.1, 1.5)]))


def _cropped(image: Picture, rng: Rng) -> Picture:
    """Without up to 3 % at each edge, and at least 2 px at one."""
    left, right = (int(image.width * rng.uniform(0, 0.03)) for _ in range(2))
    top, bottom = (int(image.height * rng.uniform(0, 0.03)) for _ in range(2))
    return image.crop((max(2, left), top, image.width - right, image.height - bottom))


def _scaled(image: Picture, by: float) -> Picture:
    return image.resize((max(1, round(image.width * by)), max(1, round(image.height * by))))


SPOILED: Mapping[str, Callable[[Picture, Rng], Picture]] = {
    "blur": _blur,
    "dark": _dark,
    "overexposed": _overexposed,
    "noise": _noise,
    "tiny": _tiny,
    "extreme ratio": _extreme_ratio,
    "watermark": _watermark,
    "border": _border,
}
"""Damages of pixels."""
COPIES: Mapping[str, Callable[[Picture, Rng], Picture]] = {
    "re-encoded": lambda image, rng: image,
    "resized": _resized,
    "cropped": _cropped,
    "mirrored": lambda image, rng: ImageOps.mirror(image),
}
"""Near duplicates: a second file with the same picture."""
DAMAGES = (*SPOILED, "truncated", "wrong extension", "wrong caption", *COPIES)


def write(folder: Path, count: int, share: float = 0.5, seed: int = 0, scenes: Scenes | None = None) -> list[Truth]:
    """Make a dirty web of `count` files in `folder`, which must not be there: a `share` is spoiled, in equal parts by
    each of `DAMAGES`; the truth, as written beside the pictures. Same arguments, same files."""
    each = round(count * share / len(DAMAGES))
    if count < 1 or not 0 <= share <= 0.75:
        raise ConfigError(f"a dirty web has at least 1 picture and a share of 0 to 0.75, not {count} and {share}")
    if share and not each:
        raise ConfigError(f"{count} pictures are too few for {len(DAMAGES)} damages; use at least {2 * len(DAMAGES)}")
    if folder.exists():
        raise ConfigError(f"{folder}: is already there; name a new folder")
    (folder / "pictures").mkdir(parents=True)
    truths = _Writer(folder / "pictures", seed, scenes or Scenes()).write(count, each)
    lines = (json.dumps({"file": t.file, "damage": t.damage, "of": t.of}) for t in truths)
    (folder / TRUTH).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return truths


def read_truth(folder: Path) -> list[Truth]:
    """The truth that `write` has left."""
    return [Truth(**json.loads(line)) for line in (folder / TRUTH).read_text(encoding="utf-8").splitlines()]


class _Writer:
    """Writes the files of one dirty web."""

    def __init__(self, pictures: Path, seed: int, scenes: Scenes) -> None:
        self.pictures, self.seed, self.scenes = pictures, seed, scenes
        self.listed: dict[str, Captions] = {}  # captions by file, where they are in a list

    def write(self, count: int, each: int) -> list[Truth]:
        truths = list(self._files(count, each))
        if self.listed:
            lines = (json.dumps({"file": file, **captions}) for file, captions in self.listed.items())
            (self.pictures / "captions.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return truths

    def _files(self, count: int, each: int) -> Iterator[Truth]:
        # Names say nothing of what is in a file.
        names = np.random.default_rng([self.seed, _SPOIL]).permutation(count)
        damages = [damage for damage in DAMAGES for _ in range(each)]
        copies = [damage for damage in damages if damage in COPIES]
        alone = [damage for damage in damages if damage not in COPIES]
        alone += [""] * (count - len(damages))
        originals: list[tuple[Truth, _Made]] = []
        for number, damage in enumerate(alone):
            rng = np.random.default_rng([self.seed, _SCENE, number])
            made = self._made(rng)
            stem = f"{names[number]:06}"
            file = self._save(stem, damage, made, rng)
            truth = Truth(file, damage)
            if not damage and len(originals) < len(copies):
                kind = copies[len(originals)]
                while kind == "mirrored" and not _turns(made):  # a scene whose mirror image is another picture
                    made = self._made(rng)
                    (self.pictures / file).unlink()
                    self.listed.pop(file, None)
                    truth = Truth(file := self._save(stem, damage, made, rng))
                originals.append((truth, made))
            yield truth
        for number, ((truth, made), damage) in enumerate(zip(originals, copies, strict=True), start=len(alone)):
            rng = np.random.default_rng([self.seed, _SCENE, number])
            yield Truth(self._save_copy(f"{names[number]:06}", damage, made, rng), damage, truth.file)

    def _made(self, rng: Rng) -> _Made:
        scenes = self.scenes
        scene = splits.sample(rng, "train", tasks=scenes.tasks, largest=scenes.largest)
        size = scenes.sizes[int(rng.integers(len(scenes.sizes)))]
        captions: Captions
        if scenes.both_captions:
            captions = {"brief": caption(scene, rng), "dense": dense(scene, rng)}
        else:
            captions = {"text": dense(scene, rng) if rng.random() < 0.5 else caption(scene, rng)}
        return _Made(scene, Image.fromarray(render(scene, *size)), captions, bool(rng.random() < 0.5))

    def _save(self, stem: str, damage: str, made: _Made, rng: Rng) -> str:
        """Write one picture with one damage, and its captions; its name."""
        image = SPOILED[damage](made.image, rng) if damage in SPOILED else made.image
        data, ending = _encoded(image, made.jpeg), "jpg" if made.jpeg else "png"
        if damage == "truncated":
            data = data[: int(len(data) * rng.uniform(0.2, 0.9))]
        if damage == "wrong extension":
            ending = "png" if made.jpeg else "jpg"
        captions = self._wrong(made.scene, rng) if damage == "wrong caption" else made.captions
        return self._put(f"{stem}.{ending}", data, captions)

    def _save_copy(self, stem: str, damage: str, made: _Made, rng: Rng) -> str:
        """Write a near duplicate of one picture, and its captions; its name."""
        captions = made.captions
        if damage == "mirrored":
            turned = _mirrored(made.scene)
            captions = {"brief": caption(turned, rng), "dense": dense(turned, rng)} if self.scenes.both_captions else {
                "text": caption(turned, rng)
            }  # fmt: skip
        jpeg = damage == "re-encoded" or made.jpeg
        image = COPIES[damage](made.image, rng)
        quality = int(rng.integers(60, 85)) if damage == "re-encoded" else 92
        return self._put(f"{stem}.{'jpg' if jpeg else 'png'}", _encoded(image, jpeg, quality), captions)

    def _put(self, file: str, data: bytes, captions: Captions) -> str:
        (self.pictures / file).write_bytes(data)
        if "text" in captions:
            (self.pictures / file).with_suffix(".txt").write_text(captions["text"], encoding="utf-8")
        else:
            self.listed[file] = captions
        return file

    def _wrong(self, scene: Scene, rng: Rng) -> Captions:
        """The captions of another scene that are not true of this one."""
        while True:
            captions = self._made(rng).captions
            facts = caption_facts(captions.get("text") or captions["brief"])
            if facts is not None and caption_match(_seen(scene), facts) < 1:
                return captions


def _encoded(image: Picture, jpeg: bool, quality: int = 92) -> bytes:
    data = io.BytesIO()
    if jpeg:
        image.save(data, "JPEG", quality=quality)
    else:
        image.save(data, "PNG", compress_level=1)
    return data.getvalue()


def _seen(scene: Scene) -> Reading:
    """A scene as a reader without faults would report it."""
    things = tuple(Seen(t.shape, t.colour, t.size, t.x, t.y, t.radius) for t in scene.things)
    return Reading(things, scene.background, scene.word, 1, 1, scene.split)


def _turns(made: _Made) -> bool:
    """Whether a mirror image of the picture has no writing and is another picture: a tenth of it differs clearly."""
    pixels = np.asarray(made.image, np.int16)
    differs = np.abs(pixels - pixels[:, ::-1]).max(axis=2) > 40
    return not made.scene.word and bool(differs.mean() > 0.1)


def _mirrored(scene: Scene) -> Scene:
    """The scene of the mirror image."""
    things = tuple(evolve(thing, x=1 - thing.x) for thing in scene.things)
    background = scene.background[::-1] if scene.split == "down" else scene.background
    side = OPPOSITE[scene.relation] if scene.relation in ("left of", "right of") else scene.relation
    return evolve(scene, things=things, background=background, relation=side)
