"""Experts that stay in 4 bits: each is unpacked when a token is routed to it, and dropped afterwards. E experts.

transformers would unpack them all when it loads a checkpoint, unless a GPU and one version of a package are there:
13 GB on disk become 40 GB in memory. This works everywhere, and gives what the unpacked weights give, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lens_core.checkpoints.lazy_tensors import LazyTensor
from lens_core.checkpoints.quantization import mxfp4, nvfp4


class Packed:
    """Replaces a weight [E,in,out] of transformers' experts: `weight[i]` unpacks expert i, [in,out]."""

    def __init__(self, experts: nn.Module, name: str) -> None:
        self.experts, self.name = experts, name

    def _part(self, part: str) -> Tensor:
        tensor: Tensor = getattr(self.experts, f"{self.name}_{part}")
        return tensor

    def __getitem__(self, index: Tensor | int) -> Tensor:
        blocks, scales, dtype = self._part("blocks")[index], self._part("scales")[index], self._part("bias").dtype
        if self.format == "mxfp4":
            values = mxfp4(blocks, scales)
        else:
            # Stored as int32, so that a cast of the model leaves its bits alone.
            scale = self._part("scale").view(torch.float32)[index]
            values = nvfp4(blocks, scales.view(torch.float8_e4m3fn), scale)
        return values.to(dtype).T.contiguous()  # the plain weight's layout: kernels round by it

    @property
    def format(self) -> str:
        return "nvfp4" if hasattr(self.experts, f"{self.name}_scale") else "mxfp4"

    def lazy(self) -> LazyTensor:
        """The plain weight, an expert at a time."""
        experts, out, *inner = self._part("blocks").shape

        def rows(dtype: torch.dtype) -> Iterator[Tensor]:
            return (self[i].to("cpu", dtype)[None] for i in range(experts))

        width = inner[0] * 32 if self.format == "mxfp4" else inner[0] * 2
        return LazyTensor((experts, width, out), self._part("bias").dtype, rows)


def pack(experts: nn.Module, name: str, form: str) -> None:
    """Put a Packed in the place of the weight `name` of transformers' GptOssExperts. Its bytes are still to be loaded:
    buffers `name_blocks`, `name_scales` and, for nvfp4, `name_scale`, all of whole numbers, which no cast changes."""
    # Buffers of integers: `.to(dtype)` and autocast change floating-point tensors only, and the bytes must stay.
    weight = getattr(experts, name)
    count, inner, out = weight.shape
    delattr(experts, name)
    setattr(experts, name, Packed(experts, name))
    shapes = {"blocks": (count, out, inner // 32, 16), "scales": (count, out, inner // 32)}
    if form == "nvfp4":
        shapes = {"blocks": (count, out, inner // 2), "scales": (count, out, inner // 16)}
        experts.register_buffer(f"{name}_scale", weight.new_empty(count, dtype=torch.int32))
    for part, shape in shapes.items():
        experts.register_buffer(f"{name}_{part}", weight.new_empty(shape, dtype=torch.uint8))


def packed(module: nn.Module) -> dict[str, Packed]:
    """Name of the weight -> what stands in its place, everywhere below `module`."""
    return {
        f"{place}.{name}": value
        for place, below in module.named_modules()
        for name, value in vars(below).items()
        if isinstance(value, Packed)
    }
