"""Pixels back to facts, with classical vision alone, and the strict judge of what a prompt asked.

The reader knows the palette and the outlines, and nothing of the scene. It reads through the blur and the slight
colour noise of an autoencoder; what it cannot name it reports as "?", which no prompt asks for. What it has read it
draws again: wherever the picture differs from that, beyond what blur and ringing do at an edge, something stands that
has no name ("?") either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from lens_core.types import ConfigError
from lens_shapes.reading import NAMES, Reading, Seen
from lens_shapes.render import GLYPHS, RING, coverage, outline
from lens_shapes.scenes import BACKGROUNDS, CELL, COLOURS, SIZES

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
_THINGS = np.array(list(COLOURS.values()), np.float32)
_BACKS = np.array(list(BACKGROUNDS.values()), np.float32)
_GRID = 24  # side of a normalised coverage, in cells
_REACH = 1.05  # half of that side, in square roots of the thing's area: the tips of a star, and some room for blur
_BLURS = (0.0, 0.5, 0.8, 1.1, 1.4)  # of the outlines, px
_SMEARS = (0.0, 0.3, 0.55)  # of the glyphs, cells
FAR = 48.0
"""RGB distance to the background from which a pixel may belong to a thing."""
RIM = 2
"""Width, px, of the soft edge that blur lays around a thing."""
FAINT = 20.0
"""RGB distance to the background under which that edge ends."""
STRANGE = 40.0
"""RGB distance to every thing's colour from which a colour, and a thing that has it, has no name; two colours of the
palette are 92 and more apart. Of things with no part that is 7 px wide, soft edge included, it is the distance to the
line from that colour to what lies behind, since blur makes all of them paler."""
PALER = 85.0
"""RGB distance to the colour itself that such thin things may have."""
OFF = 28.0
"""The same for backgrounds, which are 42 and more apart."""
BETWEEN = 0.7
"""RGB distance to the nearest of the things' colours, as a share of that to the next one (to what lies behind), from
which a colour lies between the two (a thing is only half drawn) and has no name."""
LEAST = 0.0028
"""Area, in squared shorter sides, under which a spot is a blemish: a third of the smallest thing (a small star)."""
CLEAR = 0.7
"""Correlation with the best glyph below which a letter has no name."""
BLACK = 0.7
"""Darkness (0: what lies behind, 1: black) that a tenth of the writing reaches, below which it is not black ink; less
where blur pales strokes of 2 px."""
_NUDGES = tuple((down, right) for down in (0.0, -0.35, 0.35) for right in (0.0, -0.35, 0.35))
"""Where a letter is looked for about its place, in cells."""
ALIKE = 0.3
"""Misfit (0: equal, 1.41: nothing shared) with the best outline from which a shape has no name."""
RIVAL = 0.7
"""Share of the next shape's misfit from which a shape lies between the two and has no name."""
SLACK = 0.4
"""Share of the contrast of an edge nearby that a blurred picture may differ by: blur and ringing do that."""
RINGING = 0.25
"""Share of that contrast by which a single pixel may leave the range of the colours nearby: ringing does that."""
SPECKS = {"flat": 36.0, "edges": 52.0, "far": 40.0}
"""RGB distance from which one pixel has no explanation: where all is flat and beside edges, both times the shorter side
in 64 px (at most 2), as the grain of a JPEG file is of pixels; and at most "far" where no block of such a file (16 px)
touches an edge."""
SPOTS = {0.5: 33.0, 1.0: 26.0}
"""The same after a blur of so many px of a side of 64, of half a pixel with the root of scale more."""
GHOSTS = {1.5: 22.0, 2.0: 18.5, 3.0: 14.5, 4.5: 12.5, 6.0: 10.5, 9.0: 7.5}
"""The same for means over what is flat, by the standard deviation of their window in px of a side of 64."""
TEXTURE = {"flat": 5.5, "edges": 3.2}
"""The same for the root mean square over all that is flat, and over all that is not (with the root of scale more)."""


