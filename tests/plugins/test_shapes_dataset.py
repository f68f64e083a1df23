"""The dataset: seeded, shared by ranks, resumable."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from lens_shapes.dataset import ShapesDataset

from lens_core.testing import check_dataset
from lens_core.types import ConfigError


def take(number, rank=0, world=1, **config):
    return list(islice(ShapesDataset(ShapesDataset.Config(**config)).batches(rank, world), number))


def same(a, b):
    return a.captions == b.captions and a.keys == b.keys and torch.equal(a.images, b.images)


def test_batches_are_pictures_of_one_size_with_a_caption_each():
    batches = take(12, batch=2)
    assert all(b.images.dtype == torch.uint8 and b.images.shape[:2] == (2, 3) and len(b.captions) == 2 for b in batches)
    assert len({b.images.shape for b in batches}) > 1
    assert all(b.keys == () for b in batches)


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    assert all(same(a, b) for a, b in zip(take(3, batch=4), take(3, batch=4), strict=True))
    assert take(1, batch=4)[0].captions != take(1, batch=4, seed=1)[0].captions


def test_ranks_share_the_global_batch():
    whole, parts = take(4, batch=4, seed=2), [take(4, rank, 2, batch=4, seed=2) for rank in (0, 1)]
    for n, batch in enumerate(whole):
        assert batch.captions == parts[0][n].captions + parts[1][n].captions
        assert torch.equal(batch.images, torch.cat([parts[0][n].images, parts[1][n].images]))


@pytest.mark.parametrize("count", [0, 24])
def test_it_keeps_the_contract_of_a_dataset(count):
    config = ShapesDataset.Config(batch=4, pool_size=count, sizes=((64, 64), (64, 96)))
    check_dataset(lambda: ShapesDataset(config), before=4, after=6)  # an epoch of 24 is 6 batches


def test_a_pool_shows_every_scene_once_an_epoch_in_a_new_order_with_new_captions():
    config = {"batch": 4, "pool_size": 16, "sizes": ((64, 64), (64, 96))}
    batches = take(8, **config)
    epochs = [[key for b in part for key in b.keys] for part in (batches[:4], batches[4:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(16)) and epochs[0] != epochs[1]
    seen, captions = {}, {}
    for batch in batches:
        for key, image, caption in zip(batch.keys, batch.images, batch.captions, strict=True):
            assert key not in seen or torch.equal(seen[key], image)
            seen[key] = image
            captions.setdefault(key, set()).add(caption)
    assert max(len(texts) for texts in captions.values()) == 2


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_dense_is_the_share_of_batches_with_dense_captions(share):
    batches = take(40, batch=2, dense_caption_ratio=share, images=False)
    dense = [{len(c.split()) > 60 for c in b.captions} for b in batches]
    assert all(len(kinds) == 1 for kinds in dense)
    assert abs(sum(kinds == {True} for kinds in dense) / 40 - share) < 0.25 * (0 < share < 1) + 1e-9


def test_captions_alone_are_the_same_captions():
    assert take(1, batch=3, images=False)[0].images is None
    assert take(2, batch=3, images=False)[1].captions == take(2, batch=3)[1].captions


def test_only_kinds_with_a_weight_are_drawn():
    captions = [
        c for b in take(10, batch=4, dense_caption_ratio=0.0, images=False, tasks={"words": 1.0}) for c in b.captions
    ]
    assert all('"' in c for c in captions)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": ((32, 64),)}, r"sizes\[0\]\[0\]: must be at least 64"),
        ({"sizes": ()}, "sizes"),
        ({"batch": 0}, "batch"),
        ({"dense_caption_ratio": 1.5}, "dense_caption_ratio"),
        ({"pool_size": 10}, "too few"),
        ({"tasks": {"word": 1.0}}, "Did you mean 'words'"),
        ({"tasks": {"words": 0.0}}, "no positive weight"),
    ],
)
def test_a_wrong_dataset_config_is_refused_with_its_cure(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ShapesDataset.Config(**wrong)


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="multiple of 3"):
        take(1, 0, 3, batch=4)
