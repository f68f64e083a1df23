"""A plugin whose generator draws flat colours at once and whose benchmark reads them, and runs of it that are killed.

    python stage_worker.py kill FOLDER     kills runs at moments of every stage, goes on, and prints what came of it
    python stage_worker.py rank FOLDER     one process of a run of several, under a launcher's environment

A *moment* is just before one change of a file. See core/test_stages.py.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from PIL import Image
from torch import Tensor

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.evaluation.bench import BenchmarkRequest, run_benchmark
from lens_core.recipe import ComponentSpec
from lens_core.types import (
    GenerationEstimate,
    PictureOutcome,
    PictureRequest,
    Prompt,
    Score,
    StopGeneration,
    SystemInfo,
)

torch.set_num_threads(1)


def png(value: int, side: int = 4) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), (value, 0, 0)).save(data, format="PNG")
    return data.getvalue()


class Dots:
    """Draws red of the brightness seed mod 256. Prompts that begin with a word of `refuse`, `fail`, `stop` or `broken`
    get that instead. Each call is a line of `log`."""

    @frozen
    class Config:
        batch_size: int = 1
        revision: str = "1"
        log: str = ""
        refuse: str = "refuse"
        side: int = 4

    def __init__(self, config: Config) -> None:
        self.config, self.batch_size = config, config.batch_size

    def describe(self) -> SystemInfo:
        return SystemInfo("dots", self.config.revision, {"side": self.config.side})

    def generate(self, requests: Sequence[PictureRequest]) -> Iterator[PictureOutcome]:
        for request in requests:
            if self.config.log:
                with Path(self.config.log).open("a") as file:
                    file.write(f"{request.prompt_id}_{request.index}\n")
            word = request.prompt.split()[0]
            if word == self.config.refuse:
                yield PictureOutcome(request, "refused", reason="moderation_blocked: no", seconds=0.5)
            elif word == "fail":
                yield PictureOutcome(request, "failed", reason="timeout: slow")
            elif word == "broken":
                yield PictureOutcome(request, "ok", b"<html>")
            elif word == "stop":
                raise StopGeneration("dots: the key is wrong")
            else:
                picture = png(request.seed % 256, self.config.side)
                yield PictureOutcome(request, "ok", picture, seconds=2.0, usd=0.25, facts={"seed": request.seed})

    def estimate(self, count: int, size: tuple[int, int] | None = None) -> GenerationEstimate:
        return GenerationEstimate(count, 0.25 * count, 2.0 * count)


class Brightness:
    """Scores the brightness, 0 to 1; three pictures of each prompt."""

    images_per_prompt = 3

    @frozen
    class Config:
        words: tuple[str, ...] = ("a", "b", "c")
        prompts: int | None = None

    def __init__(self, config: Config) -> None:
        self.config = config

    def prompts(self) -> list[Prompt]:
        words = self.config.words[: self.config.prompts]
        return [Prompt(word, i, "even" if i % 2 == 0 else "odd") for i, word in enumerate(words)]

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Score]:
        return [Score("ok", float(image[0].float().mean()) / 255) for image in images]


@hookimpl
def lens_generators() -> dict[str, type[Any]]:
    return {"dots": Dots}


@hookimpl
def lens_benchmarks() -> dict[str, type[Any]]:
    return {"brightness": Brightness}


CATALOG = Catalog.of(sys.modules[__name__])


def run(folder: Path, **options: Any) -> Any:
    dots = {name: options.pop(name) for name in ("log", "batch_size", "revision", "side") if name in options}
    words = options.pop("words", ("a", "b", "c"))
    fields = {"options": {"words": list(words)}, **options}
    request = BenchmarkRequest("brightness", ComponentSpec("dots", dots), **fields)
    return run_benchmark(request, folder, catalog=CATALOG)


# ---- killed runs ----------------------------------------------------------------------------------------------------

CHANGES = {"os.rename", "os.remove", "os.mkdir"}
MOMENTS = {"now": 0, "last": -1}
COUNT = 12  # moments to die at


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if MOMENTS["last"] >= 0 and (event in CHANGES or written):
        MOMENTS["now"] += 1
        if MOMENTS["now"] > MOMENTS["last"]:
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(folder: Path, last: int) -> int:
    """Run in a process of its own that is killed before change number `last` -> its exit code, -9 if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            MOMENTS["last"] = last
            run(folder / "run", log=str(folder / "drawn"))
            MOMENTS["last"] = -1
            (folder / "moments").write_text(str(MOMENTS["now"]))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "run" / "result.json").read_text())
    lines = (folder / "run" / "perceptions.jsonl").read_text().splitlines()
    drawn = (folder / "drawn").read_text().splitlines()
    return {"result": result, "perceptions": lines, "drawn": len(drawn)}


def kill(folder: Path) -> None:
    """Runs that are killed once, at moments spread over all stages, and then go on; and one that is killed again and
    again, each time later than before."""
    sys.addaudithook(audit)
    (folder / "whole").mkdir(parents=True)
    code = attempt(folder / "whole", 10**6)
    total = int((folder / "whole" / "moments").read_text())
    runs: dict[str, Any] = {}
    for last in range(2, total, max(1, total // COUNT)):
        place = folder / f"once-{last}"
        place.mkdir()
        codes = [attempt(place, last), attempt(place, 10**6)]
        runs[place.name] = {"codes": codes, **outcome(place)}
    place = folder / "often"
    place.mkdir()
    codes = [attempt(place, last) for last in range(20, total, total // 4)]
    runs["often"] = {"codes": [*codes, attempt(place, 10**6)], **outcome(place)}
    print(json.dumps({"code": code, "whole": outcome(folder / "whole"), "runs": runs}))


if __name__ == "__main__":
    import stage_worker  # under this name its components are recorded

    if sys.argv[1] == "kill":
        stage_worker.kill(Path(sys.argv[2]))
    else:
        log = f"{sys.argv[2]}.drawn-{os.environ['RANK']}"
        report = stage_worker.run(Path(sys.argv[2]), words=tuple("abcdefg"), log=log)
        print(json.dumps({"reported": report is not None}))
