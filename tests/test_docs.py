"""The documentation runs: every Python block and example, every command line, every link, every signature."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import yaml
from PIL import Image
from test_architecture import FLOORS, MODULES, floor, graph

import lens_core
from lens_core import Catalog, LensPipeline, hookspecs
from lens_core.cli.main import app, mount
from lens_core.protocols import KINDS
from lens_core.recipe import Evaluation, Training, read_recipe
from lens_core.types import TextFeatures

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(*languages: str) -> list[tuple[Path, int, str]]:
    """(page, line, text) of every fenced block in one of the `languages`."""
    result = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            if match[1] in languages:
                result.append((page, text[: match.start()].count("\n") + 2, match[2]))
    return result


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
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in t]
    missing = [t for t in targets if not (page.parent / t.partition("#")[0]).exists()]
    named = re.findall(r"`((?:lens_core|plugins|tests|examples|docs)/[\w./-]+)`", text)
    missing += [n for n in named if not (ROOT / n).exists()]
    assert missing == []


def test_the_index_links_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert {p for p in pages if f"]({p})" in index} == pages


def definitions(path: Path) -> set[str]:
    """Dotted names of what a file defines at its top and in its classes."""

    def walk(nodes: list[ast.stmt], prefix: str = "") -> set[str]:
        names: set[str] = set()
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
                names |= walk(node.body, f"{prefix}{node.name}.") if isinstance(node, ast.ClassDef) else set()
            elif isinstance(node, ast.AnnAssign):
                names.add(prefix + ast.unparse(node.target))
            elif isinstance(node, ast.Assign):
                names |= {prefix + ast.unparse(target) for target in node.targets}
        return names

    return walk(ast.parse(path.read_text(encoding="utf-8")).body)


def exists(name: str) -> bool:
    """Whether a name between backticks is a file, a folder/, a `file.py: definition`, a public name of lens_core, a
    hook, a component of the package, a command line, or the name of a checkpoint's file."""
    file, _, definition = name.partition(": ")
    if definition:
        return (ROOT / file).is_file() and definition in definitions(ROOT / file)
    if "/" in name:
        return (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file()
    if name.startswith("lens "):
        return True  # a shell block is where command lines are parsed
    components = {entry.name for kind in KINDS for entry in Catalog.installed().entries(kind)}
    return name == "lens.json" or name in {*lens_core.__all__, *dir(hookspecs)} | {n.split(":")[-1] for n in components}


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", ARCHITECTURE, flags=re.S))))
)
def test_what_the_page_on_architecture_names_exists(name: str) -> None:
    assert exists(name)


def test_a_name_that_is_gone_does_not_exist() -> None:
    assert (
        not exists("lens_core/flow.py: guidance") and not exists("lens_core/loop.py") and not exists("lens_core/lib/")
    )
    assert not exists("LensPipelin") and not exists("lens_core/catalog.py: Catalog.uninstalled")


def test_the_diagram_shows_every_room_and_each_import_between_them() -> None:
    diagram = next(text for page, _, text in blocks("mermaid") if page.name == "architecture.md")
    arrows = re.findall(r"^ *(\w+)(?:\[.*?\])? -->(?:\|.*?\|)? (\w+)", diagram, re.MULTILINE)
    below = {room: {room} for room in FLOORS}
    for room in FLOORS:  # from the lowest on
        below[room] |= {other for upper, lower in arrows if upper == room for other in below[lower]}
    assert {room for arrow in arrows for room in arrow} == set(FLOORS)
    assert all(FLOORS.index(lower) < FLOORS.index(upper) for upper, lower in arrows)
    face = ROOT / "lens_core" / "__init__.py"
    imported = {
        (floor(path), floor(other)) for path, others in graph(MODULES, ROOT).items() for other in others
        if face not in (path, other)
    }  # fmt: skip
    assert {(upper, lower) for upper, lower in imported if lower not in below[upper]} == set()


def test_every_room_says_what_it_is_for() -> None:
    for room in sorted((ROOT / "lens_core").glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse(room.read_text(encoding="utf-8"))) or ""
        assert len(text.splitlines()[0].split()) >= 5, room
        assert f"`lens_core/{room.parent.name}/`" in ARCHITECTURE


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples" / "recipes").rglob("*.yaml")), ids=label)
def test_a_recipe_is_sound_and_explained(recipe: Path) -> None:
    read_recipe(recipe, Catalog.installed())
    assert recipe.name in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("heading", "section"), [("## Options of `train`", Training), ("## Evaluation during a run", Evaluation)]
)
def test_the_options_of_a_section_are_those_of_its_class(heading: str, section: type) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \|", page.partition(f"\n{heading}\n")[2].partition("\n##")[0], re.MULTILINE
    )
    written = {name: default if default == "required" else yaml.safe_load(default) for name, default in rows}
    assert written == {field.name: _written(field) for field in attrs.fields(section)}


def test_the_options_of_reinforcement_learning_have_the_defaults_of_its_config() -> None:
    page = (ROOT / "docs" / "rl.md").read_text(encoding="utf-8")
    section = page.partition("\n## Options\n")[2].partition("\n##")[0]
    fields = {
        field.name: field for field in attrs.fields(Catalog.installed().find("method", "diffusion_nft").cls.Config)
    }
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \|", section, re.MULTILINE)
    assert len(rows) > 10
    for names, defaults in rows:
        named = re.findall(r"`(\w+)`", names)
        assert yaml.safe_load(f"[{defaults}]") == [_written(fields[name]) for name in named]


def _written(field: Any) -> Any:
    """The default of a field as YAML has it."""
    default = field.default.factory() if isinstance(field.default, attrs.Factory) else field.default
    return "required" if default is attrs.NOTHING else list(default) if isinstance(default, tuple) else default


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


@pytest.mark.parametrize(
    ("script", "arguments", "written"),
    [
        ("image_to_image", ["out.png"], "out.png"),
        ("inpaint", ["out.png"], "out.png"),
        ("own_sampler", ["out.png"], "out.png"),
        ("steps_and_guidance", ["a red circle", "out.png"], "out.png"),
        ("benchmark_remote_api", ["run"], "run/sheet.png"),
        ("two_loras", ["a.safetensors", "b.safetensors", "out.png"], "out.png"),
        ("another_encoder", ["1", "run"], "run/model/lens.json"),
        ("own_reward", ["1", "run"], "run/before_and_after.png"),
        ("own_vae", ["1", "run"], "run/model/lens.json"),
        ("own_method", ["1", "run"], "run/model/lens.json"),
        ("own_dataset", ["pictures", "1", "run"], "run/model/lens.json"),
        ("lora_on_pictures", ["moons", "2", "runs"], "runs/moon.png"),
        ("distil", ["1", "runs"], "runs/student.png"),
        ("push_to_hub", ["model"], "model/lens.json"),
        ("several_gpus", ["prompts.txt", "drawn"], "drawn/0001.png"),
    ],
)
def test_an_example_runs(
    script: str, arguments: list[str], written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle\na blue star\n")
    Path("pictures").mkdir()
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (64, 64), colour).save(Path("pictures") / f"plain {colour}.png")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    module = types.ModuleType("__main__")  # a script's classes are found by the module that they say they are of
    path = ROOT / "examples" / f"{script}.py"
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    assert Path(written).is_file()
