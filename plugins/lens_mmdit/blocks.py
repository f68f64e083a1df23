"""What the transformer is built of: the time embedding, the dual-stream block and the final norm."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_mmdit.attention import JointAttention
from lens_mmdit.modulation import Modulation
from lens_mmdit.norms import RMSNorm
from lens_mmdit.rope import PERIOD
from lens_mmdit.segments import Segments, expand_to_tokens

FREQUENCIES = 256  # channels of the sinusoidal time embedding: half cosines, then half sines
TIME_SCALE = 1000.0  # t in [0, 1] is embedded as t * 1000


@functools.lru_cache(maxsize=16)
def frequencies(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The frequencies [FREQUENCIES / 2] that t is embedded with."""
    # Cached by device: a copy from the host in every step would make the host wait for the device.
    with torch.inference_mode(False), torch.no_grad():
        steps = torch.arange(FREQUENCIES // 2, dtype=torch.float64) / (FREQUENCIES // 2)
        return (TIME_SCALE * PERIOD**-steps).to(device=device, dtype=dtype)


class TimeEmbedding(nn.Module):
    """Embed t float [B] in [0, 1] as [B,D]: cosines and sines, then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = nn.ModuleDict(
            {"linear_1": nn.Linear(FREQUENCIES, width), "linear_2": nn.Linear(width, width)}
        )

    def forward(self, t: Tensor) -> Tensor:
        first, second = self.timestep_embedder["linear_1"], self.timestep_embedder["linear_2"]
        dtype: torch.dtype = next(first.parameters()).dtype
        # bfloat16 holds 3 digits, and t * 1000 needs more: the angles are float32 at least.
        precise = torch.promote_types(dtype, torch.float32)
        angle = torch.outer(t.to(precise), frequencies(t.device, precise))
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)
        out: Tensor = second(F.silu(first(waves)))
        return out


class SwiGLU(nn.Module):
    """A gated MLP: w2(silu(w1 x) * w3 x), with 8/3 of the width inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(width / 3 * 8)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    """Joint attention, then a SwiGLU for each stream; both are modulated and gated by the time alone (adaLN)."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        width = heads * head_width
        self.img_mod = nn.Sequential(nn.SiLU(), Modulation(width, 6 * width))
        self.txt_mod = nn.Sequential(nn.SiLU(), Modulation(width, 6 * width))
        self.img_norm1 = RMSNorm(width, 1e-6)
        self.img_norm2 = RMSNorm(width, 1e-6)
        self.txt_norm1 = RMSNorm(width, 1e-6)
        self.txt_norm2 = RMSNorm(width, 1e-6)
        self.attn = JointAttention(heads, head_width)
        self.img_mlp = SwiGLU(width)
        self.txt_mlp = SwiGLU(width)

    def forward(
        self,
        img: Tensor,
        txt: Tensor | None,
        time: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        update_text: bool,
        segments: Segments | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """img [B,N,D], txt [B,T,D] or None -> both after this block; txt is None without `update_text`. A txt of fewer
        rows belongs to the last rows of img.

        `time` is what `Modulation` takes: silu of the time embedding [B,D], or rows of its table. With `segments`, the
        streams are one row, [1,N,D] and [1,T,D], which holds the tokens of B samples.
        """
        image_samples = None if segments is None else segments.image_samples
        text_samples = None if segments is None else segments.text_samples
        # [1] is the linear layer. The SiLU before it has one result for all blocks: the model applies it once.
        modulation = expand_to_tokens(self.img_mod[1](time), image_samples)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        image = self.img_norm1(img, shift1, scale1)
        text = None
        if txt is not None:
            # Rows without text come first: those with it are the last ones.
            of_text = time if segments is not None else time[len(time) - len(txt) :]
            txt_shift1, txt_scale1, *txt_rest = expand_to_tokens(self.txt_mod[1](of_text), text_samples).chunk(
                6, dim=-1
            )
            text = self.txt_norm1(txt, txt_shift1, txt_scale1)
        image, text = self.attn(image, text, rotation, mask, update_text, segments)
        img = torch.addcmul(img, gate1, image)
        img = torch.addcmul(img, gate2, self.img_mlp(self.img_norm2(img, shift2, scale2)))
        if txt is None or text is None:
            return img, None
        txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_rest
        txt = torch.addcmul(txt, txt_gate1, text)
        return img, torch.addcmul(txt, txt_gate2, self.txt_mlp(self.txt_norm2(txt, txt_shift2, txt_scale2)))


class FinalNorm(nn.Module):
    """LayerNorm without weights, modulated by the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Modulation(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor, segments: Segments | None = None) -> Tensor:
        samples = None if segments is None else segments.image_samples
        # The published weights have scale first, then shift, unlike in the blocks.
        scale, shift = expand_to_tokens(self.linear(time), samples).chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6).to(scale.dtype), 1 + scale)
