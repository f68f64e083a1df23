"""LoRA files: one content, three spellings. Read whole or refused, and written so that other tools agree.

diffusers   `transformer.LAYER.lora_A.weight`, as PEFT too; rank and alpha in the header's `lora_adapter_metadata`
comfy       `diffusion_model.LAYER.lora_A.weight` and `.alpha`
sd-scripts  `lora_unet_LAYER.lora_down.weight`, dots as underscores, and `.alpha`

All carry the header, which knows the layers by their names with dots.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lens_core.checkpoint import read_header, read_tensors, save_tensors
from lens_core.reading import one_line, parse_json
from lens_core.types import CheckpointError, ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
HEADER = "lora_adapter_metadata"  # diffusers' key: the fields of PEFT's LoraConfig, as JSON
SPELLINGS = ("diffusers", "comfy", "sd-scripts")

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
    """A LoRA file, or a folder with diffusers' `pytorch_lora_weights.safetensors` -> the pair of each layer.

    With `layers`, the model's own names, each key must fit one of them; without, names that are written with
    underscores must stand in the header. alpha is a layer's own tensor, else the header's (`lora_alpha`,
    `ss_network_alpha`), else the rank. Raises CheckpointError, which lists what fits nothing.
    """
    file = path / FILE if path.is_dir() else path
    found, header = read_tensors(file), read_header(file)
    for kind, pattern in _OTHERS.items():
        if any(re.search(pattern, key) for key in found):
            raise CheckpointError(f"{file}: is a {kind}; only plain LoRAs are read: extract one, or merge it elsewhere")
    about = _about(file, header)
    names = _aliases(layers or [str(n) for n in about.get("target_modules", ()) if isinstance(n, str)])
    parts: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, value in found.items():
        match = _KEY.fullmatch(key)
        prefix = next((p for p in _PREFIXES if key.startswith(p)), "")
        written = match[1].removeprefix(prefix) if match else ""
        layer = names.get(written) or ("" if layers or prefix == _FLAT else written)
        if match is None or not layer:
            strange.append(key)
            continue
        side = str({"A": "down", "B": "up", None: "alpha"}.get(match["side"], match["side"]))
        if side in parts.setdefault(layer, {}):
            raise CheckpointError(f"{file}: holds {layer!r} twice, in two spellings; fetch the file again")
        parts[layer][side] = value
    if strange or not parts:
        listed = ", ".join(repr(key)[1:-1][:120] for key in sorted(strange)[:5]) or "none at all"
        hint = "" if layers else "; give the model that it is for, so that its layers' names are known"
        raise CheckpointError(
            f"{file}: {len(strange)} of {len(found)} tensors fit no layer of this model ({listed}){hint}"
        )
    return {layer: _pair(file, layer, sides, about) for layer, sides in parts.items()}


def _aliases(layers: Collection[str]) -> dict[str, str]:
    """Every way to write a layer's name -> the name; what could be two layers is left out."""
    aliases: dict[str, str] = {}
    for alias, name in [
        *((name.replace(".", "_"), name) for name in layers),
        *((f"transformer_{name}".replace(".", "_"), name) for name in layers),
    ]:
        aliases[alias] = name if aliases.get(alias, name) == name else ""
    return {alias: name for alias, name in aliases.items() if name} | {name: name for name in layers}


def _about(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """The header's fields without the prefix of the network; `lora_alpha` is None where it gives none."""
    try:
        stored = parse_json(header.get(HEADER, "{}"), twins=True)
        about = {key.rpartition(".")[2]: value for key, value in stored.items()}
        given = [about["lora_alpha"]] if "lora_alpha" in about else []
        given += [header[key] for key in ("ss_network_alpha", "alpha") if key in header]
        about["lora_alpha"] = float(given[0]) if given else None
        about["alpha_pattern"] = {name: float(value) for name, value in (about.get("alpha_pattern") or {}).items()}
        about["target_modules"] = tuple(about.get("target_modules") or ())
        return about
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: the header of the LoRA file cannot be read ({one_line(error)}); fetch it again"
        ) from error


def _pair(file: Path, layer: str, sides: Mapping[str, Tensor], about: Mapping[str, Any]) -> Pair:
    if "down" not in sides or "up" not in sides:
        raise CheckpointError(f"{file}: {layer!r} has only its {', '.join(sorted(sides))}; fetch the file again")
    down, up = sides["down"], sides["up"]
    if down.ndim != 2 or up.ndim != 2 or not len(down) or len(down) != up.shape[1]:
        raise CheckpointError(f"{file}: {layer!r} is {list(up.shape)} x {list(down.shape)}, which is no product")
    alpha = about["alpha_pattern"].get(layer, about["lora_alpha"])
    if "alpha" in sides:
        if sides["alpha"].numel() != 1 or sides["alpha"].is_complex():
            raise CheckpointError(f"{file}: {layer!r} has an alpha of {list(sides['alpha'].shape)} numbers, not one")
        alpha = float(sides["alpha"])
    alpha = float(len(down)) if alpha is None else alpha
    if not (down.is_floating_point() and up.is_floating_point()):
        raise CheckpointError(f"{file}: {layer!r} is {up.dtype} x {down.dtype}, which are no plain weights")
    if not (abs(alpha) < float("inf") and bool(down.float().isfinite().all() & up.float().isfinite().all())):
        raise CheckpointError(f"{file}: {layer!r} holds numbers that are not finite; it was broken in training")
    return Pair(down, up, alpha)


def write(path: Path, pairs: Mapping[str, Pair], spelling: str = "diffusers", prefix: str = "transformer") -> None:
    """Write the pairs, by the layers' names with dots, in one of SPELLINGS. `read` gives them back bit for bit."""
    import torch

    if spelling not in SPELLINGS:
        raise ConfigError(f"no spelling is called {spelling!r}.{did_you_mean(spelling, SPELLINGS)}")
    rank = Counter(pair.rank for pair in pairs.values()).most_common(1)[0][0]
    alpha = Counter(pair.alpha for pair in pairs.values()).most_common(1)[0][0]
    about = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(pairs),
        "rank_pattern": {name: pair.rank for name, pair in sorted(pairs.items()) if pair.rank != rank},
        "alpha_pattern": {name: pair.alpha for name, pair in sorted(pairs.items()) if pair.alpha != alpha},
    }
    header = {HEADER: json.dumps({f"{prefix}.{key}": value for key, value in about.items()})}
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        start, down, up = {
            "diffusers": (f"{prefix}.{name}", "lora_A", "lora_B"),
            "comfy": (f"diffusion_model.{name}", "lora_A", "lora_B"),
            "sd-scripts": (_FLAT + name.replace(".", "_"), "lora_down", "lora_up"),
        }[spelling]
        tensors |= {f"{start}.{down}.weight": pair.down, f"{start}.{up}.weight": pair.up}
        if spelling != "diffusers":  # which reads the header alone
            exact = torch.tensor(pair.alpha, dtype=torch.float64)
            tensors[f"{start}.alpha"] = exact.float() if float(exact.float()) == pair.alpha else exact
    if len(tensors) != len(pairs) * (2 if spelling == "diffusers" else 3):
        raise CheckpointError(f"{path}: two layers would have one name in the spelling {spelling}; choose another")
    if spelling == "sd-scripts":
        header |= {"ss_network_module": "networks.lora", "ss_network_dim": f"{rank}", "ss_network_alpha": f"{alpha}"}
    save_tensors(path, tensors, header | {"modelspec.architecture": "lora"})
