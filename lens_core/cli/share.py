"""`lens check`, `lens push` and `lens lora convert`: checkpoints and LoRAs that come from others or go to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from lens_core.catalog import Catalog


def check(model: str) -> int:
    """Read every file of a checkpoint, and say which differs from what was written, is missing, or is extra.

    Parameters
    ----------
    model
        A folder, a Hub id org/name[@revision], or tiny:
    """
    from lens_core.checkpoints.sharing import check_model

    result = check_model(model, Catalog.installed())
    for line in (*result.shared, *result.problems):
        print(line)
    if result.problems:
        print(f"{model}: {len(result.problems)} of its files are not as they should be; fetch it again")
        return 1
    if result.hashed is None:
        print(
            f"{model}: {result.well_formed} files are whole, as far as their formats say (hash {result.digest}); its "
            "lens.json holds no hashes, so a changed bit would not be seen: save or convert it anew to have them"
        )
    else:
        print(f"{model}: {result.hashed} files are as they were written (hash {result.digest})")
    return 0


def push(
    model: str,
    repo: str,
    *,
    private: Annotated[bool, Parameter(negative="")] = False,
    message: str | None = None,
) -> int:
    """Put a checkpoint on the Hugging Face Hub, in one commit. Log in first: hf auth login, or HF_TOKEN.

    Parameters
    ----------
    model
        A folder, a Hub id org/name[@revision], or tiny:
    repo
        The repository, org/name; made if it is not there. A README.md that a person wrote there stays.
    private
        Make it private; one that is there and public is refused.
    message
        The commit's message.
    """
    from lens_core.checkpoints.sharing import push_model

    print(push_model(model, repo, Catalog.installed(), private=private, message=message))
    return 0


def convert(
    source: Path,
    output: Path,
    *,
    to: Literal["diffusers", "comfy", "sd-scripts"],
    model: str | None = None,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Write a LoRA in another tool's key format; its numbers stay bit for bit.

    Parameters
    ----------
    source
        A LoRA file, or a folder with pytorch_lora_weights.safetensors.
    output
        The .safetensors file to write.
    to
        diffusers (PEFT), comfy or sd-scripts.
    model
        The model that it is for, against which its layers are checked; needed where names have underscores for dots.
    overwrite
        Write over a file that is there.
    """
    from lens_core.inference.lora_convert import convert_lora

    layers = convert_lora(source, output, to, model, overwrite=overwrite)
    print(f"{output}  {layers} layers, as {to}")
    return 0


lora = App(name="lora", help="LoRA files: convert between the key formats of tools.")
lora.command(convert)
