"""The published transformer as its description has it: plain, eager, padded and masked. The yardstick of `lens bench`.

Computes on the weights of a backbone with the published names, which it shares. Every step computes every modulation,
positions turn as complex numbers in float32, both branches of guidance are one batch padded to one length, and padded
text is masked in attention. Letters as in `lens_core.types`; N image tokens, H heads, E head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_core.types import TextFeatures


class PlainPort:
    """`port(x, t, text)` -> v, as the backbone's own forward. `net` has a `config` with the published fields."""

    def __init__(self, net: nn.Module) -> None:
        self.weights = dict(net.named_parameters())
        self.config: Any = net.config
        self.tables: dict[Any, Tensor] = {}

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], eps)

    def _rotation(self, h: int, w: int, tokens: int, device: torch.device) -> Tensor:
        """Unit complex numbers [N+T,E/2]; made once for a size, as the published code does."""
        key = h, w, tokens, device
        if key not in self.tables:
            rows = torch.arange(h, dtype=torch.float64) - (h - h // 2)
            columns = torch.arange(w, dtype=torch.float64) - (w - w // 2)
            text = torch.arange(tokens, dtype=torch.float64) + max(h // 2, w // 2)
            image = (torch.zeros(h * w, dtype=torch.float64), rows.repeat_interleave(w), columns.repeat(h))
            angles = [
                torch.outer(torch.cat([p, text]), 10000.0 ** -(torch.arange(0, d, 2, dtype=torch.float64) / d))
                for p, d in zip(image, self.config.axes_dims_rope, strict=True)
            ]
            angle = torch.cat(angles, 1)
            self.tables[key] = torch.polar(torch.ones_like(angle), angle).to(device, torch.complex64)
        return self.tables[key]

    def _time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        angle = 1000.0 * t.float()[:, None] * torch.exp(-math.log(10000.0) * steps / 128)
        waves = torch.cat([angle.cos(), angle.sin()], 1).to(dtype)
        hidden = F.silu(self._linear("time_text_embed.timestep_embedder.linear_1", waves))
        return self._linear("time_text_embed.timestep_embedder.linear_2", hidden)

    def __call__(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        dtype = self.weights["img_in.weight"].dtype
        batch, _, h, w = x.shape
        img = self._linear("img_in", x.to(dtype).flatten(2).transpose(1, 2))
        features = text.features.to(dtype)
        layers = [self._norm(f"txt_norm.{i}", features[:, i], 1e-5) for i in range(features.shape[1])]
        txt = self._linear("txt_in", torch.cat(layers, -1))
        time = self._time(t, dtype)
        rotation = self._rotation(h, w, txt.shape[1], x.device)
        valid = torch.cat([text.mask.new_ones(batch, h * w), text.mask], 1)[:, None, None]
        for n in range(self.config.num_layers):
            img, txt = self._block(f"transformer_blocks.{n}", img, txt, time, rotation, valid)
        scale, shift = self._linear("norm_out.linear", F.silu(time)).chunk(2, -1)
        img = F.layer_norm(img, img.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        return self._linear("proj_out", img).transpose(1, 2).reshape(batch, -1, h, w).to(x.dtype)

    def _block(
        self, name: str, img: Tensor, txt: Tensor, time: Tensor, rotation: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        image = self._linear(f"{name}.img_mod.1", F.silu(time)).unsqueeze(1).chunk(6, -1)
        text = self._linear(f"{name}.txt_mod.1", F.silu(time)).unsqueeze(1).chunk(6, -1)
        a = self._norm(f"{name}.img_norm1", img) * (1 + image[1]) + image[0]
        b = self._norm(f"{name}.txt_norm1", txt) * (1 + text[1]) + text[0]
        a, b = self._attention(f"{name}.attn", a, b, rotation, valid)
        img, txt = img + image[2] * a, txt + text[2] * b
        a = self._norm(f"{name}.img_norm2", img) * (1 + image[4]) + image[3]
        b = self._norm(f"{name}.txt_norm2", txt) * (1 + text[4]) + text[3]
        return img + image[5] * self._mlp(f"{name}.img_mlp", a), txt + text[5] * self._mlp(f"{name}.txt_mlp", b)

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        return self._linear(f"{name}.w2", F.silu(self._linear(f"{name}.w1", x)) * self._linear(f"{name}.w3", x))

    def _attention(self, name: str, img: Tensor, txt: Tensor, rotation: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        count, heads = img.shape[1], self.config.num_attention_heads
        q, k, v = self._linear(f"{name}.img_qkv", img).view(*img.shape[:2], 3, heads, -1).unbind(2)
        text_q, text_k, text_v = self._linear(f"{name}.txt_qkv", txt).view(*txt.shape[:2], 3, heads, -1).unbind(2)
        q, k = self._norm(f"{name}.norm_q", q), self._norm(f"{name}.norm_k", k)
        text_q, text_k = self._norm(f"{name}.norm_added_q", text_q), self._norm(f"{name}.norm_added_k", text_k)
        q, k, v = (torch.cat(pair, 1) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid)
        out = out.transpose(1, 2).flatten(2)
        return self._linear(f"{name}.to_out.0", out[:, :count]), self._linear(f"{name}.to_add_out", out[:, count:])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B,S,H,E], whose adjacent channels are a pair, turned by `rotation` [S,E/2]."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)


def guided_batch(x: Tensor, t: Tensor, text: TextFeatures) -> tuple[Tensor, Tensor, TextFeatures]:
    """Both branches of guidance as one batch: without the prompt first, whose text is zeros that the mask hides."""
    features = torch.cat([torch.zeros_like(text.features), text.features])
    mask = torch.cat([torch.zeros_like(text.mask), text.mask])
    return torch.cat([x, x]), torch.cat([t, t]), TextFeatures(features, mask)
