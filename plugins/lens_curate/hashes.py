"""Hashes by which duplicates are known: of pixels, for equal pictures, and perceptual, for similar ones.

The perceptual hash has 256 bits, which stay the same when a picture is scaled, compressed again or cropped a little.
The picture is scaled to 64 x 64, and two bits say of each of 128 low frequencies (DCT-II) whether it lies above a
threshold or below its negative: 76 frequencies of brightness, 26 of each of the two differences of colour. So a
frequency that is absent is told from both signs, and in even pictures noise changes few bits. A grid of mean colours
goes with the hash: two pictures are near if few bits differ and no cell of the grid does much.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS = 256
GRID = 8
VERSION = "1"
"""Changes whenever `perceptual_hash` or `pixel_digest` of some picture does: hashes of other versions are made anew."""

_SIDE = 64  # px
_LUMA, _CHROMA = 76, 26  # frequencies
_FREQUENCIES = 12  # the highest that any bit needs, and one
_THRESHOLD = 0.1  # share of the standard deviation of the coefficients of a channel
_FLOOR = 1.0  # least threshold, in levels of 0 to 255 of the scaled picture

# ITU-R BT.601, as in JPEG.
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)


def pixel_digest(pixels: NDArray[np.uint8]) -> bytes:
    """16 bytes that are equal for equal pictures [H,W,3] only, whatever the format of their files."""
    shape = np.array(pixels.shape, np.int64).tobytes()
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16, salt=shape[:16]).digest()


def perceptual_hash(pixels: NDArray[np.uint8]) -> tuple[bytes, bytes]:
    """Picture [H,W,3] -> 32 bytes for it, and 32 for its mirror image (left and right exchanged)."""
    small = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    channels = np.asarray(small, np.float32) @ _YCBCR.T
    basis = _basis()
    straight, mirrored = [], []
    for channel, order in enumerate(_orders()):
        coefficients = (basis @ channels[..., channel] @ basis.T).ravel()[order]
        threshold = max(_FLOOR, _THRESHOLD * float(coefficients.std()))
        above, below = coefficients > threshold, coefficients < -threshold
        # Mirroring a picture turns the sign of each frequency that is odd from left to right, exactly.
        odd = order % _FREQUENCIES % 2 == 1
        straight += [above, below]
        mirrored += [np.where(odd, below, above), np.where(odd, above, below)]
    return np.packbits(np.concatenate(straight)).tobytes(), np.packbits(np.concatenate(mirrored)).tobytes()


def colour_grid(pixels: NDArray[np.uint8]) -> bytes:
    """Picture [H,W,3] -> the mean colours of 8 x 8 cells, 192 bytes: what tells apart pictures of equal hash."""
    small = Image.fromarray(pixels).resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(small).tobytes()


def grid_array(grids: Sequence[bytes]) -> NDArray[np.uint8]:
    """Grids of colours as uint8 [N,8,8,3]."""
    return np.frombuffer(b"".join(grids), np.uint8).reshape(len(grids), GRID, GRID, 3)


def colour_distances(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The largest difference of any cell of grids [N,8,8,3], in levels of 0 to 255, row by row."""
    return np.asarray(np.abs(a.astype(np.int16) - b).max(axis=(1, 2, 3), initial=0), np.int64)


def hash_array(hashes: Sequence[bytes]) -> NDArray[np.uint64]:
    """Perceptual hashes as uint64 [N,4], for `distances` and for `duplicates`."""
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(len(hashes), BITS // 64)


def distances(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Bits in which hashes [N,4] differ, row by row."""
    return np.asarray(np.bitwise_count(a ^ b).sum(axis=-1), np.int64)


@lru_cache(1)
def _basis() -> NDArray[np.float32]:
    """The lowest frequencies of a DCT-II of _SIDE samples, [_FREQUENCIES, _SIDE]; coefficients are in levels."""
    angles = np.pi * np.outer(np.arange(_FREQUENCIES), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE)
    return np.asarray(np.cos(angles) / np.sqrt(_SIDE), np.float32)


@lru_cache(1)
def _orders() -> tuple[NDArray[np.int64], ...]:
    """For brightness and the two colours, which coefficients make bits: the lowest frequencies, without the mean of
    brightness, which exposure changes."""
    grid = np.add.outer(np.arange(_FREQUENCIES) ** 2, np.arange(_FREQUENCIES) ** 2)
    by_frequency = np.argsort(grid, axis=None, kind="stable")
    return by_frequency[1 : 1 + _LUMA], by_frequency[:_CHROMA], by_frequency[:_CHROMA]
