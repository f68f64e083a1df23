"""The Lens transformer: two streams of tokens, image and text, that meet in every attention (reference: lens.md, 2).

B batch, N = h w image tokens, T text tokens, S = N + T, C latent channels, D inner width, H heads, E head width.
Parameters bear the published names; the arithmetic is the published one, ordered for speed:
what depends on t alone is shared, text that is not there is not computed, and weights of norms join the modulation.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from attrs import asdict, field, fields_dict, frozen
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lens_core.checkpoints.lazy_tensors import LazyTensor, read_lazy
from lens_core.checkpoints.tensor_files import build_on_meta, load_module, read_weights, save_module
from lens_core.inference.offload import Workload
from lens_core.io.atomic_files import write_json
from lens_core.io.readers import shown
from lens_core.types import ConfigError, NumericalError, TextFeatures, did_you_mean, move
from lens_core.validators import CHANNELS, LAYERS, each, integer, listed, optional
from lens_mmdit.modulation import Modulation, Tabulating
from lens_mmdit.segments import Segments, attend_within, spread
from lens_mmdit.single import adopt

FREQUENCIES = 256  # channels of the sinusoidal time embedding: half cosines, then half sines
TIME_SCALE = 1000.0  # t in [0, 1] is embedded as t * 1000
PERIOD = 10000.0  # the slowest wave, of time and of positions alike
SHORT = 512  # tokens up to which a CPU trains faster with the attention matrix written out
FOLDER = "transformer"  # where a checkpoint keeps this component


@functools.lru_cache(maxsize=256)
def rotations(h: int, w: int, tokens: int, axes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Unit complex numbers [S, 1, E/2] that turn the queries and keys of h*w image and then `tokens` text tokens.

    Image rows and columns are counted from the middle: for n of them, -(n - n//2) ... n//2 - 1; the frame is 0. Text
    token j sits at max(h//2, w//2) + j on all three axes. Angles are taken in float64, whatever `dtype` is.
    """
    # A table first made under inference_mode would otherwise be an inference tensor, which training cannot use.
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.arange(h, dtype=torch.float64) - (h - h // 2)
        columns = torch.arange(w, dtype=torch.float64) - (w - w // 2)
        text = torch.arange(tokens, dtype=torch.float64) + max(h // 2, w // 2)
        image = (torch.zeros(h * w, dtype=torch.float64), rows.repeat_interleave(w), columns.repeat(h))
        angles = [
            torch.outer(torch.cat([positions, text]), PERIOD ** -(torch.arange(0, d, 2, dtype=torch.float64) / d))
            for positions, d in zip(image, axes, strict=True)
        ]
        angle = torch.cat(angles, dim=1)[:, None]
        return torch.polar(torch.ones_like(angle), angle).to(device=device, dtype=dtype)


def unit(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in the dtype of x."""
    kind = x.device.type
    if kind not in ("cpu", "meta") and torch.is_autocast_enabled(kind):
        # There rms_norm would answer in float32, and pull up all that it meets. Its kernel takes the mean in float32
        # whatever x is.
        with torch.autocast(kind, enabled=False):
            return F.rms_norm(x, x.shape[-1:], eps=eps)
    if kind != "cpu":
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    # On the CPU that is a dozen passes over memory, forward and backward; these are four.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    out: Tensor = x * (norm.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)
    return out


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """With shift and scale [B,1,D] or [B,N,D], for x [B,N,D], the result is modulated: * (1 + scale) + shift."""
        # Everything is cast to x's dtype: under autocast a float32 weight would pull the whole stream up to float32.
        if shift is None or scale is None:
            return unit(x, self.eps) * self.weight.to(x.dtype)
        return torch.addcmul(shift.to(x.dtype), unit(x, self.eps), (self.weight * (1 + scale)).to(x.dtype))


class _NormTurn(torch.autograd.Function):
    """RMSNorm and rotation in float32 at least. By hand, because autograd's passes over memory take about twice as
    long; only x and one number a head are kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, by: Tensor, eps: float) -> Tensor:
        precise = x.to(by.real.dtype)
        norm = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
        inverse = (norm.square_() / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, by, inverse)
        out = (precise * inverse).mul_(weight)
        _pairs(out).mul_(by)
        turned: Tensor = out.to(x.dtype)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, by, inverse = ctx.saved_tensors
        grad = grad.to(by.real.dtype, copy=True, memory_format=torch.contiguous_format)
        _pairs(grad).mul_(by.conj())
        normed = x.to(grad.dtype) * inverse
        along = grad * normed
        for_weight = along.flatten(0, -2).sum(0).to(weight.dtype)
        mean = along.mul_(weight).mean(dim=-1, keepdim=True)
        return grad.mul_(weight).addcmul_(normed, mean, value=-1).mul_(inverse).to(x.dtype), for_weight, None, None


def _pairs(x: Tensor) -> Tensor:
    """x [...,E] seen as complex [...,E/2]: adjacent channels are a pair."""
    return torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))


class TurningNorm(RMSNorm):
    """RMSNorm of x [B,S,H,E] over E, then rotation of its channel pairs by the unit complex `by` [S,1,E/2]."""

    def forward(self, x: Tensor, by: Tensor) -> Tensor:  # type: ignore[override]  # it needs positions
        out: Tensor = _NormTurn.apply(x, self.weight, by, self.eps)  # type: ignore[no-untyped-call]  # torch's own
        return out


@functools.lru_cache(maxsize=16)
def frequencies(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[FREQUENCIES / 2]: those that t is embedded with, made once a device: a copy there would be waited for."""
    with torch.inference_mode(False), torch.no_grad():
        steps = torch.arange(FREQUENCIES // 2, dtype=torch.float64) / (FREQUENCIES // 2)
        return (TIME_SCALE * PERIOD**-steps).to(device=device, dtype=dtype)


class TimeEmbedding(nn.Module):
    """t float [B] in [0, 1] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = nn.ModuleDict(
            {"linear_1": nn.Linear(FREQUENCIES, width), "linear_2": nn.Linear(width, width)}
        )

    def forward(self, t: Tensor) -> Tensor:
        first, second = self.timestep_embedder["linear_1"], self.timestep_embedder["linear_2"]
        dtype: torch.dtype = next(first.parameters()).dtype
        # bfloat16 holds 3 digits of t * 1000: the angles need float32 at least.
        precise = torch.promote_types(dtype, torch.float32)
        angle = torch.outer(t.to(precise), frequencies(t.device, precise))
        waves = torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)
        out: Tensor = second(F.silu(first(waves)))
        return out


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), 8/3 as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(width / 3 * 8)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class JointAttention(nn.Module):
    """One softmax over image and text tokens, each stream with projections and norms of its own."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        width = heads * head_width
        self.heads = heads
        self.img_qkv = nn.Linear(width, 3 * width)
        self.txt_qkv = nn.Linear(width, 3 * width)
        self.norm_q = TurningNorm(head_width, 1e-6)
        self.norm_k = TurningNorm(head_width, 1e-6)
        self.norm_added_q = TurningNorm(head_width, 1e-6)
        self.norm_added_k = TurningNorm(head_width, 1e-6)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)

    def forward(
        self,
        img: Tensor,
        txt: Tensor | None,
        by: Tensor,
        mask: Tensor | None,
        answer_text: bool,
        where: Segments | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """img [B,N,D], txt [B,T,D] -> the same, projected; txt None if it was, or is not wanted."""
        count = img.shape[1]
        q, k, v = self.img_qkv(img).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B,N,H,E] each
        q, k = self.norm_q(q, by[:count]), self.norm_k(k, by[:count])
        if txt is not None:
            txt_q, txt_k, txt_v = self.txt_qkv(txt).unflatten(-1, (3, self.heads, -1)).unbind(2)
            k = torch.cat([k, self.norm_added_k(txt_k, by[count:])], dim=1)
            v = torch.cat([v, txt_v], dim=1)
            if answer_text:
                q = torch.cat([q, self.norm_added_q(txt_q, by[count:])], dim=1)
        if where is None:
            out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
        else:
            out = attend_within(q, k, v, where, attend)
        out = out.flatten(2)
        image = self.to_out[0](out[:, :count])
        return image, self.to_add_out(out[:, count:]) if answer_text and txt is not None else None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(E)) v for q [B,H,Q,E] and k, v [B,H,S,E]; mask bool, True where a key counts."""
    if q.device.type != "cpu" or not torch.is_grad_enabled() or k.shape[2] > SHORT or q.dtype == torch.float64:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    # torch's fused kernel is slow backwards on a CPU: for short sequences a training step takes 1.6 times as long.
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class Block(nn.Module):
    """Joint attention, then a SwiGLU a stream; both gated and modulated by the time alone."""

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
        by: Tensor,
        mask: Tensor | None,
        answer_text: bool,
        where: Segments | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`time` is what `Modulation` reads: silu of the time embedding [B,D], or rows of a table. Without
        `answer_text` the text stream ends here, as None.

        With `where`, the streams are one row, [1,N,D] and [1,T,D], which holds the tokens of B samples.
        """
        image_of, text_of = (None, None) if where is None else (where.image, where.text)
        # [1] skips the SiLU of the Sequential, which all blocks would repeat.
        shift1, scale1, gate1, shift2, scale2, gate2 = spread(self.img_mod[1](time), image_of).chunk(6, dim=-1)
        image = self.img_norm1(img, shift1, scale1)
        text = None
        if txt is not None:
            txt_shift1, txt_scale1, *txt_rest = spread(self.txt_mod[1](time), text_of).chunk(6, dim=-1)
            text = self.txt_norm1(txt, txt_shift1, txt_scale1)
        image, text = self.attn(image, text, by, mask, answer_text, where)
        img = torch.addcmul(img, gate1, image)
        img = torch.addcmul(img, gate2, self.img_mlp(self.img_norm2(img, shift2, scale2)))
        if txt is None or text is None:
            return img, None
        txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt_rest
        txt = torch.addcmul(txt, txt_gate1, text)
        return img, torch.addcmul(txt, txt_gate2, self.txt_mlp(self.txt_norm2(txt, txt_shift2, txt_scale2)))


class FinalNorm(nn.Module):
    """LayerNorm without weights, modulated: scale first, then shift, unlike in the blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = Modulation(width, 2 * width)

    def forward(self, x: Tensor, time: Tensor, where: Segments | None = None) -> Tensor:
        scale, shift = spread(self.linear(time), None if where is None else where.image).chunk(2, dim=-1)
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6).to(scale.dtype), 1 + scale)


