"""`lens doctor`: this machine, the dtypes and kernels that work on it, and which models fit."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lens_core import __version__
from lens_core.catalog import Catalog
from lens_core.inference import offload_plans
from lens_core.inference.offload_plans import MemoryEstimate, Workload
from lens_core.recipe import ComponentSpec, build
from lens_core.training.memory_estimate import published as described

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "triton", "kernels")
CARDS = (8, 12, 16, 24, 80)  # GiB that a card is sold with
CONTEXT = 640 << 20  # bytes of a card that CUDA's context and a desktop take before anything is drawn
FORMS = ("mxfp4", "bfloat16")
"""How the text encoder's experts are held: as the published file has them, or turned into bfloat16."""


def published(catalog: Catalog) -> dict[str, Any]:
    """The parts of the published model on the meta device, as the plugin that knows it names them, in bfloat16."""
    components = described(catalog)["components"]
    parts = {}
    for kind in offload_plans.PHASES:
        use = ComponentSpec(components[kind]["use"], dict(components[kind].get("config", {})))
        _, cls, config = build(catalog, kind, use, f"the published {kind}")
        with torch.device("meta"):
            parts[kind] = cls(config).to(torch.bfloat16)
    return parts


def weigh(parts: Mapping[str, Any], form: str) -> Callable[[torch.Tensor], int]:
    """Tensor -> its bytes, where parts that can be held in a smaller form are held in `form`."""
    packed: dict[int, int] = {}
    for part in parts.values() if form == "mxfp4" else ():
        packed |= part.sizes_in_4_bits() if hasattr(part, "sizes_in_4_bits") else {}
    return lambda tensor: packed.get(id(tensor), tensor.numel() * tensor.element_size())


def room(card: int) -> int:
    """Bytes free on an idle card of so many GiB."""
    return (card << 30) - CONTEXT


def fits(parts: Mapping[str, Any], load: Workload | None = None) -> dict[str, dict[int, MemoryEstimate]]:
    """Form -> card, GiB -> the plan that `auto` takes there for the published sizes."""
    load = load or Workload()
    return {
        form: {card: offload_plans.choose_plan(parts, load, room(card), weigh(parts, form)) for card in CARDS}
        for form in FORMS
    }


def table(parts: Mapping[str, Any]) -> str:
    """docs/memory.md's figures as Markdown: every plan, and the one for each card. GB are 10^9 bytes."""

    def cells(estimate: MemoryEstimate) -> str:
        return " | ".join(f"{peak / 1e9:.1f}" for peak in estimate.peaks.values())

    phases = " | ".join(offload_plans.PHASES.values())
    lines = [f"| encoder | plan | {phases} | host |", "|---|---|---|---|---|---|"]
    for form in FORMS:
        for plan in offload_plans.PLANS:
            estimate = offload_plans.estimate_memory(plan, parts, Workload(), weigh(parts, form))
            lines.append(f"| {form} | `{plan}` | {cells(estimate)} | {sum(estimate.host.values()) / 1e9:.1f} |")
    lines += ["", f"| card | encoder | `auto` takes | {phases} | free |", "|---|---|---|---|---|---|---|"]
    best = fits(parts)
    for card in CARDS:
        for form in FORMS:
            estimate = best[form][card]
            over = "" if estimate.peak + offload_plans.RESERVE <= room(card) else " (too large)"
            free = f"{room(card) / 1e9:.1f}"
            lines.append(f"| {card} GB | {form} | `{estimate.plan}`{over} | {cells(estimate)} | {free} |")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _software(_: Catalog) -> dict[str, Any]:
    facts = {"lens": __version__, "python": platform.python_version(), "system": f"{sys.platform} {platform.machine()}"}
    return facts | {name: _version(name) for name in PACKAGES}


def _plugins(catalog: Catalog) -> dict[str, Any]:
    return {p.name: f"disabled: {p.error}" if p.error else p.version for p in catalog.plugins}


