"""The page in a real browser, headless: draw, stop, the same again, inpaint, compare, an error, two windows at once.

`make test-browser` installs Debian's chromium; without a browser these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the extra ui is not installed")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed; the extra dev has it")

from lens_serve.engine import Engine
from lens_serve.outputs import Outputs
from lens_serve.pages import Drawing, PageSettings, mount_page
from playwright.sync_api import sync_playwright
from serving import Gate, Running, running

from lens_core.catalog import Catalog
from lens_core.inference import png_metadata
from lens_core.inference.pipeline import LensPipeline

BROWSER = os.environ.get("LENS_TEST_BROWSER") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
    pytest.mark.skipif(BROWSER is None, reason="no browser is installed; make test-browser installs Debian's chromium"),
]
PATIENCE = 60_000  # ms, for what takes a second on a quiet machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    # As root, which tests in containers are, chromium starts without its sandbox alone.
    arguments = {"executable_path": BROWSER, "args": ["--no-sandbox"]}
    with sync_playwright() as driver, driver.chromium.launch(**arguments) as one:
        yield one


@pytest.fixture
def quick(quick: LensPipeline) -> LensPipeline:
    quick.presets |= {"base_resolution": 64}  # large enough to be seen on the page
    return quick


@pytest.fixture
def server(quick: LensPipeline, tmp_path: Path) -> Iterator[Running]:
    scratch = tmp_path / "outputs" / "scratch"
    scratch.mkdir(parents=True)
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')
    place = tmp_path / "results" / "shapes"
    place.mkdir(parents=True)
    (place / "table.md").write_text("| task | score |\n|---|---|\n| colours | 0.75 |\n")
    settings = PageSettings(runs=tmp_path / "runs", results=tmp_path / "results", scratch=scratch.resolve())
    outputs = Outputs(tmp_path / "outputs")

    def mount(app: Any, engine: Engine) -> None:
        mount_page(app, Drawing(engine, outputs), settings, Catalog.of(__import__("lens_studio")))

    with running(quick, mount=mount, outputs=outputs) as one:
        yield one


@pytest.fixture
def window(browser: Any, server: Running) -> Iterator[Callable[[], Any]]:
    """Opens windows, and checks that none asked another host for anything or failed in its scripts."""
    pages: list[Any] = []
    requests: list[str] = []
    faults: list[str] = []

    def opened() -> Any:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.port}/studio/")
        page.wait_for_selector("#prompt textarea")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    hosts = (f"http://127.0.0.1:{server.port}/", "data:", "blob:")
    assert [url for url in requests if not url.startswith(hosts)] == []
    assert faults == []


def status(page: Any, words: str, name: str = "status") -> None:
    """Wait until the window says so."""
    end = time.monotonic() + PATIENCE / 1000
    field = page.locator(f"#{name} textarea, #{name} input")
    while words not in field.input_value():
        assert time.monotonic() < end, field.input_value()
        page.wait_for_timeout(50)


def fill(page: Any, **values: str) -> None:
    for name, value in values.items():
        page.locator(f"#{name} textarea, #{name} input").first.fill(value)


def drawn(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "outputs").glob("*.png"), key=lambda path: path.stat().st_mtime_ns)


def test_a_prompt_is_drawn_and_the_same_again_from_its_file(
    window: Callable[[], Any], quick: LensPipeline, tmp_path: Path
) -> None:
    page = window()
    fill(page, prompt="red", seed="7", steps="3", guidance="2.5", negative="blue")
    page.click("#draw")
    status(page, "drawn")
    (first,) = drawn(tmp_path)
    expected = quick("red", "blue", seed=7, num_inference_steps=3, guidance_scale=2.5).images[0]
    with Image.open(first) as picture:
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected)).max() <= 1
    page.wait_for_selector("#gallery img")
    assert "red" in page.inner_text("#facts")
    again = window()
    again.set_input_files("#again input[type=file]", str(first))
    again.wait_for_function("document.querySelector('#prompt textarea').value === 'red'")
    assert again.locator("#seed input, #seed textarea").input_value() == "7"
    again.click("#draw")
    status(again, "drawn")
    assert drawn(tmp_path)[-1].read_bytes() == first.read_bytes() and len(drawn(tmp_path)) == 2


def test_a_request_is_stopped_while_its_picture_is_shown(
    window: Callable[[], Any], quick: LensPipeline, tmp_path: Path
) -> None:
    gate = Gate(quick)
    page = window()
    fill(page, prompt="red", seed="7", steps="50")
    page.click("#draw")
    for _ in range(3):
        gate.passes.release()
    status(page, "step 3 of 50")
    page.wait_for_selector("#preview img")
    page.click("#stop")
    page.wait_for_timeout(300)
    gate.open()
    status(page, "stopped")
    assert drawn(tmp_path) == []


def test_two_windows_draw_at_once_and_each_gets_its_picture(window: Callable[[], Any], tmp_path: Path) -> None:
    one, two = window(), window()
    fill(one, prompt="red", seed="1")
    fill(two, prompt="green", seed="2", number="2")
    one.click("#draw")
    two.click("#draw")
    status(one, "drawn")
    status(two, "2 drawn")
    one.wait_for_selector("#gallery img")
    two.wait_for_selector("#gallery img")
    assert "green" not in one.inner_text("#facts") and "green" in two.inner_text("#facts")
    facts = [png_metadata.facts(path)[1] for path in drawn(tmp_path)]
    assert sorted((fact["prompt"], fact["seed"]) for fact in facts) == [("green", 2), ("green", 3), ("red", 1)]


def test_an_error_is_one_clear_line_and_the_window_goes_on(window: Callable[[], Any]) -> None:
    page = window()
    fill(page, prompt="red", steps="many")
    page.click("#draw")
    status(page, "steps must be a whole number, not 'many'")
    toast = page.locator(".toast-body, [data-testid=toast-body]").first
    toast.wait_for()
    assert "steps must be a whole number" in toast.inner_text() and "Traceback" not in toast.inner_text()
    fill(page, steps="2")
    page.click("#draw")
    status(page, "drawn")


def test_what_is_painted_is_drawn_anew_and_the_rest_stays(window: Callable[[], Any], tmp_path: Path) -> None:
    original = Image.new("RGB", (64, 64), (200, 40, 40))
    original.save(tmp_path / "start.png")
    page = window()
    page.click("#init button")
    canvas = page.locator("#editor canvas").first
    canvas.wait_for()
    page.wait_for_timeout(1500)  # the editor is ready a moment after its canvas is there
    page.set_input_files("#editor input[type=file]", str(tmp_path / "start.png"))
    page.wait_for_timeout(1500)  # it fits the picture into its canvas
    paint = page.locator("#editor button[aria-label='Brush'], #editor button[aria-label='Draw button']").first
    if paint.count():
        paint.click()
    box = canvas.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 10, y + 6, steps=5)
    page.mouse.up()
    page.wait_for_timeout(500)
    fill(page, prompt="green", seed="3")
    page.click("#draw")
    status(page, "drawn")
    (path,) = drawn(tmp_path)
    facts = png_metadata.facts(path)[1]
    assert {"image_hash", "mask_hash"} <= facts.keys() and facts["strength"] == 1.0
    with Image.open(path) as picture:
        assert picture.size == (64, 64)
        changed = np.abs(np.asarray(picture).astype(int) - np.asarray(original)).max(-1) > 0
    assert 0 < changed.mean() < 0.6  # the painted part alone
    assert not changed[0, 0] and not changed[-1, -1]


def test_steps_are_compared_as_a_grid(window: Callable[[], Any]) -> None:
    page = window()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#compare-prompt textarea").fill("red")
    page.locator("#compare-steps textarea, #compare-steps input").fill("1, 2, 3")
    page.click("#compare")
    status(page, "3 of 3", "compare-status")
    image = page.locator("#compare-grid img")
    image.wait_for()
    page.wait_for_function("document.querySelector('#compare-grid img').naturalWidth > 0")
    size = image.evaluate("one => [one.naturalWidth, one.naturalHeight]")
    assert size == [3 * 256 + 8, 256 + 22]


def test_a_run_is_followed_while_it_trains_and_a_table_is_shown(window: Callable[[], Any], tmp_path: Path) -> None:
    page = window()
    page.get_by_role("tab", name="Runs").click()
    page.locator("#run input").click()
    page.get_by_role("option", name="first").click()
    status(page, "step 2: loss 1.5", "last")
    with (tmp_path / "runs" / "first" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "loss": 0.25}) + "\n")
    status(page, "step 3: loss 0.25", "last")
    page.get_by_role("tab", name="Results").click()
    page.locator("#result input").click()
    page.get_by_role("option", name="shapes").click()
    page.wait_for_selector("#table table")
    assert "0.75" in page.inner_text("#table")