class LensTransformer2DModel(Tabulating, ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]  # untyped
    """The backbone `mmdit`, and a diffusers model: `from_pretrained` and `save_pretrained` know the same files.

    Built as `cls(config)`, or from the fields of a config by name. A new model predicts v = 0, and each of its blocks
    does nothing (adaLN-zero; Peebles and Xie, 2023): modulation, `norm_out` and `proj_out` are 0, other linears uniform
    after Glorot, biases 0, norms 1. Draws come from torch's default generator: seed it first.
    """

    to = nn.Module.to  # diffusers' own warns, at every cast, of modules to keep in float32; this model has none

    @frozen
    class Config:
        """The fields of the published `transformer/config.json`; the defaults are the published model."""

        # Latent pixels a token is wide, folded into channels by the VAE component.
        patch_size: int = field(default=2, validator=integer(at_least=1, at_most=256))
        in_channels: int = field(default=128, validator=CHANNELS)  # latent channels C, = patch_size^2 * out_channels
        out_channels: int = field(default=32, validator=CHANNELS)  # channels of an unfolded latent pixel
        num_layers: int = field(default=48, validator=LAYERS)  # blocks
        attention_head_dim: int = field(default=64, validator=CHANNELS)  # channels a head
        num_attention_heads: int = field(default=24, validator=CHANNELS)
        # Width of both streams; always heads * head width.
        inner_dim: int | None = field(default=None, validator=optional(CHANNELS))
        enc_hidden_dim: int = field(default=2880, validator=CHANNELS)  # width of a text feature
        # Channels of a head that turn with frame, height, width.
        axes_dims_rope: tuple[int, ...] = field(
            default=(8, 28, 28), converter=listed, validator=each(integer(at_least=0, at_most=2**16))
        )
        gate_mlp: bool = True  # SwiGLU
        rms_norm: bool = True
        multi_layer_encoder_feature: bool = True
        # Encoder layers that feed the text stream; only how many.
        selected_layer_index: tuple[int, ...] = field(
            default=(5, 11, 17, 23), converter=listed, validator=each(integer(at_least=0), at_least=1)
        )

        def __attrs_post_init__(self) -> None:
            problems = [
                f"backbone: {name} is False; only True, as published, is implemented"
                for name in ("gate_mlp", "rms_norm", "multi_layer_encoder_feature")
                if not getattr(self, name)
            ]
            if self.inner_dim not in (None, self.width):
                problems.append(
                    f"backbone: inner_dim is {self.inner_dim}; it must be num_attention_heads * attention_head_dim = "
                    f"{self.width}"
                )
            if self.in_channels != self.patch_size**2 * self.out_channels:
                problems.append(
                    f"backbone: in_channels is {self.in_channels}; it must be patch_size^2 * out_channels = "
                    f"{self.patch_size**2 * self.out_channels}"
                )
            axes = self.axes_dims_rope
            if len(axes) != 3 or any(d % 2 for d in axes) or sum(axes) != self.attention_head_dim:
                problems.append(
                    f"backbone: axes_dims_rope is {list(axes)}; it must be three even numbers that add up to "
                    f"attention_head_dim = {self.attention_head_dim}"
                )
            if problems:
                raise ConfigError(problems)

        @property
        def width(self) -> int:
            """D."""
            return self.num_attention_heads * self.attention_head_dim

    place = (FOLDER, "diffusion_pytorch_model")
    model_index: ClassVar = {FOLDER: ("diffusers", "LensTransformer2DModel")}
    single = "diffusion_models/lens.safetensors"
    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Block"]  # diffusers: a device map keeps a block whole
    _repeated_blocks: ClassVar = ["Block"]  # diffusers: what compile_repeated_blocks compiles

    def __init__(self, config: Config | None = None, **fields: Any) -> None:
        super().__init__()
        c = self.Config(**fields) if config is None else config
        self.register_to_config(**asdict(c) | {"inner_dim": c.width})
        self.gradient_checkpointing = False
        self.img_in = nn.Linear(c.in_channels, c.width)
        layers = len(c.selected_layer_index)
        self.txt_norm = nn.ModuleList([RMSNorm(c.enc_hidden_dim, 1e-5) for _ in range(layers)])
        self.txt_in = nn.Linear(layers * c.enc_hidden_dim, c.width)
        self.time_text_embed = TimeEmbedding(c.width)
        self.transformer_blocks = nn.ModuleList(
            [Block(c.num_attention_heads, c.attention_head_dim) for _ in range(c.num_layers)]
        )
        self.norm_out = FinalNorm(c.width)
        self.proj_out = nn.Linear(c.width, c.in_channels)
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith(("_mod.1", "norm_out.linear", "proj_out")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        """x [B,C,h,w], t float32 [B] in [0, 1], text -> v [B,C,h,w] = noise - data, in the dtype of x.

        Text that counts nowhere costs nothing and changes nothing, whatever stands in its features. Raises
        NumericalError in float16.
        """
        time = self._time(x, t)
        for img in self._walk(x, time, text, len(self.transformer_blocks)):
            last = img
        v: Tensor = self.proj_out(self.norm_out(last, time))
        return _grid(v, x)

    def packed(self, xs: Sequence[Tensor], t: Tensor, text: TextFeatures) -> list[Tensor]:
        """`forward` for samples of any sizes in one pass: xs [C,h,w] each, t [B], text -> v for each, as its x.

        No token is padded, and none of a sample meets one of another. Tokens that the mask hides are left out.
        """
        if not xs or not len(xs) == len(t) == len(text):
            raise ConfigError(
                f"backbone: {len(xs)} samples with {len(t)} times and {len(text)} texts; give one of each"
            )
        self._fits(text)
        for x in xs:
            self._reads(x.shape[0])
        time = self._time(xs[0], t)
        known = text.known
        where = Segments.of([x[0].numel() for x in xs], known.sum(1).tolist(), xs[0].device)
        samples, columns = (move(part, xs[0].device) for part in known.nonzero(as_tuple=True))
        img = self.img_in(torch.cat([x.flatten(1).T for x in xs])[None].to(self.dtype))
        txt = self._read(text.features[samples, :, columns].to(self.dtype))[None] if any(where.texts) else None
        by = self._rotations(xs, columns, text.mask.shape[1], where)
        for last in self._through(img, txt, time, by, None, len(self.transformer_blocks), where):
            img = last
        v = self.proj_out(self.norm_out(img, time, where))[0].split(where.images)
        return [_grid(row[None], x[None])[0] for row, x in zip(v, xs, strict=True)]

    def _rotations(self, xs: Sequence[Tensor], columns: Tensor, tokens: int, where: Segments) -> Tensor:
        """[N+T,1,E/2]: those of all image tokens, then those of the text tokens, which stand in `columns` [T]."""
        precise = torch.complex128 if self.dtype == torch.float64 else torch.complex64
        longest = -(-tokens // 64) * 64  # few lengths, so that tables are found again
        tables = [rotations(*x.shape[-2:], longest, self.config.axes_dims_rope, x.device, precise) for x in xs]
        own = zip(tables, where.images, columns.split(where.texts), strict=True)
        images, texts = zip(*((table[:n], table[n:][places]) for table, n, places in own), strict=True)
        return torch.cat([*images, *texts])

    def features(self, x: Tensor, t: Tensor, text: TextFeatures, blocks: Sequence[int]) -> list[Tensor]:
        """The image stream [B,D,h,w] after each of `blocks` (0-based, in any order); nothing after them runs."""
        depth = len(self.transformer_blocks)
        if not blocks or min(blocks) < 0 or max(blocks) >= depth:
            raise ConfigError(f"backbone: cannot tap blocks {list(blocks)}; name some of 0 ... {depth - 1}")
        walk = self._walk(x, self._time(x, t), text, max(blocks) + 1)
        taps = {n: _grid(img, x) for n, img in enumerate(walk) if n in blocks}
        return [taps[n] for n in blocks]

    def takes(self) -> tuple[int, int, int]:
        """(C, L, D): latent channels, layers of text features and their width, as it reads them."""
        c = self.config
        return c.in_channels, len(c.selected_layer_index), c.enc_hidden_dim

    @classmethod
    def refuses(cls, dtype: torch.dtype) -> str | None:
        """Why the model must not run in `dtype`, or None if it may."""
        if dtype == torch.float16:
            return "the backbone's residual streams overflow float16; use bfloat16 or float32"
        return None

    def _time(self, x: Tensor, t: Tensor) -> Tensor:
        """silu(time embedding) [B,D], or the rows of a table that stand for it: all that modulation wants to know.
        Refuses float16 before any work is done."""
        kind = x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        for dtype in (self.dtype, torch.get_autocast_dtype(kind) if autocast else self.dtype):
            if reason := self.refuses(dtype):
                raise NumericalError(reason)
        rows = self._tabled(t)
        return F.silu(self.time_text_embed(t)) if rows is None else rows

    def modulations(self) -> list[Modulation]:
        """Every block's, and `norm_out`'s; none if one is of another class, such as an adapter's."""
        layers = [mod[1] for block in self.transformer_blocks for mod in (block.img_mod, block.txt_mod)]
        layers.append(self.norm_out.linear)
        return layers if all(isinstance(layer, Modulation) for layer in layers) else []

    def blocks(self) -> list[nn.Module]:
        """What can be streamed: each runs once a pass, in this order."""
        return list(self.transformer_blocks)

    def activation_bytes(self, workload: Workload) -> int:
        """Estimated bytes of one pass: what a block holds at once, and the table of modulation."""
        tokens = (workload.size[0] // workload.cell) * (workload.size[1] // workload.cell) + workload.tokens
        width = self.config.inner_dim
        rows = workload.steps * sum(layer.out_features for layer in self.modulations())
        return (12 * workload.batch * tokens * width + rows) * self.dtype.itemsize

    def flops(self, size: tuple[int, int], tokens: int) -> int:
        """FLOPs of a forward for one sample of latent grid `size` and so many text tokens that count: its linears and
        its attention, a multiply-add as two."""
        c, n = self.config, math.prod(size)
        d, hidden = c.inner_dim, self.transformer_blocks[0].img_mlp.w1.out_features
        rest = d * d + 3 * d * hidden  # of a token, once attention has answered it
        once = (FREQUENCIES + d + 2 * d) * d + len(self.transformer_blocks) * (2 if tokens else 1) * 6 * d * d
        ends = n * 2 * c.in_channels * d + tokens * len(self.txt_norm) * c.enc_hidden_dim * d
        work = once + ends
        for left in reversed(range(len(self.transformer_blocks))):
            asked = n + (tokens if left else 0)  # after the last block nobody reads the text stream
            work += (n + tokens) * 3 * d * d + asked * rest + 2 * asked * (n + tokens) * d
        return int(2 * work)

    def _walk(self, x: Tensor, time: Tensor, text: TextFeatures, depth: int) -> Iterator[Tensor]:
        """The image stream [B,N,D] after each of the first `depth` blocks."""
        h, w = x.shape[-2:]
        self._reads(x.shape[1])
        img = self.img_in(x.to(self.dtype).flatten(2).transpose(1, 2))
        txt, mask = self._text(text)
        tokens = 0 if txt is None else txt.shape[1]
        precise = torch.complex128 if self.dtype == torch.float64 else torch.complex64
        by = rotations(h, w, tokens, self.config.axes_dims_rope, img.device, precise)
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(mask), h * w), mask], dim=1)[:, None, None]
        return self._through(img, txt, time, by, mask, depth)  # a frame that ends holds no first stream

    def _through(
        self,
        img: Tensor,
        txt: Tensor | None,
        time: Tensor,
        by: Tensor,
        mask: Tensor | None,
        depth: int,
        where: Segments | None = None,
    ) -> Iterator[Tensor]:
        """The image stream after each of the first `depth` blocks."""
        for n, block in enumerate(self.transformer_blocks[:depth]):
            # Nobody reads the text stream after the last block, so it ends there: exact, and a little cheaper.
            arguments = (img, txt, time, by, mask, n + 1 < depth, where)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                img, txt = self._gradient_checkpointing_func(block, *arguments)
            else:
                img, txt = block(*arguments)
            yield img

    def _text(self, text: TextFeatures) -> tuple[Tensor | None, Tensor | None]:
        """The text stream [B,T,D] and which of its tokens count, or None where there is none or all do.

        Columns that count in no row are cut from the right, so a batch without any text runs no text stream.
        """
        self._fits(text)
        if not text.mask.shape[1]:  # T = 0: nothing to look at, on the meta device too
            return None, None
        known = text.known  # on the host, which would have to wait for an answer of the device
        columns = known.any(0).nonzero()
        if not len(columns):
            return None, None
        end = int(columns.max()) + 1
        features, mask = text.features[:, :, :end].to(self.dtype), text.mask[:, :end]
        full = bool(known[:, :end].all())
        if not full:
            # A masked key has weight 0, but 0 * nan is nan.
            features = features.masked_fill(~mask[:, None, :, None], 0)
        return self._read(features), None if full else mask

    def _read(self, features: Tensor) -> Tensor:
        """Features [B,L,T,D] or [T,L,D] -> the text stream, [B,T,D] or [T,D]."""
        normed = [norm(features[:, i]) for i, norm in enumerate(self.txt_norm)]
        stream: Tensor = self.txt_in(torch.cat(normed, dim=-1))
        return stream

    def _reads(self, channels: int) -> None:
        if channels != self.config.in_channels:
            raise ConfigError(
                f"backbone: the latents have {channels} channels, but it reads {self.config.in_channels}; "
                "pair it with the VAE it was made for"
            )

    def _fits(self, text: TextFeatures) -> None:
        layers, width = len(self.txt_norm), self.config.enc_hidden_dim
        if text.features.ndim != 4 or text.features.shape[1::2] != (layers, width):
            raise ConfigError(
                f"backbone: text features are {list(text.features.shape)}, but it reads [B, {layers}, T, {width}]; "
                "pair it with the text encoder it was made for"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """diffusers' way in: the fields of a `config.json`, whose underscored keys are diffusers' own."""
        fields = {k: v for k, v in config.items() if not k.startswith("_")}
        unused = {k: kwargs.pop(k) for k in list(kwargs) if k not in fields_dict(cls.Config)}
        fields |= kwargs
        for name in fields:
            if name not in fields_dict(cls.Config):
                raise ConfigError(
                    f"backbone: no field is called {shown(name)}.{did_you_mean(name, fields_dict(cls.Config))}"
                )
        model = cls(None, **fields)
        return (model, unused) if return_unused_kwargs else model

    def save(self, folder: Path) -> None:
        """Write `transformer/config.json` and `transformer/diffusion_pytorch_model.safetensors` under `folder`."""
        self.save_about(folder)
        save_module(self, folder / FOLDER)

    def save_about(self, folder: Path) -> None:
        """Write `transformer/config.json` under `folder`."""
        write_json(folder / FOLDER / "config.json", json.loads(self.to_json_string()))

    @classmethod
    def load(cls, folder: Path, config: Config, dtype: torch.dtype | None = None) -> Self:
        """Read `folder/transformer`, floats as `dtype` (None: as stored). Raises CheckpointError, and NumericalError
        for float16."""
        if dtype is not None and (reason := cls.refuses(dtype)):
            raise NumericalError(reason)
        tensors = read_weights(folder / FOLDER)
        model = build_on_meta(lambda: cls(config), folder / FOLDER / "config.json", config.num_layers, tensors)
        load_module(model, folder / FOLDER, dtype=dtype, tensors=tensors)
        return model

    @classmethod
    def from_header(
        cls, file: Path, config: Config, folder: Path, *, plain: bool = False
    ) -> tuple[Self, Config, dict[str, LazyTensor]]:
        """A single file: the model without values, its config and the tensors for `load_weights`: `single.adopt`."""
        seen, tensors = adopt(*read_lazy(file), config, str(file))
        with torch.device("meta"):
            return cls(seen), seen, tensors

    def load_weights(self, tensors: Mapping[str, LazyTensor], file: Path, dtype: torch.dtype | None = None) -> None:
        """Read what `from_header` found, floats as `dtype`."""
        if dtype is not None and (reason := self.refuses(dtype)):
            raise NumericalError(reason)
        load_module(self, file.parent, file.stem, dtype=dtype, tensors=dict(tensors))


def _grid(tokens: Tensor, x: Tensor) -> Tensor:
    """tokens [B,h*w,C] -> [B,C,h,w] in the dtype of x, which gives h and w."""
    return tokens.transpose(1, 2).reshape(len(x), -1, *x.shape[-2:]).to(x.dtype)
