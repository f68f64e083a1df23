"""What happens before learning: which prompts and seeds, and pictures drawn with the old policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from attrs import frozen
from torch import Tensor, nn

from lens_core.inference.pixels import to_images
from lens_core.training.distributed import seed_of
from lens_core.types import Prompt, TextFeatures

if TYPE_CHECKING:
    from lens_core.inference.pipeline import LensPipeline

T = TypeVar("T")


def prompt_indices(count: int, share: int, rollout: int, seed: int) -> list[int]:
    """The `share` different indices below `count` of this rollout. Epochs are permutations, whose rest is left out."""
    epoch, place = divmod(rollout, count // share)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
    return [int(i) for i in order[place * share : (place + 1) * share]]


@frozen
class GenerationRequest:
    """A picture to draw: of what, from which seed, at which (height, width) in px."""

    prompt: Prompt
    seed: int
    size: tuple[int, int]


@frozen
class Picture:
    """A picture that was drawn: z float32 [C,h,w], image uint8 [3,H,W], and the text (B = 1) it was drawn from."""

    prompt: Prompt
    seed: int
    z: Tensor
    image: Tensor
    text: TextFeatures


def with_backbone(pipeline: LensPipeline, backbone: nn.Module) -> LensPipeline:
    """The pipeline with another backbone; all else is shared."""
    other = copy.copy(pipeline)
    other.backbone = backbone
    return other


def group_by(things: Sequence[T], key: Any, most: int) -> Iterator[list[int]]:
    """Indices of the things that have an equal key, in order, at most `most` at a time."""
    kinds: dict[Any, list[int]] = {}
    for index, thing in enumerate(things):
        kinds.setdefault(key(thing), []).append(index)
    for rows in kinds.values():
        yield from (rows[start : start + most] for start in range(0, len(rows), most))


@torch.no_grad()
def draw(
    pipeline: LensPipeline, requests: Sequence[GenerationRequest], steps: int, guidance: float, batch: int
) -> list[Picture]:
    """One picture a request, `batch` at a time; each prompt is encoded once."""
    texts = {prompt.id: pipeline.encode([prompt.text]) for prompt in {r.prompt.id: r.prompt for r in requests}.values()}
    pictures: dict[int, Picture] = {}
    for rows in group_by(requests, lambda r: r.size, batch):
        batch_requests = [requests[i] for i in rows]
        height, width = (side // pipeline.vae.downscale for side in batch_requests[0].size)
        generators = [torch.Generator().manual_seed(r.seed) for r in batch_requests]
        text = TextFeatures.cat([texts[r.prompt.id] for r in batch_requests])
        noise = partial(pipeline.noise, generators, (height, width))  # also of each step, for a sampler that adds some
        z = noise()
        for _, x in pipeline.sample(text, z, steps, guidance, draw=noise):
            z = x
        images = to_images(pipeline.decode(z)).cpu()
        for i, request, latent, image in zip(rows, batch_requests, z.float(), images, strict=True):
            pictures[i] = Picture(request.prompt, request.seed, latent, image, texts[request.prompt.id])
    return [pictures[i] for i in range(len(requests))]
