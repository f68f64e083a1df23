"""The published checkpoints: the diffusers layout, whose `model_index.json` names `LensPipeline`, Comfy's folder of
three files, and a backbone alone in one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lens_core.checkpoints import hub
from lens_core.checkpoints.manifest import SINGLE_FILES
from lens_core.checkpoints.single_files import read_single_file
from lens_core.io.atomic_files import read_json
from lens_core.io.readers import one_line
from lens_core.types import CheckpointError
from lens_mmdit.single import find_prefix

SIZES: dict[str, dict[str, tuple[int, int]]] = {
    "1024": {
        "1:2": (1472, 736),
        "9:16": (1376, 768),
        "2:3": (1248, 832),
        "3:4": (1152, 864),
        "1:1": (1024, 1024),
        "4:3": (864, 1152),
        "3:2": (832, 1248),
        "16:9": (768, 1376),
        "2:1": (736, 1472),
    },
    "1440": {
        "1:2": (2080, 1040),
        "9:16": (1936, 1088),
        "2:3": (1760, 1168),
        "3:4": (1616, 1216),
        "1:1": (1440, 1440),
        "4:3": (1216, 1616),
        "3:2": (1168, 1760),
        "16:9": (1088, 1936),
        "2:1": (1040, 2080),
    },
}
"""Base resolution -> aspect ratio, width:height -> the bucket (height, width) in px that Lens was trained on."""

PRESETS: dict[str, dict[str, float]] = {
    "Lens": {"steps": 20, "guidance_scale": 5.0},
    "Lens-Turbo": {"steps": 4, "guidance_scale": 1.0},
    "Lens-Base": {"steps": 50, "guidance_scale": 5.0},
}
"""Variant -> how the paper samples from it."""

REPOSITORIES: dict[str, tuple[str, ...]] = {
    "Lens": ("YuCollection/Lens-Diffusers",),
    "Lens-Turbo": ("YuCollection/Lens-Turbo-Diffusers", "SceneWorks/Lens-Turbo"),
    "Lens-Base": ("YuCollection/Lens-Base-Diffusers",),
}
"""What microsoft/NAME on the Hub held until it was withdrawn in 2026 -> where the same files are."""


def fetch(uri: str) -> Path | None:
    """The folder of a repository that is known to hold a published checkpoint; None for any other.

    Raises CheckpointError, which names the mirrors. A withdrawn original is read from the Hub's cache alone.
    """
    name, _, revision = uri.partition("@")
    for variant, mirrors in REPOSITORIES.items():
        withdrawn = name.lower() == f"microsoft/{variant}".lower()
        if (withdrawn or name in mirrors) and not Path(uri).is_dir():
            try:
                return hub.snapshot(name, revision or None, local=withdrawn)
            except CheckpointError as error:
                others = " or ".join(m for m in mirrors if m != name)
                if withdrawn:
                    raise CheckpointError(f"{name}: was withdrawn; the same files are in {others}") from error
                raise CheckpointError(f"{error}; the same files are in {others}" if others else str(error)) from error
    return None


PARTS = {
    "vae": ("vae", "lens_flux2:flux2"),
    "text_encoder": ("text_encoders", "lens_gpt_oss:gpt_oss"),
    "backbone": ("diffusion_models", "lens_mmdit:mmdit"),
}
"""Part -> its sub-folder in Comfy's layout, and what reads it."""


def describe(folder: Path) -> dict[str, Any] | None:
    """The `lens.json` of a published folder, or of a single file with a backbone, or None if `folder` is neither.

    `published:`, and the names of the repositories, are described without a file: as published, in every default.

    The VAE and the text encoder read their own config files. Raises CheckpointError for JSON that cannot be read and
    for a transformer that is not Lens's. Fields of `transformer/config.json` that diffusers adds for itself (a leading
    underscore) are left out; every other one is passed on, so that an architecture we do not know is refused by name.
    """
    if folder.suffix in SINGLE_FILES and folder.is_file():
        return _single_file(folder)
    if (folder / "diffusion_models").is_dir() and not (folder / "model_index.json").is_file():
        return _comfy_folder(folder)
    if not folder.exists() and (variant := _variant_of_repository(str(folder))):
        return _known_checkpoint(variant)
    if not (folder / "model_index.json").is_file():
        return None
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "LensPipeline":
        return None
    path = folder / "transformer" / "config.json"
    config = read_json(path)
    if config.get("_class_name", "LensTransformer2DModel") != "LensTransformer2DModel":
        raise CheckpointError(f"{path} describes a {one_line(config['_class_name'], 80)}, not a LensTransformer2DModel")
    variant, note = _variant(folder, index)
    return {
        "format": 1,
        "components": {
            "vae": {"use": "lens_flux2:flux2", "config": {}},
            "text_encoder": {"use": "lens_gpt_oss:gpt_oss", "config": _encoder_layers(config)},
            "backbone": {
                "use": "lens_mmdit:mmdit",
                "config": {k: v for k, v in config.items() if not k.startswith("_")},
            },
            "sampler": {"use": "lens_flow:euler", "config": {}},
        },
        "presets": {**PRESETS[variant], "base_resolution": 1024, "sizes": SIZES},
        "note": note,
    }


