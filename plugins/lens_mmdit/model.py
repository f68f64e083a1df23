"""The Lens transformer: two streams of tokens, image and text, that meet in every attention (reference: lens.md, 2).

B batch, N = h w image tokens, T text tokens, S = N + T, C latent channels, D inner width, H heads, E head width.
Parameters bear the published names; the arithmetic is the published one, ordered for speed:
what depends on t alone is shared, text that is not there is not computed, and weights of norms join the modulation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from attrs import asdict, fields_dict
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from lens_core.checkpoints import packed_linear
from lens_core.checkpoints.lazy_tensors import LazyTensor, write_lazy
from lens_core.checkpoints.single_files import read_single_file
from lens_core.checkpoints.tensor_files import build_on_meta, load_module, read_weights, save_module
from lens_core.inference.guidance import branches_at_once
from lens_core.inference.offload_plans import Workload
from lens_core.io.atomic_files import write_json
from lens_core.io.readers import shown
from lens_core.types import ConfigError, NumericalError, TextFeatures, did_you_mean, move
from lens_mmdit.blocks import FREQUENCIES, Block, FinalNorm, TimeEmbedding
from lens_mmdit.config import MMDiTConfig
from lens_mmdit.modulation import Modulation, PrecomputedModulation
from lens_mmdit.norms import RMSNorm
from lens_mmdit.rope import rotations
from lens_mmdit.segments import Segments
from lens_mmdit.single import convert_single_file

FOLDER = "transformer"  # where a checkpoint keeps this component


class LensTransformer2DModel(PrecomputedModulation, ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]  # untyped
    """The Lens diffusion transformer: double-stream MMDiT blocks with joint attention.

    It is a diffusers model: `from_pretrained` and `save_pretrained` know the same files.

    Built as `cls(config)`, or from the fields of a config by name. A new model predicts v = 0, and each of its blocks
    does nothing (adaLN-zero; Peebles and Xie, 2023): modulation, `norm_out` and `proj_out` are 0, other linears uniform
    after Glorot, biases 0, norms 1. Draws come from torch's default generator: seed it first.
    """

    to = nn.Module.to  # diffusers' own warns, at every cast, of modules to keep in float32; this model has none

    Config = MMDiTConfig

    place = (FOLDER, "diffusion_pytorch_model")
    model_index: ClassVar = {FOLDER: ("diffusers", "LensTransformer2DModel")}
    single = "diffusion_models/lens.safetensors"
    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Block"]  # diffusers: a device map keeps a block whole
    _repeated_blocks: ClassVar = ["Block"]  # diffusers: what compile_repeated_blocks compiles

    def __init__(self, config: MMDiTConfig | None = None, **fields: Any) -> None:
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
        # adaLN-zero: with gates at 0 every block begins as the identity, which deep transformers train well from.
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

        Masked text costs nothing where no sample has it, and changes nothing, whatever its features are. Raises
        NumericalError in float16.
        """
        time = self._modulation_input(x, t)
        for img in self._image_states(x, time, text, len(self.transformer_blocks)):
            last = img
        v: Tensor = self.proj_out(self.norm_out(last, time))
        return _to_grid(v, x)

    def packed(self, xs: Sequence[Tensor], t: Tensor, text: TextFeatures) -> list[Tensor]:
        """`forward` for samples of any sizes in one pass: xs [C,h,w] each, t [B], text -> v for each, as its x.

        No token is padding, and attention stays within each sample. Masked text tokens are left out.
        """
        if not xs or not len(xs) == len(t) == len(text):
            raise ConfigError(
                f"backbone: {len(xs)} samples with {len(t)} times and {len(text)} texts; give one of each"
            )
        self._check_text(text)
        for x in xs:
            self._check_latents(x.shape[0])
        time = self._modulation_input(xs[0], t)
        known = text.known
        segments = Segments.from_lengths([x[0].numel() for x in xs], known.sum(1).tolist(), xs[0].device)
        samples, columns = (move(part, xs[0].device) for part in known.nonzero(as_tuple=True))
        img = self.img_in(torch.cat([x.flatten(1).T for x in xs])[None].to(self.dtype))
        txt = None
        if any(segments.text_lengths):
            txt = self._project_text(text.features[samples, :, columns].to(self.dtype))[None]
        rotation = self._packed_rotations(xs, columns, text.mask.shape[1], segments)
        for last in self._run_blocks(img, txt, time, rotation, None, len(self.transformer_blocks), segments):
            img = last
        v = self.proj_out(self.norm_out(img, time, segments))[0].split(segments.image_lengths)
        return [_to_grid(row[None], x[None])[0] for row, x in zip(v, xs, strict=True)]

    def _packed_rotations(self, xs: Sequence[Tensor], columns: Tensor, tokens: int, segments: Segments) -> Tensor:
        """Rotations [N+T,1,E/2] of all image tokens, then of the text tokens, whose columns in the batch are [T]."""
        precise = torch.complex128 if self.dtype == torch.float64 else torch.complex64
        longest = -(-tokens // 64) * 64  # a multiple of 64: few different tables, which the cache of `rotations` holds
        tables = [rotations(*x.shape[-2:], longest, self.config.axes_dims_rope, x.device, precise) for x in xs]
        parts = zip(tables, segments.image_lengths, torch.split(columns, list(segments.text_lengths)), strict=True)
        images, texts = zip(*((table[:n], table[n:][places]) for table, n, places in parts), strict=True)
        return torch.cat([*images, *texts])

    def features(self, x: Tensor, t: Tensor, text: TextFeatures, blocks: Sequence[int]) -> list[Tensor]:
        """The image stream [B,D,h,w] after each of `blocks` (0-based, in any order); nothing after them runs."""
        depth = len(self.transformer_blocks)
        if not blocks or min(blocks) < 0 or max(blocks) >= depth:
            raise ConfigError(f"backbone: cannot tap blocks {list(blocks)}; name some of 0 ... {depth - 1}")
        states = self._image_states(x, self._modulation_input(x, t), text, max(blocks) + 1)
        selected = {n: _to_grid(img, x) for n, img in enumerate(states) if n in blocks}
        return [selected[n] for n in blocks]

    def takes(self) -> tuple[int, int, int]:
        """(C, L, D): latent channels, layers of text features and their width, as it reads them."""
        c = self.config
        return c.in_channels, len(c.selected_layer_index), c.enc_hidden_dim

    @classmethod
    def fitting(cls, options: Mapping[str, Any], channels: int, layers: int, width: int) -> dict[str, Any]:
        """The options by which it takes latents of so many channels, and text features of such layers and width."""
        patch = int(options.get("patch_size", cls.Config().patch_size))
        named = options.get("selected_layer_index", ())  # of these only the number counts
        return {
            "in_channels": channels,
            "out_channels": channels // patch**2,
            "selected_layer_index": list(named if len(named) == layers else range(layers)),
            "enc_hidden_dim": width,
        }

    @classmethod
    def refuses(cls, dtype: torch.dtype) -> str | None:
        """Why the model must not run in `dtype`, or None if it may."""
        if dtype == torch.float16:
            return "the backbone's residual streams overflow float16; use bfloat16 or float32"
        return None

    def _modulation_input(self, x: Tensor, t: Tensor) -> Tensor:
        """The input of every `Modulation`: silu of the time embedding [B,D], or rows of the tables, int64 [B].
        Raises NumericalError in float16, before any work is done."""
        kind = x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        for dtype in (self.dtype, torch.get_autocast_dtype(kind) if autocast else self.dtype):
            if reason := self.refuses(dtype):
                raise NumericalError(reason)
        rows = self._table_rows(t)
        return F.silu(self.time_text_embed(t)) if rows is None else rows

    def modulations(self) -> list[Modulation]:
        """Those of all blocks and of `norm_out`; none if one is of another class, such as an adapter's."""
        blocks: list[Any] = self.blocks()
        layers = [mod[1] for block in blocks for mod in (block.img_mod, block.txt_mod)]
        layers.append(self.norm_out.linear)
        return layers if all(isinstance(layer, Modulation) for layer in layers) else []

    def blocks(self) -> list[nn.Module]:
        """The modules that can be streamed: each runs once a pass, in this order."""
        return list(self.transformer_blocks)

    def activation_bytes(self, workload: Workload) -> int:
        """Estimated bytes of one pass: the activations of a block, and the tables of modulation."""
        branches = branches_at_once(workload.batch, workload.cells) if workload.guided else 1
        tokens = branches * workload.cells + workload.tokens  # the unconditional branch has no text
        width = self.config.inner_dim
        rows = workload.steps * sum(layer.out_features for layer in self.modulations())
        work: int = (12 * workload.batch * tokens * width + rows) * self.dtype.itemsize
        return work + packed_linear.transient_bytes(self)

    def flops(self, size: tuple[int, int], tokens: int) -> int:
        """FLOPs of a forward for one sample of latent grid `size` with `tokens` text tokens: linear layers and
        attention, a multiply-add as two."""
        c, n, blocks = self.config, math.prod(size), self.blocks()
        d, hidden = c.inner_dim, blocks[0].img_mlp.w1.out_features  # type: ignore[union-attr]  # a Block
        rest = d * d + 3 * d * hidden  # for a token after attention: output projection and SwiGLU
        once = (FREQUENCIES + d + 2 * d) * d + len(self.transformer_blocks) * (2 if tokens else 1) * 6 * d * d
        ends = n * 2 * c.in_channels * d + tokens * len(self.txt_norm) * c.enc_hidden_dim * d
        work = once + ends
        for left in reversed(range(len(self.transformer_blocks))):
            queries = n + (tokens if left else 0)  # after the last block nobody reads the text stream
            work += (n + tokens) * 3 * d * d + queries * rest + 2 * queries * (n + tokens) * d
        return int(2 * work)

    def _image_states(self, x: Tensor, time: Tensor, text: TextFeatures, depth: int) -> Iterator[Tensor]:
        """The image stream [B,N,D] after each of the first `depth` blocks."""
        h, w = x.shape[-2:]
        self._check_latents(x.shape[1])
        img = self.img_in(x.to(self.dtype).flatten(2).transpose(1, 2))
        # Rows without text that come first, as in a batch of both branches of guidance, have no text stream. Not in
        # training, where their number changes from batch to batch, and compiled blocks with it.
        alone = 0 if torch.is_grad_enabled() else _leading_rows_without_text(text)
        txt, mask = self._text_stream(text[alone:] if alone else text)
        tokens = 0 if txt is None else txt.shape[1]
        precise = torch.complex128 if self.dtype == torch.float64 else torch.complex64
        rotation = rotations(h, w, tokens, self.config.axes_dims_rope, img.device, precise)
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(mask), h * w), mask], dim=1)[:, None, None]
        # Returned, not `yield from`: a frame that goes on would keep the first image stream in memory.
        return self._run_blocks(img, txt, time, rotation, mask, depth)

    def _run_blocks(
        self,
        img: Tensor,
        txt: Tensor | None,
        time: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        depth: int,
        segments: Segments | None = None,
    ) -> Iterator[Tensor]:
        """The image stream after each of the first `depth` blocks."""
        if rotation.device.type != "cpu":
            # Compilers have no complex numbers. On a CPU torch's own complex product is faster than what they make.
            rotation = torch.view_as_real(rotation)
        for n, block in enumerate(self.transformer_blocks[:depth]):
            # Nobody reads the text stream after the last block, so it ends there: exact, and a little cheaper.
            # Without text there is one way through a block, so that it compiles once.
            arguments = (img, txt, time, rotation, mask, txt is not None and n + 1 < depth, segments)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                img, txt = self._gradient_checkpointing_func(block, *arguments)
            else:
                img, txt = block(*arguments)
            yield img

    def _text_stream(self, text: TextFeatures) -> tuple[Tensor | None, Tensor | None]:
        """The text stream [B,T,D], None without text; and its mask bool [B,T], None where every token counts.

        Columns that count in no row are cut from the right, so a batch without any text runs no text stream.
        """
        self._check_text(text)
        if not text.mask.shape[1]:  # T = 0, which needs no value: works on the meta device too
            return None, None
        known = text.known  # the mask on the host, which need not wait for the device
        columns = known.any(0).nonzero()
        if not len(columns):
            return None, None
        end = int(columns.max()) + 1
        features, mask = text.features[:, :, :end].to(self.dtype), text.mask[:, :end]
        full = bool(known[:, :end].all())
        if not full:
            # A masked key has weight 0, but 0 * nan is nan.
            features = features.masked_fill(~mask[:, None, :, None], 0)
        return self._project_text(features), None if full else mask

    def _project_text(self, features: Tensor) -> Tensor:
        """Features [B,L,T,D] or [T,L,D] -> the text stream, [B,T,D] or [T,D]."""
        normed = [norm(features[:, i]) for i, norm in enumerate(self.txt_norm)]
        stream: Tensor = self.txt_in(torch.cat(normed, dim=-1))
        return stream

    def _check_latents(self, channels: int) -> None:
        """Raise ConfigError for latents of another VAE."""
        if channels != self.config.in_channels:
            raise ConfigError(
                f"backbone: the latents have {channels} channels, but it reads {self.config.in_channels}; "
                "pair it with the VAE it was made for"
            )

    def _check_text(self, text: TextFeatures) -> None:
        """Raise ConfigError for the features of another text encoder."""
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
        if packed_linear.packed_layers(self):  # in a format that no safetensors file holds
            stem = self.place[1]
            write_lazy(folder / FOLDER / f"{stem}.safetensors", packed_linear.plain_tensors(self))
        else:
            save_module(self, folder / FOLDER)

    def save_about(self, folder: Path) -> None:
        """Write `transformer/config.json` under `folder`."""
        write_json(folder / FOLDER / "config.json", json.loads(self.to_json_string()))

    @classmethod
    def load(cls, folder: Path, config: MMDiTConfig, dtype: torch.dtype | None = None) -> Self:
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
        cls, file: Path, config: MMDiTConfig, folder: Path, *, plain: bool = False
    ) -> tuple[Self, MMDiTConfig, dict[str, LazyTensor]]:
        """A single file: the model without values, its config and the tensors for `load_weights`. See
        `single.convert_single_file`. Layers of a GGUF file stay quantised unless `plain`."""
        seen, tensors = convert_single_file(*read_single_file(file), config, str(file))
        with torch.device("meta"):
            model = cls(seen)
        return model, seen, tensors if plain else packed_linear.keep_packed(model, tensors)

    def load_weights(self, tensors: Mapping[str, LazyTensor], file: Path, dtype: torch.dtype | None = None) -> None:
        """Read what `from_header` found, floats as `dtype`."""
        if dtype is not None and (reason := self.refuses(dtype)):
            raise NumericalError(reason)
        load_module(self, file.parent, file.stem, dtype=dtype, tensors=dict(tensors))
        packed_linear.set_dtype(self, dtype)

    @property
    def note(self) -> str:
        """How quantised layers are held, for people to read; empty where there are none."""
        return packed_linear.note(self, "backbone")


def _leading_rows_without_text(text: TextFeatures) -> int:
    """How many rows come before the first that has a token; 0 where no row has one."""
    if not text.mask.shape[1]:
        return 0
    return int(text.known.any(1).to(torch.uint8).argmax())


def _to_grid(tokens: Tensor, x: Tensor) -> Tensor:
    """tokens [B,h*w,C] -> [B,C,h,w] in the dtype of x, which gives h and w."""
    return tokens.transpose(1, 2).reshape(len(x), -1, *x.shape[-2:]).to(x.dtype)
