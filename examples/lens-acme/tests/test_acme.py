"""What Acme's components promise."""

from __future__ import annotations

from pathlib import Path

import lens_acme
import pytest
import torch
from lens_acme.contrast import Contrast
from lens_acme.words import HashedWords

from lens_core import Catalog, CheckpointError, ComponentSpec, ConfigError, Prompt, build
from lens_core.testing import check_reward, check_text_encoder


def encoder(**options: int) -> HashedWords:
    torch.manual_seed(0)
    return HashedWords(HashedWords.Config(**{"rows": 512, "width": 8, "max_words": 5, **options}))


def test_both_components_are_found_by_name() -> None:
    catalog = Catalog.of(lens_acme)
    assert build(catalog, "text_encoder", ComponentSpec("hashed_words"))[1] is HashedWords
    assert build(catalog, "reward", ComponentSpec("lens_acme:contrast"))[1] is Contrast


def test_both_components_keep_their_contracts() -> None:
    check_text_encoder(encoder(), encoder().config)
    check_reward(Contrast(Contrast.Config()), [Prompt("a red cat"), Prompt("")])


def test_a_word_is_a_token_whatever_its_case() -> None:
    text = encoder().encode(["A red cat.", "red", ""])
    assert text.mask.sum(1).tolist() == [4, 1, 0]
    assert torch.equal(text.features[1:2, :, :1], encoder().encode(["RED"]).features)


def test_word_order_counts_and_long_prompts_are_cut() -> None:
    one, other = encoder().encode(["cat red"]), encoder().encode(["red cat"])
    assert not torch.equal(one.features, other.features)
    assert encoder().encode(["a b c d e f g"]).mask.shape == (1, 5)
    assert encoder().encode([""]).mask.shape == (1, 0)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    encoder().save(tmp_path)
    with pytest.raises(CheckpointError, match="has the shape"):
        HashedWords.load(tmp_path, HashedWords.Config(rows=511, width=8, max_words=5))


def test_contrast_is_the_spread_of_luma() -> None:
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    images[1, :, :2] = 255  # half black, half white: the spread is 127.5
    images[2, 2, :2] = 255  # blue counts 0.114
    scores = Contrast(Contrast.Config(full=127.5)).score(images, [Prompt("")] * 3)
    assert [s.value for s in scores] == pytest.approx([0, 1, 0.114], abs=1e-5)
    assert Contrast(Contrast.Config()).score(images, [Prompt("")] * 3)[1].value == 1.0


@pytest.mark.parametrize("wrong", [{"full": 0.0}, {"full": 200.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="full is"):
        Contrast.Config(**wrong)
