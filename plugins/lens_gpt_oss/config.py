"""The sizes of a GPT-OSS encoder: as a recipe states them, as a `config.json` does, and as transformers wants them."""

from __future__ import annotations

from datetime import date as day
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, field, fields_dict, frozen
from transformers import GptOssConfig

from lens_core.io.atomic_files import read_json
from lens_core.io.readers import shown
from lens_core.types import CheckpointError, ConfigError
from lens_core.validators import CHANNELS, LAYERS, each, integer, listed, matching, one_of

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}
"""GPT-OSS's positions. Not configurable: published config files that leave the rope block out mean this one."""
FIXED_IN_CODE = {"swiglu_limit": 7.0}
"""What older versions of transformers have in the code of the model, and not in its config."""
OURS = ("selected_layers", "date", "max_length", "experts")  # Config fields that are not the language model's


@frozen
class GptOssEncoderConfig:
    """The defaults are the published 20B model. All but the last four fields are those of its `config.json`."""

    vocab_size: int = field(default=201088, validator=integer(at_least=1))  # V
    hidden_size: int = field(default=2880, validator=CHANNELS)  # D
    intermediate_size: int = field(default=2880, validator=CHANNELS)
    num_hidden_layers: int = field(default=24, validator=LAYERS)  # N
    num_attention_heads: int = field(default=64, validator=CHANNELS)
    num_key_value_heads: int = field(default=8, validator=CHANNELS)
    head_dim: int = field(default=64, validator=CHANNELS)
    num_local_experts: int = field(default=32, validator=CHANNELS)  # E
    num_experts_per_tok: int = field(default=4, validator=CHANNELS)
    sliding_window: int = field(default=128, validator=integer(at_least=1))  # tokens; on layers 0, 2, …
    # 0-based, ascending; features are taken after them.
    selected_layers: tuple[int, ...] = field(
        default=(5, 11, 17, 23), converter=listed, validator=each(integer(at_least=0), at_least=1)
    )
    # The day the conversation claims it is, whatever today is.
    date: str = field(default="2026-05-20", validator=matching(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", "a day as YYYY-MM-DD"))
    max_length: int = field(default=512, validator=integer(at_least=1))  # tokens of the whole rendering
    # Kept in 4 bits if they are so on disk, else eager; or unpacked for one of transformers' kernels: eager is the
    # fastest on a CPU, grouped_mm suits a GPU.
    experts: str = field(default="auto", validator=one_of("auto", "eager", "grouped_mm", "batched_mm"))

    def __attrs_post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"gpt_oss: num_attention_heads is {self.num_attention_heads}; "
                f"give a multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"gpt_oss: head_dim is {self.head_dim}; positions need an even one")
        if self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"gpt_oss: num_experts_per_tok is {self.num_experts_per_tok}; "
                f"there are only {self.num_local_experts} experts (num_local_experts)"
            )
        layers = self.selected_layers
        if list(layers) != sorted(set(layers)) or layers[-1] >= self.num_hidden_layers:
            raise ConfigError(
                f"gpt_oss: selected_layers is {list(layers)}; "
                f"give ascending layers from 0 to {self.num_hidden_layers - 1}"
            )
        try:
            day.fromisoformat(self.date)
        except ValueError as error:
            raise ConfigError(f"gpt_oss: date is {self.date!r}; there is no such day") from error


def transformers_config(config: GptOssEncoderConfig) -> GptOssConfig:
    """The same model as transformers describes it."""
    sizes = {k: v for k, v in asdict(config).items() if k not in OURS}
    # Attention sinks need eager attention on a CPU: transformers has no sdpa for this model.
    # Weights start at 1 / sqrt(width), which is the published 0.02 at the published width.
    start = config.hidden_size**-0.5
    experts = "eager" if config.experts == "auto" else config.experts
    kernels: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": experts}
    return GptOssConfig(**sizes, **kernels, initializer_range=start, rope_parameters=dict(YARN))


def read_config(path: Path, config: GptOssEncoderConfig) -> GptOssEncoderConfig:
    """`config` with the sizes that `path` states. Raises CheckpointError if the file describes another architecture."""
    disk = read_json(path)
    sizes = {k: disk[k] for k in fields_dict(GptOssEncoderConfig) if k not in OURS and k in disk}
    for name, size in sizes.items():
        if type(size) is not int:
            raise CheckpointError(f"{path}: {name} is {shown(size)}, which is not a whole number; fetch it again")
    config = evolve(config, **sizes)
    plain = transformers_config(config)
    rope = {"rope_theta": disk.get("rope_theta", YARN["rope_theta"])}
    block = disk.get("rope_parameters") or disk.get("rope_scaling") or {}
    if not isinstance(block, dict):
        raise CheckpointError(f"{path}: its rope block is {shown(block, 60)}, which is no object; fetch it again")
    rope |= block
    fixed = {"model_type", "layer_types", "hidden_act", "attention_bias", "rms_norm_eps", "swiglu_limit"}
    differ = {k for k in fixed if k in disk and disk[k] != getattr(plain, k, FIXED_IN_CODE.get(k))}
    differ |= {k for k in YARN if k in rope and rope[k] != YARN[k]}
    if differ:
        raise CheckpointError(f"{path}: {', '.join(sorted(differ))} differ from GPT-OSS's; use another encoder")
    return config
