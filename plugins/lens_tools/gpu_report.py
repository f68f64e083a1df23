"""The results of a GPU check as a page to read: what is right, how fast it is, and which goals are met."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lens_core.io import atomic_files

GOALS = {
    "base 1024x1024": 1.50, "turbo 1024x1024": 0.22, "base 512x512": 0.35, "turbo 512x512": 0.09,
    "prompt to pixels 1024x1024, 20 steps": 3.15, "prompt to pixels 1024x1024, 4 steps": 0.84,
}  # fmt: skip
"""Item of the stage latency -> seconds: goals for an H200; from prompt to pixels, the paper's times on an H100."""
WAYS = ("port", "lens", "compiled", "graphed")


def report(folder: Path) -> str:
    """The page, from the JSON files of a check that are in `folder`."""
    read = {name: _read(folder / f"{name}.json") for name in ("environment", "correctness", "latency", "training")}
    lines = ["# GPU check", ""]
    lines += _environment(read["environment"])
    for name, table in (("correctness", _correctness), ("latency", _latency), ("training", _training)):
        if read[name]:
            lines += ["", f"## {name.capitalize()}", "", *table(read[name])]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, Any]:
    return dict(atomic_files.read_json(path)) if path.is_file() else {}


def _environment(facts: Mapping[str, Any]) -> Iterator[str]:
    device, software = facts.get("device", {}), facts.get("software", {})
    driver = facts.get("driver", {}).get("nvidia-smi")
    yield f"- device: {device.get('name', device.get('device', 'unknown'))}; {driver}"
    yield "- " + ", ".join(f"{name} {software.get(name)}" for name in ("torch", "python", "transformers"))


def _correctness(results: Mapping[str, Any]) -> Iterator[str]:
    tests = results.get("tests", {})
    counts: dict[str, int] = {}
    for test in tests.values():
        counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
    yield ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no test ran"
    for name, test in tests.items():
        if test["outcome"] == "failed":
            yield f"- {name}: {test.get('error', '')}"


def _latency(results: Mapping[str, Any]) -> Iterator[str]:
    yield "| item | " + " | ".join(f"{way}, s" for way in WAYS) + " | port / compiled | goal, s |"
    yield "|---" * 7 + "|"
    for name, item in results.get("items", {}).items():
        ways = item.get("ways", {})
        if not ways:
            continue
        cells = [f"{ways[way]['median_s']:.4f}" if way in ways else "" for way in WAYS]
        faster = item.get("port / compiled", {}).get("median")
        yield f"| {name} | {' | '.join(cells)} | {'' if faster is None else f'{faster:.2f}'} | {GOALS.get(name, '')} |"
    for name, item in results.get("items", {}).items():
        if "ways" not in item:
            about = {k: v for k, v in item.items() if k not in ("took_s", "where")}
            yield f"- {name}: {_short(about)}"
        elif "error" in item:
            yield f"- {name}: {item['error']}"


def _training(results: Mapping[str, Any]) -> Iterator[str]:
    yield "| setup | way | images/s | step, s | MFU | peak, GB | dry run, GB |"
    yield "|---" * 7 + "|"
    for name, item in results.get("items", {}).items():
        for way, timing in (item.get("ways") or {}).items():
            if "median_s" not in timing:
                yield f"| {name} | {way} | {timing.get('error') or timing.get('skipped')} | | | | |"
                continue
            mfu = "" if timing.get("mfu") is None else f"{timing['mfu']:.1%}"
            peak = "" if timing.get("memory_gb") is None else f"{timing['memory_gb']:.1f}"
            forecast = f"{item.get('dry_run_gb') or 0:.1f}"
            speed = f"{timing['images_per_s']:.2f} | {timing['median_s']:.3f}"
            yield f"| {name} | {way} | {speed} | {mfu} | {peak} | {forecast} |"
    for name, item in results.get("items", {}).items():
        if "variants" in item:
            steps = {k: round(v["step"], 4) for k, v in item["variants"].items()}
            yield f"- {name}: seconds a step {_short(steps)}; gradients' distance {_short(item['agreement'])}"
        if "error" in item or "skipped" in item:
            yield f"- {name}: {item.get('error') or item['skipped']}"


def _short(about: Mapping[str, Any]) -> str:
    text = ", ".join(f"{k} {_short(v) if isinstance(v, dict) else v}" for k, v in about.items() if k != "top")
    return text[:900]
