"""Draws docs/curate.png: what a report shows, of a folder of pictures that is made and spoiled here.

python scripts/curation_picture.py docs/curate.png
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = """\
sources:
  - {use: folder, path: PATH}
  - {use: text_pictures, count: 60, sizes: [[160, 160]]}
filters:
  - {use: resolution, keep: {short_side: {min: 96}, aspect_ratio: {max: 2.5}}}
  - {use: luminance, keep: {mean: {min: 30, max: 242}}}
  - {use: clarity, keep: {acuity: {min: 0.3}, noise: {max: 8}}}
"""


def spoil(folder: Path, count: int = 240) -> None:
    """Scenes of shapes, a third of them spoiled in one of eight ways."""
    from lens_shapes.captions import prompt
    from lens_shapes.render import render
    from lens_shapes.scenes import sample
    from PIL import Image, ImageEnhance, ImageFilter, ImageOps

    rng = np.random.default_rng(7)
    for number in range(count):
        scene = sample(rng, "train")
        image = Image.fromarray(render(scene, 160, 160))
        (folder / f"{number:03}.txt").write_text(f"{prompt(scene)}.")
        kind = number % 24
        noisy = np.clip(np.asarray(image, float) + rng.normal(0, 30, (160, 160, 3)), 0, 255).astype(np.uint8)
        changes: dict[int, Callable[[Image.Image], Image.Image]] = {
            0: lambda i: i.filter(ImageFilter.GaussianBlur(5)),
            1: lambda i: ImageEnhance.Brightness(i).enhance(0.08),
            2: lambda i: Image.blend(i, Image.new("RGB", i.size, "white"), 0.93),
            3: lambda i: Image.fromarray(noisy),  # noqa: B023  # called in this round
            4: lambda i: i.resize((64, 64)),
            5: lambda i: i.resize((420, 120)),
        }
        changed = changes[kind](image) if kind in changes else image
        changed.save(folder / f"{number:03}.png")
        for ending, copy in (("copy.jpg", image.resize((140, 140))), ("mirror.png", ImageOps.mirror(image))):
            if kind == {"copy.jpg": 6, "mirror.png": 7}[ending]:
                copy.save(folder / f"{number:03}-{ending}")
                (folder / f"{number:03}-{ending}").with_suffix(".txt").write_text("The same again.")
    (folder / "torn.png").write_bytes((folder / "010.png").read_bytes()[:900])


def draw(report: Any, place: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    def thumbnail(url: str) -> Any:
        return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))

    figure = plt.figure(figsize=(11, 8.2))
    funnel = figure.add_axes((0.11, 0.62, 0.3, 0.33))
    stages = [row for row in report.data["funnel"] if row["dropped"] or row["stage"] == "kept"]
    left = [row["entered"] - row["dropped"] for row in stages]
    names = [row["stage"] for row in stages]
    funnel.barh(names, left, color="#4a7fb5")
    funnel.barh(names, [row["dropped"] for row in stages], left=left, color="#c8553d")
    funnel.invert_yaxis()
    funnel.set_title("funnel (red: dropped)", fontsize=10)
    plots = (("luminance", "mean"), ("clarity", "acuity"), ("clarity", "noise"), ("resolution", "short_side"))
    for place_, (name, column) in enumerate(plots):
        row, at = divmod(place_, 2)
        axes = figure.add_axes((0.5 + 0.25 * at, 0.81 - 0.19 * row, 0.21, 0.11))
        facts = report.data["scores"][name]["columns"][column]
        edges = np.linspace(facts["low"], facts["high"], len(facts["bins"]) + 1)
        low = -np.inf if facts["min"] is None else facts["min"]
        high = np.inf if facts["max"] is None else facts["max"]
        middles = (edges[1:] + edges[:-1]) / 2
        colours = ["#4a7fb5" if low <= m <= high else "#c8553d" for m in middles]
        axes.bar(middles, facts["bins"], edges[1] - edges[0], color=colours)
        for limit in (facts["min"], facts["max"]):
            if limit is not None:
                axes.axvline(limit, color="black", linestyle=":", linewidth=1)
        axes.set_title(f"{name}: {column}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_yticks([])
    sections = ("dropped by luminance", "dropped by clarity", "dropped by near", "dropped by mirrored", "kept")
    for row, section in enumerate(sections):
        cards = report.pictures.get(section, [])
        images = [url for card in cards for url in (card["thumbnail"], card["other"]) if url]
        top = 0.44 - row * 0.105
        figure.text(0.02, top + 0.035, section, fontsize=9)
        for at, url in enumerate(images[:10]):
            axes = figure.add_axes((0.16 + at * 0.083, top, 0.078, 0.085))
            axes.imshow(thumbnail(url))
            axes.axis("off")
    figure.savefig(place, dpi=90)


def main() -> None:
    from lens_curate.curation import curate
    from lens_curate.recipe import read_spec

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "raw").mkdir()
        spoil(folder / "raw")
        (folder / "recipe.yaml").write_text(RECIPE.replace("PATH", str(folder / "raw")))
        report = curate(read_spec(folder / "recipe.yaml"), folder / "store", runner="serial")
        print(report)
        draw(report, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
