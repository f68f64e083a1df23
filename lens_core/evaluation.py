"""Running a benchmark over a generator: pictures, scores by task with intervals, a table and a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lens_core.types import LensError, Prompt, Score

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from lens_core.pipeline import LensPipeline


@frozen
class Rate:
    """A share of successes with its 95 % Wilson interval. `missing` pictures had no verdict and do not count."""

    value: float
    low: float
    high: float
    count: int
    missing: int = 0


Z = 1.959963984540054  # standard deviations of a normal on each side of the middle 95 %


def _interval(p: float, n: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share `p` of `n` (Wilson 1927)."""
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def wilson(values: Sequence[float], missing: int = 0) -> Rate:
    """The mean of verdicts in [0, 1] and its 95 % Wilson score interval. NaN where there is none."""
    n = len(values)
    if n == 0:
        return Rate(math.nan, 0.0, 1.0, 0, missing)
    p = sum(values) / n
    return Rate(p, *_interval(p, n), n, missing)


def by_task(prompts: Sequence[Prompt], scores: Sequence[Score]) -> dict[str, Rate]:
    """One rate a task, in order of first appearance. Abstentions and failures are counted apart, never as zeros."""
    tasks = dict.fromkeys(p.task for p in prompts)
    rates = {}
    for task in tasks:
        mine = [s for p, s in zip(prompts, scores, strict=True) if p.task == task]
        values = [s.value for s in mine if s.value is not None]
        rates[task] = wilson(values, len(mine) - len(values))
    return rates


def overall(rates: Mapping[str, Rate], headline: Sequence[str]) -> Rate:
    """The mean of the headline tasks' rates, with Wilson's interval for the effective number of pictures.

    That is how many pictures of one task would give a mean as certain as this mean of tasks (Kish 1965). Its variances
    are taken at the centres of the tasks' Wilson intervals, so that none is 0, even where all verdicts agree.
    """
    used = [rates[t] for t in headline if t in rates and rates[t].count]
    if len(used) != len(headline):
        raise LensError("a headline task has no verdict at all; raise the number of prompts")
    value = sum(r.value for r in used) / len(used)
    centres = [(r.value * r.count + Z * Z / 2) / (r.count + Z * Z) for r in used]
    centre = sum(centres) / len(used)
    variance = sum(c * (1 - c) / r.count for c, r in zip(centres, used, strict=True)) / len(used) ** 2
    interval = _interval(value, centre * (1 - centre) / variance)
    return Rate(value, *interval, sum(r.count for r in used), sum(r.missing for r in used))


def draw(pipeline: LensPipeline, prompts: Sequence[Prompt], seed: int, batch: int, **settings: Any) -> Iterator[Tensor]:
    """Images uint8 in order, `batch` at a time; picture i has the seed `seed + i` however they are batched."""
    for start in range(0, len(prompts), batch):
        texts = [p.text for p in prompts[start : start + batch]]
        yield pipeline(texts, seed=seed + start, output_type="pt", **settings).images


@frozen
class Outcome:
    """What a benchmark run found."""

    rates: dict[str, Rate]
    overall: Rate
    scores: tuple[Score, ...]
    images: Tensor
    headline: tuple[str, ...]  # the tasks that `overall` is the mean of


def evaluate(
    pipeline: LensPipeline,
    benchmark: Any,
    *,
    seed: int = 0,
    batch: int = 50,
    say: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Outcome:
    """Draw every prompt of `benchmark` once and judge the pictures; `settings` go to the pipeline's call."""
    import torch

    prompts = benchmark.prompts()
    images: list[Tensor] = []
    for part in draw(pipeline, prompts, seed, batch, **settings):
        images.append(part.cpu())
        say(f"drawn {sum(map(len, images))} of {len(prompts)}")
    pictures = torch.cat(images)
    scores = tuple(benchmark.score(pictures, prompts))
    rates = by_task(prompts, scores)
    headline = tuple(getattr(benchmark, "headline", rates))
    return Outcome(rates, overall(rates, headline), scores, pictures, headline)


def table(outcome: Outcome) -> str:
    """A Markdown table of the rates in percent, 95 % intervals."""
    rows = ["| task | score | 95 % interval | pictures |", "|---|---|---|---|"]
    for name, rate in (*outcome.rates.items(), ("**overall**", outcome.overall)):
        rows.append(f"| {name} | {rate.value:.3f} | {rate.low:.3f} to {rate.high:.3f} | {rate.count} |")
    return "\n".join(rows)


def contact_sheet(images: Tensor, labels: Sequence[str], passed: Sequence[bool | None], columns: int = 8) -> Image:
    """Pictures uint8 [B,3,H,W] in a grid, each with its prompt, framed green if it passed and red if it failed."""
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
