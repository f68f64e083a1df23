"""`lens new-plugin` writes packages that pass their own tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from lens_tools import scaffold

from lens_core.cli.main import main
from lens_core.protocols import KINDS
from lens_core.types import ConfigError

ROOT = Path(__file__).parents[2]


def test_a_package_of_every_kind_passes_its_own_tests(tmp_path: Path) -> None:
    kinds = scaffold.available_kinds()
    scaffold.write_plugin("lens-sparkle", kinds, tmp_path)
    folder = tmp_path / "lens-sparkle"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), str(ROOT / "plugins")])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(kinds)} passed" not in run.stdout  # each kind has a contract test beside the look-up by name


def test_its_project_file_names_the_entry_point(tmp_path: Path) -> None:
    scaffold.write_plugin("lens-sparkle", ["reward"], tmp_path)
    project = tomllib.loads((tmp_path / "lens-sparkle/pyproject.toml").read_text())
    assert project["project"]["entry-points"]["lens.v1"] == {"lens_sparkle": "lens_sparkle"}
    assert "Example" not in "".join(p.read_text() for p in tmp_path.rglob("*.*") if p.is_file())


def test_the_command_prints_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-plugin", "sparkle", "--kind", "reward", "--output", str(tmp_path)]) == 0
    assert str(tmp_path / "sparkle/sparkle/reward.py") in capsys.readouterr().out.splitlines()
    assert main(["new-plugin", "sparkle", "--kind", "reward", "--output", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["sparkle"]


@pytest.mark.parametrize(
    ("name", "kind", "cls"),
    [
        ("lens-3d", "reward", "Lens3d"),
        ("lens-none", "sampler", "LensNone"),
        ("lens-score", "reward", "LensScore"),
        ("lens-tensor", "backbone", "LensTensor"),
        ("lens-any", "vae", "LensAny"),
    ],
)
def test_a_name_that_means_something_else_in_python_gets_a_class_of_its_own(
    tmp_path: Path, name: str, kind: str, cls: str
) -> None:
    for path in scaffold.write_plugin(name, [kind], tmp_path):
        if path.suffix == ".py":
            compile(path.read_text(), str(path), "exec")
    assert f"class {cls}" in (tmp_path / name / name.replace("-", "_") / f"{kind}.py").read_text()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../up", "reward", "cannot be the name of a package"),
        ("Lens-Sparkle", "reward", "cannot be the name of a package"),
        ("class", "reward", "cannot be the name of a package"),
        ("json", "reward", "is the name of another package"),
        ("torch", "reward", "is the name of another package"),
        ("lens-null", "reward", "a recipe would read its short name 'null' as a value"),
        ("lens-core", "reward", "is the name of another package"),
        ("lens-shapes", "reward", "comes with Lens"),
        ("lens-sparkle", "rewrad", r"kinds are .*Did you mean 'reward'\?"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_left(
    tmp_path: Path, name: str, kind: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        scaffold.write_plugin(name, [kind], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_page_of_examples_shows_every_template_as_it_is() -> None:
    page = (ROOT / "docs" / "kinds.md").read_text(encoding="utf-8")
    for kind in KINDS:
        assert f"## {kind}\n" in page and f"```python\n{scaffold.example(kind)}\n```" in page, kind
