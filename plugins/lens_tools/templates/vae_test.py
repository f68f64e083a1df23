"""The vae keeps its contract."""

import torch
from lens_example.vae import Example

from lens_core.testing import check_vae


def test_contract() -> None:
    config = Example.Config()
    check_vae(Example(config), config)


def test_decode_is_the_inverse_of_encode() -> None:
    vae = Example(Example.Config(std=0.3))
    pixels = torch.linspace(-1, 1, 288).view(1, 3, 8, 12)
    torch.testing.assert_close(vae.decode(vae.encode(pixels)), pixels)
