"""LoRA files: one content, three key formats. Read whole or refused, and written so that other tools agree.

diffusers   `transformer.LAYER.lora_A.weight`, as PEFT too; rank and alpha in the header's `lora_adapter_metadata`
comfy       `diffusion_model.LAYER.lora_A.weight` and `.alpha`
sd-scripts  `lora_unet_LAYER.lora_down.weight`, dots as underscores, and `.alpha`

All carry the header, which knows the layers by their names with dots. PEFT's own files, `adapter_model.safetensors`,
have none: what they are to be multiplied by stands in the `adapter_config.json` beside them (`peft_config`).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from lens_core.checkpoints import peft_config
from lens_core.checkpoints.peft_config import Strength
from lens_core.checkpoints.tensor_files import read_header, read_tensors, save_tensors
from lens_core.io.atomic_files import read_json
from lens_core.io.readers import one_line, parse_json, shown
from lens_core.types import CheckpointError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
HEADER = "lora_adapter_metadata"  # diffusers' key: the fields of PEFT's LoraConfig, as JSON
KEY_FORMATS = ("diffusers", "comfy", "sd-scripts")
_KEY = re.compile(r"(.+)\.(?:lora_(?P<side>[AB]|down|up)(?:\.[^.]+)?\.weight|(?P<alpha>alpha))")
_FLAT = "lora_unet_"
_PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", _FLAT)
"""Of diffusers, Comfy, PEFT and sd-scripts."""
_OTHERS = {
    "LoHa": r"\.hada_",
    "LoKr": r"\.lokr_",
    "DoRA": r"\.dora_scale$|lora_magnitude_vector",
    "LoCon": r"\.lora_mid\.",
    "OFT": r"\.oft_",
    "LoRA with a bias beside its matrices (lora_bias)": r"\.lora_(B|up)(\.[^.]+)?\.bias$",
    "LoRA of embeddings": r"\.lora_embedding_[AB]",
    "LoRA with modules that were trained whole (modules_to_save)": r"\.modules_to_save\.",
    "LoRA with trained tokens": r"\.token_adapter\.|trainable_tokens_",
}
"""Adapters that are something else than up @ down -> how their keys are known."""


@frozen
class Pair:
    """One layer's tensors: `down` [rank,in], `up` [out,rank]; the change is alpha / rank * up @ down."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)


def read(path: Path, layers: Collection[str] = ()) -> dict[str, Pair]:
    """A LoRA file, or a folder with diffusers' `pytorch_lora_weights.safetensors` or PEFT's
    `adapter_model.safetensors` -> the pair of each layer.

    With `layers`, the model's own names, each key must fit one of them; without, names that are written with
    underscores must stand in the header. alpha is a layer's own tensor, else what the header says
    (`lora_adapter_metadata`, `ss_network_alpha`), else what an `adapter_config.json` beside the file says, else the
    rank. Raises CheckpointError, which lists what fits nothing, or names what cannot be honoured.
    """
    file = _file(path)
    tensors, header = read_tensors(file), read_header(file)
    # First: their keys would otherwise be reported one by one as tensors that fit no layer.
    for kind, pattern in _OTHERS.items():
        if any(re.search(pattern, key) for key in tensors):
            raise CheckpointError(f"{file}: is a {kind}; only plain LoRAs are read: extract one, or merge it elsewhere")
    about = _about(file, header, tensors)
    names = _aliases(layers or about.names)
    parts: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        prefix = next((p for p in _PREFIXES if key.startswith(p)), "")
        written = match[1].removeprefix(prefix) if match else ""
        # sd-scripts joins a layer's name by underscores, which only a list of layers can undo.
        layer = names.get(written) or ("" if layers or prefix == _FLAT else written)
        if match is None or not layer:
            strange.append(key)
            continue
        side = str({"A": "down", "B": "up", None: "alpha"}.get(match["side"], match["side"]))
        # Merged files hold a layer in two formats: which one is meant cannot be known.
        if side in parts.setdefault(layer, {}):
            raise CheckpointError(f"{file}: holds {shown(layer)} twice, in two key formats; fetch the file again")
        parts[layer][side] = value
    if strange or not parts:
        listed = ", ".join(repr(key)[1:-1][:120] for key in sorted(strange)[:5]) or "none at all"
        hint = "" if layers else "; give the model that it is for, so that its layers' names are known"
        raise CheckpointError(
            f"{file}: {len(strange)} of {len(tensors)} tensors fit no layer of this model ({listed}){hint}"
        )
    # "Dynamic" and the like are harmless where every layer has an alpha; elsewhere the strength would be a guess.
    if (
        about.alpha is not None
        and math.isnan(about.alpha)
        and (bare := [k for k, v in parts.items() if "alpha" not in v])
    ):
        alpha = header.get("ss_network_alpha", header.get("alpha"))
        raise CheckpointError(
            f"{file}: its alpha is {alpha!r:.40}, which is no number, and {shown(bare[0])} has none either"
        )
    return {layer: _pair(file, layer, sides, about) for layer, sides in parts.items()}


