"""How the reader of the proving ground was attacked, to be run again.

    python examples/attack_reader.py rates --scenes 500 --vae tiny:     true scenes refused, cheats accepted, in tables
    python examples/attack_reader.py sheet cheats.png                   one refused picture of every kind
    python examples/attack_reader.py climb found.png --minutes 5        changes to pixels that it does not see
    python examples/attack_reader.py climb found.png --minutes 5 --vae tiny:      the same in latents

`climb` begins at a true scene and adds whatever changes the picture most while the reader still accepts it: random
patches, ellipses and strokes of random colours and opacities (or random changes of latents). Look at what it found.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from lens_shapes import splits
from lens_shapes.benchmark import reconstruct
from lens_shapes.hostile import HONEST, HOSTILE
from lens_shapes.reader import read
from lens_shapes.reading import satisfies
from lens_shapes.render import render
from lens_shapes.scenes import BACKGROUNDS, COLOURS, prompt_facts
from PIL import Image, ImageDraw, ImageFont

TASKS = ("single", "two", "counting", "colours", "position", "attribution", "words")


def scene_of(number: int, tasks: tuple[str, ...] = TASKS) -> Any:
    return splits.sample(np.random.default_rng([21, number]), "test", tasks[number % len(tasks)])


def vae_of(uri: str) -> Any:
    from lens_core.inference.pipeline import LensPipeline

    return LensPipeline.from_pretrained(uri).vae


def rates(count: int, uri: str | None) -> None:
    rng = np.random.default_rng(0)
    print("| true scenes | pictures | refused |\n|---|---|---|")
    for name, (side, change) in HONEST.items():
        wrong = 0
        for n in range(count):
            scene = scene_of(n)
            wrong += not satisfies(read(change(render(scene, side, side), rng)), prompt_facts(scene))
        print(f"| {name} | {count} | {wrong / count:.2%} |", flush=True)
    for largest in (False, True) if uri else ():
        drawn = [
            splits.sample(np.random.default_rng([21, n]), "test", TASKS[n % 7], largest=largest) for n in range(count)
        ]
        images = torch.from_numpy(np.stack([render(s, 64, 64) for s in drawn])).permute(0, 3, 1, 2)
        back = reconstruct(vae_of(str(uri)), images).permute(0, 2, 3, 1).contiguous().numpy()
        wrong = sum(not satisfies(read(image), prompt_facts(s)) for image, s in zip(back, drawn, strict=True))
        size = "largest things" if largest else "any size"
        print(f"| through the VAE of `{uri}`, 64 px, {size} | {count} | {wrong / count:.2%} |", flush=True)
    print("\n| cheats | pictures | accepted, 64 px | pictures | accepted, 128 px |\n|---|---|---|---|---|")
    for name, make in HOSTILE.items():
        cells = []
        for side in (64, 128):
            tried = passed = 0
            for n in range(max(30, count // 5)):
                scene = scene_of(n, TASKS[:-1])
                picture = make(scene, side, side, np.random.default_rng([22, n]))
                if picture is not None:
                    tried, passed = tried + 1, passed + satisfies(read(picture), prompt_facts(scene))
            cells.append(f"{tried} | {passed}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def sheet(path: str) -> None:
    pictures = []
    for name, make in HOSTILE.items():
        for n in range(60):
            scene = scene_of(n, ("two", "attribution", "colours"))
            picture = make(scene, 96, 96, np.random.default_rng([22, n]))
            if picture is not None and not satisfies(read(picture), prompt_facts(scene)):
                pictures.append((name, picture))
                break
    save(path, pictures, 96, 7)


def save(path: str, pictures: list[tuple[str, Any]], side: int, columns: int) -> None:
    """Pictures in a grid, each with its name below."""
    import textwrap

    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (side + 8), rows * (side + 44)), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(10)
    for n, (name, picture) in enumerate(pictures):
        x, y = n % columns * (side + 8) + 4, n // columns * (side + 44) + 4
        grid.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.multiline_text((x, y + side + 1), textwrap.fill(name, side // 6), "black", font, spacing=0)
    grid.save(path, optimize=True)


def patched(image: Any, rng: np.random.Generator) -> Any:
    """`image` with a random patch, ellipse or stroke over it."""
    height, width = image.shape[:2]
    palette = [*COLOURS.values(), *BACKGROUNDS.values(), (0, 0, 0), tuple(int(v) for v in rng.integers(0, 256, 3))]
    layer = Image.new("L", (width, height))
    pen = ImageDraw.Draw(layer)
    corner, size = rng.integers(-4, width, 2), rng.integers(1, int(rng.choice([3, 8, 24, 48])) + 1, 2)
    box = (*(int(v) for v in corner), *(int(v) for v in corner + size))
    kind = int(rng.integers(3))
    (pen.rectangle, pen.ellipse, pen.line)[kind](box, fill=255)
    alpha = np.asarray(layer, np.float32)[..., None] / 255 * float(rng.choice([0.05, 0.1, 0.2, 0.4, 1.0]))
    return np.clip((image + alpha * (np.array(palette[int(rng.integers(len(palette)))]) - image)).round(), 0, 255)


def climb(path: str, minutes: float, uri: str | None, side: int) -> None:
    """The largest changes that are still accepted, by root mean square over the picture; before, after, difference."""
    vae = vae_of(uri) if uri else None
    pictures: list[tuple[str, Any]] = []
    tasks = ("two", "attribution", "counting", "position", "single", "colours")
    for number in range(6):
        rng = np.random.default_rng([23, number])
        scene = scene_of(number, tasks)
        start = render(scene, side, side)
        latent = None
        if vae is not None:
            with torch.no_grad():
                latent = vae.encode(torch.from_numpy(start).permute(2, 0, 1)[None].float() / 127.5 - 1)
                start = decoded(vae, latent)
        now, best, tried, kept, until = start.astype(float), 0.0, 0, 0, time.time() + minutes * 10
        while time.time() < until:
            tried += 1
            if latent is None:
                new, moved = patched(now, rng), None
            else:
                mask = torch.from_numpy(rng.random(latent.shape) < rng.choice([0.01, 0.1, 1.0])).float()
                noise = torch.from_numpy(rng.normal(0, float(rng.choice([0.1, 0.4, 1.5])), latent.shape)).float()
                moved = latent + mask * noise
                with torch.no_grad():
                    new = decoded(vae, moved).astype(float)
            gain = float(np.sqrt(((new - start) ** 2).mean()))
            if gain > best and satisfies(read(new.astype(np.uint8)), prompt_facts(scene)):
                now, best, kept, latent = new, gain, kept + 1, moved if moved is not None else latent
        gap = np.clip(128 + 2 * (now - start), 0, 255).astype(np.uint8)
        pictures += [(scene.task, start), (f"rms {best:.1f}", now.astype(np.uint8)), ("difference, doubled", gap)]
        print(f"{scene.task}: {tried} tried, {kept} kept, rms {best:.1f} of 255", flush=True)
    save(path, pictures, 2 * side, 6)


def decoded(vae: Any, latent: Any) -> Any:
    pixels = vae.decode(latent)[0].clamp(-1, 1).permute(1, 2, 0)
    return ((pixels + 1) * 127.5).round().to(torch.uint8).numpy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rates", "sheet", "climb"))
    parser.add_argument("path", nargs="?", default="found.png")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=5.0, help="of climbing, all six scenes together")
    parser.add_argument("--side", type=int, default=64, help="of the pictures that are climbed on, px")
    parser.add_argument("--vae", help="a checkpoint whose VAE pictures go through")
    args = parser.parse_args()
    if args.what == "rates":
        rates(args.scenes, args.vae)
    elif args.what == "sheet":
        sheet(args.path)
    else:
        climb(args.path, args.minutes, args.vae, args.side)
