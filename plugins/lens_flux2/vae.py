"""The component `flux2`: diffusers' AutoencoderKLFlux2 with the patchify and the BatchNorm that Lens puts around it.

Letters: B batch, C = 4c latent channels as the backbone sees them, c those of the network, h w the latent grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from attrs import asdict, fields_dict
from diffusers import AutoencoderKLFlux2
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from lens_core.checkpoints.lazy_tensors import LazyTensor
from lens_core.checkpoints.single_files import read_single_file
from lens_core.checkpoints.tensor_files import build_on_meta, load_module, read_weights, save_module
from lens_core.inference.offload_plans import Workload
from lens_core.io.atomic_files import read_json, write_json
from lens_core.io.readers import one_line, shown
from lens_core.recipe import structure
from lens_core.types import CheckpointError, ConfigError, LensError, move
from lens_flux2.config import Flux2VAEConfig
from lens_flux2.single import convert_single_file

FOLDER = "vae"  # where a checkpoint keeps this component
PATCH = 2  # the network's latent pixels update_statistics PATCH x PATCH into the channels of one cell
FIXED: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "patch_size": [PATCH, PATCH]}
UNUSED = ("sample_size", "batch_norm_momentum", "force_upcast", "down_block_types", "up_block_types")


class Flux2VAE(nn.Module):
    """The FLUX.2 autoencoder: pictures to normalised latents, and back.

    `net` is the diffusers model; latents have about unit variance. Draws its first weights from torch's default
    generator: seed it first.
    """

    Config = Flux2VAEConfig

    place = (FOLDER, "diffusion_pytorch_model")
    single = "vae/flux2-vae.safetensors"
    model_index: ClassVar = {"vae": ("diffusers", "AutoencoderKLFlux2")}

    def __init__(self, config: Flux2VAEConfig) -> None:
        super().__init__()
        self.config = config
        levels = len(config.block_out_channels)
        self.net: Any = AutoencoderKLFlux2(
            **asdict(config),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
        self.channels = PATCH**2 * config.latent_channels
        self.downscale = PATCH * 2 ** (levels - 1)
        self.convolutional = not config.mid_block_add_attention  # attention sees the whole picture

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B,3,H,W] in [-1, 1] -> z [B,C,h,w]: the posterior's mode, patchified in channel order (c, row,
        column) and normalised. Raises LensError unless H and W are multiples of `downscale`."""
        # The mode, not a sample: the same picture has the same latents, so they can be cached.
        mean, _ = self._posterior(pixels)
        z = pixel_unshuffle(mean, PATCH)
        # The published checkpoints normalise by these statistics, of training, not by the scale and shift that other
        # VAEs have in their config: the backbone sees about unit variance in every channel.
        return (z - self._per_channel(self.net.bn.running_mean)) / self._std()

    def decode(self, z: Tensor) -> Tensor:
        """z [B,C,h,w] -> pixels [B,3,H,W], about [-1, 1]; not clamped."""
        if z.ndim != 4 or z.shape[1] != self.channels:
            raise LensError(f"vae: the latents are {list(z.shape)}; it decodes [B, {self.channels}, h, w]")
        z = z.to(self.net.device)
        return self._decode(pixel_shuffle(z * self._std() + self._per_channel(self.net.bn.running_mean), PATCH))

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training: pixels [B,3,H,W], standard normal noise [B,c,2h,2w] -> the reconstruction of a posterior sample,
        and the posterior's mean and log variance, both [B,c,2h,2w]. No normalisation is involved."""
        mean, logvar = self._posterior(pixels)
        return self._decode(mean + (logvar / 2).exp() * move(noise, mean.device).to(mean.dtype)), mean, logvar

    @torch.no_grad()
    def moments(self, mean: Tensor) -> dict[str, Tensor]:
        """Of posterior means [B,c,2h,2w], float64: `cells`, how many there are, and their `sum` and `squares` [C].
        Those of several batches add up. A batch that is not finite has none."""
        cells = pixel_unshuffle(mean.double(), PATCH).transpose(0, 1).flatten(1)
        # One infinite value would stay in the running statistics for good. Decided on the device: no wait for it.
        whole = cells.isfinite().all()
        cells = torch.where(whole, cells, 0.0)
        count = whole.double() * cells.shape[1]
        return {"cells": count, "sum": cells.sum(1), "squares": cells.square().sum(1)}

    @torch.no_grad()
    def update_statistics(self, moments: Mapping[str, Tensor], momentum: float) -> None:
        """Update the latent statistics with the `moments` of a step: a plain average over the first 1/momentum calls,
        then an exponential one. Mean and variance are those of the weighted mixture of all steps so far."""
        bn = self.net.bn
        cells = float(moments["cells"])
        if cells == 0:
            return
        mean = moments["sum"] / cells
        variance = (moments["squares"] / cells - mean.square()).clamp(min=0)
        bn.num_batches_tracked += 1
        # A fixed momentum would leave the statistics near their start, 0 and 1, for the first steps.
        weight = max(momentum, 1 / int(bn.num_batches_tracked))
        # The variance of a mixture: the mean of the variances, and the variance of the means.
        gap = mean - bn.running_mean.double()
        spread = (1 - weight) * bn.running_var.double() + weight * variance + weight * (1 - weight) * gap**2
        bn.running_mean.copy_(bn.running_mean.double() + weight * gap)
        bn.running_var.copy_(spread)

    def track_statistics(self, mean: Tensor, momentum: float) -> None:
        """Update the latent statistics with one batch of posterior means [B,c,2h,2w]."""
        self.update_statistics(self.moments(mean), momentum)

    def activation_bytes(self, workload: Workload) -> int:
        """Estimated bytes of a decoding: the second level's channels at full size, three times over. Workspaces of
        convolution kernels come on top."""
        wide = (self.config.decoder_block_out_channels or self.config.block_out_channels)[:2][-1]
        itemsize: int = self.net.dtype.itemsize
        return int(3.25 * workload.batch * workload.size[0] * workload.size[1] * wide) * itemsize

    def save(self, folder: Path) -> None:
        """Write `vae/config.json` and `vae/diffusion_pytorch_model.safetensors` under `folder`, for diffusers too."""
        self.save_about(folder)
        save_module(self.net, folder / FOLDER)

    def save_about(self, folder: Path) -> None:
        """Write `vae/config.json` under `folder`."""
        write_json(folder / FOLDER / "config.json", json.loads(self.net.to_json_string()))

    @classmethod
    def load(cls, folder: Path, config: Flux2VAEConfig, dtype: torch.dtype | None = None) -> Self:
        """Read `folder/vae`, floats as `dtype` (None: as stored). Its own config.json decides; a `config` that differs
        from it and from the defaults is a CheckpointError, as is any foreign or damaged file."""
        path = folder / FOLDER / "config.json"
        stored = cls._read(path)
        if config not in (stored, cls.Config()):
            name = next(n for n in fields_dict(cls.Config) if getattr(config, n) != getattr(stored, n))
            raise CheckpointError(
                f"{path}: {name} is {shown(getattr(stored, name))}, but lens.json says "
                f"{shown(getattr(config, name))}; fix one"
            )
        tensors = read_weights(folder / FOLDER)
        layers = stored.layers_per_block * len(stored.block_out_channels)
        vae = build_on_meta(lambda: cls(stored), path, layers, tensors)
        load_module(vae.net, folder / FOLDER, dtype=dtype, tensors=tensors)
        return vae

    @classmethod
    def from_header(
        cls, file: Path, config: Flux2VAEConfig, folder: Path, *, plain: bool = False
    ) -> tuple[Self, Flux2VAEConfig, dict[str, LazyTensor]]:
        """A single file: the VAE without values, its config, and the tensors for `load_weights`. `folder` is the
        checkpoint whose VAE it takes the place of. See `single.convert_single_file`."""
        path = folder / FOLDER / "config.json"
        known = cls._read(path) if path.is_file() else config
        inferred, tensors = convert_single_file(*read_single_file(file), known, str(file))
        with torch.device("meta"):
            return cls(inferred), inferred, tensors

    def load_weights(self, tensors: Mapping[str, LazyTensor], file: Path, dtype: torch.dtype | None = None) -> None:
        """Read the tensors of `from_header`, floats as `dtype`."""
        load_module(self.net, file.parent, file.stem, dtype=dtype, tensors=dict(tensors))

    @classmethod
    def _read(cls, path: Path) -> Flux2VAEConfig:
        data = {k: v for k, v in read_json(path).items() if not k.startswith("_") or k == "_class_name"}
        if (kind := data.pop("_class_name", None)) != "AutoencoderKLFlux2":
            raise CheckpointError(
                f"{path} describes a {one_line(kind, 80)}, not an AutoencoderKLFlux2; choose another vae component"
            )
        for name, value in FIXED.items():
            if data.pop(name, value) != value:
                raise CheckpointError(f"{path}: {name} must be {value}; this component reads no other")
        data = {k: v for k, v in data.items() if k not in UNUSED}
        try:
            return structure(cls.Config, data, str(path))
        except ConfigError as error:
            raise CheckpointError("; ".join(error.problems)) from error

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        multiple = self.downscale
        height, width = pixels.shape[-2:]
        if height % multiple or width % multiple or not height or not width:
            nearest = " x ".join(str(max(1, round(n / multiple)) * multiple) for n in (height, width))
            raise LensError(
                f"vae: the picture is {height} x {width} px; height and width must be multiples of {multiple}: "
                f"the nearest is {nearest}"
            )
        # channels_last is twice as fast in bfloat16 on a CPU. Weights stay as they are: their layout does not survive a
        # file, and an optimizer's state must keep the layout of its weight.
        x = pixels.to(self.net.device, self.net.dtype, memory_format=torch.channels_last)
        posterior = self.net.encode(x, return_dict=False)[0]
        return posterior.mean, posterior.logvar

    def _decode(self, latents: Tensor) -> Tensor:
        x = latents.to(self.net.dtype).contiguous(memory_format=torch.channels_last)
        pixels: Tensor = self.net.decode(x, return_dict=False)[0]
        return pixels

    def _std(self) -> Tensor:
        return self._per_channel((self.net.bn.running_var + self.config.batch_norm_eps).sqrt())

    @staticmethod
    def _per_channel(values: Tensor) -> Tensor:
        return values.view(1, -1, 1, 1)
