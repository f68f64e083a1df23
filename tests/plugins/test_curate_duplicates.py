"""Hashes and duplicates: invariants of the hash, and the search against comparing every pair."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from lens_curate.duplicates import band_bits, equal_groups, leaders, near_duplicates, near_pairs
from lens_curate.hashes import BITS, colour_grid, distances, grid_array, hash_array, perceptual_hash, pixel_digest
from numpy.typing import NDArray
from PIL import Image


def texture(seed: int, side: int = 128) -> NDArray[np.uint8]:
    """A picture whose spectrum falls as in photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.fft.fftfreq(side)[:, None] ** 2 + np.fft.fftfreq(side)[None] ** 2
    frequency[0, 0] = 1
    noise = np.fft.fft2(rng.standard_normal((3, side, side))) / frequency**0.6
    planes = np.fft.ifft2(noise).real
    planes = planes[:1] + 0.4 * planes
    planes /= planes.std()
    return np.clip(128 + 45 * planes, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def hashed(*pictures: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return hash_array([perceptual_hash(picture)[0] for picture in pictures])


def as_jpeg(picture: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def scaled(picture: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    size = tuple(round(side * factor) for side in picture.shape[1::-1])
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    "change",
    [lambda p: as_jpeg(p, 30), lambda p: scaled(p, 0.5), lambda p: scaled(p, 1.7), lambda p: p[2:-2, 2:-2].copy()],
    ids=["jpeg", "smaller", "larger", "cropped"],
)
def test_what_does_not_change_a_picture_much_changes_few_bits_of_its_hash(change) -> None:
    pictures = [texture(seed) for seed in range(12)]
    apart = distances(hashed(*pictures), hashed(*map(change, pictures)))
    assert apart.max() <= 32
    others = distances(hashed(*pictures), hashed(*(texture(seed) for seed in range(100, 112))))
    assert others.min() > 64


def test_the_second_hash_is_that_of_the_mirror_image() -> None:
    for seed in range(8):
        picture = texture(seed)
        straight, mirrored = perceptual_hash(picture)
        flipped = perceptual_hash(np.ascontiguousarray(picture[:, ::-1]))
        assert distances(hash_array([mirrored]), hash_array([flipped[0]]))[0] <= 2
        assert distances(hash_array([straight]), hash_array([flipped[1]]))[0] <= 2
        assert distances(hash_array([straight]), hash_array([mirrored]))[0] > 64


def test_pictures_of_equal_hash_in_other_colours_are_no_duplicates() -> None:
    plain = [np.full((64, 64, 3), colour, np.uint8) for colour in ((200, 40, 40), (200, 41, 40), (90, 20, 20))]
    assert len({perceptual_hash(picture) for picture in plain}) == 1
    grids = grid_array([colour_grid(picture) for picture in plain])
    instead, _, _ = near_duplicates(hashed(*plain), None, np.arange(3), 32, lambda places: grids[places], 56)
    assert instead.tolist() == [-1, 0, -1]


def test_the_colours_of_a_mirror_image_are_compared_mirrored() -> None:
    picture = texture(3)
    picture[:, :64, 0] //= 4
    both = [picture, np.ascontiguousarray(picture[:, ::-1])]
    made = [perceptual_hash(p) for p in both]
    grids = grid_array([colour_grid(p) for p in both])
    straight, mirrored = (hash_array([h[n] for h in made]) for n in (0, 1))
    near = near_duplicates(straight, mirrored, np.arange(2), 32, lambda places: grids[places], 10)
    assert near[0].tolist() == [-1, 0] and near[2].tolist() == [False, True]


def test_a_digest_tells_pixels_and_shapes_apart() -> None:
    picture = texture(0)
    other = picture.copy()
    other[5, 5, 1] ^= 1
    assert pixel_digest(picture) == pixel_digest(picture.copy())
    assert len({pixel_digest(p) for p in (picture, other, picture.reshape(64, 256, 3))}) == 3


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_the_smallest_pictures_have_hashes_too(size: tuple[int, int]) -> None:
    straight, mirrored = perceptual_hash(np.zeros((*size, 3), np.uint8))
    assert len(straight) == len(mirrored) == BITS // 8


def copies(count: int, share: float, flips: float, seed: int = 0) -> NDArray[np.uint64]:
    """Random hashes, the last of them copies of the first with this share of bits turned."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, (count, 4), dtype=np.uint64)
    some = int(count * share)
    turned = np.packbits(rng.random((some, BITS)) < flips, axis=1).view(np.uint64)
    hashes[-some:] = hashes[:some] ^ turned
    return hashes


def test_the_search_finds_what_comparing_every_pair_finds() -> None:
    hashes = copies(1500, 0.2, 0.05)
    i, j, bits = near_pairs(hashes, 32)
    apart = distances(hashes[:, None], hashes[None])
    true = {(a, b) for a, b in zip(*np.nonzero(apart <= 32), strict=True) if a < b}
    pairs = set(zip(i.tolist(), j.tolist(), strict=True))
    assert pairs <= true
    assert len(pairs) >= 0.99 * len(true) > 200
    assert (apart[i, j] == bits).all()


def test_a_band_grows_with_the_number_of_hashes_so_that_candidates_by_chance_do_not() -> None:
    assert [band_bits(n) for n in (1, 1_000, 1_000_000, 800_000_000)] == [14, 14, 24, 34]


def test_many_equal_pictures_cost_no_more_than_as_many_others() -> None:
    hashes = np.repeat(copies(2, 0.5, 0)[:1], 20_000, axis=0)
    instead, _, _ = near_duplicates(hashes, None, np.arange(20_000), 32)
    assert (instead[1:] == 0).all() and instead[0] == -1


def test_every_dropped_picture_is_near_the_one_that_is_kept() -> None:
    # A chain: each is near its neighbours and far from all others, so every second one stays.
    hashes = np.zeros((9, 4), np.uint64)
    for place in range(9):
        hashes[place] = np.packbits(np.arange(BITS) < 20 * place).view(np.uint64)
    rank = np.arange(9)
    pairs = [(a, b, 20 * (b - a)) for a in range(9) for b in range(a + 1, 9) if 20 * (b - a) <= 30]
    instead, apart = leaders(rank, tuple(np.array(column) for column in zip(*pairs, strict=True)))
    assert instead.tolist() == [-1, 0, -1, 2, -1, 4, -1, 6, -1]
    assert apart.tolist() == [0, 20] * 4 + [0]


def test_the_order_of_pictures_does_not_decide_which_are_kept() -> None:
    hashes = copies(600, 0.4, 0.04)
    rank = np.random.default_rng(1).permutation(600)
    instead, _, _ = near_duplicates(hashes, None, rank, 32)
    shuffle = np.random.default_rng(2).permutation(600)
    other, _, _ = near_duplicates(hashes[shuffle], None, rank[shuffle], 32)
    assert set(shuffle[other < 0].tolist()) == set(np.flatnonzero(instead < 0).tolist())


def test_mirrored_copies_are_told_from_straight_ones() -> None:
    pictures = [texture(seed) for seed in range(6)]
    flipped = [np.ascontiguousarray(p[:, ::-1]) for p in pictures[:3]]
    made = [perceptual_hash(p) for p in [*pictures, *flipped, as_jpeg(pictures[5], 50)]]
    straight, mirrored = (hash_array([h[n] for h in made]) for n in (0, 1))
    instead, _, is_mirrored = near_duplicates(straight, mirrored, np.arange(10), 32)
    assert instead.tolist() == [-1] * 6 + [0, 1, 2, 5]
    assert is_mirrored.tolist() == [False] * 6 + [True] * 3 + [False]
    kept, _, _ = near_duplicates(straight, None, np.arange(10), 32)
    assert kept.tolist() == [-1] * 9 + [5]


def test_pictures_with_little_in_them_are_near_by_what_is_in_them() -> None:
    """Two squares at other places on one even ground set few bits, and share all bits that neither sets."""
    ground = np.full((128, 128, 3), 200, np.uint8)
    pictures = [ground.copy() for _ in range(2)]
    pictures[0][54:74, 54:74], pictures[1][54:74, 40:60] = 150, 150
    hashes = hashed(*pictures, as_jpeg(pictures[0], 60))
    assert distances(hashes[:1], hashes[1:2])[0] <= 32
    assert [pair.tolist() for pair in near_pairs(hashes, 32)[:2]] == [[0], [2]]


def test_of_equal_keys_the_one_of_least_rank_stays() -> None:
    keys = np.array([b"a", b"b", b"a", b"c", b"b"], "S1")
    assert equal_groups(keys, np.array([4, 0, 1, 2, 3])).tolist() == [2, -1, -1, -1, 1]
    assert equal_groups(np.array([], "S1"), np.array([], np.int64)).tolist() == []


def test_nothing_and_one_picture_have_no_duplicates() -> None:
    for count in (0, 1):
        hashes = np.zeros((count, 4), np.uint64)
        instead, _, _ = near_duplicates(hashes, hashes, np.arange(count), 32)
        assert instead.tolist() == [-1] * count


def test_a_part_of_the_pictures_is_compared_as_if_it_were_all() -> None:
    rng = np.random.default_rng(4)
    hashes, mirrored = (rng.integers(0, 2**64, (3000, 4), dtype=np.uint64) for _ in range(2))
    flips = np.packbits(rng.random((600, BITS)) < 0.05, axis=1).view(np.uint64)
    hashes[600:1200], mirrored[1200:1800] = hashes[:600] ^ flips, hashes[:600] ^ flips
    places = np.sort(rng.permutation(3000)[:2000])
    rank = rng.permutation(2000)
    part = near_duplicates(hashes, mirrored, rank, 32, places=places)
    alone = near_duplicates(hashes[places], mirrored[places], rank, 32)
    assert all(np.array_equal(one, other) for one, other in zip(part, alone, strict=True))
    assert (part[0] >= 0).sum() > 100 and part[2].any() and not part[2].all()


def test_the_search_holds_few_bytes_of_each_hash() -> None:
    def peak(count: int) -> int:
        rng = np.random.default_rng(0)
        hashes, mirrored = (rng.integers(0, 2**64, (count, 4), dtype=np.uint64) for _ in range(2))
        rank = rng.permutation(count)
        tracemalloc.start()
        near_duplicates(hashes, mirrored, rank, 32)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert (peak(30_000) - peak(10_000)) / 20_000 < 200
