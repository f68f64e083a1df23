"""Pictures made to fool the reader: a true scene, with something in it that its caption does not say; and true scenes
as honest processes change them. Both are what the reader's rates are measured on."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from attrs import evolve
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from lens_shapes.render import GLYPHS, coverage, render
from lens_shapes.scenes import BACKGROUNDS, COLOURS, INK, SHAPES, Scene, Thing

Picture = NDArray[np.uint8]
Make = Callable[[Scene, int, int, np.random.Generator], Picture | None]
"""(scene, height, width, rng) -> the scene's picture with something added; None where the scene has no room for it."""


def _over(image: Picture, alpha: NDArray[Any], colour: Any) -> Picture:
    """`colour` over `image` with opacity `alpha`, 0-1 [H,W]."""
    return _rounded(image + alpha[..., None] * (np.asarray(colour, np.float32) - image))


def _rounded(values: NDArray[Any]) -> Picture:
    return np.asarray(np.clip(values.round(), 0, 255), np.uint8)


def _room(scene: Scene, radius: float, rng: np.random.Generator, high: float = 1.0) -> tuple[float, float] | None:
    """A free place (x, y) for something of half-extent `radius`, in shorter sides; None where there is none."""
    if scene.word:
        return None
    for _ in range(200):
        x, y = (float(v) for v in rng.uniform(radius + 0.02, 1 - radius - 0.02, 2))
        if y < high and all(max(abs(x - t.x), abs(y - t.y)) > radius + t.radius + 0.02 for t in scene.things):
            return x, y
    return None


def _cover(shape: str, radius: float, at: tuple[float, float], height: int, width: int) -> NDArray[Any]:
    unit = min(height, width)
    return coverage(shape, radius * unit, at[0] * width, at[1] * height, height, width).astype(np.float32) / 255


