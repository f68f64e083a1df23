"""The VAE of the embedded model: trained further while scenes are rendered, and chosen by what a reader makes of it."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from embedded_scenes import Group, SceneFactory, SharedScenes
from lens_flux2.training import Autoencode
from lens_flux2.vae import Flux2VAE
from lens_shapes.benchmark import ShapesBenchmark, pictures, reconstruct

from lens_core import LensPipeline
from lens_core.types import Batch

BATCHES = {"64": 256, "128": 96, "64x80": 128, "96x160": 64, "160x96": 64}
"""Pictures of a batch, by group."""


def train_vae(
    start: str, device_name: str, scenes: SharedScenes, out: Path, seconds: float, until: float, lr: float, most: int
) -> None:
    """Go on with the VAE of the checkpoint `start` on scenes as they are rendered; writes `out/vae/`. The learning rate
    follows the clock; it ends at `until`, a time of `time.time()`, if that is sooner. `most` pictures are a batch at
    most."""
    pipeline = LensPipeline.from_pretrained(start, dtype=torch.float32, device=device_name)
    method = Autoencode(Autoencode.Config(kl=1e-4), pipeline)
    vae: Any = pipeline.vae.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    device = next(vae.parameters()).device
    rng = torch.Generator() if device.type == "cpu" else torch.cuda.default_generators[device.index]
    order = torch.Generator().manual_seed(1)
    places = [place for place, g in enumerate(scenes.groups) if g.name in BATCHES]
    while any(len(scenes.ready(place)) < 1 for place in places):
        time.sleep(0.1)
    seconds = max(1.0, min(seconds, until - time.time()))
    begin, step, total = time.monotonic(), 0, 0.0
    while (share := (time.monotonic() - begin) / seconds) < 1:
        place = places[int(torch.randint(len(places), (), generator=order))]
        group, chunks = scenes.groups[place], scenes.ready(place)
        count = min(most, BATCHES[group.name])
        rows = torch.randint(len(chunks) * group.chunk, (count,), generator=order).numpy()
        images = torch.from_numpy(scenes.images[place][chunks[rows // group.chunk] * group.chunk + rows % group.chunk])
        batch = Batch(images.to(device).permute(0, 3, 1, 2), ("",) * count)
        for settings in optimizer.param_groups:
            settings["lr"] = lr * min(1, (step + 1) / 50, (1 - share) / 0.7)
        with torch.autocast(device.type, torch.bfloat16):
            loss = method.loss("vae", {"vae": vae}, batch, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        method.after_update("vae", {"vae": vae}, loss.sums)
        step += 1
        if step % 50 == 0:
            total = float(loss.total)
            print(f"vae step {step} {group.name} loss {total:.4f} at {share:.2f}", flush=True)
    pipeline.vae.to(torch.bfloat16).save(out)
    (out / "vae" / "done.json").write_text(json.dumps({"steps": step, "seconds": seconds, "loss": total}))


def ceilings(factory: SceneFactory, vaes: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What each VAE lets a generator score at most, by size and task, on the split `select`."""
    handles: list[tuple[str, Any, Any]] = []
    for side in (64, 128):
        benchmark = ShapesBenchmark(ShapesBenchmark.Config(prompts=56, split="select", seed=7, largest=True))
        images, prompts = pictures(benchmark.scenes(), side, side), benchmark.prompts()
        for name, vae in vaes.items():
            handles.append((f"{name} {side}", factory.readers.score(reconstruct(vae, images, 56), prompts), prompts))
    return {name: by_task(handle.get(), prompts) for name, handle, prompts in handles}


def by_task(parts: Any, prompts: Any) -> dict[str, float]:
    """Means by task, and their mean without single shapes: `overall` without words, too."""
    values: dict[str, list[float]] = defaultdict(list)
    for value, prompt in zip([v for part in parts for v in part], prompts, strict=True):
        values[prompt.task].append(value)
    means = {task: round(sum(v) / len(v), 4) for task, v in values.items()}
    chosen = [v for task, v in means.items() if task not in ("single", "words")]
    return means | {"overall": round(sum(chosen) / max(1, len(chosen)), 4)}


def choose_vae(factory: SceneFactory, pipeline: LensPipeline, folders: dict[str, Path]) -> tuple[str, Any, Any]:
    """The VAE with the best ceiling, among the pipeline's ("start") and those in `folders`: its name, the ceilings of
    all, and itself."""
    vaes: dict[str, Any] = {"start": pipeline.vae}
    for name, folder in folders.items():
        if (folder / "vae" / "config.json").is_file():
            vaes[name] = Flux2VAE.load(folder, Flux2VAE.Config(), torch.bfloat16).to(pipeline.device)
    if len(vaes) == 1:
        return "start", {}, vaes["start"]
    ceilings_by_vae = ceilings(factory, vaes)
    score = {
        name: sum(
            f["overall"] + 0.5 * f.get("words", 0) for key, f in ceilings_by_vae.items() if key.startswith(f"{name} ")
        )
        for name in vaes
    }
    best = max(score, key=lambda name: score[name])
    return best, ceilings_by_vae, vaes[best].eval().requires_grad_(False)


def main() -> None:
    """What `train_embedded.py` starts: one argument, the arguments of `train_vae` as JSON."""
    arguments = json.loads(sys.argv[1])
    groups = [Group(**{**g, "size": tuple(g["size"])}) for g in arguments.pop("groups")]
    scenes = SharedScenes(groups, arguments.pop("files"))
    torch.set_num_threads(1)
    train_vae(scenes=scenes, out=Path(arguments.pop("out")), **arguments)


if __name__ == "__main__":
    main()
