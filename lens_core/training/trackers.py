"""Trackers (TensorBoard, Trackio, W&B …): where the lines of `log.jsonl` and evaluations go as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lens_core.io.readers import one_line
from lens_core.types import ConfigError, did_you_mean


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError where Accelerate knows no such tracker, or its package is missing."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    bundled = {str(kind) for kind in LoggerType}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"$.train.trackers: no tracker is called {name!r}.{did_you_mean(name, LOGGER_TYPE_TO_CLASS)}"
            )
        if name in bundled and name not in map(str, get_available_trackers()):
            extra = "'lens-t2i[track]'" if name in ("tensorboard", "trackio") else name
            raise ConfigError(f"$.train.trackers: {name} is not installed; pip install {extra}, or leave it out")


class Trackers:
    """Accelerate's trackers of a run. One that fails while it runs is logged and left out; it never stops the run."""

    def __init__(self, accelerator: Any, recipe: Mapping[str, Any], out: Path, log: Callable[[str], None]) -> None:
        self.log_line = log
        if accelerator.log_with:
            named = {str(t): {"name": out.name} for t in accelerator.log_with if str(t) in ("wandb", "trackio")}
            accelerator.init_trackers("lens", dict(_flat(recipe, "")), named)
        self.trackers = accelerator.trackers

    def log(self, values: Mapping[str, Any], step: int) -> None:
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        for tracker in list(self.trackers):
            try:
                tracker.log(numbers, step=step)
            except Exception as error:  # whatever a service or its client does, the training is worth more
                self.trackers.remove(tracker)
                self.log_line(f"the tracker {tracker.name} failed and is left out from now on: {one_line(error)}")

    def finish(self) -> None:
        while self.trackers:
            tracker = self.trackers.pop()
            try:
                tracker.finish()
            except Exception as error:
                self.log_line(f"the tracker {tracker.name} failed as it ended: {one_line(error)}")


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path, value if isinstance(value, bool | int | float | str) else str(value)
