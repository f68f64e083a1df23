"""The text encoder keeps its contract."""

from lens_example.text_encoder import Example

from lens_core.testing import check_text_encoder


def test_contract() -> None:
    config = Example.Config(width=8, max_bytes=32)
    check_text_encoder(Example(config), config)


def test_long_prompts_are_cut() -> None:
    encoder = Example(Example.Config(width=8, max_bytes=4))
    assert encoder.encode(["a long prompt"]).mask.shape == (1, 4)
