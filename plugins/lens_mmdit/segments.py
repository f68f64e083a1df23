"""Packed samples of different sizes: where the tokens of each sample are, and attention that stays within a sample.

A packed stream holds the tokens of all samples one after the other, as one row without padding. Linear layers and norms
treat every token alike. What belongs to a sample, such as its modulation, is expanded to its tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from attrs import frozen
from torch import Tensor
from torch.autograd.function import once_differentiable

from lens_core.types import move

Attention = Callable[[Tensor, Tensor, Tensor, None], Tensor]
"""(q, k, v [B,H,S,E], no mask) -> [B,H,S,E]."""


@frozen(eq=False)
class Segments:
    """The layout of B packed samples. Sample i has `image_lengths[i]` image and `text_lengths[i]` text tokens;
    `image_samples` int64 [N] and `text_samples` [T] are the number of the sample that each token belongs to."""

    image_lengths: tuple[int, ...]
    text_lengths: tuple[int, ...]
    image_samples: Tensor
    text_samples: Tensor

    @classmethod
    def from_lengths(cls, images: Sequence[int], texts: Sequence[int], device: torch.device) -> Self:
        """The layout of samples with so many image and text tokens each."""

        def samples(counts: Sequence[int]) -> Tensor:
            # Made on the CPU, where the lengths are known: on a GPU, repeat_interleave would wait for their sum.
            return move(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), device)

        return cls(tuple(images), tuple(texts), samples(images), samples(texts))

    # Every block needs these; they are computed once.

    @functools.cached_property
    def order(self) -> Tensor:
        """Indices [N+T] that bring the tokens of each sample together, its image before its text."""
        return torch.argsort(torch.cat([self.image_samples, self.text_samples]), stable=True)

    @functools.cached_property
    def inverse_order(self) -> Tensor:
        """Indices [N+T] that undo `order`."""
        return torch.argsort(self.order)

    @functools.cached_property
    def cumulative_lengths(self) -> tuple[Tensor, Tensor]:
        """int32 [B+1] each: where samples begin and end among the image tokens, and among all tokens in `order`."""
        images, texts = torch.tensor(self.image_lengths), torch.tensor(self.text_lengths)
        ends = torch.nn.functional.pad(torch.stack([images, images + texts]).cumsum(1), (1, 0))
        of_images, of_all = move(ends.to(torch.int32), self.image_samples.device)
        return of_images, of_all

    @functools.cached_property
    def max_lengths(self) -> tuple[int, int]:
        """The most image tokens of a sample, and the most tokens in all."""
        lengths = zip(self.image_lengths, self.text_lengths, strict=True)
        return max(self.image_lengths), max(n + m for n, m in lengths)

    def samples_by_shape(self) -> dict[tuple[int, int], list[int]]:
        """(image tokens, text tokens) -> the samples that have so many."""
        groups: dict[tuple[int, int], list[int]] = {}
        for sample, shape in enumerate(zip(self.image_lengths, self.text_lengths, strict=True)):
            groups.setdefault(shape, []).append(sample)
        return groups


class _ExpandToTokens(torch.autograd.Function):
    """Indexing with a deterministic backward pass: on a GPU that of an index adds atomically, in another order in every
    run, so that equal runs would differ in the last bits."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, samples: Tensor) -> Tensor:
        ctx.save_for_backward(samples)
        ctx.count = len(rows)
        return rows[samples]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (samples,) = ctx.saved_tensors
        # A sample's gradient is the sum over its tokens: a product with a 0/1 matrix [B,N] adds in a fixed order.
        membership = torch.arange(ctx.count, device=samples.device)[:, None] == samples
        return membership.to(grad.dtype) @ grad, None


def expand_to_tokens(rows: Tensor, samples: Tensor | None) -> Tensor:
    """rows [B,K], one for each sample -> [1,N,K], one for each token, where `samples` [N] is the token's sample.

    Without `samples` -> [B,1,K], which broadcasts over the tokens of an unpacked batch.
    """
    if samples is None:
        return rows.unsqueeze(1)
    out: Tensor = _ExpandToTokens.apply(rows, samples)  # type: ignore[no-untyped-call]  # torch's own
    return out.unsqueeze(0)


# Not compiled: the lengths differ in every batch, and each set of lengths would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
def segmented_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, attention: Attention) -> Tensor:
    """softmax(q k' / sqrt(E)) v within each sample -> the shape of q.

    k and v [1,N+T,H,E] hold all image tokens and then all text tokens. So does q, or it is [1,N,H,E], image tokens
    alone. `attention` is used where no variable-length kernel fits the device and dtype.
    """
    q, k, v = q[0], k[0], v[0]
    kernel = varlen_kernel(q)
    if kernel is not None:
        out = _varlen_attention(q, k, v, segments, kernel)
    else:
        out = _attention_by_shape(q, k, v, segments, attention)
    return out.unsqueeze(0)


def varlen_kernel(q: Tensor) -> Any:
    """torch's attention over sequences of different lengths, or None where it does not take q's device or dtype."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return _varlen_attn(q.device.index) if q.is_cuda and half else None


@functools.cache
def _varlen_attn(device: int) -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and newer
    except ImportError:
        return None
    return varlen_attn if torch.cuda.get_device_capability(device) >= (8, 0) else None


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, kernel: Any) -> Tensor:
    """All samples in one kernel call."""
    # The kernel wants the tokens of a sample side by side; the streams have all images first and then all texts.
    order, (of_images, of_all), (most_images, most) = segments.order, segments.cumulative_lengths, segments.max_lengths
    if len(q) < len(k):  # image tokens alone: they are in the kernel's order already
        out: Tensor = kernel(q, k[order], v[order], of_images, of_all, most_images, most)
        return out
    out = kernel(q[order], k[order], v[order], of_all, of_all, most, most)
    return out[segments.inverse_order]


def _attention_by_shape(q: Tensor, k: Tensor, v: Tensor, segments: Segments, attention: Attention) -> Tensor:
    """One call of `attention` for all samples of a shape: they stack to a batch that needs no mask."""
    count, lengths = len(segments.image_lengths), [*segments.image_lengths, *segments.text_lengths]
    keys, values = torch.split(k, lengths), torch.split(v, lengths)
    with_text = len(q) == len(k)
    queries = torch.split(q, lengths if with_text else list(segments.image_lengths))
    outputs: list[Tensor] = list(queries)  # piece s is the image of sample s, piece count + s its text
    for (n, m), samples in segments.samples_by_shape().items():

        def stack(pieces: Sequence[Tensor], both: bool, samples: list[int] = samples) -> Tensor:
            rows = [pieces[i] for s in samples for i in ((s, count + s) if both else (s,))]
            return torch.unflatten(torch.cat(rows), 0, (len(samples), -1)).transpose(1, 2)  # [G,H,S,E]

        out = attention(stack(queries, with_text), stack(keys, True), stack(values, True), None).transpose(1, 2)
        for sample, row in zip(samples, out, strict=True):
            outputs[sample] = row[:n]
            if with_text:
                outputs[count + sample] = row[n : n + m]
    return torch.cat(outputs)