def _variant_of_repository(name: str) -> str | None:
    """The variant that a repository is known to hold; `published:` is the one that all the others came from."""
    name = name.partition("@")[0]
    known = {mirror: variant for variant, mirrors in REPOSITORIES.items() for mirror in mirrors}
    known |= {f"microsoft/{variant}": variant for variant in REPOSITORIES} | {"published:": "Lens"}
    return known.get(name)


def _known_checkpoint(variant: str) -> dict[str, Any]:
    parts: dict[str, Any] = {part: {"use": use, "config": {}} for part, (_, use) in PARTS.items()}
    return {
        "format": 1,
        "components": {**parts, "sampler": {"use": "lens_flow:euler", "config": {}}},
        "presets": {**PRESETS[variant], "base_resolution": 1024, "sizes": SIZES},
        "note": f"the preset of {variant}, as its repository is known",
    }


def _single_file(file: Path) -> dict[str, Any] | None:
    """One file: a backbone, which names its variant in its own name."""
    if find_prefix(read_single_file(file)[0]) is None:
        return None
    parts = {"backbone": {"use": PARTS["backbone"][1], "file": file.name}}
    return _checkpoint_of_parts(parts, file.name)


def _comfy_folder(folder: Path) -> dict[str, Any]:
    """Comfy's layout: `diffusion_models/`, `text_encoders/` and `vae/`, one file in each. Parts may be absent."""
    parts: dict[str, Any] = {}
    for part, (place, use) in PARTS.items():
        files = sorted(p.relative_to(folder) for p in (folder / place).glob("*") if p.suffix in SINGLE_FILES)
        if len(files) > 1:
            raise CheckpointError(
                f"{folder / place}: holds {files[0].name} and {len(files) - 1} more; give one as --model, "
                "and the other parts as --text-encoder and --vae"
            )
        parts |= {part: {"use": use, "file": str(files[0])}} if files else {}
    if "backbone" not in parts:
        raise CheckpointError(f"{folder / 'diffusion_models'}: holds no .safetensors and no .gguf file; fetch one")
    return _checkpoint_of_parts(parts, Path(parts["backbone"]["file"]).name, folder.resolve().name)


def _checkpoint_of_parts(parts: dict[str, Any], *names: str) -> dict[str, Any]:
    variant, note = _variant_by_name(*names)
    return {
        "format": 1,
        "components": {**parts, "sampler": {"use": "lens_flow:euler", "config": {}}},
        "presets": {**PRESETS[variant], "base_resolution": 1024, "sizes": SIZES},
        "note": note,
    }


def _encoder_layers(config: dict[str, Any]) -> dict[str, Any]:
    """The backbone's file says which layers of the encoder feed it; the encoder's own file does not."""
    return {"selected_layers": config["selected_layer_index"]} if "selected_layer_index" in config else {}


def _variant(folder: Path, index: dict[str, Any]) -> tuple[str, str]:
    """(variant, how we know). The config files of the three are alike, and so are the shapes of their weights: only the
    repository that a folder was fetched from is sure (the Hub's cache: models--org--name/snapshots/<commit>), and words
    in its name are a sign. Where nothing tells, it is taken for Lens, and the note says so."""
    folder = folder.resolve()
    repository = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    for variant, mirrors in REPOSITORIES.items():
        if repository in {f"models--{name.replace('/', '--')}" for name in (*mirrors, f"microsoft/{variant}")}:
            return variant, f"the preset of {variant}, as its repository is known"
    return _variant_by_name(repository, folder.name, str(index.get("_name_or_path") or "").rpartition("/")[2])


def _variant_by_name(*names: str) -> tuple[str, str]:
    """(variant, how we know) by the first of the names that tells, in whole words: a database is no Base."""
    for name in names:
        words = set(re.findall("[a-z0-9]+", name.lower()))
        named = [f"Lens-{word.title()}" for word in ("turbo", "base") if word in words]
        named = named or (["Lens"] if "lens" in words else [])
        if len(named) == 1:
            return named[0], f"the preset of {named[0]}, going by the name {name!r}"
    others = ", ".join(
        f"{name} has {p['steps']} and {p['guidance_scale']:g}" for name, p in PRESETS.items() if name != "Lens"
    )
    return "Lens", f"the preset of Lens, as nothing tells which variant this is ({others})"
