"""A scene as pixels: anti-aliased, deterministic, at any size. Height before width."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lens_shapes.scenes import BACKGROUNDS, CELL, COLOURS, GAP, INK, Scene

OVER = 4
"""Sub-samples along each side of a pixel."""
RING = 0.5
"""Inner radius of a ring, in outer radii."""

_ROWS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01111 10000 10000 10000 10000 10000 01111",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "G": "01111 10000 10000 10011 10001 10001 01111",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "I": "11111 00100 00100 00100 00100 00100 11111",
    "J": "00111 00001 00001 00001 00001 10001 01110",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "N": "10001 11001 11001 10101 10011 10011 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "Q": "01110 10001 10001 10001 10101 10011 01111",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "V": "10001 10001 10001 10001 01010 01010 00100",
    "W": "10001 10001 10001 10101 10101 11011 10001",
    "X": "10001 01010 01010 00100 01010 01010 10001",
    "Y": "10001 01010 01010 00100 00100 00100 00100",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
}
GLYPHS: dict[str, NDArray[np.uint8]] = {
    letter: np.array([[int(bit) for bit in row] for row in rows.split()], np.uint8) for letter, rows in _ROWS.items()
}
"""Capitals as 7 x 5 bitmaps of 0 and 1."""


@cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The polygon of a shape about its centre, x right and y down, within [-1, 1]. A ring's is its outer edge."""
    turns = [2 * math.pi * step / 48 for step in range(48)]
    if shape in ("circle", "ring"):
        return tuple((math.cos(a), math.sin(a)) for a in turns)
    if shape == "heart":
        points = [(math.sin(a) ** 3, _heart(a)) for a in turns]
        return tuple((x, y + 0.06) for x, y in points)
    if shape == "star":
        spikes = [(1.0 if step % 2 == 0 else 0.42, math.pi * step / 5) for step in range(10)]
        return tuple((r * math.sin(a), 0.05 - r * math.cos(a)) for r, a in spikes)
    if shape == "cross":
        a = 0.33
        quarter = [(a, -1.0), (a, -a), (1.0, -a)]
        corners: list[tuple[float, float]] = []
        for _ in range(4):
            corners += quarter
            quarter = [(-y, x) for x, y in quarter]
        return tuple(corners)
    if shape == "moon":
        # a circle less another one, which meets it at the two tips
        bite, middle = 0.78, 0.55
        x = (1 + middle**2 - bite**2) / (2 * middle)
        far, near = math.acos(x), math.atan2(math.sqrt(1 - x * x), x - middle)
        outer = [far + (2 * math.pi - 2 * far) * step / 36 for step in range(37)]
        inner = [2 * math.pi - near - (2 * math.pi - 2 * near) * step / 24 for step in range(1, 24)]
        points = [(math.cos(a), math.sin(a)) for a in outer]
        points += [(middle + bite * math.cos(a), bite * math.sin(a)) for a in inner]
        return tuple((x + 0.15, y) for x, y in points)
    return {
        "square": ((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)),
        "triangle": ((0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)),
        "diamond": ((0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)),
    }[shape]


def _heart(angle: float) -> float:
    wave = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
    return -wave / 16


def coverage(shape: str, radius: float, x: float, y: float, height: int, width: int) -> NDArray[np.uint8]:
    """How much of each pixel a shape covers, 0-255 [height, width]. Centre and radius in px."""
    canvas = Image.new("L", (width * OVER, height * OVER))
    draw = ImageDraw.Draw(canvas)

    def fill(reach: float, value: int) -> None:
        # PIL's pixel centres lie on whole numbers, hence the half
        points = [((x + reach * px) * OVER - 0.5, (y + reach * py) * OVER - 0.5) for px, py in outline(shape)]
        draw.polygon(points, fill=value)

    fill(radius, 255)
    if shape == "ring":
        fill(radius * RING, 0)
    return np.asarray(canvas.reduce(OVER))


def render(scene: Scene, height: int, width: int) -> NDArray[np.uint8]:
    """The scene as uint8 [height, width, 3], both at least 64 px; the aspect ratio may be anything from 1:2 to 2:1."""
    if min(height, width) < 64:
        raise ValueError(f"a scene needs at least 64 px on each side, not {height} x {width}")
    image = np.empty((height, width, 3), np.uint8)
    image[:] = BACKGROUNDS[scene.background[0]]
    if scene.split == "across":
        image[height // 2 :] = BACKGROUNDS[scene.background[1]]
    elif scene.split == "down":
        image[:, width // 2 :] = BACKGROUNDS[scene.background[1]]
    unit = min(height, width)
    for thing in scene.things:
        x, y, radius = thing.x * width, thing.y * height, thing.radius * unit
        left, top = max(0, int(x - radius) - 1), max(0, int(y - radius) - 1)
        right, bottom = min(width, int(x + radius) + 2), min(height, int(y + radius) + 2)
        alpha = coverage(thing.shape, radius, x - left, y - top, bottom - top, right - left)
        _paint(image[top:bottom, left:right], alpha, COLOURS[thing.colour])
    if scene.word:
        _write(image, scene, unit)
    return image


def _paint(patch: NDArray[np.uint8], alpha: NDArray[np.uint8], colour: tuple[int, int, int]) -> None:
    share = alpha.astype(np.float32)[..., None] / 255
    patch[:] = (patch + share * (np.array(colour, np.float32) - patch) + 0.5).astype(np.uint8)


def _write(image: NDArray[np.uint8], scene: Scene, unit: int) -> None:
    height, width = image.shape[:2]
    cell = CELL * unit
    long, tall = (6 * len(scene.word) - 1) * cell, 7 * cell
    top = {"top": GAP * unit, "middle": (height - tall) / 2, "bottom": height - GAP * unit - tall}[scene.word_at]
    left, low = (width - long) / 2, int(top)
    crop = min(height, math.ceil(top + tall) + 1)
    canvas = Image.new("L", (width * OVER, (crop - low) * OVER))
    draw = ImageDraw.Draw(canvas)
    for place, letter in enumerate(scene.word):
        for row, column in np.argwhere(GLYPHS[letter]):
            x, y = (left + (6 * place + column) * cell) * OVER, (top - low + row * cell) * OVER
            # rounded edges shared by neighbours, so that strokes have no seams
            draw.rectangle((round(x), round(y), round(x + cell * OVER) - 1, round(y + cell * OVER) - 1), fill=255)
    _paint(image[low:crop], np.asarray(canvas.reduce(OVER)), INK)
