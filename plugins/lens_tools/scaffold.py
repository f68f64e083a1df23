"""`lens new-plugin`: a package with one component of each kind that was named, its hooks, its tests and a README.

The components are the files of `templates/`, where `Example` and `lens_example` stand for the new names. The same
files are the examples of docs/kinds.md.
"""

from __future__ import annotations

import builtins
import keyword
import os
import re
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import yaml

from lens_core import __version__
from lens_core.io.readers import read_text, shown
from lens_core.protocols import KINDS
from lens_core.types import ConfigError, did_you_mean
from lens_tools.reference import USED_IN

TEMPLATES = Path(__file__).parent / "templates"

PYPROJECT = """[build-system]
requires = ["setuptools>=80"]
build-backend = "setuptools.build_meta"

[project]
name = "{project}"
version = "0.1.0"
description = "A plugin for Lens: {kinds}"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["lens-t2i>={version}"]

[project.entry-points."lens.v1"]
{package} = "{package}"

[tool.setuptools]
packages = ["{package}"]

[tool.pytest.ini_options]
testpaths = ["tests"]
filterwarnings = ["error"]
"""

README = """# {project}

A plugin for [Lens](https://pypi.org/project/lens-t2i/) with {kinds}.

```bash
pip install -e .
pytest
lens plugins --check
lens show {package}:{short}
```

{uses}
"""

HOOK = """

@hookimpl
def {hook}() -> dict[str, type[Any]]:
    from {package}.{kind} import {cls}

    return {{"{short}": {cls}}}
"""

TEST = '''"""What the plugin offers is found by name."""

from __future__ import annotations

import {package}
import pytest

from lens_core import Catalog


@pytest.mark.parametrize("kind", {kinds})
def test_the_component_is_offered(kind: str) -> None:
    assert Catalog.of({package}).find(kind, "{short}").name == "{package}:{short}"
'''


def available_kinds() -> list[str]:
    """Kinds that have a template."""
    return [kind for kind in KINDS if (TEMPLATES / f"{kind}.py").is_file()]


def example(kind: str) -> str:
    """A component of a kind and the check of its contract, as one script: what docs/kinds.md shows.

    A check that needs helpers of its own, as a method's does, is left to the tests of the package.
    """
    component = read_text(TEMPLATES / f"{kind}.py").partition("from __future__ import annotations\n\n")[2].rstrip()
    tests = read_text(TEMPLATES / f"{kind}_test.py")
    if "def make(" in tests:
        return component
    body = tests.partition("def test_contract() -> None:\n")[2].partition("\n\n")[0]
    return f"{component}\n\n\nfrom lens_core.testing import check_{kind}\n\n{textwrap.dedent(body).rstrip()}"


def write_plugin(name: str, kinds: Sequence[str], parent: Path) -> list[Path]:
    """Write the package `name` into `parent / name` -> its files.

    Raises ConfigError for a name that no package can have or that is in use, an unknown kind, and a folder that is
    there already. The folder appears whole or not at all.
    """
    folder = parent / name
    package = name.replace("-", "_")
    _check_name(name, package)
    unknown = [kind for kind in kinds if kind not in available_kinds()]
    if unknown or not kinds:
        wrong = shown(unknown[0]) if unknown else "nothing"
        hint = did_you_mean(unknown[0], available_kinds()) if unknown else ""
        raise ConfigError(f"--kind is {wrong}; kinds are {', '.join(available_kinds())}.{hint}")
    if os.path.lexists(folder):
        raise ConfigError(f"{folder}: is there already; choose another name, or remove it")
    files = _files(name, package, list(dict.fromkeys(kinds)))
    parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
    try:
        for path, text in files.items():
            (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / path).write_text(text, encoding="utf-8")
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return [folder / path for path in files]


def _check_name(name: str, package: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or len(name) > 60 or keyword.iskeyword(package):
        raise ConfigError(f"{shown(name)} cannot be the name of a package; write it as lens-sparkle, in lower case")
    if package == "lens_core" or package in sys.stdlib_module_names:
        raise ConfigError(f"{shown(name)} is the name of another package; write it as lens-sparkle, say")
    short = short_name(package)
    if not isinstance(yaml.safe_load(short), str):
        raise ConfigError(
            f"{shown(name)}: a recipe would read its short name {short!r} as a value; choose another name"
        )
    plugins = Path(__file__).parents[1]
    if (plugins / package / "__init__.py").is_file():
        raise ConfigError(f"{shown(name)} is the name of a plugin that comes with Lens; choose another")
    spec = find_spec(package)
    if spec is not None and spec.origin is not None:
        raise ConfigError(f"{shown(name)} is the name of another package, {spec.origin}; write it as lens-sparkle, say")


def short_name(package: str) -> str:
    """What recipes call the component of a package."""
    return package.removeprefix("lens_") or package


def class_name(short: str, kinds: Sequence[str]) -> str:
    """A name for the classes of a package that is no word of Python, nor one of the templates of `kinds`."""
    texts = [read_text(TEMPLATES / f"{kind}{end}.py") for kind in kinds for end in ("", "_test")] + [HOOK, TEST]
    taken = {*re.findall(r"\w+", "".join(texts)), *dir(builtins), "hookimpl"} - {"Example"}
    plain = "".join(word.capitalize() for word in short.split("_"))
    names = (f"{'Lens' * times}{plain}" for times in range(len(taken) + 1))
    return next(name for name in names if name.isidentifier() and not keyword.iskeyword(name) and name not in taken)


def _files(name: str, package: str, kinds: list[str]) -> dict[str, str]:
    short = short_name(package)
    cls = class_name(short, kinds)
    words = {"project": name, "package": package, "short": short, "cls": cls, "version": __version__}
    listed = ", ".join(f"a {kind.replace('_', ' ')}" for kind in kinds)
    uses = "\n".join(f"`{short}` of the kind {kind} is named in: {USED_IN[kind]}." for kind in kinds)
    init = [f'"""A plugin for Lens: {listed}."""\n\nfrom __future__ import annotations\n\nfrom typing import Any\n\n']
    init += ["from lens_core import hookimpl\n"]
    init += [HOOK.format(hook=KINDS[kind][0], kind=kind, **words) for kind in kinds]
    files = {
        "pyproject.toml": PYPROJECT.format(kinds=listed, **words),
        "README.md": README.format(kinds=listed, uses=uses, **words),
        f"{package}/__init__.py": "".join(init),
        "tests/test_plugin.py": TEST.format(kinds=repr(kinds).replace("'", '"'), **words),
    }
    for kind in kinds:
        for source, path in ((kind, f"{package}/{kind}.py"), (f"{kind}_test", f"tests/test_{kind}.py")):
            text = read_text(TEMPLATES / f"{source}.py").replace("lens_example", package)
            files[path] = re.sub(r"\bExample\b", cls, text)
    return files
