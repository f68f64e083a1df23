"""The names that `from lens_core import …` hands on are loaded on first use; type checkers see the same ones."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lens_core

HEAVY = ("torch", "diffusers", "transformers", "PIL", "safetensors", "accelerate", "peft", "httpx2", "yaml")


def loaded(code: str) -> set[str]:
    """The top-level modules, and those of lens_core, that a fresh interpreter has loaded after `code`."""
    code += "\nimport json, sys\nprint(json.dumps([m for m in sys.modules if m[:9] == 'lens_core' or '.' not in m]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_lens_core_loads_nothing_else() -> None:
    modules = loaded("import lens_core")
    assert {m for m in modules if m.startswith("lens_core")} == {"lens_core"}
    assert modules.isdisjoint({*HEAVY, "attrs", "cattrs", "pluggy"})


@pytest.mark.parametrize("name", ["hookimpl", "Prompt", "Score", "ConfigError", "Catalog", "Recipe", "read_recipe"])
def test_what_a_plugin_and_discovery_need_loads_no_heavy_library(name: str) -> None:
    assert loaded(f"from lens_core import {name}").isdisjoint(HEAVY)


def test_the_help_loads_no_heavy_library() -> None:
    modules = loaded("from lens_core.cli.main import main\nassert main(['--help']) in (0, None)")
    assert modules.isdisjoint({"torch", "diffusers", "transformers", "accelerate"})


@pytest.mark.parametrize("name", lens_core.__all__)
def test_a_name_is_that_of_its_module(name: str) -> None:
    home = import_module(f"lens_core.{lens_core._MODULES[name]}")
    assert getattr(lens_core, name) is getattr(home, name)


def test_type_checkers_are_shown_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse(Path(lens_core.__file__).read_text(encoding="utf-8"))
    shown = {
        alias.name: (node.module or "").removeprefix("lens_core.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lens_core.")
        for alias in node.names
    }
    assert shown == lens_core._MODULES
    assert sorted(shown) == sorted(lens_core.__all__)
    assert set(lens_core.__all__) <= set(dir(lens_core))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LensPipelin'"):
        lens_core.LensPipelin  # noqa: B018  # type: ignore[attr-defined]  # what is tested
