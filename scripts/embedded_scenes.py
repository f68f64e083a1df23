"""Scenes for the embedded model: rendered by many processes into shared memory, and read back by others."""

from __future__ import annotations

import mmap
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen
from lens_shapes import splits
from lens_shapes.captions import caption, dense
from lens_shapes.render import render
from lens_shapes.scoring import score_images
from numpy.typing import NDArray

from lens_core.types import Prompt

TASKS = {
    "single": 0.03,
    "two": 0.12,
    "counting": 0.20,
    "colours": 0.04,
    "position": 0.15,
    "attribution": 0.14,
    "words": 0.16,
    "counted colours": 0.06,
    "coloured position": 0.05,
    "groups": 0.03,
    "word and thing": 0.02,
}
"""How often each kind of scene is drawn: the tasks of the benchmark, with more words and counts."""
FURTHER_TASKS = {
    "single": 0.02,
    "two": 0.10,
    "counting": 0.10,
    "colours": 0.15,
    "position": 0.06,
    "attribution": 0.19,
    "words": 0.07,
    "counted colours": 0.15,
    "coloured position": 0.12,
    "groups": 0.02,
    "word and thing": 0.02,
}
"""Of a run that goes on: three of five captions name colours, where it was three of ten. Where captions
rarely name the colour of a shape, a model learns from pictures alone which colours it has, and draws no other."""
NAMED_TASKS = {
    "single": 0.01,
    "two": 0.07,
    "counting": 0.09,
    "colours": 0.20,
    "position": 0.03,
    "attribution": 0.16,
    "words": 0.03,
    "counted colours": 0.24,
    "coloured position": 0.14,
    "groups": 0.02,
    "word and thing": 0.01,
}
"""Three of four captions name colours, and a third of the scenes are about how many there are."""
MIXTURES = {"first": TASKS, "further": FURTHER_TASKS, "named": NAMED_TASKS}


@frozen
class Group:
    """Scenes of one picture size and one style of captions. `tokens`: columns of text features that fit its captions.

    Brief captions never name a size, so their things are as large as their number allows; dense ones do.
    """

    name: str
    size: tuple[int, int]  # height, width px
    chunks: int
    dense: bool
    tokens: int
    chunk: int = 512  # scenes that one job renders

    @property
    def count(self) -> int:
        """Its scenes."""
        return self.chunks * self.chunk


class SharedScenes:
    """The pictures of all groups in memory that other processes share by the files' numbers, `files`."""

    def __init__(self, groups: Sequence[Group], files: Sequence[int] = ()) -> None:
        self.groups = groups
        self.files = list(files) or [os.memfd_create(g.name) for g in groups for _ in range(2)]
        shapes = [s for g in groups for s in ((g.count, *g.size, 3), (g.chunks,))]
        arrays = [_shared(file, shape) for file, shape in zip(self.files, shapes, strict=True)]
        self.images, self._done = arrays[::2], arrays[1::2]

    def finish(self, place: int, number: int) -> None:
        """Mark a chunk as rendered."""
        self._done[place][number] = 1

    def ready(self, place: int) -> NDArray[np.int64]:
        """The chunks of a group that are rendered."""
        return np.flatnonzero(self._done[place])


class Readers:
    """Processes that read pictures. Start them before CUDA."""

    def __init__(self, count: int) -> None:
        self._pool = multiprocessing.get_context("fork").Pool(count, initializer=_one_thread)

    def score(self, images: torch.Tensor, prompts: Sequence[Prompt]) -> Any:
        """A handle whose `.get()` returns one list of values for every few pictures, uint8 [B,3,H,W], in order."""
        pictures = images.cpu().numpy()
        parts = [(pictures[n : n + 4], list(prompts[n : n + 4])) for n in range(0, len(prompts), 4)]
        return self._pool.starmap_async(_read, parts, chunksize=1)

    def close(self) -> None:
        self._pool.terminate()
        self._pool.join()


class SceneFactory:
    """Renders every scene of `groups` in `workers` processes; `readers` more judge pictures. Start it before CUDA."""

    def __init__(
        self,
        groups: Sequence[Group],
        encoder: Any,
        seed: int,
        workers: int,
        readers: int,
        tasks: Mapping[str, float] = TASKS,
    ) -> None:
        self.groups, self.encoder, self.seed, self.tasks = groups, encoder, seed, dict(tasks)
        self.scenes = SharedScenes(groups)
        context = multiprocessing.get_context("fork")
        self.readers = Readers(readers)
        # The workers inherit `self`, and so the shared memory, with the fork.
        self._workers = context.Pool(workers, initializer=_start, initargs=(self,))
        jobs = [
            ((number + 0.5) / group.chunks, place, number)
            for place, group in enumerate(groups)
            for number in range(group.chunks)
        ]
        self.left = len(jobs)
        self._results: Any = self._workers.imap_unordered(_render, [job[1:] for job in sorted(jobs)])

    def finished(self, wait: float) -> Iterator[tuple[int, int, list[bytes]]]:
        """The chunks that were finished since the last call, as (group, chunk, captions); waits so long for each. A
        caption is the bytes of its tokens, int16."""
        while self.left:
            try:
                result = self._results.next(wait)
            except multiprocessing.TimeoutError:
                return
            self.left -= 1
            yield result

    def close(self) -> None:
        self._workers.terminate()
        self._workers.join()
        self.readers.close()


def caption_tokens(encoder: Any, captions: Sequence[str]) -> list[bytes]:
    """Captions as the bytes of their tokens, int16, as `TextStore` takes them."""
    ids, mask = encoder.rendered(captions)
    head = encoder.head_length
    tokens = ids[:, head:].numpy().astype(np.int16)
    return [row[:n].tobytes() for row, n in zip(tokens, mask[:, head:].sum(1).tolist(), strict=True)]


def _shared(file: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An array in the memory of a file, zeros at first."""
    size = int(np.prod(shape))
    if os.fstat(file).st_size < size:
        os.ftruncate(file, size)
    return np.frombuffer(mmap.mmap(file, size), np.uint8).reshape(shape)


_factory: SceneFactory | None = None


def _one_thread() -> None:
    torch.set_num_threads(1)


def _start(factory: SceneFactory) -> None:
    global _factory
    _factory = factory
    os.nice(5)
    _one_thread()


def _render(job: tuple[int, int]) -> tuple[int, int, list[bytes]]:
    assert _factory is not None
    place, number = job
    group, captions = _factory.groups[place], []
    for index in range(number * group.chunk, (number + 1) * group.chunk):
        rng = np.random.default_rng([_factory.seed, place, index])
        scene = splits.sample(rng, "train", tasks=_factory.tasks, largest=not group.dense)
        _factory.scenes.images[place][index] = render(scene, *group.size)
        captions.append((dense if group.dense else caption)(scene, rng))
    _factory.scenes.finish(place, number)
    return place, number, caption_tokens(_factory.encoder, captions)


def _read(pictures: NDArray[np.uint8], prompts: list[Prompt]) -> list[float]:
    return [float(s.value or 0.0) for s in score_images(torch.from_numpy(pictures), prompts)]
