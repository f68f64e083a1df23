"""Files of adapters: one content, three key formats. Read whole or refused, and written so that other tools agree.

diffusers   `transformer.LAYER.lora_A.weight`, as PEFT too; rank and alpha in the header's `lora_adapter_metadata`
comfy       `diffusion_model.LAYER.lora_A.weight` and `.alpha`
sd-scripts  `lora_unet_LAYER.lora_down.weight`, dots as underscores, and `.alpha`; LyCORIS begins with `lycoris_`

LoHa's and LoKr's factors, `LAYER.hada_w1_a`, `LAYER.lokr_w1`, have the names of LyCORIS everywhere, PEFT included.
DoRA's lengths are `LAYER.lora_magnitude_vector` to PEFT and `LAYER.dora_scale` to the others. `adapters` says what all
of them mean.

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

from attrs import evolve

from lens_core.checkpoints import peft_config
from lens_core.checkpoints.adapters import FACTORS, Adapter, LoHa, LoKr, LoRA, kind_of
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
_KEY = re.compile(
    r"(.+)\.(?:lora_(?P<side>[AB]|down|up)(?:\.[^.]+)?\.(?P<matrix>weight|bias)"
    r"|(?P<length>lora_magnitude_vector)(?:\.[^.]+){0,2}|(?P<other>dora_scale|alpha)"
    r"|(?P<factor>hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)(?:\.[^.]+)?)"
)
_SIDES = {"A": "down", "B": "up", "down": "down", "up": "up"}
_FLAT = ("lora_unet_", "lycoris_")
_PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", *_FLAT)
"""Of diffusers, Comfy, PEFT, sd-scripts and LyCORIS."""
_OTHERS = {
    "LoHa or LoKr in Tucker's form, which linear layers do not have": r"\.hada_t[12]|\.lokr_t2",
    "LoCon": r"\.lora_mid\.",
    "OFT": r"\.oft_",
    "whole difference of weights": r"\.diff(_b)?$",
    "LoRA of embeddings": r"\.lora_embedding_[AB]",
    "LoRA with modules that were trained whole (modules_to_save)": r"\.modules_to_save\.",
    "LoRA with trained tokens": r"\.token_adapter\.|trainable_tokens_",
}
"""Adapters that cannot be honoured -> how their keys are known."""
_SPELLINGS = {
    "diffusers": {
        "down": "lora_A.weight", "up": "lora_B.weight", "bias": "lora_B.bias", "magnitude": "lora_magnitude_vector",
    },
    "comfy": {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "dora_scale"},
    "sd-scripts": {"down": "lora_down.weight", "up": "lora_up.weight", "magnitude": "dora_scale"},
}  # fmt: skip
"""Key format -> part of an adapter -> what its key ends in. LoHa's and LoKr's factors have the same names in the last
two, and diffusers reads neither."""


def read(path: Path, layers: Collection[str] = ()) -> dict[str, Adapter]:
    """A file of adapters, or a folder with diffusers' `pytorch_lora_weights.safetensors` or PEFT's
    `adapter_model.safetensors` -> the adapter of each layer.

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
            raise CheckpointError(
                f"{file}: is a {kind}; LoRA, DoRA, LoHa and LoKr are read: extract one, or merge it elsewhere"
            )
    about = _about(file, header, tensors)
    parts, strange = _sorted(file, tensors, layers, _aliases(layers or about.names))
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
    for part in about.parts:
        if not any(part in sides for sides in parts.values()):
            raise CheckpointError(
                f"{file}: its config says that there is a {part}, and no layer has one; fetch it again"
            )
    return {layer: _adapter(file, layer, sides, about) for layer, sides in parts.items()}