def _ghost(opacity: float, size: float) -> Make:
    def make(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
        at = _room(scene, size, rng)
        backs = [np.array(BACKGROUNDS[name]) for name in scene.background]
        seen = [c for c in COLOURS.values() if min(np.linalg.norm(back - c) for back in backs) * opacity > 30]
        shape = SHAPES[int(rng.integers(len(SHAPES)))] if size < 0.18 else "square"
        if at is None or not seen:
            return None
        base, colour = render(scene, height, width), seen[int(rng.integers(len(seen)))]
        return _over(base, opacity * _cover(shape, size, at, height, width), colour)

    return make


def _halved(scene: Scene, rng: np.random.Generator) -> Scene:
    one, two = (list(BACKGROUNDS)[n] for n in rng.permutation(len(BACKGROUNDS))[:2])
    return evolve(scene, background=(one, two), split="across")


def _other_half(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
    """A shape in the lower half's background colour, in the upper half."""
    scene = _halved(scene, rng)
    at = _room(scene, 0.13, rng, high=0.35)
    if at is None:
        return None
    alpha = _cover(SHAPES[int(rng.integers(len(SHAPES)))], 0.13, at, height, width)
    return _over(render(scene, height, width), alpha, BACKGROUNDS[scene.background[1]])


def _disk(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
    """A disk of another background colour, over 12 % of the picture or as much as there is room for."""
    scene = evolve(scene, background=scene.background[:1], split="")
    for radius in (0.2, 0.16, 0.13):
        at = _room(scene, radius, rng)
        if at is not None:
            others = [rgb for name, rgb in BACKGROUNDS.items() if name not in scene.background]
            alpha = _cover("circle", radius, at, height, width)
            return _over(render(scene, height, width), alpha, others[int(rng.integers(len(others)))])
    return None


def _confetti(side: int, count: int) -> Make:
    def make(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
        image = render(scene, height, width)
        for _ in range(count):
            y, x = int(rng.integers(height - side)), int(rng.integers(width - side))
            image[y : y + side, x : x + side] = list(COLOURS.values())[int(rng.integers(len(COLOURS)))]
        return image

    return make


def _added(image: Picture, change: NDArray[Any]) -> Picture:
    return _rounded(image + change)


def _slope(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
    """The background darkens by 70 levels from the left to the right."""
    return _added(render(scene, height, width), -np.linspace(0, 70, width)[None, :, None])


def _stripes(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
    """A texture: stripes of 25 levels, six to the picture."""
    waves = 25 * np.sign(np.sin(np.linspace(0, 12 * np.pi, width)))
    return _added(render(scene, height, width), waves[None, :, None])


def _noise(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
    return _added(render(scene, height, width), rng.normal(0, 60, (height, width, 3)))


def _outlined(colour: tuple[int, int, int]) -> Make:
    def make(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
        if not scene.things:
            return None
        image = render(evolve(scene, background=("grey",), split=""), height, width)
        line = max(2, round(min(height, width) / 32))
        for thing in scene.things:
            inside = _cover(thing.shape, thing.radius, (thing.x, thing.y), height, width) > 0.5
            ring = ndimage.binary_dilation(inside, iterations=line) & ~inside
            image[ring] = colour
        return image

    return make


def _pale(levels: float, radius: float, soft: float = 0.0) -> Make:
    """A disk that differs by so many levels in each channel, its edge blurred by `soft` shorter sides."""

    def make(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
        at = _room(scene, radius, rng)
        if at is None:
            return None
        image = render(scene, height, width)
        alpha = ndimage.gaussian_filter(_cover("circle", radius, at, height, width), soft * min(height, width))
        below = image[int(at[1] * height), int(at[0] * width)]
        # never brighter than a pixel can be
        signs = np.where(below > 225, -1, np.where(below < 30, 1, rng.choice([-1, 1], 3)))
        return _added(image, alpha[..., None] * levels * signs)

    return make


def _off_palette(apart: float) -> Make:
    """All things in a colour that is so far, by RGB distance, from each of the palette and from each background."""
    known = np.array([*COLOURS.values(), *BACKGROUNDS.values(), INK], np.float32)

    def make(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
        if not scene.things:
            return None
        image = render(evolve(scene, things=()), height, width)
        far = [c for c in rng.integers(0, 256, (300, 3)) if np.linalg.norm(known - c, axis=1).min() > apart]
        for thing in scene.things:
            image = _over(image, _cover(thing.shape, thing.radius, (thing.x, thing.y), height, width), far[0])
        return image

    return make


def _tinted(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
    """A background that lies 40 from white, in no colour of the palette."""
    image = render(evolve(scene, background=("white",), split=""), height, width)
    image[(image == BACKGROUNDS["white"]).all(2)] = (246, 218, 218)
    return image


def _merged(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
    """A second thing of the same shape and colour, half over the first."""
    if not scene.things:
        return None
    one = scene.things[0]
    way = 1 if one.x < 0.5 else -1
    return render(evolve(scene, things=(*scene.things, evolve(one, x=one.x + way * one.radius))), height, width)


def _third(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
    """A strip of a third background along the edge."""
    image = render(evolve(scene, background=("white", "brown"), split="across"), height, width)
    image[:, : max(3, width // 14)] = BACKGROUNDS["mint"]
    return image


def _seam(kind: str) -> Make:
    def make(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
        row, column = np.mgrid[:height, :width]
        line = {"slanted": height / 2 + (column - width / 2) * 0.4, "low": height * 0.7 + 0 * column,
                "wavy": height / 2 + 0.08 * height * np.sin(column / width * 12)}[kind]  # fmt: skip
        top, bottom = (render(evolve(scene, background=(n,), split=""), height, width) for n in ("lavender", "grey"))
        return np.where((row < line)[..., None], top, bottom)

    return make


def _tiny_letters(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
    """A word in letters a third as high as the world's."""
    at = _room(scene, 0.1, rng)
    if at is None:
        return None
    image, cell = render(scene, height, width), max(1, round(0.01 * min(height, width)))
    ink = np.kron(np.hstack([np.pad(GLYPHS[letter], ((0, 0), (0, 1))) for letter in "NOT"]), np.ones((cell, cell)))
    y, x = (max(0, min(int(at[n] * side - ink.shape[1 - n] / 2), side - ink.shape[1 - n])) for n, side in
            ((1, height), (0, width)))  # fmt: skip
    patch = image[y : y + ink.shape[0], x : x + ink.shape[1]]
    patch[ink > 0] = 0
    return image


def _cut_off(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
    """An extra thing that lies half outside the picture."""
    if scene.word:
        return None
    for _ in range(60):
        x, y = [(0.0, float(rng.uniform(0.15, 0.85))), (float(rng.uniform(0.15, 0.85)), 1.0)][int(rng.integers(2))]
        if all(max(abs(x - t.x), abs(y - t.y)) > t.radius + 0.17 for t in scene.things):
            extra = Thing(SHAPES[int(rng.integers(8))], list(COLOURS)[int(rng.integers(8))], "medium", x, y)
            return render(evolve(scene, things=(*scene.things, extra)), height, width)
    return None


def _on_things(how: str) -> Make:
    """Something within the largest thing: a slope, a spot of another colour."""

    def make(scene: Scene, height: int, width: int, rng: np.random.Generator) -> Picture | None:
        broad = [t for t in scene.things if t.shape in ("circle", "square", "diamond", "heart") and t.size != "small"]
        if not broad:
            return None
        thing, image = broad[0], render(scene, height, width)
        place = (thing.x, thing.y)
        if how == "spot":
            colour = (0, 0, 0) if thing.colour not in ("blue", "purple") else (255, 255, 255)
            return _over(image, _cover("circle", 0.35 * thing.radius, place, height, width), colour)
        way = np.clip((np.arange(width) / width - thing.x) / thing.radius, -1, 1) * 45
        return _added(image, _cover(thing.shape, thing.radius, place, height, width)[..., None] * way[None, :, None])

    return make


HOSTILE: dict[str, Make] = {
    "a shape in the other half's background colour": _other_half,
    "a disk of another background colour": _disk,
    "a large square at 0.20 opacity": _ghost(0.2, 0.18),
    "a shape at 0.25 opacity": _ghost(0.25, 0.13),
    "60 specks of confetti, 2 px": _confetti(2, 60),
    "60 specks of confetti, 1 px": _confetti(1, 60),
    "3 specks of 2 px": _confetti(2, 3),
    "10 specks of 1 px": _confetti(1, 10),
    "a disk of 20 levels": _pale(20, 0.09),
    "a broad disk of 12 levels": _pale(12, 0.18),
    "a soft disk of 20 levels": _pale(20, 0.13, 0.04),
    "things of a colour that has no name": _off_palette(60),
    "a background that has no name": _tinted,
    "a slope of 70 levels": _slope,
    "stripes of 25 levels": _stripes,
    "noise of 60 levels": _noise,
    "black outlines": _outlined((0, 0, 0)),
    "white outlines": _outlined((255, 255, 255)),
    "two of a kind, half over each other": _merged,
    "a strip of a third background": _third,
    "a slanted seam": _seam("slanted"),
    "a wavy seam": _seam("wavy"),
    "a seam that is not in the middle": _seam("low"),
    "tiny letters": _tiny_letters,
    "a thing half outside": _cut_off,
    "a spot on a thing": _on_things("spot"),
    "a slope on a thing": _on_things("slope"),
}


def blurred(image: Picture, rng: np.random.Generator) -> Picture:
    """A blur of one pixel, a tint and noise, as an autoencoder adds them."""
    soft = ndimage.gaussian_filter(image.astype(float), (1.0, 1.0, 0.0))
    return np.asarray(np.clip(soft + rng.normal(0, 5, 3) + rng.normal(0, 5, image.shape), 0, 255), np.uint8)


def hazed(image: Picture, rng: np.random.Generator) -> Picture:
    """What a small autoencoder does to a picture of 64 px: blur, ringing one or two pixels wide, a tint and grain."""
    sharp = image.astype(float)
    narrow, wide = (ndimage.gaussian_filter(sharp, (sigma, sigma, 0)) for sigma in (1.0, 1.9))
    grain = ndimage.gaussian_filter(rng.normal(0, 10, image.shape), (0.7, 0.7, 0)) + rng.normal(0, 3, 3)
    soft = ndimage.gaussian_filter(sharp, (0.8, 0.8, 0)) + 0.45 * (narrow - wide) + grain
    return _rounded(soft)


def jpeg(image: Picture, rng: np.random.Generator) -> Picture:
    """As a JPEG file of quality 60."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


HONEST: dict[str, tuple[int, Callable[[Picture, np.random.Generator], Picture]]] = {
    "as drawn, 64 px": (64, lambda image, rng: image),
    "as drawn, 128 px": (128, lambda image, rng: image),
    "haze of an autoencoder, 64 px": (64, hazed),
    "blur, tint and noise, 128 px": (128, blurred),
    "JPEG of quality 60, 128 px": (128, jpeg),
}
"""Side in px and change, under which a true scene must still be read right."""
