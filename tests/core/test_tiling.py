"""Decoding in tiles: which it takes, what it changes, and that a picture says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from lens_core.cli.main import main
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.pixels import to_images
from lens_core.inference.requests import GenerateRequest
from lens_core.inference.tiling import check_tile, decode_tiles
from lens_core.types import ConfigError


def upsample(z: Tensor) -> Tensor:
    return interpolate(z[:, :3], scale_factor=4)


@pytest.mark.parametrize("size", [(8, 8), (9, 21), (40, 5), (17, 33)])
def test_tiles_of_what_has_no_neighbours_are_the_whole(size: tuple[int, int]) -> None:
    z = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(decode_tiles(upsample, z, 8), upsample(z), atol=1e-6, rtol=1e-5)


def test_no_tile_is_larger_than_was_wanted_and_each_cell_is_decoded() -> None:
    seen = torch.zeros(13, 30)
    sizes = []

    def decode(z: Tensor) -> Tensor:
        sizes.append(tuple(z.shape[-2:]))
        seen.view(-1)[z[0, 0].long().flatten()] += 1
        return upsample(z)

    cells = torch.arange(13 * 30.0).view(1, 1, 13, 30).repeat(1, 3, 1, 1)
    decode_tiles(decode, cells, 6)
    assert set(sizes) == {(6, 6)} and seen.min() >= 1


def test_a_picture_that_fits_one_tile_is_decoded_as_it_is() -> None:
    calls = []
    z = torch.zeros(1, 3, 8, 8)
    decode_tiles(lambda x: calls.append(x) or upsample(x), z, 8)  # type: ignore[func-returns-value]
    assert len(calls) == 1 and calls[0] is z


def test_seams_of_what_sees_its_neighbours_are_blended() -> None:
    kernel = torch.full((3, 3, 3, 3), 1 / 27)

    def smooth(z: Tensor) -> Tensor:
        return conv2d(upsample(z), kernel, padding=1)  # which pads a tile's edges with zeros

    z = torch.ones(1, 3, 16, 16)
    inner = (slice(None), slice(None), slice(4, -4), slice(4, -4))
    gaps = (decode_tiles(smooth, z, 8) - smooth(z))[inner].abs()
    assert 0 < gaps.max() < 0.1  # a hard seam would be off by a third


class Bare:
    downscale, convolutional = 8, True


@pytest.mark.parametrize(
    ("side", "words"),
    [(100, "multiple of 8 px"), (24, "use 32"), (0, "at least 1"), ("64", "whole number"), (2**20, "at most")],
)
def test_a_tile_that_fits_no_grid_is_refused(side: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_tile(Bare(), side)
    assert check_tile(Bare(), 64) == 64


def test_a_vae_that_attends_over_the_whole_picture_is_refused(pipeline: LensPipeline) -> None:
    from lens_flux2.vae import Flux2VAE

    small = {"block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    assert not Flux2VAE(Flux2VAE.Config(**small)).convolutional
    assert Flux2VAE(Flux2VAE.Config(**small, mid_block_add_attention=False)).convolutional
    with pytest.raises(ConfigError, match="attends over the whole picture"):
        pipeline.use_lossy_vae_tiles(64)  # the toy's VAE does not say that it is convolutional


def test_tiles_of_the_embedded_vae_are_near_and_are_recorded() -> None:
    pipeline = LensPipeline.from_pretrained("tiny:turbo", device="cpu")
    request = GenerateRequest(height=128, width=192, steps=2)
    whole = pipeline("a red circle", seed=3, **request.arguments())
    z = pipeline("a red circle", seed=3, output_type="latent", **request.arguments()).images
    before = request.fingerprint(pipeline, "a red circle", 3)
    pipeline.use_lossy_vae_tiles(96)
    tiled = pipeline("a red circle", seed=3, **request.arguments())
    assert "lossy_vae_tile" not in whole.settings and tiled.settings["lossy_vae_tile"] == 96
    assert request.fingerprint(pipeline, "a red circle", 3) != before
    pipeline.use_lossy_vae_tiles(None)
    gap = to_images(pipeline.decode(z)).float()
    pipeline.use_lossy_vae_tiles(96)
    gap = (gap - to_images(pipeline.decode(z)).float()).abs()
    assert 0 < float(gap.square().mean().sqrt()) < 12


def test_a_tiled_picture_is_drawn_again_in_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ("--model", "tiny:turbo", "--device", "cpu")
    flags = ("--seed", "3", "--steps", "2", "--size", "64x128")
    assert main(["generate", "a red circle", *model, *flags, "--lossy-vae-tile", "64", "-o", "a.png"]) == 0
    capsys.readouterr()
    assert main(["generate", *model, "--reproduce", "a.png"]) == 0
    assert capsys.readouterr().out == "identical\n"
    assert main(["generate", "a red circle", *model, *flags, "--lossy-vae-tile", "60", "-o", "b.png"]) == 2
    assert "lossy_vae_tile 60 must be a multiple of 8 px" in capsys.readouterr().err
