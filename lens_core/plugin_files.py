"""Plugins that are one file, used without being installed: `lens --plugin ./mine.py …`.

The file is a plugin's module: it may have hooks, or plain component classes, each with `kind = "reward"` (one of the
kinds of `lens_core.protocols`). A class is called by its `name`, where it has one, or by its own name in snake case.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from lens_core.io.readers import one_line, shown
from lens_core.protocols import KINDS
from lens_core.types import ConfigError, did_you_mean

VARIABLE = "LENS_PLUGIN_FILES"
"""The environment variable with files to load, separated as PATH is; `--plugin` adds to it, so that processes which a
command starts load them too."""


def add_to_environment(paths: Iterable[str]) -> None:
    """Add files, given as a user types them, to VARIABLE. Raises ConfigError for one that is not there."""
    known = [p for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p]
    for text in paths:
        path = Path(text).resolve()
        if not path.is_file() or path.suffix != ".py":
            raise ConfigError(
                f"--plugin {shown(text)[1:-1]}: there is no such Python file; give the path of a .py file"
            )
        known += [str(path)] if str(path) not in known else []
    if known:
        os.environ[VARIABLE] = os.pathsep.join(known)


def from_environment() -> list[Path]:
    """The files that VARIABLE names."""
    return [Path(p) for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p]


def load(path: Path) -> ModuleType:
    """Import a file as a module of its own name. Raises ConfigError where that name is taken by another module, and
    whatever the file raises."""
    name = path.stem
    if not name.isidentifier():
        raise ConfigError(f"{path}: {name!r} cannot be the name of a module; use letters, digits and _")
    already = sys.modules.get(name)
    if already is not None:
        if Path(getattr(already, "__file__", None) or "").resolve() == path.resolve():
            return already
        raise ConfigError(f"{path}: a module called {name!r} is in use already; rename the file")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: attrs looks up the types of a Config there
    try:
        spec.loader.exec_module(module)
        with_hooks(module)
    except BaseException:  # the next catalog loads it anew, and quotes the same error
        del sys.modules[name]
        raise
    return module


def with_hooks(module: ModuleType) -> ModuleType:
    """`module` with a hook for each kind of its classes that have a `kind`. Raises ConfigError for a kind that is
    none, two classes of one name, and a hook that is there already and would hide them."""
    offered: dict[str, dict[str, type[Any]]] = {}
    for cls in vars(module).values():
        kind = vars(cls).get("kind") if isinstance(cls, type) and cls.__module__ == module.__name__ else None
        if not isinstance(kind, str):
            continue
        if kind not in KINDS:
            raise ConfigError(
                f"{module.__name__}.{cls.__name__}: there is no kind {kind!r}.{did_you_mean(kind, KINDS)}"
            )
        short = vars(cls).get("name") if isinstance(vars(cls).get("name"), str) else snake_case(cls.__name__)
        if short in offered.setdefault(kind, {}):
            raise ConfigError(f"{module.__name__}: two {kind}s are called {short!r}; rename one")
        offered[kind][short] = cls
    for kind, classes in offered.items():
        hook = KINDS[kind][0]
        if hasattr(module, hook) and not hasattr(getattr(module, hook), "lens_classes"):
            raise ConfigError(f"{module.__name__}: {one_line(hook)} and classes with kind = {kind!r}; keep one of both")
        setattr(module, hook, _returning(classes))
    return module


def _returning(classes: dict[str, type[Any]]) -> Callable[[], dict[str, type[Any]]]:
    def hook() -> dict[str, type[Any]]:
        return dict(classes)

    hook.lens_classes = True  # type: ignore[attr-defined]  # so that it is not taken for the author's own
    return hook


def snake_case(name: str) -> str:
    """`HashedWords` -> `hashed_words`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