def _file(path: Path) -> Path:
    """The LoRA file that is meant by a path: itself, or the one in a folder."""
    if not path.is_dir():
        return path
    there = [path / name for name in (FILE, peft_config.MODEL) if (path / name).is_file()]
    if len(there) > 1:
        raise CheckpointError(f"{path}: holds {FILE} and {peft_config.MODEL}; name the file that is meant")
    if there:
        return there[0]
    if (path / "adapter_model.bin").is_file():
        raise CheckpointError(f"{path}: its adapter_model.bin is a pickle, which can run code; save it as safetensors")
    others = sorted(
        p.relative_to(path).as_posix() for p in (*path.glob("*.safetensors"), *path.glob("*/adapter_model*"))
    )
    hint = f"; name the file: {', '.join(others[:5])}" if others else "; check the path"
    raise CheckpointError(f"{path}: holds neither {FILE} nor {peft_config.MODEL}{hint}")


def _aliases(layers: Collection[str]) -> dict[str, str]:
    """Every way to write a layer's name -> the name; what could be two layers is left out."""
    aliases: dict[str, str] = {}
    for alias, name in [
        *((name.replace(".", "_"), name) for name in layers),
        *((f"transformer_{name}".replace(".", "_"), name) for name in layers),
    ]:
        # a.b_c and a_b.c are one name with underscores.
        aliases[alias] = name if aliases.get(alias, name) == name else ""
    return {alias: name for alias, name in aliases.items() if name} | {name: name for name in layers}


def _about(file: Path, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Strength:
    """What the file says of all its layers together, in its header or in PEFT's config beside it."""
    if HEADER in header:
        stored = _stored(file, header[HEADER])
        plain = _header_alpha(header)
        about = peft_config.strength(stored, f"{file}: the header of the LoRA file")
        return evolve(about, alpha=plain) if about.alpha is None else about
    config = file.with_name(peft_config.CONFIG)
    plain = _header_alpha(header)
    # A config beside a file that states its alpha may be that of another LoRA in the same folder.
    if plain is None and not any(key.endswith(".alpha") for key in tensors) and config.is_file():
        return peft_config.strength(read_json(config), str(config), whole=True)
    return Strength(plain)


def _header_alpha(header: Mapping[str, str]) -> float | None:
    """alpha by sd-scripts' name, or the plain one; NaN if it is no number, such as "Dynamic"."""
    text = header.get("ss_network_alpha", header.get("alpha"))
    try:
        return None if text is None else float(text)
    except ValueError:
        return math.nan


def _stored(file: Path, text: str) -> dict[str, object]:
    """The fields that diffusers keeps of a LoraConfig: those of the backbone, without its prefix."""
    try:
        stored = parse_json(text, allow_duplicate_keys=True)
        owners = {key.rpartition(".")[0] for key in stored}
        # diffusers stores adapters of several models in one header, each key after its model's name.
        owner = next((name for name in ("transformer", "") if name in owners), min(owners, default=""))
        return {key.rpartition(".")[2]: value for key, value in stored.items() if key.rpartition(".")[0] == owner}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: the header of the LoRA file cannot be read ({one_line(error)}); fetch it again"
        ) from error