def read(image: NDArray[np.uint8]) -> Reading:
    """uint8 [H,W,3], both sides at least 64 px, at most 2:1 -> what the picture shows, things from left to right.

    What no part of the reading explains is a thing named "?". ConfigError for a picture of another size or kind."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ConfigError(f"a picture is uint8 [H,W,3], not {image.dtype} {list(image.shape)}; convert it first")
    height, width = image.shape[:2]
    if min(height, width) < 64 or max(height, width) > 2 * min(height, width):
        raise ConfigError(
            f"pictures of the shapes' world have sides of at least 64 px and at most 2:1, not {height} x {width}; "
            f"draw at such a size"
        )
    unit = min(height, width)
    pixels = image.astype(np.float32)
    names, halves, colours, behind = _background(pixels)
    away = _distance(pixels, colours)
    ink = _ink(pixels, behind, away, unit)
    word, boxes = _read_word(ink, unit)
    away[ndimage.binary_dilation(ink > 0.2, iterations=3)] = 0
    marks, count = ndimage.label(away > FAR)
    things: list[Seen] = []
    colours_seen: list[Floats] = []
    for number, where in enumerate(ndimage.find_objects(marks, count), start=1):
        rows, columns = (slice(max(0, side.start - RIM), side.stop + RIM) for side in where)
        near = marks[rows, columns]
        mask = near == number
        if mask.sum() < LEAST * unit**2:
            continue
        edge = ndimage.binary_dilation(mask, iterations=RIM) & (near == 0) & (away[rows, columns] > FAINT)
        patch, back = pixels[rows, columns], behind[rows, columns]
        for alpha, colour, measured, whole in _split(patch, back, mask, edge, away[rows, columns], unit):
            if alpha.sum() >= LEAST * unit**2:
                things.append(_thing(alpha, colour, whole, rows.start, columns.start, height, width))
                colours_seen.append(measured)
    if any(float(np.linalg.norm(rgb - BACKGROUNDS[name])) > OFF for rgb, name in zip(colours, names, strict=True)):
        things.append(Seen("?", "?", "?", 0.5, 0.5, 0.0))
    if "?" not in word and all(t.shape != "?" for t in things):
        things += _unexplained(pixels, _drawn(behind, things, colours_seen, word, boxes))
    return Reading(tuple(sorted(things, key=lambda t: (t.x, t.y))), names, word, height, width, halves)


def _gaps(pixels: Floats, palette: Floats) -> Floats:
    """RGB distance [H,W,N] of each pixel to each of N colours."""
    square = (pixels**2).sum(2)[..., None] - 2 * pixels @ palette.T + (palette**2).sum(1)
    return np.asarray(np.sqrt(np.maximum(square, 0)), np.float32)


def _background(pixels: Floats) -> tuple[tuple[str, ...], str, Floats, Floats]:
    """The one or two background colours: their names, how they are halved ("" for one), the RGB [1 or 2, 3] that they
    have here, and what lies behind each pixel, RGB [H,W,3]."""
    height, width = pixels.shape[:2]
    smooth = ndimage.uniform_filter(pixels, (3, 3, 0))
    distance = _gaps(smooth, _BACKS)
    nearest = distance.argmin(2)
    # the seam between two colours may resemble a third one: only flat parts vote
    flat = (ndimage.maximum_filter(nearest, 3) == ndimage.minimum_filter(nearest, 3)) & (distance.min(2) < 55)
    row, column = np.arange(height)[:, None], np.arange(width)
    ways = {"": np.zeros((height, width), int), "across": np.broadcast_to(row >= height // 2, (height, width)) * 1}
    ways["down"] = np.broadcast_to(column >= width // 2, (height, width)) * 1
    best = 0.0
    best_reading: tuple[str, tuple[int, ...]] = "", (0,)
    for way, side in ways.items():
        votes = [np.bincount(nearest[flat & (side == n)], minlength=len(_BACKS)) for n in range(1 if not way else 2)]
        names = tuple(int(v.argmax()) for v in votes)
        agreed = float(sum(v.max() for v in votes)) * (1.0 if not way else 0.95)
        if agreed > best and len(set(names)) == len(names) and all(v.any() for v in votes):
            best, best_reading = agreed, (way, names)
    way, names = best_reading
    side = ways[way]
    # a tint may carry a part of one colour over to its neighbour's name, so colours are measured
    colours = np.stack([
        np.median(smooth[mine], axis=0) if (mine := flat & (side == n) & (nearest == name)).any() else _BACKS[name]
        for n, name in enumerate(names)
    ])  # fmt: skip
    known = list(BACKGROUNDS)
    return tuple(known[n] for n in names), way, colours, colours[side]


def _distance(pixels: Floats, colours: Floats) -> Floats:
    """RGB distance of each pixel to the background, seam included: to the segment between its two colours."""
    start, along = colours[0], colours[-1] - colours[0]
    share = np.clip((pixels - start) @ along / max(float(along @ along), 1.0), 0, 1)
    gap: Floats = np.linalg.norm(pixels - start - share[..., None] * along, axis=2)
    return gap


def _ink(pixels: Floats, behind: Floats, away: Floats, unit: int) -> Floats:
    """How black each pixel of the writing is, 0-1; 0 away from it. Ink darkens what lies behind, and leaves its hue."""
    share = 1 - (pixels * behind).sum(2) / (behind**2).sum(2)
    hue = np.linalg.norm(pixels - (1 - share)[..., None] * behind, axis=2)
    sure = (share > 0.45) & (hue < 35) & (away > FAR)
    # the cells of a diagonal hang together by their corners, which blur may cut: judge them with their neighbours
    marks, count = ndimage.label(ndimage.binary_dilation(sure, np.ones((3, 3)), iterations=2))
    areas = np.bincount(marks[sure], minlength=count + 1)
    near = (areas > 2 * (CELL * unit) ** 2)[marks]
    return np.where(near, np.clip(share, 0, 1), 0).astype(np.float32)


@cache
def _glyphs() -> tuple[str, Floats]:
    """The capitals, and each of them at several blurs as correlation rows [blurs * capitals, 35]."""
    cell, rows = 8, []
    for smear in _SMEARS:
        for glyph in GLYPHS.values():
            ink = np.pad(np.kron(glyph, np.ones((cell, cell))), cell)
            summed = np.pad(ndimage.gaussian_filter(ink, smear * cell).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
            rows.append(_unit(_cells(summed, cell, cell, cell, cell).ravel()))
    return "".join(GLYPHS), np.stack(rows)


def _unit(cells: Floats) -> Floats:
    """Zero mean and length one, so that a product is a correlation, which blur and a faint ink leave alone."""
    centred = cells - cells.mean()
    return np.asarray(centred / max(float(np.linalg.norm(centred)), 1e-6), np.float32)


def _read_word(ink: Floats, unit: int) -> tuple[str, tuple[float, float, float, float]]:
    """The capitals, left to right; "?" for a letter without a name; "" where nothing is written. With it the place:
    top, left, height of a cell and width of a letter with its gap, px."""
    cell = CELL * unit
    inside = ink > 0.4
    if inside.sum() < 6 * cell**2:
        return "", (0.0, 0.0, 0.0, 0.0)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    top, tall = float(rows[0]), float(rows[-1] + 1 - rows[0])
    left, long = float(columns[0]), float(columns[-1] + 1 - columns[0])
    if not 0.75 < tall / (7 * cell) < 1.3 or np.quantile(ink[inside], 0.9) < min(BLACK, 0.28 * cell):
        return "?", (0.0, 0.0, 0.0, 0.0)
    count = max(1, round((long / cell + 1) / 6))
    pitch = (long + cell) / count  # of a letter with its gap
    if not 0.8 < pitch / (6 * cell) < 1.2:
        return "?", (0.0, 0.0, 0.0, 0.0)
    summed = np.pad(ink.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    letters, table = _glyphs()
    word = ""
    for place in range(count):
        best = ("?", CLEAR)
        for down, right in _NUDGES:
            grid = _cells(summed, top + down * cell, left + place * pitch + right * cell, tall / 7, (pitch - cell) / 5)
            match = table @ _unit(grid.ravel())
            number = int(match.argmax())
            if match[number] > best[1]:
                best = (letters[number % len(letters)], float(match[number]))
        word += best[0]
    return word, (top, left, tall / 7, pitch)


def _cells(summed: NDArray[Any], top: float, left: float, tall: float, wide: float) -> Floats:
    """Mean ink in the middle of each of 7 x 5 cells, from the summed-area table."""
    height, width = summed.shape[0] - 1, summed.shape[1] - 1

    def edges(start: float, step: float, count: int, limit: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        low = np.round(start + (np.arange(count) + 0.2) * step).astype(int).clip(0, limit - 1)
        return low, np.maximum(low + 1, np.round(start + (np.arange(count) + 0.8) * step).astype(int).clip(0, limit))

    (y0, y1), (x0, x1) = edges(top, tall, 7, height), edges(left, wide, 5, width)
    total = summed[np.ix_(y1, x1)] - summed[np.ix_(y0, x1)] - summed[np.ix_(y1, x0)] + summed[np.ix_(y0, x0)]
    return np.asarray(total / ((y1 - y0)[:, None] * (x1 - x0)), np.float32)


def _drawn(
    behind: Floats, things: Sequence[Seen], colours: Sequence[Floats], word: str, place: tuple[float, ...]
) -> Floats:
    """The picture that a reading claims: sharp, in the colours that were measured, RGB [H,W,3]."""
    height, width = behind.shape[:2]
    unit = min(height, width)
    image = behind.copy()
    for thing, colour in zip(things, colours, strict=True):
        x, y, radius = thing.x * width, thing.y * height, thing.radius * unit
        left, top = max(0, int(x - radius * 1.2) - 1), max(0, int(y - radius * 1.2) - 1)
        right, bottom = min(width, int(x + radius * 1.2) + 2), min(height, int(y + radius * 1.2) + 2)
        down, across = _middle(thing.shape)
        inside = (x - across * radius - left, y - down * radius - top, bottom - top, right - left)
        alpha = coverage(thing.shape, radius, *inside).astype(np.float32)[..., None] / 255
        image[top:bottom, left:right] += alpha * (colour - image[top:bottom, left:right])
    if word:
        above, start, tall, pitch = place
        wide = pitch / 6
        for number, letter in enumerate(word):
            for row, column in np.argwhere(GLYPHS[letter]):
                y0, x0 = above + row * tall, start + number * pitch + column * wide
                y1, x1 = max(round(y0) + 1, round(y0 + tall)), max(round(x0) + 1, round(x0 + wide))
                image[round(y0) : y1, round(x0) : x1] = 0
    return image


@cache
def _middle(shape: str) -> tuple[float, float]:
    """Where the centre of mass of a shape of radius 1 lies (y, x): what `_thing` calls its place."""
    _, y, x, _ = _normal(coverage(shape, 100.0, 130.0, 130.0, 260, 260).astype(np.float32) / np.float32(255))
    return (y - 130) / 100, (x - 130) / 100


def _strays(pixels: Floats, drawn: Floats) -> Iterator[Floats]:
    """How far a picture differs from what was drawn, beyond what softens and rings about an edge, as a share of what is
    allowed: maps [h,w] for single pixels, spots, means over wider and wider windows, and over everything."""
    scale = min(pixels.shape[:2]) / 64
    reach = 2 * round(3 * min(scale, 2)) + 1
    high, low = ndimage.maximum_filter(drawn, (reach, reach, 1)), ndimage.minimum_filter(drawn, (reach, reach, 1))
    edge = high - low
    flat = edge.max(2) < 8
    yield _specks(pixels, high, low, edge, flat, min(scale, 2))
    blurs = (ndimage.gaussian_filter(drawn, (blur, blur, 0)) for blur in _BLURS)
    left = pixels - min(blurs, key=lambda soft: float(((pixels - soft) ** 2).sum()))
    for blur, limit in SPOTS.items():
        soft = ndimage.gaussian_filter(left, (blur * scale, blur * scale, 0))
        spots = np.linalg.norm(np.maximum(np.abs(soft) - SLACK / blur * edge, 0), axis=2)
        yield spots / (limit if blur == 1 else limit * math.sqrt(scale))
    # many differences, each too faint to be seen alone: their root mean square over all that is flat, or not
    texture = (TEXTURE["flat"], np.linalg.norm(soft, axis=2), flat), (TEXTURE["edges"] * math.sqrt(scale), spots, ~flat)
    for limit, far, where in texture:
        mean = math.sqrt(float((far[where] ** 2).mean())) if where.any() else 0.0
        yield np.where(far == far.max(), mean / limit, 0).astype(np.float32)
    yield from _ghosts(left, flat, scale)


def _specks(pixels: Floats, high: Floats, low: Floats, edge: Floats, flat: Mask, scale: float) -> Floats:
    """Pixels whose colour lies outside the range `low` to `high` of what was drawn nearby: blur never leaves it."""
    gap = np.linalg.norm(np.maximum(np.maximum(pixels - high, low - pixels) - RINGING * edge, 0), axis=2)
    # `flat` reaches 3 px in 64 already; the rest of 16 px makes no difference where limits are low anyway
    far = ndimage.minimum_filter(flat, 2 * (16 - round(3 * scale)) + 1)
    limit = scale * np.where(flat, SPECKS["flat"], SPECKS["edges"])
    return np.asarray(gap / np.where(far, np.minimum(limit, SPECKS["far"]), limit), np.float32)


def _ghosts(left: Floats, flat: Mask, scale: float) -> Iterator[Floats]:
    """The mean difference where it is flat, in windows of `GHOSTS`: what is too faint for single pixels to show."""
    sums = np.dstack([left * flat[..., None], flat])  # differences that count, and how many do
    step = 1
    for sigma, limit in GHOSTS.items():
        # a wide window needs no fine grid
        finer = max(1, round(scale * (1 if sigma < 4 else 2))) // step
        sums, step = _reduced(sums, finer), step * finer
        mean = ndimage.gaussian_filter(sums, (sigma * scale / step, sigma * scale / step, 0), truncate=3.0)
        # few flat pixels: no certain mean
        gap = np.linalg.norm(mean[..., :3], axis=2) / np.maximum(mean[..., 3], 0.25)
        yield np.where(sums[..., 3] > 0.5, gap / limit, 0).astype(np.float32)


def _reduced(values: Floats, step: int) -> Floats:
    """Means over blocks of `step` x `step`, the last ones filled up with zeros."""
    if step == 1:
        return values
    height, width, channels = values.shape
    filled = np.pad(values, ((0, -height % step), (0, -width % step), (0, 0)))
    means: Floats = filled.reshape(-(-height // step), step, -(-width // step), step, channels).mean((1, 3))
    return means


def _unexplained(pixels: Floats, drawn: Floats) -> list[Seen]:
    """A thing without a name where no part of the reading explains the picture: a stain, specks, a slope, a ghost."""
    for stray in _strays(pixels, drawn):
        if float(stray.max()) > 1:
            height, width = stray.shape
            y, x = divmod(int(stray.argmax()), width)
            return [Seen("?", "?", "?", (x + 0.5) / width, (y + 0.5) / height, 0.0)]
    return []


def _split(
    patch: Floats, back: Floats, mask: Mask, edge: Mask, away: Floats, unit: int
) -> Iterator[tuple[Floats, str, Floats, bool]]:
    """A connected spot with its soft edge as (coverage [h,w], colour name, RGB, whether it is drawn in full) of each
    colour in it: two things that touch are still two."""
    distance = _gaps(patch, _THINGS)
    nearest = distance.argmin(2)
    core = ndimage.binary_erosion(mask)
    if core.sum() < 0.3 * LEAST * unit**2:
        core = mask & (away >= np.quantile(away[mask], 0.6))
    votes = np.bincount(nearest[core], minlength=len(_THINGS))
    parts: list[int] = []
    for number in np.argsort(-votes, kind="stable")[:3]:
        solid = ndimage.binary_opening(core & (nearest == number), np.ones((3, 3)))
        if not parts or solid.sum() > LEAST * unit**2:
            parts.append(int(number))
    owner = np.array(parts)[distance[:, :, parts].argmin(2)]
    for number in parts:
        # blur pales thin parts: the half that is farthest from the background tells the colour
        inner = core & (nearest == number)
        inner &= away >= np.median(away[inner])
        colour, behind = np.median(patch[inner], axis=0), np.median(back[inner], axis=0)
        gap, rival = np.sort(np.linalg.norm(_THINGS - colour, axis=1))[:2]
        strange = gap
        if gap < PALER and not ndimage.binary_erosion(mask & (owner == number), np.ones((7, 7))).any():
            line = (behind - _THINGS[number]) / max(float(np.linalg.norm(behind - _THINGS[number])), 1.0)
            off = colour - _THINGS[number]
            strange = np.linalg.norm(off - max(float(off @ line), 0.0) * line)
        name = list(COLOURS)[number] if strange < STRANGE and gap < BETWEEN * rival else "?"
        along = colour - back
        share = ((patch - back) * along).sum(2) / np.maximum((along**2).sum(2), 1.0)
        alpha = np.where((mask | edge) & (owner == number), np.clip(share, 0, 1), 0)
        yield alpha.astype(np.float32), name, colour, bool(gap < BETWEEN * np.linalg.norm(colour - behind))


def _thing(alpha: Floats, colour: str, whole: bool, top: int, left: int, height: int, width: int) -> Seen:
    """The coverage of one spot, whose corner lies at (top, left), as a thing. Only a whole one of
    a colour of the palette has a shape's name."""
    unit = min(height, width)
    sides, bank = _bank()
    seen, y, x, side = _normal(alpha)
    near = bank[np.argsort(np.abs(np.log(sides / side)))[:2]]  # [2, shapes, blurs, cells]
    misfit = np.sqrt(np.maximum(2 - 2 * (near @ seen).max((0, 2)), 0))
    best, next_ = np.argsort(misfit)[:2]
    named = whole and colour != "?" and misfit[best] < min(ALIKE, RIVAL * misfit[next_])
    radius = side / math.sqrt(_area(NAMES[best])) / unit
    size = min(SIZES, key=lambda name: abs(math.log(SIZES[name] / radius)))
    return Seen(NAMES[best] if named else "?", colour, size, (left + x) / width, (top + y) / height, radius)


