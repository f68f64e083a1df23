"""Samples of different sizes in one pass: where each lies in the streams, and attention that stays within it.

Both streams hold the tokens of all samples one after the other, as one row; nothing is padded. Linears and norms see
tokens alone and do not care. What belongs to a sample is spread over its tokens; attention is taken within samples.
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

Attend = Callable[[Tensor, Tensor, Tensor, None], Tensor]


@frozen(eq=False)
class Segments:
    """`images[i]` and `texts[i]` count the tokens of sample i; `image` [N] and `text` [T] name each token's sample."""

    images: tuple[int, ...]
    texts: tuple[int, ...]
    image: Tensor
    text: Tensor

    @classmethod
    def of(cls, images: Sequence[int], texts: Sequence[int], device: torch.device) -> Self:
        """For samples of so many tokens each."""

        def samples(counts: Sequence[int]) -> Tensor:
            # Made on the CPU, where the sizes are known: a GPU would have to be waited for.
            return move(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), device)

        return cls(tuple(images), tuple(texts), samples(images), samples(texts))

    # All blocks ask for these; they are found once.

    @functools.cached_property
    def order(self) -> Tensor:
        """[N+T]: each sample's tokens side by side, its image before its text."""
        return torch.argsort(torch.cat([self.image, self.text]), stable=True)

    @functools.cached_property
    def back(self) -> Tensor:
        """The inverse of `order`."""
        return torch.argsort(self.order)

    @functools.cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """int32 [B+1]: where each sample begins and ends among the image tokens, and among all of them in `order`."""
        images, texts = torch.tensor(self.images), torch.tensor(self.texts)
        ends = torch.nn.functional.pad(torch.stack([images, images + texts]).cumsum(1), (1, 0))
        to_images, to_all = move(ends.to(torch.int32), self.image.device)
        return to_images, to_all

    @functools.cached_property
    def longest(self) -> tuple[int, int]:
        """The most tokens that a sample has: of its image, and in all."""
        return max(self.images), max(n + m for n, m in zip(self.images, self.texts, strict=True))

    def groups(self) -> dict[tuple[int, int], list[int]]:
        """The samples of each shape: (image tokens, text tokens)."""
        found: dict[tuple[int, int], list[int]] = {}
        for sample, shape in enumerate(zip(self.images, self.texts, strict=True)):
            found.setdefault(shape, []).append(sample)
        return found


class _Spread(torch.autograd.Function):
    """By hand, because on a GPU the way back through an index adds atomically, in another order in every run."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, to: Tensor) -> Tensor:
        ctx.save_for_backward(to)
        ctx.count = len(rows)
        return rows[to]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (to,) = ctx.saved_tensors
        belongs = torch.arange(ctx.count, device=to.device)[:, None] == to
        return belongs.to(grad.dtype) @ grad, None


def spread(rows: Tensor, to: Tensor | None) -> Tensor:
    """rows [B,K], one a sample -> [1,N,K], one a token, where `to` [N] names the token's sample; None: [B,1,K]."""
    if to is None:
        return rows.unsqueeze(1)
    out: Tensor = _Spread.apply(rows, to)  # type: ignore[no-untyped-call]  # torch's own
    return out.unsqueeze(0)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the lengths differ in every batch: each would be compiled
def attend_within(q: Tensor, k: Tensor, v: Tensor, where: Segments, attend: Attend) -> Tensor:
    """Each sample's softmax(q k' / sqrt(E)) v -> as q. k, v [1,N+T,H,E] hold all image and then all text tokens, and so
    does q, or it holds [1,N,H,E] image tokens alone. `attend` is the plain one, for what no fused kernel takes."""
    q, k, v = q[0], k[0], v[0]
    kernel = fused(q)
    out = _in_one_call(q, k, v, where, kernel) if kernel is not None else _by_shape(q, k, v, where, attend)
    return out.unsqueeze(0)


def fused(q: Tensor) -> Any:
    """The attention over sequences of any lengths that fits the device and dtype of `q`, or None."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    return _varlen(q.device.index) if q.is_cuda and half else None


@functools.cache
def _varlen(device: int) -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and newer
    except ImportError:
        return None
    return varlen_attn if torch.cuda.get_device_capability(device) >= (8, 0) else None


def _in_one_call(q: Tensor, k: Tensor, v: Tensor, where: Segments, kernel: Any) -> Tensor:
    # The kernel wants each sample's tokens side by side.
    order, (to_images, to_all), (longest, keys) = where.order, where.ends, where.longest
    if len(q) < len(k):
        out: Tensor = kernel(q, k[order], v[order], to_images, to_all, longest, keys)
        return out
    out = kernel(q[order], k[order], v[order], to_all, to_all, keys, keys)
    return out[where.back]


def _by_shape(q: Tensor, k: Tensor, v: Tensor, where: Segments, attend: Attend) -> Tensor:
    count, cuts = len(where.images), [*where.images, *where.texts]
    keys, values = k.split(cuts), v.split(cuts)
    text_asks = len(q) == len(k)
    queries = q.split(cuts if text_asks else list(where.images))
    answers: list[Tensor] = list(queries)
    for (n, m), samples in where.groups().items():

        def gather(pieces: Sequence[Tensor], both: bool, samples: list[int] = samples) -> Tensor:
            rows = [pieces[i] for s in samples for i in ((s, count + s) if both else (s,))]
            return torch.cat(rows).unflatten(0, (len(samples), -1)).transpose(1, 2)  # [G,H,S,E]

        out = attend(gather(queries, text_asks), gather(keys, True), gather(values, True), None).transpose(1, 2)
        for sample, row in zip(samples, out, strict=True):
            answers[sample] = row[:n]
            if text_asks:
                answers[count + sample] = row[n : n + m]
    return torch.cat(answers)
