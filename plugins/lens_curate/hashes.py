"""Hashes by which duplicates are known: of pixels, for equal pictures, and perceptual, for similar ones.

The perceptual hash has 256 bits, which stay the same when a picture is scaled, compressed again or cropped a little.
The picture is scaled to 64 x 64, and a bit says whether a low frequency (DCT-II) of its brightness or of its colours
lies above a threshold: 168 bits are brightness, 44 each of the two differences of colour. The threshold is a fixed
share of a picture's contrast, not zero: noise then changes few bits of even pictures, which have no contrast in most
frequencies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS = 256
VERSION = "1"
"""Changes whenever `perceptual_hash` or `pixel_digest` of some picture does: hashes of other versions are made anew."""

_SIDE = 64  # px
_LUMA, _CHROMA = 168, 44  # bits
_FREQUENCIES = 20  # the highest that any bit needs, and one
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
    small = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BOX, reducing_gap=3.0)
    channels = np.asarray(small, np.float32) @ _YCBCR.T
    basis = _basis()
    straight, mirrored = [], []
    for channel, order in enumerate(_orders()):
        coefficients = (basis @ channels[..., channel] @ basis.T).ravel()[order]
        threshold = max(_FLOOR, _THRESHOLD * float(coefficients.std()))
        # Mirroring a picture turns the sign of each frequency that is odd from left to right, exactly.
        sign = np.where(order % _FREQUENCIES % 2, -1, 1)
        straight.append(coefficients > threshold)
        mirrored.append(coefficients * sign > threshold)
    return np.packbits(np.concatenate(straight)).tobytes(), np.packbits(np.concatenate(mirrored)).tobytes()


def hash_array(hashes: Sequence[bytes]) -> NDArray[np.uint64]:
    """Perceptual hashes as uint64 [N,4], for `distances` and for `duplicates`."""
    return np.frombuffer(b"".join(hashes), np.uint64).reshape(len(hashes), BITS // 64)


def distances(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Bits in which hashes [N,4] differ, row by row."""
    return np.bitwise_count(a ^ b).sum(axis=-1, dtype=np.int64)


@lru_cache(1)
def _basis() -> NDArray[np.float32]:
    """The lowest frequencies of a DCT-II of _SIDE samples, [_FREQUENCIES, _SIDE]; coefficients are in levels."""
    angles = np.pi * np.outer(np.arange(_FREQUENCIES), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE)
    return (np.cos(angles) / np.sqrt(_SIDE)).astype(np.float32)


@lru_cache(1)
def _orders() -> tuple[NDArray[np.int64], ...]:
    """For brightness and the two colours, which coefficients make bits: the lowest frequencies, without the mean of
    brightness, which exposure changes."""
    grid = np.add.outer(np.arange(_FREQUENCIES) ** 2, np.arange(_FREQUENCIES) ** 2)
    by_frequency = np.argsort(grid, axis=None, kind="stable")
    return by_frequency[1 : 1 + _LUMA], by_frequency[:_CHROMA], by_frequency[:_CHROMA]
