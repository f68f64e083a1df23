"""Joint attention: one softmax over the image and text tokens of a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_mmdit.norms import RotaryRMSNorm
from lens_mmdit.segments import Segments, segmented_attention

MAX_EXPLICIT_TOKENS = 512  # up to which a CPU trains faster with the attention matrix written out


class JointAttention(nn.Module):
    """Attention over image and text tokens together; each stream has projections and norms of its own."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        width = heads * head_width
        self.heads = heads
        self.img_qkv = nn.Linear(width, 3 * width)
        self.txt_qkv = nn.Linear(width, 3 * width)
        self.norm_q = RotaryRMSNorm(head_width, 1e-6)
        self.norm_k = RotaryRMSNorm(head_width, 1e-6)
        self.norm_added_q = RotaryRMSNorm(head_width, 1e-6)
        self.norm_added_k = RotaryRMSNorm(head_width, 1e-6)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)

    def forward(
        self,
        img: Tensor,
        txt: Tensor | None,
        rotation: Tensor,
        mask: Tensor | None,
        update_text: bool,
        segments: Segments | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """img [B,N,D], txt [B,T,D] or None -> the updates of both; that of the text is None without `update_text`.

        A txt of fewer rows than img belongs to its last rows; those before have no text.
        """
        count = img.shape[1]
        q, k, v = self.img_qkv(img).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B,N,H,E] each
        q, k = self.norm_q(q, rotation[:count]), self.norm_k(k, rotation[:count])
        before = None
        if txt is not None and segments is None and len(txt) < len(img):
            rows = (len(img) - len(txt), len(txt))
            (q0, q), (k0, k), (v0, v) = q.split(rows), k.split(rows), v.split(rows)
            before = attention(q0.transpose(1, 2), k0.transpose(1, 2), v0.transpose(1, 2), None).transpose(1, 2)
        if txt is not None:
            txt_q, txt_k, txt_v = self.txt_qkv(txt).unflatten(-1, (3, self.heads, -1)).unbind(2)
            k = torch.cat([k, self.norm_added_k(txt_k, rotation[count:])], dim=1)
            v = torch.cat([v, txt_v], dim=1)
            # Image tokens always attend to text; text tokens attend only where their update is used.
            if update_text:
                q = torch.cat([q, self.norm_added_q(txt_q, rotation[count:])], dim=1)
        if segments is None:
            out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
        else:
            out = segmented_attention(q, k, v, segments, attention)
        out = out.flatten(2)
        images = out[:, :count] if before is None else torch.cat([before.flatten(2), out[:, :count]])
        image = self.to_out[0](images)
        return image, self.to_add_out(out[:, count:]) if update_text and txt is not None else None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(E)) v for q [B,H,Q,E] and k, v [B,H,S,E]; mask bool, True for the keys to attend to."""
    explicit = q.device.type == "cpu" and torch.is_grad_enabled() and k.shape[2] <= MAX_EXPLICIT_TOKENS
    if not explicit or q.dtype == torch.float64:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # torch's fused kernel is slow backwards on a CPU: for short sequences a training step takes 1.6 times as long.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights: Tensor = scores.softmax(-1).to(v.dtype)
    return weights @ v