def _sorted(
    file: Path, tensors: Mapping[str, Tensor], layers: Collection[str], names: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors by layer and by part, and the keys that fit none."""
    parts: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        prefix = next((p for p in _PREFIXES if key.startswith(p)), "")
        written = match[1].removeprefix(prefix) if match else ""
        # sd-scripts joins a layer's name by underscores, which only a list of layers can undo.
        layer = names.get(written) or ("" if layers or prefix in _FLAT else written)
        part = _part(match) if match else None
        if part is None or not layer:
            strange.append(key)
            continue
        # Merged files hold a layer in two formats: which one is meant cannot be known.
        if part in parts.setdefault(layer, {}):
            raise CheckpointError(f"{file}: holds {shown(layer)} twice, in two key formats; fetch the file again")
        parts[layer][part] = value
    return parts, strange


def _part(match: re.Match[str]) -> str | None:
    """Which part of an adapter a key is; None for a bias beside the first matrix, which nobody trains."""
    if match["side"]:
        side = _SIDES[match["side"]]
        return side if match["matrix"] == "weight" else "bias" if side == "up" else None
    if match["length"] or match["other"] == "dora_scale":
        return "magnitude"
    return match["other"] or match["factor"]


def _file(path: Path) -> Path:
    """The LoRA file that is meant by a path: itself, or the one in a folder."""
    if not path.exists():
        raise CheckpointError(
            f"{path}: there is no such LoRA; names of the Hub are not read here: give its file or folder"
        )
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


def _adapter(file: Path, layer: str, sides: Mapping[str, Tensor], about: Strength) -> Adapter:
    """The adapter of one layer, once its tensors fit each other. Raises CheckpointError."""
    what = f"{file}: {shown(layer)}"
    kind = kind_of(sides)
    if kind is None:
        held = ", ".join(sorted(sides))
        raise CheckpointError(f"{what} has {held}, which are not one adapter's; fetch the file again")
    if about.kind not in (None, kind):
        raise CheckpointError(f"{what} is a {kind}, and {peft_config.CONFIG} beside it says {about.kind}")
    for value in sides.values():
        if not value.is_floating_point() and value is not sides.get("alpha"):
            dtypes = " x ".join(str(sides[name].dtype) for name in reversed(FACTORS[kind]) if name in sides)
            raise CheckpointError(f"{what} is {dtypes}, which are no plain weights")
    made = {"LoRA": _lora, "LoHa": _loha, "LoKr": _lokr}[kind](what, sides)
    rank = made.rank
    if about.ranks is not None and rank not in (None, about.ranks(layer)):
        raise CheckpointError(
            f"{what} has the rank {rank}, and {peft_config.CONFIG} beside it says {about.ranks(layer)}; the two do not "
            "belong together"
        )
    if isinstance(made, LoKr) and rank is None and about.ranks is not None:
        rank = about.ranks(layer)  # PEFT multiplies by alpha / rank even then; others do not
        made = evolve(made, rank=rank)
    alpha = _alpha(what, sides, about.of(layer, rank or 1))
    # After the cast: a finite float64 may be infinite as float32, in which the product is computed.
    finite = all(bool(value.float().isfinite().all()) for name, value in sides.items() if name != "alpha")
    if not finite or not abs(alpha) < float("inf"):
        raise CheckpointError(f"{what} holds numbers that are not finite; it was broken in training")
    return evolve(made, alpha=alpha, magnitude=_magnitude(what, sides, made.shape), bias=_bias(what, sides, made.shape))


def _alpha(what: str, sides: Mapping[str, Tensor], elsewhere: float) -> float:
    if "alpha" not in sides:
        return elsewhere
    if sides["alpha"].numel() != 1 or sides["alpha"].is_complex():
        raise CheckpointError(f"{what} has an alpha of {list(sides['alpha'].shape)} numbers, not one")
    return float(sides["alpha"])


def _lora(what: str, sides: Mapping[str, Tensor]) -> LoRA:
    if "down" not in sides or "up" not in sides:
        raise CheckpointError(f"{what} has only its {', '.join(sorted(sides))}; fetch the file again")
    _check_product(what, sides["up"], sides["down"])
    return LoRA(sides["down"], sides["up"], 1.0)


def _loha(what: str, sides: Mapping[str, Tensor]) -> LoHa:
    if any(name not in sides for name in FACTORS["LoHa"]):
        raise CheckpointError(f"{what} has only its {', '.join(sorted(sides))}; fetch the file again")
    a, b, c, d = (sides[name] for name in FACTORS["LoHa"])
    _check_product(what, a, b)
    _check_product(what, c, d)
    if (len(a), *b.shape) != (len(c), *d.shape):
        raise CheckpointError(
            f"{what} is {list(a.shape)} x {list(b.shape)} times {list(c.shape)} x {list(d.shape)}, which do not fit"
        )
    return LoHa((a, b), (c, d), 1.0)


def _lokr(what: str, sides: Mapping[str, Tensor]) -> LoKr:
    made = []
    for name in ("lokr_w1", "lokr_w2"):
        whole, halves = sides.get(name), [sides[n] for n in (f"{name}_a", f"{name}_b") if n in sides]
        if (whole is None) == (not halves) or len(halves) == 1:
            held = ", ".join(sorted(sides))
            raise CheckpointError(f"{what} has {held}, of which no {name} can be made; fetch the file again")
        _check_product(what, *(halves if whole is None else [whole]))
        made.append(tuple(halves) if whole is None else (whole,))
    ranks = {len(factors[1]) for factors in made if len(factors) == 2}
    if len(ranks) > 1:  # by which of them its alpha is divided, tools do not agree
        raise CheckpointError(f"{what} has factors of the ranks {' and '.join(map(str, sorted(ranks)))}; give them one")
    return LoKr(made[0], made[1], 1.0, next(iter(ranks), None))


def _check_product(what: str, *matrices: Tensor) -> None:
    fits = all(matrix.ndim == 2 and matrix.numel() for matrix in matrices)
    if not fits or (len(matrices) == 2 and matrices[0].shape[1] != len(matrices[1])):
        raise CheckpointError(f"{what} is {' x '.join(str(list(m.shape)) for m in matrices)}, which is no product")


def _magnitude(what: str, sides: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor | None:
    """DoRA's lengths: [out], of rows, or [1,in], of columns."""
    if "magnitude" not in sides:
        return None
    stored, (out, inner) = sides["magnitude"], shape
    # [1,out] is no row: a layer of as many inputs would be read as one of LyCORIS's columns.
    if tuple(stored.shape) in ((out,), (out, 1)):
        return stored.reshape(out)
    if tuple(stored.shape) == (1, inner):
        return stored
    raise CheckpointError(
        f"{what} has DoRA lengths of the shape {list(stored.shape)}; a layer of {list(shape)} has {out} of its rows, "
        f"or {[1, inner]} of its columns"
    )


def _bias(what: str, sides: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor | None:
    if "bias" not in sides:
        return None
    if tuple(sides["bias"].shape) != shape[:1]:
        raise CheckpointError(f"{what} has a bias of the shape {list(sides['bias'].shape)} for {shape[0]} outputs")
    return sides["bias"]


def _exact(name: str, names: Collection[str]) -> str:
    """A key for PEFT's patterns that matches this layer and no other: the name, unless another one ends in it."""
    return f"^{re.escape(name)}" if any(n != name and re.match(rf"(.*\.)?({name})$", n) for n in names) else name


def write(
    path: Path, adapters: Mapping[str, Adapter], key_format: str = "diffusers", prefix: str = "transformer"
) -> None:
    """Write the adapters, by the layers' names with dots, in one of KEY_FORMATS. `read` gives them back bit for bit.

    Raises CheckpointError for what the format cannot hold."""
    if key_format not in KEY_FORMATS:
        raise ConfigError(f"no key format is called {shown(key_format)}.{did_you_mean(key_format, KEY_FORMATS)}")
    tensors: dict[str, Tensor] = {}
    count = 0
    for name, adapter in adapters.items():
        start = {
            "diffusers": f"{prefix}.{name}",
            "comfy": f"diffusion_model.{name}",
            "sd-scripts": _FLAT[0] + name.replace(".", "_"),
        }[key_format]
        parts = _written(f"{path}: {shown(name)}", adapter, key_format)
        tensors |= {f"{start}.{key}": value for key, value in parts.items()}
        count += len(parts)
    # Underscores can make one name of two layers.
    if len(tensors) != count:
        raise CheckpointError(f"{path}: two layers would have one name in the key format {key_format}; choose another")
    save_tensors(path, tensors, _header_of(adapters, key_format, prefix))


def _written(what: str, adapter: Adapter, key_format: str) -> dict[str, Tensor]:
    """The tensors of one adapter by what their keys end in."""
    import torch

    spellings = _SPELLINGS[key_format]
    if key_format == "diffusers" and adapter.kind != "LoRA":
        raise CheckpointError(f"{what} is a {adapter.kind}, which diffusers does not read; write it as comfy")
    if adapter.bias is not None and "bias" not in spellings:
        raise CheckpointError(f"{what} has a bias, for which {key_format} has no key; write it as diffusers")
    parts = {spellings.get(name, name): value for name, value in adapter.factors.items()}
    if adapter.bias is not None:
        parts[spellings["bias"]] = adapter.bias
    if (lengths := adapter.magnitude) is not None:
        if key_format == "diffusers" and lengths.ndim == 2:
            raise CheckpointError(
                f"{what} has DoRA lengths of columns, which diffusers does not read; write it as comfy"
            )
        # By its two dimensions other tools know that it belongs to rows.
        parts[spellings["magnitude"]] = lengths if key_format == "diffusers" or lengths.ndim == 2 else lengths[:, None]
    if key_format != "diffusers":  # which reads the header alone
        if isinstance(adapter, LoKr) and len(adapter.w1) == len(adapter.w2) == 1 and adapter.scale != 1:
            raise CheckpointError(
                f"{what} is {adapter.scale:g} times a LoKr of whole factors, which {key_format} takes for 1; merge it"
            )
        # Other tools write float32; float64 only where that would round, so that `read` gives it back exactly.
        exact = torch.tensor(adapter.alpha, dtype=torch.float64)
        parts["alpha"] = exact.float() if float(exact.float()) == adapter.alpha else exact
    return parts


def _header_of(adapters: Mapping[str, Adapter], key_format: str, prefix: str) -> dict[str, str]:
    """What PEFT's config says of them: one rank and one alpha; layers that differ from the most common as patterns."""
    ranks = {name: adapter.rank or 1 for name, adapter in adapters.items()}
    alphas = {name: adapter.alpha for name, adapter in adapters.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    about: dict[str, object] = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(adapters),
        "rank_pattern": {_exact(n, adapters): value for n, value in sorted(ranks.items()) if value != rank},
        "alpha_pattern": {_exact(n, adapters): value for n, value in sorted(alphas.items()) if value != alpha},
    }
    about |= {
        field: True
        for field, part in peft_config.PARTS.items()
        if any(getattr(a, part) is not None for a in adapters.values())
    }
    header = {HEADER: json.dumps({f"{prefix}.{key}": value for key, value in about.items()})}
    if key_format == "sd-scripts":
        kinds = {adapter.kind for adapter in adapters.values()}
        module = "networks.lora" if kinds == {"LoRA"} else "lycoris.kohya"
        header |= {"ss_network_module": module, "ss_network_dim": f"{rank}", "ss_network_alpha": f"{alpha}"}
    return header | {"modelspec.architecture": "lora"}
