"""`lens doctor --check`: whether Lens is right and fast on this GPU, in stages by priority, within so many minutes.

Each stage is a process of its own with a hard limit, so a stage that hangs or crashes costs the others nothing. It
writes its results after every item, as JSON under the output folder: environment.json, correctness.json, latency.json,
training.json, embedded.json; summary.json and report.md come last.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field, frozen

from lens_core.inference.parts import resolve_device
from lens_core.io import atomic_files
from lens_core.types import ConfigError, did_you_mean
from lens_core.validators import real
from lens_tools.records import Records, plain

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "gpu"
EMBEDDED = ROOT / "scripts" / "train_embedded.py"
SHARES = {"correctness": 0.25, "latency": 0.44, "training": 0.31, "embedded": 0.6}
"""Stage -> the most of the whole time that it may take; what a stage leaves goes to those after it."""
GRACE = 8.0  # seconds between a stage's deadline, which it knows, and its end by force


@frozen
class CheckRequest:
    """What to check: `stages` in this order within `minutes`, on `device`; `small` takes sizes for a CPU."""

    output: Path
    minutes: float = field(default=8.0, validator=real(above=0))
    stages: tuple[str, ...] = ("correctness", "latency", "training")
    device: str = "cuda"
    small: bool = False
    tests: str = ""  # a file of tests/gpu, or its pytest expression; "": all


def check(request: CheckRequest) -> dict[str, Any]:
    """Run the stages and return the summary, which is also in the output folder. Raises ConfigError for unknown names
    and where there is no such device."""
    for stage in request.stages:
        if stage not in SHARES:
            raise ConfigError(f"no stage is called {stage!r}.{did_you_mean(stage, SHARES)}")
    if request.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here; use --device cpu --small to rehearse the check on this CPU")
    resolve_device(request.device)
    request = evolve(request, output=request.output.resolve())
    request.output.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    end = begun + 60 * request.minutes
    atomic_files.write_json(request.output / "environment.json", plain(environment(request.device)))
    summary: dict[str, Any] = {"stages": {}, "minutes": request.minutes, "small": request.small}
    shares = {stage: SHARES[stage] for stage in request.stages}
    for n, stage in enumerate(request.stages):
        rest = end - time.time()
        left = [shares[name] for name in request.stages[n:]]
        # What earlier stages left over is shared; the last stage has all of it.
        limit = rest * min(1.0, shares[stage] / sum(left)) if len(left) > 1 else rest
        summary["stages"][stage] = run_stage(request, stage, limit)
        atomic_files.write_json(request.output / "summary.json", plain(summary))
    summary["seconds"] = round(time.time() - begun, 1)
    atomic_files.write_json(request.output / "summary.json", plain(summary))
    from lens_tools.gpu_report import report

    text = report(request.output)
    atomic_files.write_text(request.output / "report.md", text)
    return summary


def run_stage(request: CheckRequest, stage: str, limit: float) -> dict[str, Any]:
    """Run one stage in a process of its own, which is ended after `limit` seconds -> how it ended."""
    if limit < 3:
        return {"state": "skipped", "why": "no time left"}
    begun = time.time()
    soft = max(limit - GRACE, 0.7 * limit)
    kind = request.device.partition(":")[0]
    command = stage_command(evolve(request, device=kind), stage, soft)
    if not command:
        return {"state": "skipped", "why": "its script is not here"}
    variables = {"LENS_TEST_DEVICE": kind, "PYTHONUNBUFFERED": "1", **visible_device(request.device)}
    paths = [str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]
    variables |= {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    variables |= {"LENS_GPU_RESULTS": str(request.output / "correctness.json"), "TOKENIZERS_PARALLELISM": "false"}
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")
    }  # a stage is no worker of ours
    with (request.output / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"== {stage}, {limit:.0f} s\n")
        log.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=inherited | variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    state = "cut off" if code is None else "finished" if code == 0 else "failed"
    return {"state": state, "exit_code": code, "seconds": round(time.time() - begun, 1), "limit": round(limit, 1)}


def visible_device(device: str) -> dict[str, str]:
    """Environment variables under which a GPU such as cuda:1 is the only one, and cuda: events, graphs and default
    generators are the current device's, whatever device tensors are on."""
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index:
        return {}
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return {"CUDA_VISIBLE_DEVICES": names[int(index)] if names else index}


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a stage and all that it started, if any of it still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stage_command(request: CheckRequest, stage: str, soft: float) -> list[str]:
    """The command of a stage, which has `soft` seconds; [] for a stage that is not here."""
    if stage == "embedded":
        if not EMBEDDED.is_file():
            return []
        small = ["--small"] if request.small else []
        more = [
            "--minutes",
            f"{soft / 60:.2f}",
            "--output",
            str(request.output / "embedded"),
            "--device",
            request.device,
        ]
        return [sys.executable, str(EMBEDDED), *more, *small]
    if stage == "correctness":
        return test_command(request) if TESTS.is_dir() else []
    about = {
        "stage": stage, "output": str(request.output / f"{stage}.json"), "deadline": time.time() + soft,
        "device": request.device, "small": request.small,
    }  # fmt: skip
    return [sys.executable, "-m", "lens_tools.gpu_check", json.dumps(about)]


def test_command(request: CheckRequest) -> list[str]:
    """pytest over the tests marked `gpu`. Their outcomes are written one by one by tests/gpu/conftest.py."""
    from importlib.util import find_spec

    places = [str(TESTS / request.tests) if request.tests.endswith(".py") else str(TESTS)]
    chosen = ["-k", request.tests] if request.tests and not request.tests.endswith(".py") else []
    # Another version of a dependency may warn of what is still right.
    options = ["-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-q", "--tb=short", "-rfE"]
    options += ["--timeout", "60"] if find_spec("pytest_timeout") else []
    options += ["-n", "8"] if find_spec("xdist") and not request.small else []
    return [sys.executable, "-m", "pytest", *places, *chosen, *options]


def environment(device: str) -> dict[str, Any]:
    """What was measured on: machine, driver, versions."""
    from lens_core.catalog import Catalog
    from lens_tools import doctor

    cuda = device.partition(":")[0] == "cuda"
    current: Any = torch.cuda.device(device) if cuda and ":" in device else contextlib.nullcontext()
    with current:
        facts = doctor.examine(Catalog.installed(), ("software", "device", "attention"))
    facts["machine"] = {"cores": os.cpu_count(), "platform": platform.platform(), "date": time.strftime("%Y-%m-%d")}
    if cuda:
        facts["driver"] = {"nvidia-smi": query_driver()}
    return facts


def query_driver() -> str:
    """Name, driver, clocks and memory, as nvidia-smi has them."""
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


def main(arguments: Sequence[str]) -> int:
    """The process of one stage: one JSON object, as `stage_command` makes it."""
    about = json.loads(arguments[0])
    records = Records(Path(about["output"]), about["deadline"])
    records.write()
    if about["stage"] == "latency":
        from lens_tools.gpu_latency import measure
    else:
        from lens_tools.gpu_training import measure
    measure(records, torch.device(about["device"]), about["small"])
    records.write()
    return 1 if any("error" in item for item in records.items.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
