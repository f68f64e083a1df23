"""Which components are installed, by kind and name. Discovery imports no model code; a look-up imports one plugin's.

A catalog is passed, never global. A plugin that cannot be used is set aside with its error, which is quoted when a
recipe needs it; it never breaks the others.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Collection
from functools import partial
from types import ModuleType
from typing import Any

import attrs
import pluggy
from attrs import field, frozen, mutable

from lens_core import hookspecs
from lens_core.protocols import KINDS
from lens_core.types import LensError, did_you_mean


@frozen
class Entry:
    """One component: its kind, its qualified name `plugin:short`, and its class."""

    kind: str
    plugin: str
    short: str
    cls: type[Any]

    @property
    def name(self) -> str:
        return f"{self.plugin}:{self.short}"


@mutable
class Plugin:
    """One installed plugin. `error` says why it was set aside; None while it is in use."""

    name: str
    distribution: str
    version: str
    module: ModuleType | None = None
    error: str | None = None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _itself(module: ModuleType) -> ModuleType:
    return module


def _methods_of(protocol: type[Any]) -> list[str]:
    skip = {"save", "load"}
    return sorted(n for n, v in vars(protocol).items() if callable(v) and not n.startswith("_") and n not in skip)


def _flaw(cls: Any, kind: str) -> str | None:
    """Why `cls` cannot be a component of `kind`, or None."""
    if not isinstance(cls, type):
        return f"is {cls!r}, not a class"
    config = cls.__dict__.get("Config") or getattr(cls, "Config", None)
    if config is None:
        return f"{cls.__name__} has no nested Config; add `@frozen class Config` (attrs)"
    if not (isinstance(config, type) and attrs.has(config)):
        return f"{cls.__name__}.Config is not an attrs class; decorate it with attrs.frozen"
    if not attrs.inspect(config).is_frozen:
        return f"{cls.__name__}.Config is not frozen; decorate it with attrs.frozen"
    missing = [m for m in _methods_of(KINDS[kind][1]) if not callable(getattr(cls, m, None))]
    if missing:
        return f"{cls.__name__} lacks {', '.join(missing)}(), which every {kind} has"
    return None


@mutable
class Catalog:
    """The installed plugins and what they offer. Build it with `installed()` or, in tests, `of(module, ...)`."""

    plugins: list[Plugin] = field(factory=list)
    _manager: pluggy.PluginManager = field(init=False)
    _kinds: dict[str, list[Entry]] = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._manager = pluggy.PluginManager("lens")
        self._manager.add_hookspecs(hookspecs)

    @classmethod
    def installed(cls) -> Catalog:
        """Every plugin of the entry-point group `lens.v1`; `LENS_PLUGINS=a,b` narrows it to those names."""
        catalog = cls()
        wanted = [n.strip() for n in os.environ.get("LENS_PLUGINS", "").split(",") if n.strip()]
        points = sorted(importlib.metadata.entry_points(group=hookspecs.ENTRY_POINTS), key=lambda p: p.name)
        # An editable install may be visible through two folders of the path: one entry point, met twice.
        unique = {(p.name, p.value, p.dist.name if p.dist else ""): p for p in points}
        for point in unique.values():
            if wanted and point.name not in wanted and point.name.removeprefix("lens_") not in wanted:
                continue
            dist = point.dist
            catalog._add(Plugin(point.name, dist.name if dist else "?", dist.version if dist else "?"), point.load)
        for foreign in sorted(importlib.metadata.entry_points().groups):
            if foreign.startswith("lens.v") and foreign != hookspecs.ENTRY_POINTS:
                for point in importlib.metadata.entry_points(group=foreign):
                    dist = point.dist
                    error = f"speaks {foreign}, this Lens speaks {hookspecs.ENTRY_POINTS}; install a matching version"
                    catalog.plugins.append(
                        Plugin(point.name, dist.name if dist else "?", dist.version if dist else "?", None, error)
                    )
        return catalog

    @classmethod
    def of(cls, *modules: ModuleType) -> Catalog:
        """A catalog of these plugin modules and nothing else."""
        catalog = cls()
        for module in modules:
            catalog._add(Plugin(module.__name__, module.__name__, "0"), partial(_itself, module))
        return catalog

    def _add(self, plugin: Plugin, load: Callable[[], ModuleType]) -> None:
        self.plugins.append(plugin)
        twin = next((p for p in self.plugins[:-1] if p.name == plugin.name), None)
        if twin is not None:
            # pluggy would keep the first and say nothing; load order must not decide, so neither is used.
            both = f"two plugins are called {plugin.name!r}: {twin.distribution} and {plugin.distribution}; remove one"
            self._set_aside(plugin, both)
            self._set_aside(twin, both)
            return
        try:
            module = load()
            unknown = [
                n
                for n in vars(module)
                if n.startswith("lens_")
                and getattr(getattr(module, n), "lens_impl", None)
                and not hasattr(hookspecs, n)
            ]
            if unknown:
                known = [n for n in vars(hookspecs) if n.startswith("lens_")]
                raise LensError(f"there is no hook {unknown[0]!r}.{did_you_mean(unknown[0], known)}")
            self._manager.register(module, name=plugin.name)
        except (Exception, SystemExit) as error:  # whatever a third party's import raises, the others go on
            self._manager.unregister(name=plugin.name) if self._manager.has_plugin(plugin.name) else None
            plugin.error = _one_line(error)
            return
        plugin.module = module

    def _set_aside(self, plugin: Plugin, error: str) -> None:
        plugin.error = plugin.error or error
        if self._manager.get_plugin(plugin.name) is not None:
            self._manager.unregister(name=plugin.name)
        for entries in self._kinds.values():
            entries[:] = [e for e in entries if e.plugin != plugin.name]

    def entries(self, kind: str) -> list[Entry]:
        """Every component of `kind`, sorted by qualified name. Asks each plugin once."""
        if kind not in KINDS:
            raise LensError(f"there is no kind {kind!r}.{did_you_mean(kind, KINDS)}")
        if kind not in self._kinds:
            self._kinds[kind] = found = []
            hook = KINDS[kind][0]
            for plugin in list(self.plugins):
                if plugin.error is not None or not hasattr(plugin.module, hook):
                    continue
                try:
                    offered = getattr(plugin.module, hook)()
                    if not isinstance(offered, dict) or not all(isinstance(n, str) for n in offered):
                        raise LensError(f"{hook} must return {{short name: class}}, not {offered!r}")
                    for short, component in offered.items():
                        flaw = _flaw(component, kind)
                        if flaw:
                            raise LensError(f"{hook}[{short!r}] {flaw}")
                except (Exception, SystemExit) as error:  # as above: one plugin's fault stays its own
                    self._set_aside(plugin, f"in {hook}: {_one_line(error)}")
                    continue
                found += [Entry(kind, plugin.name, short, c) for short, c in offered.items()]
            found.sort(key=lambda e: e.name)
        return self._kinds[kind]

    def find(self, kind: str, name: str) -> Entry:
        """The component called `name`: `flux2`, or `lens_flux2:flux2`. Ambiguity and absence are errors."""
        entries = self.entries(kind)
        hits = [e for e in entries if name in (e.name, e.short)]
        if len(hits) == 1:
            return hits[0]
        label = kind.replace("_", " ")
        if hits:
            raise LensError(f"{name!r} is ambiguous: {', '.join(e.name for e in hits)} are {label}s; write one in full")
        plugin_name = name.partition(":")[0] if ":" in name else ""
        known = [e.short for e in entries] + ([e.name for e in entries] if plugin_name else [])
        message = f"no {label} is called {name!r}.{did_you_mean(name, known)}"
        if plugin_name and all(p.name != plugin_name for p in self.plugins):
            message += f" The plugin {plugin_name!r} is not installed: pip install the package that brings it."
        aside = [p for p in self.plugins if p.error and (not plugin_name or p.name == plugin_name)]
        if aside:
            message += " Set aside: " + "; ".join(f"{p.name} ({p.error})" for p in aside) + "."
        raise LensError(message)

    def commands(self, taken: Collection[str] = ()) -> dict[str, str]:
        """The commands that plugins bring: name -> "module:attribute". A name that is taken, or brought twice, is used
        by nobody: its plugins are set aside."""
        owners: dict[str, Plugin] = {}
        found: dict[str, str] = {}
        for plugin in list(self.plugins):
            if plugin.error is not None or not hasattr(plugin.module, "lens_commands"):
                continue
            try:
                offered = plugin.module.lens_commands()  # type: ignore[union-attr]  # hasattr has just asked
                for name, place in offered.items():
                    if not all(part.isidentifier() for part in f"{place}".replace(":", ".").split(".")):
                        raise LensError(f'lens_commands[{name!r}] must be "module:attribute", not {place!r}')
                    if name in taken:
                        raise LensError(f"the command {name!r} is the core's own; give yours another name")
                    if name in owners:
                        both = f"two plugins bring the command {name!r}: {owners[name].name} and {plugin.name}"
                        self._set_aside(owners[name], both)
                        raise LensError(both)
            except (Exception, SystemExit) as error:  # one plugin's fault stays its own
                self._set_aside(plugin, f"in lens_commands: {_one_line(error)}")
                continue
            owners |= dict.fromkeys(offered, plugin)
            found |= offered
        return {name: place for name, place in found.items() if owners[name].error is None}

    def first(self, resolver: str, argument: Any) -> Any:
        """The first answer to a resolver hook, or None. A plugin that raises a LensError speaks for itself."""
        try:
            return getattr(self._manager.hook, resolver)(**{"uri" if resolver == "lens_fetch" else "folder": argument})
        except LensError:
            raise
        except Exception as error:
            raise LensError(f"a plugin failed in {resolver}({str(argument)!r}): {_one_line(error)}") from error

    def version(self, plugin: str) -> str | None:
        """`distribution==version` of a plugin, or None where it is not installed."""
        return next((f"{p.distribution}=={p.version}" for p in self.plugins if p.name == plugin), None)
