"""The documentation runs: every Python block and example, every command line, every link, every signature."""

from __future__ import annotations

import inspect
import re
import runpy
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from lens_core import hookspecs
from lens_core.catalog import Catalog
from lens_core.cli.main import app, mount
from lens_core.inference.pipeline import LensPipeline
from lens_core.protocols import KINDS
from lens_core.recipe import read_recipe
from lens_core.types import TextFeatures

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(*languages: str) -> list[tuple[Path, int, str]]:
    """(page, line, text) of every fenced block in one of the `languages`."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            if match[1] in languages:
                found.append((page, text[: match.start()].count("\n") + 2, match[2]))
    return found


def commands() -> list[tuple[str, str]]:
    """(where, command line) of every line of every shell block."""
    return [
        (f"{page.name}:{line + i}", text.removeprefix("$ "))
        for page, line, block in blocks("bash", "console")
        for i, text in enumerate(block.splitlines())
        if text.strip()
    ]


def label(value: object) -> str:
    return value.name if isinstance(value, Path) else str(value) if isinstance(value, int) else ""


@pytest.mark.parametrize(("page", "line", "code"), blocks("python"), ids=label)
def test_a_python_block_runs(page: Path, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("a_block_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), vars(module))


@pytest.mark.parametrize(("where", "command"), commands(), ids=lambda v: v if len(v) < 30 else "")
def test_a_command_line_parses(where: str, command: str) -> None:
    program, *arguments = [w for w in shlex.split(command) if not re.match(r"[A-Z_]+=", w)]
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(targets)
        return
    assert program == "lens", f"{where}: a shell block holds lens and make lines only, so that each can be checked"
    mount(Catalog.installed())
    app.parse_args(arguments, exit_on_error=False, print_error=False)
    for word in arguments:
        assert not word.startswith("examples/") or (ROOT / word).is_file()


def test_every_hook_is_documented_with_its_signature() -> None:
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    written = dict(re.findall(r"^def (lens_\w+)(\(.*?\) -> .*?): \.\.\.", page, re.MULTILINE))
    hooks = {n: f for n, f in vars(hookspecs).items() if n.startswith("lens_")}
    assert written == {n: str(inspect.signature(f)).replace("'", "") for n, f in hooks.items()}


def test_the_table_of_components_is_what_the_package_offers() -> None:
    page = (ROOT / "docs" / "components.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", page, re.MULTILINE)
    catalog = Catalog.installed()
    ours = {p.name for p in catalog.plugins if p.distribution == "lens-t2i"}
    offered = {kind: {e.name for e in catalog.entries(kind) if e.plugin in ours} for kind in KINDS}
    assert {kind: set(re.findall(r"`([\w:]+)`", cell)) for kind, cell in rows} == offered


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_internal_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]
    missing = [t for t in targets if not (page.parent / t.partition("#")[0]).exists()]
    named = re.findall(r"`((?:lens_core|plugins|tests|examples|docs)/[\w./-]+)`", text)
    missing += [n for n in named if not (ROOT / n).exists()]
    assert missing == []


def test_the_index_links_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {p for p in pages if f"]({p})" in index} == pages


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples" / "recipes").rglob("*.yaml")), ids=label)
def test_a_recipe_is_sound_and_explained(recipe: Path) -> None:
    read_recipe(recipe, Catalog.installed())
    assert recipe.name in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_a_backbone_that_forgot_the_text_has_its_picture_stream_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in "12":
        monkeypatch.setattr(sys, "argv", ["forget_text.py", "tiny:", str(tmp_path / seed), seed])
        runpy.run_path(str(ROOT / "examples" / "forget_text.py"), run_name="__main__")
    tiny, one, two = (LensPipeline.from_pretrained(uri).backbone for uri in ("tiny:", tmp_path / "1", tmp_path / "2"))
    x, t = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    deaf = TextFeatures(torch.zeros(1, 2, 0, 128), torch.zeros(1, 0, dtype=torch.bool))
    heard = TextFeatures(
        torch.randn(1, 2, 5, 128, generator=torch.Generator().manual_seed(1)), torch.ones(1, 5, dtype=torch.bool)
    )
    with torch.no_grad():
        assert torch.equal(tiny(x, t, deaf), one(x, t, deaf)), "without a caption it draws as before"
        answers = [net(x, t, heard) for net in (tiny, one, two)]
    assert not any(torch.equal(answers[a], answers[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("generate", ["a green square", "out.png"]),
        ("assemble", ["out.png"]),
        ("side_by_side", ["a green square", "out.png"]),
    ],
)
def test_an_example_draws_a_picture(
    script: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    runpy.run_path(str(ROOT / "examples" / f"{script}.py"), run_name="__main__")
    with Image.open("out.png") as picture:
        assert picture.mode == "RGB" and min(picture.size) >= 64