def _normal(alpha: Floats) -> tuple[Floats, float, float, float]:
    """A coverage about its centre of mass in units of the root of its area, resampled to a grid of length one and
    flattened; with that centre (y, x) and that root, in px. Neither hangs on single pixels, as a bounding box would."""
    area = float(alpha.sum())
    y, x = (float(alpha.sum(1 - axis) @ (np.arange(alpha.shape[axis]) + 0.5)) / area for axis in (0, 1))
    side = math.sqrt(area)
    steps = ((np.arange(_GRID) + 0.5) / _GRID * 2 - 1) * _REACH * side - 0.5
    grid = np.stack(np.meshgrid(y + steps, x + steps, indexing="ij"))
    cells = ndimage.map_coordinates(alpha, grid, order=1).ravel()
    return np.asarray(cells / max(float(np.linalg.norm(cells)), 1e-6), np.float32), y, x, side


@cache
def _bank() -> tuple[Floats, Floats]:
    """Every outline at several sizes (roots of areas, px: [N]) and blurs, seen through the same normalisation
    [N, shapes, blurs, cells]."""
    sides = 6.0 * 1.2 ** np.arange(12)
    rows = []
    for side in sides:
        for shape in NAMES:
            radius = side / math.sqrt(_area(shape))
            canvas = int(2 * radius) + 12
            sharp = coverage(shape, radius, canvas / 2, canvas / 2, canvas, canvas).astype(np.float32) / 255
            rows += [_normal(ndimage.gaussian_filter(sharp, blur))[0] for blur in _BLURS]
    return sides.astype(np.float32), np.stack(rows).reshape(len(sides), len(NAMES), len(_BLURS), -1)


@cache
def _area(shape: str) -> float:
    """Area of a shape of radius 1 (shoelace formula; a ring less its hole)."""
    points = outline(shape)
    twice = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, points[1:] + points[:1], strict=True))
    return abs(twice) / 2 * (1 - RING**2 if shape == "ring" else 1)