def _device(_: Catalog) -> dict[str, Any]:
    ram: dict[str, Any] = {}
    if hasattr(os, "sysconf"):
        page = os.sysconf("SC_PAGE_SIZE")
        ram = {"ram_gb": round(page * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)}
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            ram["ram_free_gb"] = round(page * os.sysconf("SC_AVPHYS_PAGES") / 1e9, 1)
    if not torch.cuda.is_available():
        return {"device": "cpu", "why": "torch finds no CUDA device", "default_dtype": "float32", **ram}
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": "cuda",
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # torch's
        "memory_gb": round(about.total_memory / 1e9, 1),
        "memory_free_gb": round(torch.cuda.mem_get_info()[0] / 1e9, 1),
        "default_dtype": "bfloat16",
        **ram,
    }


def _dtypes(catalog: Catalog) -> dict[str, Any]:
    """Which dtypes work here with the published backbone, and why the others do not."""
    facts: dict[str, Any] = {"float32": "yes"}
    native = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    facts["bfloat16"] = "yes" if native else "emulated, slow: this GPU has none"
    backbone = catalog.find("backbone", described(catalog)["components"]["backbone"]["use"]).cls
    reason = backbone.refuses(torch.float16) if hasattr(backbone, "refuses") else None
    facts["float16"] = f"refused: {reason}" if reason else "yes"
    return facts


def _attention(_: Catalog) -> dict[str, Any]:
    """Which of torch's kernels may be taken here; each is tried with bfloat16 heads of 64 channels."""
    if not torch.cuda.is_available():
        return {"cpu": "torch's fused kernel"}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device="cuda")
    facts = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, q, q)
            facts[backend.name.lower()] = "yes"
        except RuntimeError as error:
            facts[backend.name.lower()] = f"no: {_line(error)}"
    return facts


def _encoder(catalog: Catalog) -> dict[str, Any]:
    """What the published text encoder reports of itself."""
    entry = catalog.find("text_encoder", described(catalog)["components"]["text_encoder"]["use"])
    facts = entry.cls.diagnose() if hasattr(entry.cls, "diagnose") else {}
    return {f"{entry.name} {key}": value for key, value in facts.items()}


def _fits(catalog: Catalog) -> dict[str, Any]:
    """The published model at 1024 x 1024: what `auto` takes on this GPU, or on cards of each size."""
    parts = published(catalog)
    facts: dict[str, Any] = {
        f"{part}, {form}": f"{sum(map(weigh(parts, form), (*net.parameters(), *net.buffers()))) / 1e9:.2f} GB"
        for part, net in parts.items()
        for form in FORMS
        if form == "bfloat16" or hasattr(net, "sizes_in_4_bits")
    }
    rooms = {f"a card of {card} GB": room(card) for card in CARDS}
    if torch.cuda.is_available():
        rooms = {"this GPU": torch.cuda.mem_get_info()[0]}
    for place, free in rooms.items():
        for form in FORMS:
            best = offload_plans.choose_plan(parts, Workload(), free, weigh(parts, form))
            warning = "" if best.peak + offload_plans.RESERVE <= free else ", too large"
            facts[f"{place}, encoder {form}"] = f"{best.plan}, peak {best.peak / 1e9:.1f} GB{warning}"
    return facts


SECTIONS: dict[str, Callable[[Catalog], dict[str, Any]]] = {
    "software": _software,
    "plugins": _plugins,
    "device": _device,
    "dtypes": _dtypes,
    "attention": _attention,
    "text encoder": _encoder,
    "published model": _fits,
}


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def examine(catalog: Catalog, names: Collection[str] = tuple(SECTIONS)) -> dict[str, dict[str, Any]]:
    """The sections `names` with their facts. A section that fails holds its error instead, and the others stay."""
    sections = {}
    for name in names:
        try:
            sections[name] = SECTIONS[name](catalog)
        except Exception as error:  # a doctor is called when something is broken
            sections[name] = {"error": _line(error)}
    return sections


def describe(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """The sections as text."""
    lines = []
    for name, facts in sections.items():
        lines += [name, *(f"  {key:32} {value}" for key, value in facts.items())]
    return "\n".join(lines)
