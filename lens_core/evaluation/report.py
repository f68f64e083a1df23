"""What is written of a benchmark run: PNG files, result.json, a Markdown table and a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attrs import asdict

from lens_core.evaluation.run import BenchmarkResult, picture_seed
from lens_core.evaluation.statistics import Estimate, cluster_of
from lens_core.io import markdown
from lens_core.types import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def result_json(result: BenchmarkResult, prompts: Sequence[Prompt], seed: int) -> dict[str, Any]:
    """The content of result.json: estimates, and each picture's prompt, task, seed, status and score."""

    def numbers(estimate: Estimate) -> dict[str, Any]:  # JSON has no NaN
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(estimate).items()}

    pictures = []
    for index, (prompt, scored) in enumerate(zip(prompts, result.scores, strict=True)):
        entry = {"prompt": prompt.text, "task": prompt.task, "seed": picture_seed(seed, index)}
        entry |= {"status": scored.status, "value": scored.value}
        cluster = cluster_of(prompt)
        pictures.append(entry if cluster == prompt.text else entry | {"cluster": str(cluster)})
    return {
        "headline": [task for task in result.tasks if task in result.headline],
        "overall": numbers(result.overall),
        "pooled": numbers(result.pooled),
        "tasks": {name: numbers(estimate) for name, estimate in result.tasks.items()},
        **({"ceiling": {name: round(value, 6) for name, value in result.ceiling.items()}} if result.ceiling else {}),
        "pictures": pictures,
    }


def table(result: BenchmarkResult) -> str:
    """A Markdown table of scores with 95 % intervals by prompt, and the ceiling where it is known."""
    ceiling = result.ceiling
    more = ["ceiling"] if ceiling else []
    rows = markdown.header(["task", "score", "95 % interval", "pictures", "distinct prompts", *more])
    tasks = len([name for name in result.tasks if name in result.headline])
    named = {
        **{name: (name, estimate) for name, estimate in result.tasks.items()},
        "overall": (f"**overall** (mean of {tasks} tasks)", result.overall),
        "pooled": ("all pictures", result.pooled),
    }
    for key, (name, estimate) in named.items():
        more = [f"{ceiling[key]:.3f}" if key in ceiling else ""] if ceiling else []
        rows.append(markdown.row([name, *cells_of(estimate), estimate.count, estimate.distinct, *more]))
    return "\n".join(rows)


def cells_of(estimate: Estimate | None) -> list[str]:
    """A score and its interval for two cells of a table; a dash where there is no score."""
    if estimate is None or math.isnan(estimate.value):
        return ["–", ""]
    span = "" if math.isnan(estimate.low) else f"{estimate.low:.3f} to {estimate.high:.3f}"
    return [f"{estimate.value:.3f}", span]


def contact_sheet(images: Tensor, labels: Sequence[str], passed: Sequence[bool | None], columns: int = 8) -> Image:
    """A grid of images uint8 [B,3,H,W], each above its prompt, framed green (passed), red (failed) or grey."""
    import textwrap

    from PIL import Image as pil
    from PIL import ImageDraw, ImageFont

    high, wide = images.shape[-2:]
    words = 34
    rows = math.ceil(len(images) / columns)
    sheet = pil.new("RGB", (columns * (wide + 8), rows * (high + 8 + words)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, picture in enumerate(images):
        x, y = (i % columns) * (wide + 8) + 4, (i // columns) * (high + 8 + words) + 4
        frame = {True: "#1a9641", False: "#d7191c", None: "#999999"}[passed[i]]
        pen.rectangle((x - 3, y - 3, x + wide + 2, y + high + 2), fill=frame)
        sheet.paste(pil.fromarray(picture.permute(1, 2, 0).numpy()), (x, y))
        pen.multiline_text(
            (x, y + high + 4), textwrap.fill(labels[i], max(8, wide // 6), max_lines=3), "black", font, spacing=1
        )
    return sheet
