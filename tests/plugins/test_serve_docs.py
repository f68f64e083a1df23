"""docs/serve.md: its lines for OpenAI's client and for curl work, and its figures are those of the results."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import attrs
import pytest
from lens_serve.bodies import BodyLimits
from lens_serve.fields import NO_EFFECT, READERS
from lens_serve.jobs import Limits
from serving import running

from lens_core.inference.pipeline import LensPipeline

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
LOAD = ROOT / "docs" / "results" / "serve" / "load.json"


def block(begin: str) -> str:
    """The fenced text that begins so."""
    return next(text for text in re.findall(r"^```text\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE) if begin in text)


def test_the_lines_of_the_client_and_of_curl_draw_a_picture(
    quick: LensPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(quick) as server:
        names: dict[str, Any] = {}
        exec(block("from openai").replace("http://127.0.0.1:8000/v1", server.url), names)
        assert capsys.readouterr().out.startswith("iVBORw0KGgo") and names["answer"].data[0].seed == 7
        names["client"].close()
        words = shlex.split(block("curl"))
        path = words[1].removeprefix("http://127.0.0.1:8000")
        header = dict([words[words.index("-H") + 1].split(": ")])
        status, _, body = server.ask("POST", path, words[words.index("-d") + 1].encode(), header)
        assert status == 200 and [item["seed"] for item in json.loads(body)["data"]] == [7, 8]


def test_the_page_names_every_field_and_every_default_limit() -> None:
    table = PAGE.split("## Requests")[1].split("## The queue")[0]
    assert {*READERS, *NO_EFFECT} - {"background"} <= set(re.findall(r"`(\w+)`", table))
    limits = PAGE.split("## Limits")[1].split("\n## ")[0]
    for name, value in {**attrs.asdict(Limits()), "max_upload_pixels": BodyLimits().max_upload_pixels}.items():
        if name != "max_previews":
            assert f"{value:,}" in limits, name
    assert f"| {BodyLimits().max_json >> 20} MiB |" in limits and f"| {BodyLimits().max_upload >> 20} MiB |" in limits


def test_the_figures_are_those_of_the_results() -> None:
    data = json.loads(LOAD.read_text(encoding="utf-8"))
    load, section = data["load"], PAGE.split("## Load")[1].split("\n## ")[0]
    assert load["lost"] == 0 and load["answered"] == load["requests"] == 500
    for value in (*load["seconds"].values(), load["images_per_second"], load["images_per_batch"]):
        assert f"{value:g}" in section, value
    memory = load["resident_mib"]
    assert f"{min(memory):.0f} to {max(memory):.0f} MiB" in section
    assert max(memory[len(memory) // 2 :]) <= 1.05 * memory[0]  # flat
    assert load["alone_against_batched"]["max_difference"] <= 1
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")]
    names = ("clients", "images_per_second", "images_per_cpu_second", "images_per_batch")
    assert [tuple(map(float, row)) for row in rows[1:]] == [tuple(row[n] for n in names) for row in data["rates"]]