def _pair(file: Path, layer: str, sides: Mapping[str, Tensor], about: Strength) -> Pair:
    if "down" not in sides or "up" not in sides:
        raise CheckpointError(f"{file}: {shown(layer)} has only its {', '.join(sorted(sides))}; fetch the file again")
    down, up = sides["down"], sides["up"]
    if down.ndim != 2 or up.ndim != 2 or not len(down) or len(down) != up.shape[1]:
        raise CheckpointError(f"{file}: {shown(layer)} is {list(up.shape)} x {list(down.shape)}, which is no product")
    if about.ranks is not None and about.ranks(layer) != len(down):
        raise CheckpointError(
            f"{file}: {shown(layer)} has the rank {len(down)}, and {peft_config.CONFIG} beside it says "
            f"{about.ranks(layer)}; the two do not belong together"
        )
    alpha = about.of(layer, len(down))
    if "alpha" in sides:
        if sides["alpha"].numel() != 1 or sides["alpha"].is_complex():
            raise CheckpointError(
                f"{file}: {shown(layer)} has an alpha of {list(sides['alpha'].shape)} numbers, not one"
            )
        alpha = float(sides["alpha"])
    if not (down.is_floating_point() and up.is_floating_point()):
        raise CheckpointError(f"{file}: {shown(layer)} is {up.dtype} x {down.dtype}, which are no plain weights")
    # After the cast: a finite float64 may be infinite as float32, in which the product is computed.
    if not (abs(alpha) < float("inf") and bool(down.float().isfinite().all() & up.float().isfinite().all())):
        raise CheckpointError(f"{file}: {shown(layer)} holds numbers that are not finite; it was broken in training")
    return Pair(down, up, alpha)


def _exact(name: str, names: Collection[str]) -> str:
    """A key for PEFT's patterns that matches this layer and no other: the name, unless another one ends in it."""
    return f"^{re.escape(name)}" if any(n != name and re.match(rf"(.*\.)?({name})$", n) for n in names) else name


def write(path: Path, pairs: Mapping[str, Pair], key_format: str = "diffusers", prefix: str = "transformer") -> None:
    """Write the pairs, by the layers' names with dots, in one of KEY_FORMATS. `read` gives them back bit for bit."""
    import torch

    if key_format not in KEY_FORMATS:
        raise ConfigError(f"no key format is called {shown(key_format)}.{did_you_mean(key_format, KEY_FORMATS)}")
    # PEFT's config has one rank and one alpha; layers that differ from the most common are listed as patterns.
    rank = Counter(pair.rank for pair in pairs.values()).most_common(1)[0][0]
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    about = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(pairs),
        "rank_pattern": {_exact(n, pairs): pair.rank for n, pair in sorted(pairs.items()) if pair.rank != rank},
        "alpha_pattern": {_exact(n, pairs): pair.alpha for n, pair in sorted(pairs.items()) if pair.alpha != alpha},
    }
    header = {HEADER: json.dumps({f"{prefix}.{key}": value for key, value in about.items()})}
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        start, down, up = {
            "diffusers": (f"{prefix}.{name}", "lora_A", "lora_B"),
            "comfy": (f"diffusion_model.{name}", "lora_A", "lora_B"),
            "sd-scripts": (_FLAT + name.replace(".", "_"), "lora_down", "lora_up"),
        }[key_format]
        tensors |= {f"{start}.{down}.weight": pair.down, f"{start}.{up}.weight": pair.up}
        if key_format != "diffusers":  # which reads the header alone
            # Other tools write float32; float64 only where that would round, so that `read` gives it back exactly.
            exact = torch.tensor(pair.alpha, dtype=torch.float64)
            tensors[f"{start}.alpha"] = exact.float() if float(exact.float()) == pair.alpha else exact
    # Underscores can make one name of two layers.
    if len(tensors) != len(pairs) * (2 if key_format == "diffusers" else 3):
        raise CheckpointError(f"{path}: two layers would have one name in the key format {key_format}; choose another")
    if key_format == "sd-scripts":
        header |= {"ss_network_module": "networks.lora", "ss_network_dim": f"{rank}", "ss_network_alpha": f"{alpha}"}
    save_tensors(path, tensors, header | {"modelspec.architecture": "lora"})
