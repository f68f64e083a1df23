"""Write a LoRA file in another tool's key format."""

from __future__ import annotations

from pathlib import Path

from lens_core.arguments import refuse_existing, wrong_ending
from lens_core.checkpoints import lora_keys
from lens_core.inference import lora
from lens_core.inference.pipeline import LensPipeline


def convert_lora(source: Path, output: Path, to: str, model: str | None = None, *, overwrite: bool = False) -> int:
    """Write the LoRA `source` to `output` with the keys of `to`: diffusers, comfy or sd-scripts -> number of layers.

    Its numbers stay bit for bit. `model` is the checkpoint whose backbone the layers are checked against; needed where
    the source's names have underscores for dots. Raises CheckpointError for what cannot be read or does not fit, and
    ConfigError for an `output` that is there already, without `overwrite`.
    """
    # Other tools tell a format by the ending, and take anything else for a pickle.
    if output.suffix != ".safetensors":
        raise wrong_ending(output, ".safetensors", "a LoRA is")
    if not overwrite:
        refuse_existing([output], "output")
    if model is None:
        adapters = lora_keys.read(source)
    else:
        # Which layers there are is known from the backbone alone: the encoder, most of a model, is not read. On the
        # CPU, because nothing is computed.
        backbone = LensPipeline.from_pretrained(model, device="cpu", parts=("backbone",)).backbone
        adapters = lora.read(source, backbone)
    lora_keys.write(output, adapters, to)
    return len(adapters)
