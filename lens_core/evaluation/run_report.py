"""What is written of a run in its folder: result.json, table.md, verdicts.jsonl and the contact sheet sheet.png."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lens_core.evaluation.decision import Decision, PictureScore, by_task, numbers
from lens_core.evaluation.manifest import Entry, Manifest
from lens_core.evaluation.report import cells_of, contact_sheet
from lens_core.evaluation.stages import Plan
from lens_core.evaluation.statistics import cluster_of, pooled
from lens_core.inference import png_metadata
from lens_core.io import atomic_files, markdown
from lens_core.io.images import read_raw, read_rgb

if TYPE_CHECKING:
    from torch import Tensor

INNER = ("versions", "report_versions", "settings", "run", "perceivers")
"""Settings that are too long for the line below the table."""
SHEET_IMAGES = 56  # on the contact sheet: seven rows of eight
THUMBNAIL = 192  # px of the longer side, at most, of a picture there


@frozen
class Measured:
    """A run that has been decided. `ceiling`: by task what flawless pictures score after the checkpoint's VAE."""

    plan: Plan
    manifest: Manifest
    decision: Decision
    settings: Mapping[str, Any]
    ceiling: Mapping[str, float]

    @property
    def text(self) -> str:
        """The table, the notes, and the settings in one line below it."""
        sampler = self.settings.get("settings", {}).get("sampler")  # None for a system that has none, or does not say
        shown = {k: v for k, v in self.settings.items() if k not in INNER} | {"sampler": sampler}
        parts = [table(self.decision, self.ceiling), *(f"note: {note}" for note in self.decision.notes)]
        counts = ", ".join(f"{count} {status}" for status, count in self.decision.statuses.items())
        parts.append(f"{counts}; coverage {self.decision.coverage:.1%}")
        return "\n\n".join([*parts, ", ".join(f"{k} {v}" for k, v in shown.items() if v not in (None, ""))])


def settings(run: Mapping[str, Any], plan: Plan, manifest: Manifest) -> dict[str, Any]:
    """What decides the figures, as result.json has it; `run` is run.json with the benchmark's `label`."""
    first = next((e for e in manifest.entries.values() if e.status == "ok"), None)
    size = list(reversed(read_raw(manifest.folder / first.file).size)) if first is not None else run.get("size")
    of_system = run["settings"]
    return {
        "benchmark": run["label"],
        "model": run["system"],
        "model_hash": run["revision"],
        "seed": run["seed"],
        **{name: of_system.get(name) for name in ("steps", "guidance_scale")},
        "size": size,
        **{name: of_system[name] for name in ("dtype", "device") if isinstance(of_system.get(name), str)},
        "prompts": of_system.get("prompts") or "raw",  # or refined, by a reasoner or a rewriter
        "settings": dict(of_system),
        "versions": run.get("versions", {}),
        "report_versions": {**png_metadata.versions(), **{n: version(n) for n in ("transformers", "pillow", "numpy")}},
        "run": {
            "benchmark": plan.benchmark,
            "options": dict(plan.options),
            **{name: run.get(name) for name in ("prompts_sha256", "images_per_prompt")},
        },
    }


def write(measured: Measured) -> None:
    """Each file whole or not at all; result.json comes last."""
    folder = measured.manifest.folder
    atomic_files.write_text(folder / "table.md", f"{measured.text}\n")
    if measured.decision.verdicts:
        lines = "".join(json.dumps(verdict) + "\n" for verdict in measured.decision.verdicts)
        atomic_files.write_text(folder / "verdicts.jsonl", lines)
    _write_sheet(measured)
    atomic_files.write_json(folder / "result.json", {**measured.settings, **result_json(measured)})


def result_json(measured: Measured) -> dict[str, Any]:
    """Scores by both rules, by task and by category, and each picture's prompt, task, seed, status, score and cost."""
    plan, entries, decided = measured.plan, measured.manifest.entries, measured.decision
    clusters = {name: cluster_of(prompt) for name, prompt in plan.by_id.items()}
    tasks = by_task(decided.scores, clusters)
    overall = decided.official.get(decided.headline)
    times = [e.seconds for e in entries.values() if e.status == "ok"]
    return {
        "headline": list(decided.tasks),
        "metric": decided.headline,
        "overall": None if overall is None else numbers({"": overall})[""],
        "pooled": numbers({"": pooled(tasks)})[""] if tasks else None,
        "tasks": numbers({name: task.estimate() for name, task in tasks.items()}),
        "official": numbers(decided.official),
        "strict": numbers(decided.strict),
        "categories": {name: numbers(metrics) for name, metrics in decided.categories.items()},
        "coverage": decided.coverage,
        "statuses": dict(decided.statuses),
        "notes": list(decided.notes),
        **({"ceiling": {k: round(v, 6) for k, v in measured.ceiling.items()}} if measured.ceiling else {}),
        "seconds": round(math.fsum(e.seconds for e in entries.values()), 1),
        "seconds_per_picture": round(math.fsum(times) / len(times), 4) if times else None,
        "usd": round(math.fsum(e.usd for e in entries.values()), 6),
        "pictures": [_picture(measured, score, clusters, entries) for score in decided.scores],
    }


