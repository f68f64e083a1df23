"""The Lens transformer once more, transcribed from the description line by line: slow, plain, without torch.nn modules.

`oracle(weights, config, x, t, features, mask)` takes a state dict and computes in its dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rotate(x: Tensor, positions: list[tuple[int, int, int]], axes: tuple[int, ...]) -> Tensor:
    """x [B, S, H, E]; pairs (2i, 2i+1), three axes one after the other."""
    out = x.clone()
    for s, position in enumerate(positions):
        first = 0
        for p, d in zip(position, axes, strict=True):
            for i in range(d // 2):
                angle = p * 10000.0 ** (-2 * i / d)
                a, b = x[:, s, :, first + 2 * i], x[:, s, :, first + 2 * i + 1]
                out[:, s, :, first + 2 * i] = a * math.cos(angle) - b * math.sin(angle)
                out[:, s, :, first + 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
            first += d
    return out


def oracle(w: dict[str, Tensor], c: Any, x: Tensor, t: Tensor, features: Tensor, mask: Tensor) -> Tensor:
    dtype = w["img_in.weight"].dtype
    batch, _, h, width = x.shape
    heads, head = c.num_attention_heads, c.attention_head_dim
    tokens = mask.shape[1]

    img = linear(w, "img_in", x.reshape(batch, -1, h * width).permute(0, 2, 1).to(dtype))
    texts = [rms(features[:, i].to(dtype), w[f"txt_norm.{i}.weight"], 1e-5) for i in range(features.shape[1])]
    txt = linear(w, "txt_in", torch.cat(texts, -1))

    waves = [1000.0 * t.double() * math.exp(-math.log(10000.0) * i / 128) for i in range(128)]
    sinusoid = torch.stack([torch.cos(a) for a in waves] + [torch.sin(a) for a in waves], -1).to(dtype)
    temb = linear(w, "time_text_embed.timestep_embedder.linear_1", sinusoid)
    temb = linear(w, "time_text_embed.timestep_embedder.linear_2", silu(temb))

    positions = [(0, r - (h - h // 2), q - (width - width // 2)) for r in range(h) for q in range(width)]
    start = max(h // 2, width // 2)
    positions += [(start + j, start + j, start + j) for j in range(tokens)]

    for n in range(c.num_layers):
        b = f"transformer_blocks.{n}"
        img_mod = linear(w, f"{b}.img_mod.1", silu(temb)).chunk(6, -1)
        txt_mod = linear(w, f"{b}.txt_mod.1", silu(temb)).chunk(6, -1)

        def modulated(z: Tensor, name: str, shift: Tensor, scale: Tensor, b: str = b) -> Tensor:
            return rms(z, w[f"{b}.{name}.weight"], 1e-6) * (1 + scale[:, None]) + shift[:, None]

        def mlp(z: Tensor, name: str, b: str = b) -> Tensor:
            return linear(w, f"{b}.{name}.w2", silu(linear(w, f"{b}.{name}.w1", z)) * linear(w, f"{b}.{name}.w3", z))

        i_qkv = linear(w, f"{b}.attn.img_qkv", modulated(img, "img_norm1", img_mod[0], img_mod[1]))
        t_qkv = linear(w, f"{b}.attn.txt_qkv", modulated(txt, "txt_norm1", txt_mod[0], txt_mod[1]))
        i_qkv = i_qkv.reshape(batch, h * width, 3, heads, head)
        t_qkv = t_qkv.reshape(batch, tokens, 3, heads, head)
        iq, ik, iv = i_qkv[:, :, 0], i_qkv[:, :, 1], i_qkv[:, :, 2]
        tq, tk, tv = t_qkv[:, :, 0], t_qkv[:, :, 1], t_qkv[:, :, 2]
        iq, ik = rms(iq, w[f"{b}.attn.norm_q.weight"], 1e-6), rms(ik, w[f"{b}.attn.norm_k.weight"], 1e-6)
        tq, tk = rms(tq, w[f"{b}.attn.norm_added_q.weight"], 1e-6), rms(tk, w[f"{b}.attn.norm_added_k.weight"], 1e-6)
        q = rotate(torch.cat([iq, tq], 1), positions, c.axes_dims_rope)
        k = rotate(torch.cat([ik, tk], 1), positions, c.axes_dims_rope)
        v = torch.cat([iv, tv], 1)
        logits = torch.einsum("bshe,bkhe->bhsk", q, k) / math.sqrt(head)
        valid = torch.cat([torch.ones(batch, h * width, dtype=torch.bool), mask], 1)
        logits = logits.masked_fill(~valid[:, None, None], -math.inf)
        out = torch.einsum("bhsk,bkhe->bshe", logits.softmax(-1), v).reshape(batch, -1, heads * head)
        img = img + img_mod[2][:, None] * linear(w, f"{b}.attn.to_out.0", out[:, : h * width])
        txt = txt + txt_mod[2][:, None] * linear(w, f"{b}.attn.to_add_out", out[:, h * width :])
        img = img + img_mod[5][:, None] * mlp(modulated(img, "img_norm2", img_mod[3], img_mod[4]), "img_mlp")
        txt = txt + txt_mod[5][:, None] * mlp(modulated(txt, "txt_norm2", txt_mod[3], txt_mod[4]), "txt_mlp")

    scale, shift = linear(w, "norm_out.linear", silu(temb)).chunk(2, -1)
    img = (img - img.mean(-1, keepdim=True)) / torch.sqrt(img.var(-1, unbiased=False, keepdim=True) + 1e-6)
    img = linear(w, "proj_out", img * (1 + scale[:, None]) + shift[:, None])
    return img.permute(0, 2, 1).reshape(batch, -1, h, width)
