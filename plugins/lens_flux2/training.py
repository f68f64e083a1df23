"""The method `autoencode`: trains the VAE by reconstruction, with a slight pull of the posterior towards N(0, 1).

The latent statistics that `encode` normalises with are gathered on the way, from the posterior's mean (what `encode`
returns), so that they follow the encoder as it changes. They are buffers of the network: saved and resumed with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import field, frozen
from torch import Tensor, nn

from lens_core.inference.pixels import to_pixels
from lens_core.protocols import BaseMethod
from lens_core.types import Batch, ConfigError, LensError, Loss, move
from lens_core.validators import WEIGHT, integer, real, within

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline


class Autoencode(BaseMethod):
    """Train the VAE to reconstruct pictures: L1, L2, edge and KL losses.

    loss = l1 |e| + l2 e^2 + edges |de| + kl KL, each a mean over its elements, for the pixel error e in [-2, 2].
    """

    headline = ("vae/loss", "vae/l1", "vae/edges", "vae/kl", "vae/grad_norm")

    @frozen
    class Config:
        l1: float = field(default=1.0, validator=WEIGHT)
        l2: float = field(default=1.0, validator=WEIGHT)
        # Weighs the error's differences between neighbours, down and across: keeps edges crisp.
        edges: float = field(default=1.0, validator=WEIGHT)
        # Weighs the divergence in nats a latent element, KL(posterior, N(0, 1)).
        kl: float = field(default=1e-6, validator=WEIGHT)
        # Weight of the newest batch in the latent statistics.
        statistics_momentum: float = field(default=0.01, validator=real(above=0, at_most=1))
        # px, side of a random square to learn from instead of the whole picture; 0: never.
        crop: int = field(default=0, validator=integer(at_least=0, at_most=2**16))
        # Of the steps that crop: whole pictures teach the norms their real extent.
        crop_share: float = field(default=1.0, validator=within(0, 1))

        def __attrs_post_init__(self) -> None:
            if self.l1 + self.l2 == 0:
                raise ConfigError("autoencode: l1 and l2 are both 0; raise one, or nothing is reconstructed")

    def __init__(self, config: Config, pipeline: LensPipeline) -> None:
        vae: Any = pipeline.vae
        if not hasattr(vae, "track_statistics"):
            raise ConfigError(f"autoencode: trains a flux2 VAE, not a {type(vae).__name__}; name flux2 in the recipe")
        self.config = config
        self.vae = vae
        pipeline.latent_preview = None  # it was fitted to the VAE before this training

    def trainable_modules(self) -> Mapping[str, nn.Module]:
        return {"vae": self.vae}

    def steps(
        self, batches: Iterator[Batch], modules: Mapping[str, nn.Module], rng: torch.Generator
    ) -> Iterator[Sequence[Batch]]:
        """One batch a step, cropped in `crop_share` of them."""
        for batch in batches:
            side = self.config.crop
            if side and float(torch.rand((), generator=rng)) < self.config.crop_share:
                yield (_crop(batch, side, rng),)
            else:
                yield (batch,)

    def update_order(self, step: int) -> Sequence[str]:
        return ("vae",)

    def loss(self, module_name: str, modules: Mapping[str, nn.Module], batch: Batch, rng: torch.Generator) -> Loss:
        """Its sums are the moments of the latents, unless gradients are off. Raises LensError without pictures."""
        images = batch.even()
        if images is None:
            raise LensError("autoencode: the dataset yields captions only; name one that yields pictures")
        size, cell = images.shape, self.vae.downscale // 2
        shape = (size[0], self.vae.config.latent_channels, size[2] // cell, size[3] // cell)
        noise = torch.randn(shape, generator=rng, device=rng.device)
        pixels = to_pixels(move(images, next(self.vae.parameters()).device))
        guess, mean, logvar = modules[module_name](pixels, noise)
        moments = self.vae.moments(mean) if torch.is_grad_enabled() else {}
        parts = _terms(guess.float() - pixels.to(guess.device), mean.float(), logvar.float())
        total = sum((getattr(self.config, name) * part for name, part in parts.items()), guess.new_zeros(()).float())
        return Loss(total * batch.weight, {name: part.detach() for name, part in parts.items()}, sums=moments)

    def after_update(self, module_name: str, modules: Mapping[str, nn.Module], sums: Mapping[str, Tensor]) -> None:
        """Folds the moments of the whole step, of all its parts, into the latent statistics."""
        self.vae.update_statistics(sums, self.config.statistics_momentum)


def _crop(batch: Batch, side: int, rng: torch.Generator) -> Batch:
    """One random window of `side` px a picture; it has no key, for it is not the picture."""
    images = batch.even()
    if images is None or min(images.shape[-2:]) < side:
        raise LensError(f"autoencode: cannot crop {side} px; lower crop, or name a dataset of larger pictures")
    room = [n - side + 1 for n in images.shape[-2:]]
    corners = [torch.randint(n, (len(batch),), generator=rng).tolist() for n in room]
    rows = zip(images, *corners, strict=True)
    windows = torch.stack([i[:, y : y + side, x : x + side] for i, y, x in rows])
    return Batch(windows, batch.captions, weight=batch.weight)


def _terms(error: Tensor, mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    return {
        "l1": error.abs().mean(),
        "l2": error.square().mean(),
        "edges": (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2,
        "kl": (mean.square() + logvar.exp() - 1 - logvar).mean() / 2,
    }