def _picture(
    measured: Measured, score: PictureScore, clusters: Mapping[str, Any], entries: Mapping[Any, Entry]
) -> dict[str, Any]:
    prompt, entry = measured.plan.by_id[score.prompt_id], entries.get((score.prompt_id, score.index))
    cluster = clusters[score.prompt_id]
    return {
        "prompt": prompt.text,
        "task": score.task,
        "seed": None if entry is None else entry.seed,
        "status": "missing" if entry is None else entry.status,
        "value": score.value,
        **({} if score.weight == 1 else {"weight": score.weight}),
        **({} if cluster == prompt.text else {"cluster": str(cluster)}),
    }


# ---- for people -----------------------------------------------------------------------------------------------------


def table(decided: Decision, ceiling: Mapping[str, float] | None = None) -> str:
    """A Markdown table of scores with 95 % intervals by prompt: by the official rule, by the strict one where pictures
    are missing, and the ceiling where it is known."""
    ceiling = ceiling or {}
    strict = decided.coverage < 1
    head = ["task", "score", "95 % interval", *(["strict", "95 % interval"] if strict else [])]
    shown = [*decided.official.values(), *(e for metrics in decided.categories.values() for e in metrics.values())]
    words = any(estimate.count > sum(decided.statuses.values()) for estimate in shown)  # each is a yes or no
    head += ["scores" if words else "pictures", "distinct prompts", *(["ceiling"] if ceiling else [])]
    rows = markdown.header(head)
    for name, estimate in decided.official.items():
        label = f"**{name}**" if name == decided.headline else name
        if name == "overall" and len(decided.tasks) > 1:
            label += f" (mean of {len(decided.tasks)} tasks)"
        cells = [label, *cells_of(estimate)]
        cells += cells_of(decided.strict.get(name)) if strict else []
        cells += [str(estimate.count), str(estimate.distinct)]
        bound = ceiling.get("pooled" if name == "all pictures" else name)
        cells += ["" if bound is None else f"{bound:.3f}"] if ceiling else []
        rows.append(markdown.row(cells))
    for category, metrics in decided.categories.items():
        for name, estimate in metrics.items():
            cells = [f"{category}: {name}", *cells_of(estimate), *(["", ""] if strict else [])]
            cells += [str(estimate.count), str(estimate.distinct), *([""] if ceiling else [])]
            rows.append(markdown.row(cells))
    return "\n".join(rows)


def _write_sheet(measured: Measured) -> None:
    """Pictures spread evenly over the run, framed by whether their score is at least a half."""
    plan, manifest = measured.plan, measured.manifest
    entries = [e for e in manifest.entries.values() if e.status == "ok" and e.prompt_id in plan.by_id]
    entries.sort(key=lambda e: e.key)
    if len(entries) > SHEET_IMAGES:
        entries = [entries[i * len(entries) // SHEET_IMAGES] for i in range(SHEET_IMAGES)]
    if not entries:
        return
    values = {(s.prompt_id, s.index): s.value for s in measured.decision.scores}
    passed = [None if (v := values.get(e.key)) is None else v >= 0.5 for e in entries]
    sheet = contact_sheet(_thumbnails(manifest, entries), [e.prompt for e in entries], passed)
    atomic_files.write_atomic(manifest.folder / "sheet.png", lambda p: sheet.save(p, format="PNG"))


def _thumbnails(manifest: Manifest, entries: Sequence[Entry]) -> Tensor:
    """uint8 [B,3,H,W]: pictures made small enough, in the middle of a grey field where their shapes differ."""
    import numpy as np
    import torch
    from PIL import Image as pil

    small = []
    for entry in entries:
        image = read_rgb(manifest.folder / entry.file)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        small.append(image)
    width, height = max(i.width for i in small), max(i.height for i in small)
    fields = []
    for image in small:
        middle = pil.new("RGB", (width, height), "#cccccc")
        middle.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        fields.append(torch.from_numpy(np.array(middle)).permute(2, 0, 1))
    return torch.stack(fields)
