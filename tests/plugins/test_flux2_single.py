"""The VAE in one file: diffusers' names and the original ones, which diffusers' own conversion code knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from attrs import evolve
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from lens_flux2 import lens_describe
from lens_flux2.single import convert_single_file
from lens_flux2.vae import Flux2VAE
from safetensors.torch import save_file
from torch import Tensor

from lens_core.checkpoints.lazy_tensors import LazyTensor
from lens_core.types import CheckpointError

Config = Flux2VAE.Config
SMALL = Config(block_out_channels=(8, 16, 16), layers_per_block=1, latent_channels=2, norm_num_groups=2)


def small(config: Config = SMALL) -> Flux2VAE:
    torch.manual_seed(0)
    vae = Flux2VAE(config).eval().requires_grad_(False)
    vae.net.bn.running_mean.copy_(torch.randn(vae.channels, generator=torch.Generator().manual_seed(1)))
    return vae


def original(state: dict[str, Tensor], levels: int, *, quant_inside: bool) -> dict[str, Tensor]:
    """diffusers' names -> those of the first publication."""
    tensors = {}
    for name, value in state.items():
        if name.startswith(("quant_conv", "post_quant_conv")) and quant_inside:
            name = ("encoder." if name.startswith("quant") else "decoder.") + name
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
        name = re.sub(r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1", name)
        name = name.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
        name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        convolution = "mid.attn_1" in name and value.ndim == 2
        tensors[name] = value[:, :, None, None] if convolution else value
    return tensors


def write(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


def read(path: Path, config: Config = SMALL, dtype: torch.dtype | None = None) -> tuple[Flux2VAE, Config]:
    vae, seen, tensors = Flux2VAE.from_header(path, config, path.parent)
    vae.load_weights(tensors, path, dtype)
    return vae.eval(), seen


def error(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("names", ["diffusers", "original", "original, quant_conv inside"])
def test_each_set_of_names_gives_the_vae_back(names: str, tmp_path: Path) -> None:
    vae = small()
    state = vae.net.state_dict()
    if names != "diffusers":
        stored = original(state, 3, quant_inside="inside" in names)
        assert not stored.keys() & {k for k in state if "block" in k}
    else:
        stored = state
    again, seen = read(write(tmp_path / "flux2-vae.safetensors", stored))
    assert again.net.state_dict().keys() == state.keys() and seen == SMALL
    assert all(torch.equal(v, state[k]) for k, v in again.net.state_dict().items())
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.encode(pixels), vae.encode(pixels))


def test_the_original_names_are_those_that_diffusers_converts() -> None:
    state = small().net.state_dict()
    stored = original(state, 3, quant_inside=False)
    theirs = convert_ldm_vae_checkpoint(dict(stored), {"down_block_types": [""] * 3, "up_block_types": [""] * 3})
    assert theirs.keys() == {k for k in state if not k.startswith("bn.")}
    _, ours = convert_single_file({k: LazyTensor.of(v) for k, v in stored.items()}, {}, SMALL, "vae")
    assert all(torch.equal(ours[k].read(), v) and ours[k].shape == v.shape for k, v in theirs.items())


def test_the_published_shapes_give_the_published_config_whatever_it_is_put_into() -> None:
    with torch.device("meta"):
        state = Flux2VAE(Config()).net.state_dict()
    tensors = {k: LazyTensor(tuple(v.shape), v.dtype, lambda _: iter(())) for k, v in state.items()}
    for config in (Config(), SMALL):
        assert convert_single_file(tensors, {}, config, "vae")[0] == Config()


def test_a_narrower_decoder_is_seen(tmp_path: Path) -> None:
    config = evolve(SMALL, decoder_block_out_channels=(4, 8, 8))
    assert read(write(tmp_path / "vae.safetensors", small(config).net.state_dict()))[1] == config


def test_the_folder_that_it_is_put_into_tells_what_no_shape_tells(tmp_path: Path) -> None:
    config = evolve(SMALL, norm_num_groups=4)
    small(config).save(tmp_path)
    path = write(tmp_path / "flux2-vae.safetensors", small(config).net.state_dict())
    assert read(path, Config())[1] == config


def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path) -> None:
    state = small().net.state_dict()
    other = evolve(SMALL, block_out_channels=(8, 16, 32))
    wide = write(tmp_path / "wide.safetensors", small(other).net.state_dict())
    assert "its block_out_channels is (8, 16, 32), but that of the model it is for is (8, 16, 16)" in error(
        lambda: read(wide)
    )
    for name, words in {
        "bn.running_mean": "not a FLUX.2 VAE, which has a bn.running_mean",
        "bn.running_var": "lacks 'bn.running_var'",
        "encoder.down_blocks.1.resnets.0.conv1.weight": "lacks 'encoder.down_blocks.1.resnets.0.conv1.weight'",
        "decoder.conv_out.bias": "lacks 'decoder.conv_out.bias'",
    }.items():
        path = write(tmp_path / "less.safetensors", {k: v for k, v in state.items() if k != name})
        assert words in (said := error(partial(read, path))) and str(path) in said


def test_a_file_with_a_vae_describes_itself(tmp_path: Path) -> None:
    path = write(tmp_path / "vae.safetensors", original(small().net.state_dict(), 3, quant_inside=True))
    description = lens_describe(path)
    assert description is not None and description["components"] == {
        "vae": {"use": "lens_flux2:flux2", "file": "vae.safetensors"}
    }
    assert lens_describe(write(tmp_path / "other.safetensors", {"a": torch.ones(1)})) is None
    assert lens_describe(tmp_path) is None
