"""The autoencoder of FLUX.2, between pixels and latents of 1/16 their height and width.

`flux2` (vae.py) is the network with its patchify and its latent statistics; `autoencode` (training.py) trains one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_vaes() -> dict[str, type[Any]]:
    from lens_flux2.vae import Flux2VAE

    return {"flux2": Flux2VAE}


@hookimpl
def lens_methods() -> dict[str, type[Any]]:
    from lens_flux2.training import Autoencode

    return {"autoencode": Autoencode}


@hookimpl
def lens_describe(folder: Path) -> dict[str, Any] | None:
    from lens_core.checkpoints.single_files import describe_file
    from lens_flux2.single import holds

    return describe_file(folder, holds, "vae", "lens_flux2:flux2")
