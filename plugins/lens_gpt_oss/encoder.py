"""The component `gpt_oss`: features from the residual stream of a GPT-OSS language model.

Letters: B batch, S tokens of the whole rendering, T = S without its head, L tapped layers, D width, V vocabulary,
N layers, E experts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GptOssModel, PreTrainedTokenizerFast
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from lens_core.checkpoints.gguf_files import SUFFIX as GGUF
from lens_core.checkpoints.lazy_tensors import LazyTensor, read_lazy, write_lazy
from lens_core.checkpoints.tensor_files import build_on_meta, files, load_module, save_module
from lens_core.inference.offload_plans import Workload
from lens_core.io.atomic_files import write_json
from lens_core.types import CheckpointError, ConfigError, LensError, TextFeatures, move
from lens_gpt_oss.chat import ChatRenderer
from lens_gpt_oss.config import GptOssEncoderConfig, read_config, transformers_config
from lens_gpt_oss.experts import pack, packed
from lens_gpt_oss.generation import WritesText
from lens_gpt_oss.gguf import read_llama_cpp
from lens_gpt_oss.single import PACKED, check_mxfp4, convert_single_file
from lens_gpt_oss.template import LARGEST, Wrapper, open_tokenizer, read_tokenizer

FOLDER, TOKENIZER = "text_encoder", "tokenizer"  # where a checkpoint keeps this component
STEM = "model"
KEPT_PLAIN = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
"""The modules that are not in MXFP4, as a published config.json lists them for transformers."""


class GptOssEncoder(WritesText, nn.Module):
    """GPT-OSS as a text encoder: residual streams of several layers, one vector a token.

    Prompts are wrapped in the published conversation. A new one has no tokenizer: the method `language_model` makes it.
    Draws its first weights from torch's default generator: seed it first.
    """

    Config = GptOssEncoderConfig

    place = (FOLDER, STEM)
    companion_folders = (TOKENIZER,)
    single = "text_encoders/gpt_oss.safetensors"
    model_index: ClassVar = {
        FOLDER: ("transformers", "LensGptOssEncoder"),
        TOKENIZER: ("transformers", "PreTrainedTokenizerFast"),
    }

    def __init__(self, config: GptOssEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = len(config.selected_layers)
        self.width = config.hidden_size
        self.model = GptOssModel(transformers_config(config))
        self.lm_head: nn.Linear | None = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=self.model.config.initializer_range)
        # Captions give a language model little reason to tell one colour's name from another: from the usual small
        # weights, all colours end up within 2 % of one vector, and a backbone can hardly see which is named.
        nn.init.normal_(self.model.embed_tokens.weight)
        self._wrapper: Wrapper | None = None
        self._cached_prefix: tuple[Any, list[tuple[Tensor, Tensor]]] | None = None
        self._chat: ChatRenderer | None = None
        # Weights that encoding does not need, left in their file: tensors, the file, and the dtype of the others.
        self._unread: tuple[dict[str, LazyTensor], Path, torch.dtype | None] | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        return None if self._wrapper is None else self._wrapper.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        wrapper = Wrapper(tokenizer, self.config.date)
        highest = max(tokenizer.get_vocab().values(), default=-1)
        if max(len(tokenizer), highest + 1) > self.config.vocab_size:
            raise ConfigError(
                f"gpt_oss: vocab_size is {self.config.vocab_size}; the tokenizer has {len(tokenizer)} tokens, up to "
                f"number {highest}: raise it"
            )
        least = len(wrapper.head) + len(wrapper.tail)
        if self.config.max_length <= least:
            raise ConfigError(
                f"gpt_oss: max_length is {self.config.max_length}; the conversation alone takes {least}: raise it"
            )
        self._wrapper, self._cached_prefix, self._chat = wrapper, None, None

    def _wrap(self) -> Wrapper:
        if self._wrapper is None:
            raise LensError(
                "gpt_oss: has no tokenizer yet; train it with the language_model method or load a checkpoint"
            )
        return self._wrapper

    @property
    def head_length(self) -> int:
        """How many tokens stand before the prompt (97 in the published model)."""
        return len(self._wrap().head)

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> ids [B,S] of their renderings, padded on the right, and their mask, True where a token counts, on
        the model's device. Warns as `rendered` does."""
        device = self.model.embed_tokens.weight.device
        ids, mask = self.rendered(prompts)
        return move(ids, device), move(mask, device)

    def rendered(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What `tokens` gives, on the host: lengths can be read there without waiting for the device.

        Warns when a prompt is cut to make its rendering fit `max_length`; the conversation around it stays whole.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError("prompts must be a list of one or more strings")
        rows, cut = self._wrap().ids(prompts, self.config.max_length)
        if any(cut):
            worst = max(range(len(cut)), key=cut.__getitem__)
            warnings.warn(
                f"gpt_oss: {sum(n > 0 for n in cut)} of {len(cut)} prompts cut to fit max_length "
                f"{self.config.max_length}; prompt {worst} lost its last {cut[worst]} tokens: shorten it",
                stacklevel=2,
            )
        lengths = torch.tensor([len(row) for row in rows])
        longest = int(lengths.max())
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.arange(longest) < lengths[:, None]
        return ids, mask

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Prompts -> features [B,L,T,D], the residual stream after each selected layer, 0 where padded; no gradient.

        T counts the prompt and what follows it; the head is dropped. Raises LensError without a tokenizer.
        """
        ids, mask = self.rendered(prompts)
        head = self.head_length
        return self.encode_ids(ids[:, head:], mask[:, head:])

    @torch.no_grad()
    def encode_ids(self, host_ids: Tensor, host: Tensor) -> TextFeatures:
        """`encode`, for prompts that are tokens already: ids [B,T] and their mask as `rendered` gives them, without the
        head, on the host."""
        device = self.model.embed_tokens.weight.device
        ids, mask = move(host_ids, device), move(host, device)
        # The conversation's beginning is the same for every prompt: its keys and values are computed once.
        prefix = self._prefix_cache(ids.device)
        cache = DynamicCache([tuple(t.expand(len(ids), -1, -1, -1) for t in pair) for pair in prefix])
        features = torch.stack(self._run_layers(ids, cache), dim=1)
        # Zeros where padded, so that the features hold nothing that padding computed.
        return TextFeatures(features.masked_fill(~mask[:, None, :, None], 0), mask, host)

    def _run_layers(self, ids: Tensor, cache: DynamicCache) -> list[Tensor]:
        """ids [B,S], after what `cache` holds, which grows by them -> the residual stream [B,S,D] after each selected
        layer; no layer after the last one runs.

        Padding on the right needs no mask: attention looks back only, and experts see one token at a time.
        """
        model, kinds, features = self.model, self.model.config.layer_types or [], []
        x = model.embed_tokens(ids)
        before = cache.get_seq_length()
        positions = torch.arange(before, before + ids.shape[1], device=ids.device)[None]
        rope = model.rotary_emb(x, positions)
        about = {"config": model.config, "inputs_embeds": x, "attention_mask": None, "past_key_values": cache}
        masks = {
            "full_attention": create_causal_mask(**about),
            "sliding_attention": create_sliding_window_causal_mask(**about),
        }
        # Layer by layer, because `model(…)` also runs the layers after the last selected one, which may not be loaded.
        for index in range(self.config.selected_layers[-1] + 1):
            x = model.layers[index](
                x,
                attention_mask=masks[kinds[index]],
                position_ids=positions,
                position_embeddings=rope,
                past_key_values=cache,
            )
            if index in self.config.selected_layers:
                features.append(x)
        return features

    def _prefix_cache(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the head, which is the same before every prompt: most of a short prompt's cost. They are
        kept until a weight changes; autocast and dtype count as a change."""
        # The version counters of the weights change with every optimizer step and load, so a stale cache is not used.
        kind = device.type
        casts = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        weights = list(self.model.parameters())
        versions = [(p.dtype, p.data_ptr(), 0 if p.is_inference() else p._version) for p in weights]
        state = (device, casts, versions)
        if self._cached_prefix is None or self._cached_prefix[0] != state:
            cache = DynamicCache()
            self._run_layers(torch.tensor([self._wrap().head], device=device), cache)
            self._cached_prefix = state, [(layer.keys, layer.values) for layer in cache.layers]
        return self._cached_prefix[1]

    def forward(self, ids: Tensor, first: int = 0, shared: int = 0) -> tuple[Tensor, Tensor]:
        """ids [B,S] -> what comes next: logits [B,S-first,V] from position `first` on, and router logits [N,B,S,E].

        The first `shared` tokens, which must be the same in all rows and no more than `first`, are computed once; then
        the router logits are those of the tokens after them, [N,B,S-shared,E].
        """
        if self.lm_head is None:
            raise LensError(
                "gpt_oss: it was loaded without an lm_head, so it can encode but not predict; load a checkpoint that "
                "has one, with experts: eager if its experts are in 4 bits"
            )
        cache = None
        if shared:
            cache = DynamicCache()
            self.model(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
            pairs = [(layer.keys, layer.values) for layer in cache.layers]
            cache = DynamicCache([tuple(t.expand(len(ids), -1, -1, -1) for t in pair) for pair in pairs])
        rest = ids[:, shared:]
        out = self.model(input_ids=rest, past_key_values=cache, use_cache=cache is not None, output_router_logits=True)
        routes = torch.stack(out.router_logits).view(self.config.num_hidden_layers, *rest.shape, -1)
        return self.lm_head(out.last_hidden_state[:, first - shared :]), routes

    def blocks(self) -> list[nn.Module]:
        """What can be streamed: `encode` runs these layers once a pass, in this order."""
        return list(self.model.layers[: self.config.selected_layers[-1] + 1])

    def unused_modules(self) -> list[nn.Module]:
        """What `encode` does not read."""
        head = [] if self.lm_head is None else [self.lm_head]
        return [*self.model.layers[self.config.selected_layers[-1] + 1 :], self.model.norm, *head]

    def activation_bytes(self, workload: Workload) -> int:
        """Estimated bytes of one encoding: the scores of eager attention, and a few streams of activations."""
        heads, head = self.config.num_attention_heads, 97 if self._wrapper is None else self.head_length
        longest = min(workload.tokens, self.config.max_length - head)
        scores = 5 * heads * max(longest * (longest + head), head * head)
        # An expert that is unpacked: float32 values, then twice in the model's dtype.
        expert = 2 * self.config.hidden_size * self.config.intermediate_size
        unpacked = (4 + 2 * self.model.dtype.itemsize) * expert if self.config.experts == "auto" else 0
        return int((scores + 16 * longest * self.width) * self.model.dtype.itemsize + unpacked)

    def sizes_in_4_bits(self) -> dict[int, int]:
        """id of a weight -> its bytes in the published file, where experts are MXFP4: 4 bits each and 8 for 32."""
        experts = [layer.mlp.experts for layer in self.model.layers]
        weights = [w for e in experts for w in (e.gate_up_proj, e.down_proj)]
        return {id(w): w.numel() * 17 // 32 for w in weights}

    def pack_experts(self) -> None:
        """Hold all experts in MXFP4, as the published file has them; their bytes are still to be loaded."""
        for layer in self.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                pack(layer.mlp.experts, name, "mxfp4")

    @classmethod
    def diagnose(cls) -> dict[str, str]:
        """What `lens doctor` reports of it."""
        from lens_gpt_oss.paths import diagnose

        return diagnose()

    def provenance(self) -> dict[str, str]:
        """What a picture must record to be drawn again: the pinned date."""
        return {"date": self.config.date}

    @property
    def note(self) -> str:
        """How its experts are held and what it takes, for people to read; empty for plain weights."""
        return _experts_note(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A cast to bfloat16 would round the frequencies of the positions too; they are made anew in float32.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.model.rotary_emb = GptOssRotaryEmbedding(self.model.config).to(self.model.embed_tokens.weight.device)
        return self

    def save(self, folder: Path) -> None:
        """Write `text_encoder/` as transformers' GptOssForCausalLM and `tokenizer/`. Raises LensError without one.

        Experts in MXFP4 stay so; those in nvfp4, which transformers does not read, are written as plain weights.
        """
        self.save_about(folder)
        comfy = {name: p for name, p in packed(self).items() if p.format == "nvfp4"}
        if not comfy:
            save_module(self, folder / FOLDER, STEM)
            return
        parts = {f"{name}_{part}" for name in comfy for part in PACKED}
        tensors = {n: LazyTensor.of(t) for n, t in self.state_dict().items() if n not in parts}
        write_lazy(folder / FOLDER / f"{STEM}.safetensors", tensors | {n: p.lazy() for n, p in comfy.items()})

    def save_about(self, folder: Path) -> None:
        """Write `text_encoder/config.json` and `tokenizer/`."""
        tokenizer = self._wrap().tokenizer
        config = self.model.config.to_dict() | {
            "architectures": ["GptOssForCausalLM"],
            "num_hidden_layers": len(self.model.layers),
            "layer_types": self.model.config.layer_types[: len(self.model.layers)],
            "dtype": str(self.model.embed_tokens.weight.dtype).removeprefix("torch."),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        if any(name.endswith("_blocks") for name in self.state_dict()) and "nvfp4" not in self.note:
            config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": KEPT_PLAIN}
        write_json(folder / FOLDER / "config.json", config)
        tokenizer.save_pretrained(folder / TOKENIZER)

    @classmethod
    def load(cls, folder: Path, config: GptOssEncoderConfig, dtype: torch.dtype | None = None) -> Self:
        """Read the layout that `save` writes, MXFP4 experts and sharded files included; the sizes are those on disk.

        Experts in MXFP4 stay packed with `experts: auto`, and no layer after the last selected one is held; with
        others they come out as `dtype`, or bfloat16. A file without lm_head can encode, not predict.
        """
        config = read_config(folder / FOLDER / "config.json", config)
        tokenizer = open_tokenizer(folder / TOKENIZER)
        tensors, _ = read_lazy(*files(folder / FOLDER, STEM))
        encoder = build_on_meta(lambda: cls(config), folder / FOLDER / "config.json", config.num_hidden_layers, tensors)
        encoder.tokenizer = tokenizer
        file = folder / FOLDER / f"{STEM}.safetensors"
        encoder.load_weights(encoder._prepare_for(tensors, file, packed=config.experts == "auto"), file, dtype)
        return encoder

    @classmethod
    def from_header(
        cls, file: Path, config: GptOssEncoderConfig, folder: Path, *, plain: bool = False
    ) -> tuple[Self, GptOssEncoderConfig, dict[str, LazyTensor]]:
        """A single file: the encoder without values, its config and the tensors for `load_weights`; `plain`: no nvfp4.

        `file` may be a folder as transformers saves it, in shards, or a GGUF file of llama.cpp. The tokenizer is the
        one in the file, else the tokenizer.json beside it or in that folder, else that of `folder`, the checkpoint
        whose encoder it takes the place of.
        """
        disk = file / "config.json" if file.is_dir() else folder / FOLDER / "config.json"
        tokenizer, texts, stated = None, dict[str, str](), dict[str, Any]()
        if file.suffix == GGUF:
            tensors, stated, tokenizer = read_llama_cpp(file)
        else:
            tensors, texts = read_lazy(*(files(file, STEM) if file.is_dir() else [file]))
        known = read_config(disk, config) if disk.is_file() else config
        keep = config.experts == "auto" and not plain
        inferred, weights = convert_single_file(tensors, texts, known, str(file), packed=keep, stated=stated)
        with torch.device("meta"):
            encoder = cls(inferred)
        encoder.tokenizer = tokenizer or _tokenizer_of(file, tensors, texts, folder)
        return encoder, inferred, encoder._prepare_for(weights, file, packed=keep or plain, whole=plain)

    def _prepare_for(
        self, tensors: Mapping[str, LazyTensor], file: Path, *, packed: bool, whole: bool = False
    ) -> dict[str, LazyTensor]:
        """Give this encoder, on the meta device, the modules that the tensors fit -> the tensors that it needs.

        With experts `packed`, and not `whole`, it can only encode: layers after the last selected one are dropped.
        """
        weights = check_mxfp4(tensors, str(file), packed=packed)
        places = [n.removesuffix("_blocks") for n in weights if n.endswith("_blocks")]
        if places and not whole:
            used = self.config.selected_layers[-1] + 1
            unused = (*(f"model.layers.{i}." for i in range(used, len(self.model.layers))), "lm_head.")
            rest = {n: t for n, t in weights.items() if n.startswith(unused)}
            self._unread = (rest, file, None) if "lm_head.weight" in rest else None
            weights = {n: t for n, t in weights.items() if n not in rest}
            places = [n for n in places if not n.startswith(unused)]
            self.model.layers = self.model.layers[:used]
        if "lm_head.weight" not in weights:
            self.lm_head = None
        for place in places:
            module, _, name = place.rpartition(".")
            pack(self.get_submodule(module), name, "nvfp4" if f"{place}_scale" in weights else "mxfp4")
        return weights

    def load_weights(self, tensors: Mapping[str, LazyTensor], file: Path, dtype: torch.dtype | None = None) -> None:
        """Read the tensors of `from_header`, floats as `dtype`."""
        load_module(self, file.parent, file.stem, dtype=dtype, tensors=dict(tensors))
        self._unread = self._unread and (*self._unread[:2], dtype)
        self.model.rotary_emb = GptOssRotaryEmbedding(self.model.config)  # no file holds it

    @classmethod
    def extras(cls, source: Path | GptOssEncoder) -> tuple[dict[str, LazyTensor], dict[str, str]]:
        """What a single file holds besides the weights: the tokenizer of a checkpoint, or of an encoder, and its chat
        template as text."""
        tokenizer = (
            source._wrap().tokenizer if isinstance(source, GptOssEncoder) else open_tokenizer(source / TOKENIZER)
        )
        tensor = torch.frombuffer(bytearray(tokenizer.backend_tokenizer.to_str().encode()), dtype=torch.uint8)
        return {"tokenizer_json": LazyTensor.of(tensor)}, {"chat_template": str(tokenizer.chat_template)}


def _tokenizer_of(
    file: Path, tensors: Mapping[str, LazyTensor], texts: Mapping[str, str], folder: Path
) -> PreTrainedTokenizerFast:
    """The tokenizer in a safetensors file, else the one beside it, else that of the checkpoint `folder`."""
    beside = file if file.is_dir() else file.parent
    if "tokenizer_json" not in tensors:
        return open_tokenizer(beside if (beside / "tokenizer.json").is_file() else folder / TOKENIZER)
    stored = tensors["tokenizer_json"]
    if stored.dtype != torch.uint8 or len(stored.shape) != 1 or stored.shape[0] > LARGEST:
        raise CheckpointError(f"{file}: tokenizer_json is {list(stored.shape)} of {stored.dtype}, not its bytes")
    data = bytes(stored.read().numpy().data)
    return read_tokenizer(data, texts.get("chat_template"), str(file))


def _experts_note(encoder: GptOssEncoder) -> str:
    forms = {p.format for p in packed(encoder).values()}
    held = sum(t.nbytes for t in (*encoder.parameters(), *encoder.buffers()))
    more = sum(math.prod(p.lazy().shape) * p.lazy().dtype.itemsize for p in packed(encoder).values())
    more -= sum(t.nbytes for n, t in encoder.named_buffers() if ".experts." in n)
    if not forms:
        return ""
    return (
        f"text encoder: experts stay in {' and '.join(sorted(forms))}, unpacked one at a time; "
        f"{held / 1e9:.1f} GB instead of {(held + more) / 1e9:.1f}"
    )
