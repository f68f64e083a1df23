"""The gallery shows the examples as they are: short scripts, each with its picture, each run by a test."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("gallery", ROOT / "scripts" / "gallery.py")
assert SPEC is not None and SPEC.loader is not None
gallery = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gallery)


def test_the_page_is_the_one_that_the_script_writes() -> None:
    assert gallery.PAGE.read_text(encoding="utf-8") == gallery.page()


def test_every_picture_belongs_to_an_example() -> None:
    drawn = {name for name, (_, _, picture, _) in gallery.ENTRIES.items() if picture}
    assert {path.stem for path in gallery.PICTURES.iterdir()} == drawn


@pytest.mark.parametrize("name", gallery.ENTRIES)
def test_an_example_is_short_has_a_picture_and_is_run_by_a_test(name: str) -> None:
    _, _, picture, _ = gallery.ENTRIES[name]
    assert 8 <= gallery.code_lines(ROOT / "examples" / f"{name}.py") <= 40
    assert f'("{name}", [' in (ROOT / "tests" / "test_docs.py").read_text(encoding="utf-8")
    if picture:
        path = gallery.PICTURES / f"{name}.png"
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert max(image.size) <= gallery.LARGEST and path.stat().st_size < 300_000
        assert pixels.std() > 5, "it shows something"


def test_lines_of_code_count_neither_blank_lines_nor_comments_nor_the_docstring(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text('"""What it\\ndoes."""\n\n# why\nimport sys  # too\n\nprint(1)\n')
    assert gallery.code_lines(tmp_path / "script.py") == 2


def test_the_page_for_authors_says_how_many_lines_each_idea_takes() -> None:
    page = (ROOT / "docs" / "write-a-plugin.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]+\| \[(\w+)\.py\]\(\.\./examples/\1\.py\) \| (\d+) \|$", page, re.M)
    assert [name for name, _ in rows] == [
        "own_reward", "another_encoder", "own_sampler", "own_vae", "own_method", "own_dataset",
    ]  # fmt: skip
    for name, count in rows:
        assert gallery.code_lines(ROOT / "examples" / f"{name}.py") == int(count), name
        assert f'("{name}", [' in (ROOT / "tests" / "test_docs.py").read_text(encoding="utf-8"), "no test runs it"
