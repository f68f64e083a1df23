"""The component flux2: its latents, its files, its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from attrs import evolve
from diffusers import AutoencoderKLFlux2
from lens_flux2.vae import Flux2VAE

from lens_core.testing import check_vae
from lens_core.types import CheckpointError, ConfigError, LensError

SMALL = Flux2VAE.Config(
    block_out_channels=(8, 16), layers_per_block=1, latent_channels=2, norm_num_groups=2, mid_block_add_attention=False
)


def small(config: Flux2VAE.Config = SMALL) -> Flux2VAE:
    torch.manual_seed(0)
    vae = Flux2VAE(config).eval()
    draw = torch.Generator().manual_seed(1)
    vae.net.bn.running_mean.copy_(torch.randn(vae.channels, generator=draw))
    vae.net.bn.running_var.copy_(torch.rand(vae.channels, generator=draw) + 0.5)
    return vae.requires_grad_(False)


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_the_default_config_is_the_published_model():
    with torch.device("meta"):
        vae = Flux2VAE(Flux2VAE.Config())
        published = AutoencoderKLFlux2()
    assert (vae.channels, vae.downscale) == (128, 16)
    assert {k: v.shape for k, v in vae.net.state_dict().items()} == {
        k: v.shape for k, v in published.state_dict().items()
    }
    assert dict(vae.net.config)["batch_norm_eps"] == 1e-4


def test_encode_folds_two_by_two_in_channel_row_column_order_and_normalises():
    vae = small()
    x = pixels(2, 3, 12, 8)
    mean = vae.net.encode(x).latent_dist.mode()
    expected = torch.empty(2, 8, 3, 2)
    for c in range(2):
        for p1 in range(2):
            for p2 in range(2):
                k = c * 4 + p1 * 2 + p2
                cells = mean[:, c, p1::2, p2::2]
                expected[:, k] = (cells - vae.net.bn.running_mean[k]) / (vae.net.bn.running_var[k] + 1e-4) ** 0.5
    torch.testing.assert_close(vae.encode(x), expected)


def test_decode_undoes_what_encode_did_after_the_network():
    vae = small()
    x = pixels(2, 3, 12, 8)
    torch.testing.assert_close(vae.decode(vae.encode(x)), vae.net.decode(vae.net.encode(x).latent_dist.mode()).sample)


def test_the_training_pass_decodes_a_sample_of_the_posterior():
    vae = small()
    x, noise = pixels(1, 3, 8, 8), torch.ones(1, 2, 4, 4)
    guess, mean, logvar = vae(x, noise)
    posterior = vae.net.encode(x).latent_dist
    torch.testing.assert_close((mean, logvar), (posterior.mean, posterior.logvar))
    torch.testing.assert_close(guess, vae.net.decode(posterior.mean + posterior.std).sample)


@pytest.mark.parametrize(("size", "nearest"), [((10, 8), "8 x 8"), ((8, 11), "8 x 12"), ((1, 4), "4 x 4")])
def test_a_size_off_the_grid_is_refused_with_its_neighbour(size, nearest):
    with pytest.raises(LensError, match=f"{size[0]} x {size[1]} px.*multiples of 4.*{nearest}"):
        small().encode(pixels(1, 3, *size))


def test_latents_of_another_width_are_refused():
    with pytest.raises(LensError, match=r"\[1, 7, 2, 2\].*\[B, 8, h, w\]"):
        small().decode(torch.zeros(1, 7, 2, 2))


def test_diffusers_reads_what_is_saved(tmp_path):
    vae = small()
    vae.save(tmp_path)
    theirs = AutoencoderKLFlux2.from_pretrained(tmp_path / "vae")
    assert json.loads((tmp_path / "vae/config.json").read_text())["_class_name"] == "AutoencoderKLFlux2"
    assert theirs.state_dict().keys() == vae.net.state_dict().keys()
    assert all(torch.equal(v, vae.net.state_dict()[k]) for k, v in theirs.state_dict().items())


def test_what_diffusers_saves_is_read(tmp_path):
    vae = small()
    vae.net.save_pretrained(tmp_path / "vae")
    again = Flux2VAE.load(tmp_path, Flux2VAE.Config()).eval()
    assert again.config == SMALL
    x = pixels(1, 3, 8, 8)
    assert torch.equal(again.encode(x), vae.encode(x))


def test_it_keeps_the_contract_of_a_vae():
    check_vae(small(), SMALL)


def test_it_works_in_the_dtype_it_was_loaded_in(tmp_path):
    small().save(tmp_path)
    vae = Flux2VAE.load(tmp_path, SMALL, dtype=torch.bfloat16).eval()
    assert vae.decode(vae.encode(pixels(1, 3, 8, 8))).dtype == torch.bfloat16


def edit(folder: Path, **changes: object) -> None:
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "describes a AutoencoderKL"),
        ({"act_fn": "relu"}, "act_fn must be silu"),
        ({"latent_chanels": 2}, "Did you mean 'latent_channels'"),
        ({"latent_channels": "2"}, "config.json.latent_channels"),
        ({"mid_block_add_attention": "false"}, "config.json.mid_block_add_attention"),
        ({"norm_num_groups": 3}, "multiples of norm_num_groups"),
    ],
)
def test_a_foreign_config_is_refused(tmp_path, change, message):
    small().save(tmp_path)
    edit(tmp_path, **change)
    with pytest.raises(CheckpointError, match=message):
        Flux2VAE.load(tmp_path, Flux2VAE.Config())


def test_a_recipe_that_contradicts_the_checkpoint_is_refused(tmp_path):
    small().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"latent_channels is 2, but lens\.json says 4"):
        Flux2VAE.load(tmp_path, evolve(SMALL, latent_channels=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 0}, "latent_channels: must be at least 1"),
        ({"batch_norm_eps": 0.0}, "batch_norm_eps"),
        ({"block_out_channels": (8, 9)}, r"\[8, 9\].*norm_num_groups \(2\)"),
        ({"block_out_channels": ()}, "block_out_channels"),
        ({"decoder_block_out_channels": (8,)}, "has 1 levels"),
    ],
)
def test_an_impossible_config_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        evolve(SMALL, **change)


def test_the_decoder_may_be_narrower_than_the_encoder():
    vae = small(evolve(SMALL, decoder_block_out_channels=(4, 8)))
    assert vae.decode(vae.encode(pixels(1, 3, 8, 8))).shape == (1, 3, 8, 8)
    assert vae.net.decoder.conv_in.out_channels == 8


def test_lists_do_where_a_config_has_tuples():
    config = Flux2VAE.Config(block_out_channels=[32, 64], decoder_block_out_channels=[32, 64], norm_num_groups=32)
    assert config == Flux2VAE.Config(block_out_channels=(32, 64), decoder_block_out_channels=(32, 64))
    assert isinstance(hash(config), int) and Flux2VAE(config).downscale == 4
