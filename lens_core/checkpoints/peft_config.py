"""How strong an adapter is, as PEFT's configs say it: in `adapter_config.json`, or in the header of diffusers' files.

A layer's change is scaling * up @ down, with scaling = alpha / rank, or alpha / sqrt(rank) with `use_rslora`. alpha is
that of the first entry of `alpha_pattern` whose key matches the layer's name, else `lora_alpha`, which LoHa and LoKr
call `alpha`. A key matches as in
PEFT: it is a regular expression for the whole name or for its last parts (`peft.utils.other.get_pattern_key`).

A field that asks for more than that is refused by its name: nothing else would give the strength that was trained.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from attrs import field, frozen

from lens_core.types import CheckpointError

CONFIG = "adapter_config.json"  # PEFT's name
MODEL = "adapter_model.safetensors"
PARTS = {"use_dora": "magnitude", "lora_bias": "bias"}
"""Fields that ask for a tensor beside the factors -> its name."""
REFUSED = {
    "modules_to_save": "modules that were trained whole",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapters of bare parameters",
    "layer_replication": "repeated layers",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "an activated LoRA (aLoRA)",
    "arrow_config": "Arrow",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
"""Fields that change what an adapter computes, in ways that are not read -> what they ask for."""
KINDS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}
"""PEFT's names of the kinds that are read."""
_KNOWN = {
    "use_dora", "lora_bias",  # which the file's tensors show
    "alpha", "init_weights", "rank_dropout", "rank_dropout_scale", "module_dropout", "decompose_both",
    "decompose_factor", "use_effective_conv2d",  # of LoHa and LoKr: how their factors were begun and cut
    "r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "target_modules", "exclude_modules", "bias",
    "init_lora_weights", "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path",
    "revision", "inference_mode", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_config",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "qalora_group_size", "ensure_weight_tying", "velora_config",
    "fan_in_fan_out",  # which PEFT sets aside for linear layers
}  # fmt: skip
_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # of A and B that leave the weights below them as they are
_REPEATS = re.compile(r"[*+{]")
_GROUPS = re.compile(r"\)[*+{?]|\(\?|\\\d")


@frozen
class Strength:
    """What a LoRA file says of its layers together. `alpha` is None where it says nothing."""

    alpha: float | None = None
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()
    rslora: bool = False
    ranks: Callable[[str], int] | None = None
    names: tuple[str, ...] = field(factory=tuple)  # of layers, as far as they are listed
    kind: str | None = None  # LoRA, LoHa or LoKr, where it is said
    parts: tuple[str, ...] = ()  # what it says that there is beside the factors: "magnitude", "bias"

    def of(self, layer: str, rank: int) -> float:
        """alpha of a layer, such that its change is alpha / rank * up @ down."""
        alpha = next((value for key, value in self.patterns if key.match(layer)), self.alpha)
        if alpha is None:
            return float(rank)
        return alpha * math.sqrt(rank) if self.rslora else alpha


def strength(config: Mapping[str, Any], where: str, whole: bool = False) -> Strength:
    """What a LoraConfig says; `whole`: all of its fields are there, or have PEFT's defaults, and ranks are checked.

    Raises CheckpointError, which begins with `where`, for fields that cannot be honoured and for nonsense.
    """
    kind = config.get("peft_type", "LORA")
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"{where}: is an adapter of the kind {kind!r:.40}; {', '.join(KINDS)} are read")
    for name, value in config.items():
        if name in _KNOWN or value in (None, False, 0, "", [], {}):
            continue
        what = REFUSED.get(name, "which this Lens does not know")
        raise CheckpointError(
            f"{where}: {name!r:.60} is set: {what}; it cannot be honoured: merge it into its model with PEFT"
        )
    if config.get("bias") not in (None, "none"):
        raise CheckpointError(f"{where}: 'bias' is {config['bias']!r:.40}: trained biases are not read; train without")
    start = config.get("init_lora_weights", True)
    if not any(start is known or (isinstance(start, str) and start == known) for known in (*_STARTS, None)):
        raise CheckpointError(
            f"{where}: 'init_lora_weights' is {start!r:.40}, which changed the weights below the adapter too; save it "
            "with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    try:
        alpha = config.get("lora_alpha" if kind == "LORA" else "alpha", 8 if whole else None)
        targets = config.get("target_modules")
        return Strength(
            None if alpha is None else _number(alpha, where),
            _patterns(config.get("alpha_pattern"), where),
            bool(config.get("use_rslora")),
            _ranks(config, where) if whole else None,
            tuple(n for n in targets if isinstance(n, str)) if isinstance(targets, list | tuple) else (),
            KINDS[kind] if whole or "peft_type" in config else None,
            tuple(part for field, part in PARTS.items() if config.get(field)),
        )
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{where}: cannot be read ({' '.join(str(error).split())}); fetch it again") from error


def _ranks(config: Mapping[str, Any], where: str) -> Callable[[str], int]:
    patterns, rank = _patterns(config.get("rank_pattern"), where), int(_number(config.get("r", 8), where))
    return lambda layer: int(next((value for key, value in patterns if key.match(layer)), rank))


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r:.40} is no number")
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value!r:.40} is not finite")
    return number


def _patterns(entries: Any, where: str) -> tuple[tuple[re.Pattern[str], float], ...]:
    """Compiled as PEFT matches them; a stranger's expression must not be one that runs for ever."""
    made, hard = [], 0
    for key, value in (entries or {}).items():
        repeats = len(_REPEATS.findall(key))
        hard += repeats > 0
        if len(key) > 500 or repeats > 3 or hard > 50 or _GROUPS.search(key):
            raise CheckpointError(f"{where}: the pattern {key!r:.60} is too intricate; write the layers' names out")
        try:
            made.append((re.compile(rf"(.*\.)?({key})$"), _number(value, where)))
        except (re.error, RecursionError) as error:
            raise CheckpointError(f"{where}: the pattern {key!r:.60} is no regular expression ({error})") from error
    return tuple(made)
