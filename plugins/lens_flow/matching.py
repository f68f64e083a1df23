"""The method `flow_matching`: pre-training by rectified-flow velocity regression (paper, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from lens_core import flow
from lens_core.attribution import latents_of, text_of
from lens_core.inference.pixels import to_pixels
from lens_core.protocols import BaseMethod
from lens_core.types import Batch, ConfigError, LensError, Loss, TextFeatures, move
from lens_core.validators import integer, real, within

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline

CACHE = 2 * 1024**3  # bytes that each of the two caches may hold; the oldest entries make room
BINS = 5  # of t, in which validation measures


@frozen
class EncodedBatch:
    """A micro-batch: clean latents `z` [B,C,h,w], or B of [C,h,w] if it is packed, and the features of its captions."""

    z: Tensor | tuple[Tensor, ...]
    text: TextFeatures
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.z)


class FlowMatching(BaseMethod):
    """Pre-train or fine-tune the backbone by flow matching, for t logit-normal.

    The loss is the mean squared error between its velocity at x_t and noise - data.

    The loss is the mean over samples of each sample's mean: in a packed batch, a large picture counts as much as a
    small one, as it does in batches of one size. The mean of logit(t) is linear in the latent cells of the picture:
    neighbouring cells of a larger picture are more alike, so it takes more noise to hide as much.
    """

    headline = ("backbone/loss", "backbone/grad_norm")
    takes_encoded = True  # batches may bring latents and features; then no encoder is needed

    @frozen
    class Config:
        # Share of captions replaced by the empty prompt, which guidance needs.
        caption_dropout: float = field(default=0.1, validator=within(0, 1))
        # Latent cells at which logit(t) has the mean base_shift, and max_shift: the paper's line, 1.0 at 256 cells and
        # 1.3 at 4096, through its 1.06 for 512 x 512 px, which are 1024 cells (a reading note of it).
        base_tokens: int = field(default=256, validator=integer(at_least=1))
        base_shift: float = field(default=1.0, validator=within(-50, 50))
        max_tokens: int = field(default=4096, validator=integer(at_least=1))
        max_shift: float = field(default=1.3, validator=within(-50, 50))
        std: float = field(default=1.0, validator=real(above=0))  # of logit(t)
        cache_latents: bool = False  # keep the latents of pictures that have keys, in memory
        cache_texts: bool = False  # keep encoded captions in memory, for datasets that repeat them

        def __attrs_post_init__(self) -> None:
            if self.base_tokens >= self.max_tokens:
                raise ConfigError(
                    f"flow_matching: base_tokens is {self.base_tokens}; it must be below max_tokens ({self.max_tokens})"
                )

        def logit_mean(self, tokens: int) -> float:
            """The mean of logit(t) for pictures of `tokens` latent cells."""
            share = (tokens - self.base_tokens) / (self.max_tokens - self.base_tokens)
            return self.base_shift + share * (self.max_shift - self.base_shift)

    def __init__(self, config: Config, pipeline: LensPipeline) -> None:
        self.config = config
        self.pipeline = pipeline
        self._latents = TensorCache()
        self._texts = TensorCache()

    def trainable_modules(self) -> Mapping[str, nn.Module]:
        backbone: Any = self.pipeline.backbone
        return {"backbone": backbone}

    def steps(
        self, batches: Iterator[Batch], modules: Mapping[str, nn.Module], rng: torch.Generator
    ) -> Iterator[Sequence[EncodedBatch]]:
        """One encoded batch a step. Raises LensError where a batch has no pictures."""
        for batch in batches:
            yield (EncodedBatch(self._encode_images(batch), self._encode_captions(batch), batch.weight),)

    def update_order(self, step: int) -> Sequence[str]:
        return ("backbone",)

    def loss(
        self, module_name: str, modules: Mapping[str, nn.Module], batch: EncodedBatch, rng: torch.Generator
    ) -> Loss:
        """`rng` gives, in this order: t, the noise, sample by sample where sizes differ, and whose caption is dropped.
        Raises ConfigError for a packed batch where the backbone cannot take one."""
        if isinstance(batch.z, tuple):
            return self._packed_loss(modules[module_name], batch.z, batch, rng)
        z = batch.z.float()
        where = rng.device  # the host, unless the caller's generator draws on the device
        normal = torch.randn(len(z), generator=rng, device=where)
        noise = move(torch.randn(z.shape, generator=rng, device=where), z.device)
        dropped = torch.rand(len(z), generator=rng, device=where) < self.config.caption_dropout
        mean = self.config.logit_mean(z.shape[2] * z.shape[3])
        t = move((self.config.std * normal + mean).sigmoid(), z.device)
        text = batch.text.to(z.device)
        if self.config.caption_dropout:
            text = _drop(text, dropped.cpu())
        v = modules[module_name](flow.mix(z, noise, t), t, text)
        # float32: squares of small errors vanish in bfloat16.
        total = (v.float() - flow.velocity(z, noise)).square().mean() * batch.weight
        return Loss(total, {"loss": total.detach()})

    def _packed_loss(self, net: Any, latents: Sequence[Tensor], batch: EncodedBatch, rng: torch.Generator) -> Loss:
        if not hasattr(net, "packed"):
            raise ConfigError(
                f"flow_matching: {type(net).__name__} cannot take samples of different sizes in one pass; use a "
                "dataset with batches of one size, `store` for instance"
            )
        device = latents[0].device
        zs = [z.float() for z in latents]
        normal = torch.randn(len(zs), generator=rng)
        noise = [move(torch.randn(z.shape, generator=rng), device) for z in zs]
        dropped = torch.rand(len(zs), generator=rng) < self.config.caption_dropout
        means = torch.tensor([self.config.logit_mean(z[0].numel()) for z in zs])
        t = move((self.config.std * normal + means).sigmoid(), device)
        xs = [flow.mix(z[None], e[None], t[i : i + 1])[0] for i, (z, e) in enumerate(zip(zs, noise, strict=True))]
        vs = net.packed(xs, t, _drop(batch.text.to(device), dropped))
        errors = [(v.float() - flow.velocity(z, e)).square().mean() for v, z, e in zip(vs, zs, noise, strict=True)]
        total = torch.stack(errors).mean() * batch.weight
        return Loss(total, {"loss": total.detach()})

    def flops(self, module_name: str, batch: EncodedBatch) -> float:
        """FLOPs of a forward pass over a micro-batch, padding left out; 0 if the backbone has no `flops`."""
        count = getattr(self.pipeline.backbone, "flops", None)
        if count is None:
            return 0.0
        tokens = batch.text.known.sum(1).tolist()
        return float(sum(count((z.shape[-2], z.shape[-1]), n) for z, n in zip(batch.z, tokens, strict=True)))

    @torch.no_grad()
    def validate(self, batch: Batch, modules: Mapping[str, nn.Module], rng: torch.Generator) -> dict[str, float]:
        """The squared error by time, each sample at one even draw from every bin of t, and by size in px; no caption is
        dropped. The mean is over t even in [0, 1], so it is not the training's loss, whose t is logit-normal."""
        z = self._encode_images(evolve(batch, keys=()))  # not cached: another dataset's keys may be the same
        text = batch.text if batch.text is not None else text_of(self.pipeline.text_encoder, batch.captions)
        if isinstance(z, tuple):  # of mixed sizes: no part by size, which would be the mean of some samples only
            each = [self._errors(modules["backbone"], one[None], text[i : i + 1], rng) for i, one in enumerate(z)]
            return {name: sum(errors[name] for errors in each) / len(each) for name in each[0]}
        errors = self._errors(modules["backbone"], z, text, rng)
        cell = self.pipeline.vae.downscale
        return {**errors, f"loss/{z.shape[2] * cell}x{z.shape[3] * cell}": errors["loss"]}

    def _errors(self, net: nn.Module, z: Tensor, text: TextFeatures, rng: torch.Generator) -> dict[str, float]:
        """The mean squared error in every bin of t, and the mean of the bins."""
        z, errors = z.float(), {}
        for number in range(BINS):
            t = ((number + torch.rand(len(z), generator=rng)) / BINS).to(z.device)
            noise = torch.randn(z.shape, generator=rng).to(z.device)
            v = net(flow.mix(z, noise, t), t, text.to(z.device))
            name = f"loss/t{number / BINS:.1f}-{(number + 1) / BINS:.1f}"
            errors[name] = float((v.float() - flow.velocity(z, noise)).square().mean())
        return {"loss": sum(errors.values()) / BINS, **errors}

    # What is cached is encoded in a batch of one: in a larger one the last bits depend on the neighbours, and a resumed
    # run, whose cache starts empty, would differ.

    @torch.no_grad()
    def _encode_images(self, batch: Batch) -> Tensor | tuple[Tensor, ...]:
        if batch.latents is not None:
            device = self.pipeline.device
            if isinstance(batch.latents, tuple):
                return tuple(move(z, device) for z in batch.latents)
            return move(batch.latents, device)
        if batch.images is None:
            raise LensError("flow_matching: the dataset yields captions only; name one that yields pictures")
        if not isinstance(batch.images, tuple):
            return self._latents_of(batch.images, batch.keys)
        sizes: dict[tuple[int, ...], list[int]] = {}
        for row, image in enumerate(batch.images):
            sizes.setdefault(tuple(image.shape), []).append(row)
        latents: dict[int, Tensor] = {}
        for rows in sizes.values():
            keys = [batch.keys[row] for row in rows] if batch.keys else []
            encoded = self._latents_of(torch.stack([batch.images[row] for row in rows]), keys)
            latents |= zip(rows, encoded, strict=True)
        return tuple(latents[row] for row in range(len(batch)))

    def _latents_of(self, images: Tensor, keys: Sequence[int]) -> Tensor:
        """Of pictures of one size."""
        # Converted on the device: the trainer moves bytes there, a quarter of what floats would be.
        pixels = to_pixels(images)
        if not (self.config.cache_latents and keys):
            z = latents_of(self.pipeline.vae, pixels)
            return z
        height, width = pixels.shape[-2:]
        named = [(key, height, width) for key in keys]
        return torch.cat([self._latents.get(k, self._latent, row)[0] for k, row in zip(named, pixels, strict=True)])

    @torch.no_grad()
    def _encode_captions(self, batch: Batch) -> TextFeatures:
        if batch.text is not None:
            return batch.text
        if not self.config.cache_texts:
            text = text_of(self.pipeline.text_encoder, batch.captions)
            return text
        return TextFeatures.cat([TextFeatures(*self._texts.get(c, self._text, c)) for c in batch.captions])

    def _latent(self, row: Tensor) -> tuple[Tensor, ...]:
        return (latents_of(self.pipeline.vae, row[None]),)

    def _text(self, caption: str) -> tuple[Tensor, ...]:
        text = text_of(self.pipeline.text_encoder, [caption])
        return text.features, text.mask, text.known


class TensorCache:
    """Keep tensors by key, up to `limit` bytes; the oldest are dropped first."""

    def __init__(self, limit: int = CACHE) -> None:
        self.limit = limit
        self.bytes = 0
        self._held: dict[Any, tuple[Tensor, ...]] = {}

    def get(self, key: Any, make: Callable[[Any], tuple[Tensor, ...]], source: Any) -> tuple[Tensor, ...]:
        """The tensors cached for `key`, or `make(source)`, which is cached from now on."""
        if key not in self._held:
            made = make(source)
            self._held[key] = made
            self.bytes += _size(made)
            while self.bytes > self.limit and self._held:
                self.bytes -= _size(self._held.pop(next(iter(self._held))))
            return made
        return self._held[key]


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _drop(text: TextFeatures, dropped: Tensor) -> TextFeatures:
    """Empty the `dropped` [B] rows (no token counts: the empty prompt), then cut the padding that all rows share."""
    known = text.known & ~dropped[:, None]
    columns = known.any(0).nonzero()  # cut for speed: attention costs as much for padding as for text
    known = known[:, : int(columns.max()) + 1 if len(columns) else 0]
    return TextFeatures(text.features[:, :, : known.shape[1]], move(known, text.mask.device), known)
