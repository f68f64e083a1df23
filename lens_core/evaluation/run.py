"""Run a benchmark over a pipeline: generate an image for each prompt, score them, and take means by task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lens_core.attribution import calling, checked_scores, headline_tasks_of, prompts_of
from lens_core.evaluation.contracts import naming_first
from lens_core.evaluation.statistics import ClusteredScores, Estimate, cluster_of, mean_of_tasks, pooled
from lens_core.types import ConfigError, Prompt, Score

if TYPE_CHECKING:
    from torch import Tensor

    from lens_core.inference.pipeline import LensPipeline


PICTURES_PER_SEED = 1_000_000
"""Seeds of pictures that belong to one seed of a benchmark, so that two runs of it share no noise."""


def picture_seed(seed: int, index: int) -> int:
    """The seed of picture `index` of a benchmark run with `seed`. Raises ConfigError outside 0 to 2^63 / 1,000,000."""
    if not 0 <= seed < 2**63 // PICTURES_PER_SEED:
        raise ConfigError(f"a benchmark's seed must be from 0 to {2**63 // PICTURES_PER_SEED - 1}, not {seed}")
    return seed * PICTURES_PER_SEED + index


def by_task(prompts: Sequence[Prompt], scores: Sequence[Score]) -> dict[str, ClusteredScores]:
    """Scores by task, in order of first appearance. Pictures without a score are counted apart, never as zeros."""
    tasks: dict[str, tuple[list[float], list[Any], list[Score]]] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        values, clusters, missing = tasks.setdefault(prompt.task, ([], [], []))
        if score.value is None:
            missing.append(score)
        else:
            values.append(score.value)
            clusters.append(cluster_of(prompt))
    return {
        task: ClusteredScores(values, clusters, len(missing)) for task, (values, clusters, missing) in tasks.items()
    }


def generate_images(
    pipeline: LensPipeline, prompts: Sequence[Prompt], seed: int, batch_size: int, **settings: Any
) -> Iterator[Tensor]:
    """Yield images uint8 [B,3,H,W] in the order of the prompts, `batch_size` at a time.

    Image i has the seed `seed + i` however they are batched; `settings` go to the pipeline's call.
    """
    for start in range(0, len(prompts), batch_size):
        texts = [p.text for p in prompts[start : start + batch_size]]
        yield pipeline(texts, seed=seed + start, output_type="pt", **settings).images


@frozen
class BenchmarkResult:
    """What a benchmark run measured: estimates by task, and every score and image."""

    tasks: dict[str, Estimate]
    overall: Estimate  # the mean of the headline tasks' means
    pooled: Estimate  # the plain mean over all pictures: the share right, where scores are yes or no
    scores: tuple[Score, ...]
    images: Tensor
    headline: tuple[str, ...]  # the tasks that `overall` is the mean of
    ceiling: dict[str, float]  # by task, "overall" and "pooled": what right pictures score after the VAE; may be empty


def evaluate(
    pipeline: LensPipeline,
    benchmark: Any,
    *,
    seed: int = 0,
    batch_size: int = 50,
    log: Callable[[str], None] = lambda line: None,
    on_images: Callable[[int, Tensor], None] = lambda first, images: None,
    ceiling: bool = False,
    **settings: Any,
) -> BenchmarkResult:
    """Generate one image for each prompt of `benchmark` and score them; `settings` go to the pipeline's call.

    Image i has the seed `picture_seed(seed, i)`. `on_images` gets each batch as it comes, with the index of its first
    image, so that a caller can keep what is drawn if scoring fails. `ceiling` asks for `ceiling_of` too.
    Raises LensError where a headline task has no score.
    """
    import torch

    prompts = prompts_of(benchmark)
    if len(prompts) > PICTURES_PER_SEED:
        raise ConfigError(f"a benchmark may have {PICTURES_PER_SEED} prompts at most, not {len(prompts)}")
    images: list[Tensor] = []
    for part in generate_images(pipeline, prompts, picture_seed(seed, 0), batch_size, **settings):
        done = sum(map(len, images))
        images.append(part.cpu())
        on_images(done, images[-1])
        log(f"generated {done + len(part)} of {len(prompts)}")
    pictures = torch.cat(images)
    size = (pictures.shape[-2], pictures.shape[-1])
    return score(benchmark, pictures, prompts, ceiling_of(pipeline, benchmark, prompts, size) if ceiling else {})


def score(
    benchmark: Any, images: Tensor, prompts: Sequence[Prompt], ceiling: Mapping[str, float] | None = None
) -> BenchmarkResult:
    """Score images uint8 [B,3,H,W], one a prompt, and take means by task. Raises LensError as `evaluate`."""
    with calling(benchmark, "score"):
        scores = benchmark.score(images, prompts)
    scores = checked_scores(benchmark, scores, len(prompts))
    tasks = by_task(prompts, scores)
    headline = headline_tasks_of(benchmark) or tuple(tasks)
    estimates = {name: task.estimate() for name, task in tasks.items()}
    with naming_first([(p.task, s) for p, s in zip(prompts, scores, strict=True)], headline):
        overall = mean_of_tasks(tasks, headline)
    return BenchmarkResult(estimates, overall, pooled(tasks), scores, images, headline, dict(ceiling or {}))


def ceiling_of(
    pipeline: LensPipeline, benchmark: Any, prompts: Sequence[Prompt], size: tuple[int, int]
) -> dict[str, float]:
    """The scores that flawless images of `size` (height, width) get after the pipeline's own VAE: no model that decodes
    with it can be expected to score higher. By task, and as "overall" and "pooled"; empty where the benchmark cannot
    make such images."""
    if not hasattr(benchmark, "ceiling"):
        return {}
    with calling(benchmark, "ceiling"):
        scores = benchmark.ceiling(pipeline.vae, *size)
    tasks = by_task(prompts, checked_scores(benchmark, scores, len(prompts), "ceiling"))
    headline = headline_tasks_of(benchmark) or tuple(tasks)
    return {
        **{name: task.mean for name, task in tasks.items()},
        "overall": mean_of_tasks(tasks, headline).value,
        "pooled": pooled(tasks).value,
    }
