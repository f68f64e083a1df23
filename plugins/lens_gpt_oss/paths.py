"""Which code computes the experts: Lens unpacks MXFP4 expert by expert; transformers has kernels of its own."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

NEEDS = {"triton": ("3.4", None), "kernels": ("0.18.2", "0.19")}
"""What transformers' MXFP4 kernels ask for: package -> (least version, first version that is too new)."""
CAPABILITY = (7, 5)


def missing(capability: tuple[int, int] | None) -> list[str]:
    """What transformers' MXFP4 kernels lack here. `capability`: the GPU's, or None where there is no CUDA."""
    lacks = []
    if capability is None:
        lacks.append("a CUDA device")
    elif capability < CAPABILITY:
        lacks.append(f"compute capability 7.5 (this is {capability[0]}.{capability[1]})")
    for name, (least, below) in NEEDS.items():
        wanted = f"{name}>={least}" + (f",<{below}" if below else "")
        try:
            installed = Version(version(name))
        except PackageNotFoundError:
            lacks.append(wanted)
            continue
        if installed < Version(least) or (below is not None and installed >= Version(below)):
            lacks.append(f"{wanted} (this is {installed})")
    return lacks


def diagnose() -> dict[str, str]:
    """The path that experts take when a published checkpoint is read, and what the other one lacks."""
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    lacks = missing(capability)
    return {
        "experts": "stay in 4 bits, each unpacked when a token is routed to it; transformers' kernels are not used",
        "transformers_kernels": f"not available: needs {', '.join(lacks)}" if lacks else "available",
    }
