"""The house rules: imports point down through the rooms, plugins know the core and themselves."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lens_core import hookspecs, protocols

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "lens_core"
MODULES = sorted(CORE.rglob("*.py"))
PLUGINS = sorted(p.parent for p in (ROOT / "plugins").glob("*/__init__.py"))
FLOORS = ("base", "io", "root", "checkpoints", "inference", "evaluation", "training", "testing", "cli")
"""What a module may import stands on its own floor or further left. `base` is `types` and `flow`; `root` is the rest of
what a plugin's author reads, at the root of the package; the others are the rooms of the same names."""
ROOMS = (".", *sorted(p.parent.name for p in CORE.glob("*/__init__.py")))
LAZY = {
    "accelerate",
    "huggingface_hub",
    "yaml",
    "PIL",
    "safetensors",
    "peft",
    "httpx2",
}  # they cost time, and most commands need none
HEAVY = {"torch", "diffusers", "transformers"}


def imports(path: Path, top_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; `from a import b` gives both `a` and `a.b`. Type-only imports do not count."""

    def walk(nodes: list[ast.stmt]) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: relative import"
                yield node.module or ""
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            elif not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
                inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
                hidden = {
                    n
                    for f in ast.walk(node)
                    if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
                    for n in ast.walk(f)
                }
                yield from walk([n for n in inner if not (top_only and n in hidden)])

    yield from walk(ast.parse(path.read_text(encoding="utf-8")).body)


def roots(path: Path, top_only: bool = False) -> set[str]:
    return {name.partition(".")[0] for name in imports(path, top_only)}


def floor(path: Path) -> str:
    """The floor of a module of the core."""
    inside = path.relative_to(CORE)
    if len(inside.parts) > 1:
        return inside.parts[0]
    return {"types": "base", "flow": "base", "__main__": "cli"}.get(path.stem, "root")


def graph(files: list[Path], top: Path) -> dict[Path, set[Path]]:
    """Module -> the other modules of `files` that it imports anywhere, for type checking too. Names begin at `top`."""
    modules = {".".join(p.relative_to(top).with_suffix("").parts).removesuffix(".__init__"): p for p in files}
    edges: dict[Path, set[Path]] = {}
    for path in files:
        edges[path] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                named = {modules.get(f"{node.module}.{a.name}", modules[node.module]) for a in node.names}
                edges[path] |= named - {path}
            elif isinstance(node, ast.Import):
                edges[path] |= {modules[a.name] for a in node.names if a.name in modules} - {path}
    return edges


def circles(edges: dict[Path, set[Path]], face: Path) -> set[str]:
    """The modules left when those that import no other are taken away, again and again. `face`, the package's
    `__init__`, hands names on and does not count."""
    left = {path: others - {face} for path, others in edges.items() if path != face}
    while free := [path for path, others in left.items() if not others & left.keys()]:
        for path in free:
            del left[path]
    return {str(path.relative_to(ROOT)) for path in left}


def test_core_imports_point_down_type_checking_included() -> None:
    above = [
        f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for path, others in graph(MODULES, ROOT).items()
        if path != CORE / "__init__.py"  # the package's face hands names on
        for other in others - {CORE / "__init__.py"}
        if FLOORS.index(floor(other)) > FLOORS.index(floor(path))
    ]
    assert above == []


def test_no_modules_of_the_core_import_each_other_in_a_circle() -> None:
    assert circles(graph(MODULES, ROOT), CORE / "__init__.py") == set()


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)
def test_no_modules_of_a_plugin_import_each_other_in_a_circle(plugin: Path) -> None:
    assert circles(graph(sorted(plugin.rglob("*.py")), plugin.parent), plugin / "__init__.py") == set()


def test_a_circle_for_type_checking_alone_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from b import B\n")
    (tmp_path / "b.py").write_text("import c\n")
    (tmp_path / "c.py").write_text("def f():\n    from a import A\n")
    (tmp_path / "d.py").write_text("import a\n")
    edges = graph(sorted(tmp_path.glob("*.py")), tmp_path)
    assert {p.stem: {q.stem for q in others} for p, others in edges.items()} == {
        "a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}
    }  # fmt: skip


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(CORE)))
def test_the_core_knows_no_plugin_and_no_model_library(path: Path) -> None:
    used = roots(path)
    assert used.isdisjoint({"diffusers", "transformers", *(p.name for p in PLUGINS)})
    assert (
        "peft" not in used or path == CORE / "inference" / "lora.py"
    )  # any trainable module can have an adapter, whatever its architecture
    assert roots(path, top_only=True).isdisjoint(LAZY), "import it inside the function that needs it"


@pytest.mark.parametrize(
    "module",
    [
        "types",
        "io/readers",
        "protocols",
        "hookspecs",
        "catalog",
        "config",
        "recipe",
        "checkpoints/manifest",
        "cli/main",
    ],
)
def test_discovery_costs_no_torch(module: str) -> None:
    assert roots(CORE / f"{module}.py", top_only=True).isdisjoint(HEAVY)


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)
def test_a_plugin_imports_the_core_and_itself(plugin: Path) -> None:
    for path in plugin.rglob("*.py"):
        # In a template of `lens new-plugin`, lens_example stands for the package that is written.
        itself = "lens_example" if path.parent.name == "templates" else plugin.name
        strangers = {r for r in roots(path) if r.startswith("lens_")} - {"lens_core", itself}
        assert strangers == set(), path


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda p: p.name)
def test_a_plugins_init_is_its_table_of_contents(plugin: Path) -> None:
    path = plugin / "__init__.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "say what the plugin holds"
    assert roots(path, top_only=True) <= {"__future__", "typing", "pathlib", "lens_core"}
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert functions
    for node in tree.body:
        assert isinstance(node, ast.Expr | ast.Import | ast.ImportFrom | ast.FunctionDef), ast.unparse(node)
    for function in functions:
        assert [ast.unparse(d) for d in function.decorator_list] == ["hookimpl"]
        assert hasattr(hookspecs, function.name)


PRIVATE_WORDS = {"found", "told", "given", "asked", "lent", "own", "say", "look", "nets", "twins"}


@pytest.mark.parametrize("folder", ["lens_core", "plugins", "scripts", "examples"])
def test_names_are_nouns_of_the_field(folder: str) -> None:
    """A name says what a thing is: `entries`, not `found`; `message`, not `told`."""
    offences = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "name", None)
            if name in PRIVATE_WORDS:
                offences.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert offences == []


@pytest.mark.parametrize("path", sorted([*MODULES, *(ROOT / "plugins").rglob("*.py")]), ids=str)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def specs() -> dict[str, object]:
    return {n: f for n, f in vars(hookspecs).items() if hasattr(f, "lens_spec")}


def test_every_hook_is_prefixed_and_documented() -> None:
    assert len(specs()) == 17
    for name, hook in specs().items():
        assert name.startswith("lens_")
        assert inspect.getdoc(hook), name


def test_every_provider_hook_has_a_kind_and_takes_nothing() -> None:
    others = ("lens_commands", "lens_pages", "lens_fetch", "lens_describe")
    providers = {n: f for n, f in specs().items() if n not in others}
    assert set(providers) == {hook for hook, _ in protocols.KINDS.values()}
    for name, hook in providers.items():
        assert not inspect.signature(hook).parameters, name  # type: ignore[arg-type]  # a function


def test_every_entry_point_is_a_plugin_folder_and_every_folder_an_entry_point() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    points = project["project"]["entry-points"][hookspecs.ENTRY_POINTS]
    assert points == {p.name: p.name for p in PLUGINS}
    inner = [f"{p.parents[1].name}.{p.parent.name}" for p in (ROOT / "plugins").glob("*/*/__init__.py")]
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(
        [*("lens_core" if room == "." else f"lens_core.{room}" for room in ROOMS), *points, *inner]
    )


def test_randomness_is_an_argument() -> None:
    # Whatever draws from a global generator cannot be resumed or batched; initial weights are drawn by torch itself.
    drawn = re.compile(r"torch\.(rand|randn|randint|randperm|rand_like|randn_like)\((?![^\n]*generator)")
    numpy = re.compile(r"\bnp\.random\.(?!Generator|default_rng|SeedSequence|PCG64)|^import random\b", re.M)
    for path in [*MODULES, *(ROOT / "plugins").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        draws = [m.group() for m in numpy.finditer(text)]
        draws += [m.group() for m in drawn.finditer(text) if "generator" not in text[m.start() : m.start() + 200]]
        assert draws == [], path


SIGNATURES_ARE_OPTIONS = {"generate", "bench", "bench_train", "doctor", "serve"}
"""Commands: cyclopts makes their parameters the options of the command line, so they have as many as there are."""


@pytest.mark.parametrize("path", sorted([*MODULES, *(ROOT / "plugins").rglob("*.py")]), ids=str)
def test_files_classes_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450, "split it by subject"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        lines = (node.end_lineno or 0) - node.lineno + 1
        if isinstance(node, ast.ClassDef):
            assert lines <= 350, node.name
        elif node.name not in SIGNATURES_ARE_OPTIONS:
            parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert lines <= 60 or node.name == "__call__", node.name
            assert len(set(parameters) - {"self", "cls"}) <= 8 or node.name == "__call__", node.name
