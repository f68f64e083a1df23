"""Which components are installed, by kind and name. Discovery imports no model code; a look-up imports one plugin's.

A catalog is passed, never global. A plugin that cannot be used is disabled, with its error, which is quoted when a
recipe needs it; it never breaks the others.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable
from functools import partial
from inspect import isfunction
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
from attrs import field, frozen, mutable

from lens_core import hookspecs, plugin_files
from lens_core.attribution import remember
from lens_core.io.readers import one_line, shown
from lens_core.protocols import KINDS, HasWeights
from lens_core.types import LensError, PluginError, did_you_mean

RESOLVERS = ("lens_fetch", "lens_describe")


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
    """One installed plugin. `error` says why it is disabled; None while it is in use."""

    name: str
    distribution: str
    version: str
    module: ModuleType | None = None
    error: str | None = None

    @property
    def note(self) -> str | None:
        """Of a file: that it offers nothing, as one that only others import. None: it offers something."""
        if self.version != "file" or self.module is None or self.error is not None:
            return None
        if any(name.startswith("lens_") and callable(value) for name, value in vars(self.module).items()):
            return None
        return "offers nothing; give a class of its own a line such as kind = 'reward'"


def _one_line(error: BaseException) -> str:
    return one_line(error if isinstance(error, LensError) else f"{type(error).__name__}: {error}")


def _itself(module: ModuleType) -> ModuleType:
    return module


def _methods_of(protocol: type[Any]) -> list[str]:
    skip = {"save", "load"}
    return sorted(n for n, v in vars(protocol).items() if callable(v) and not n.startswith("_") and n not in skip)


def _lacks(cls: type[Any], method: str, protocol: type[Any]) -> bool:
    """Whether `cls` has no method of its own there; a stub that a protocol or torch's Module leaves to it is none."""
    attribute = getattr(cls, method, None)
    stub = attribute is vars(protocol).get(method) or getattr(attribute, "__name__", "") == "_forward_unimplemented"
    return not callable(attribute) or stub or bool(getattr(attribute, "__isabstractmethod__", False))


def _flaw(cls: Any, kind: str) -> str | None:
    """Why `cls` cannot be a component of `kind`, or None."""
    from lens_core.config import flaw_of

    if not isinstance(cls, type):
        return f"is {shown(cls)}, not a class"
    config = getattr(cls, "Config", None)
    if config is None:
        return f"{cls.__name__} has no nested Config; add `@frozen class Config` (attrs)"
    if flaw := flaw_of(config):
        return f"{cls.__name__}.Config {flaw}"
    missing = [m for m in _methods_of(KINDS[kind][1]) if _lacks(cls, m, KINDS[kind][1])]
    if missing:
        return f"{cls.__name__} lacks {', '.join(missing)}(), which every {kind} has"
    return None


def _weaknesses(cls: type[Any], kind: str) -> list[str]:
    """What would stop a component of `kind` later than its discovery."""
    problems = []
    arguments = ("config", "pipeline") if kind == "method" else ("config",)
    try:
        inspect.signature(cls).bind(*arguments)
    except TypeError:
        problems.append(f"cannot be built as {cls.__name__}({', '.join(arguments)}); change its __init__")
    except ValueError:
        pass  # a class that does not say what it takes
    protocol = KINDS[kind][1]
    problems += [flaw for m in _methods_of(protocol) if (flaw := _flaw_of_method(cls, m, vars(protocol)[m]))]
    lacks = [m for m in ("save", "load") if HasWeights in protocol.__mro__ and not hasattr(cls, m)]
    if lacks:
        problems.append(f"lacks {' and '.join(lacks)}, without which no checkpoint can hold it")
    return problems


def _flaw_of_method(cls: type[Any], name: str, wanted: Callable[..., Any]) -> str | None:
    """Why a method cannot be called as its protocol's `wanted` is, or None."""
    method = inspect.getattr_static(cls, name, None)
    if not isfunction(method):
        return None
    required = [p.name for p in inspect.signature(wanted).parameters.values() if p.default is p.empty]
    more = ["draw"] if name == "sample" and getattr(cls, "stochastic", False) else []  # which comes by keyword
    taken = inspect.signature(method)
    try:
        taken.bind(*required, **dict.fromkeys(more))
    except TypeError:
        arguments = ", ".join([*required[1:], *(f"{keyword}=…" for keyword in more)])  # without self
        return f"{cls.__name__}.{name}({', '.join(taken.parameters)}) cannot be called as {name}({arguments})"
    return None


def _offered(module: Any, kind: str) -> tuple[dict[str, Any], list[str]]:
    """(what a plugin offers of a kind, everything that is wrong with it)."""
    hook = KINDS[kind][0]
    try:
        offered = getattr(module, hook)()
    except (Exception, SystemExit) as error:  # whatever a third party's code raises, the others go on
        return {}, [f"in {hook}: {_one_line(error)}"]
    if not isinstance(offered, dict) or not all(isinstance(n, str) for n in offered):
        return {}, [f"in {hook}: {hook} must return {{short name: class}}, not {shown(offered)}"]
    for short in offered:
        if not re.fullmatch(r"\w[\w.-]*", short):
            return {}, [f"in {hook}: {shown(short)} is no name of a component; use letters, digits, '_', '-' and '.'"]
    flaws = {short: flaw for short, component in offered.items() if (flaw := _flaw(component, kind))}
    return offered, [f"in {hook}: {hook}[{short!r}] {flaw}" for short, flaw in flaws.items()]


def _commands(module: Any, taken: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """(the commands that a plugin brings, everything that is wrong with them)."""
    where = "in lens_commands"
    try:
        offered = module.lens_commands()
    except (Exception, SystemExit) as error:  # as above
        return {}, [f"{where}: {_one_line(error)}"]
    if not isinstance(offered, dict):
        return {}, [f'{where}: lens_commands must return {{name: "module:attribute"}}, not {shown(offered)}']
    problems = []
    for name, place in offered.items():
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][\w-]*( [a-z][\w-]*)?", name):
            problems.append(f"{where}: {shown(name)} is no name of a command; use lower case letters, digits and -")
        elif (
            not isinstance(place, str)
            or not re.fullmatch(r"[\w.]+:[\w.]+", place)
            or not all(part.isidentifier() for part in place.replace(":", ".").split("."))
        ):
            problems.append(f'{where}: lens_commands[{name!r}] must be "module:attribute", not {shown(place)}')
        elif name in taken:
            problems.append(f"{where}: the command {name!r} is the core's own; give yours another name")
    return offered, problems


def _pages(module: Any) -> tuple[dict[str, str], list[str]]:
    """(the pages that a plugin brings, everything that is wrong with them)."""
    try:
        offered = module.lens_pages()
    except (Exception, SystemExit) as error:  # as above
        return {}, [f"in lens_pages: {_one_line(error)}"]
    if not isinstance(offered, dict) or not all(isinstance(text, str) for text in (*offered, *offered.values())):
        return {}, [f'in lens_pages: lens_pages must return {{name: "module:function"}}, not {shown(offered)}']
    return offered, []


def _module_of(place: str) -> Any:
    """The module of "module:attribute". Raises LensError."""
    try:
        return importlib.import_module(place.partition(":")[0])
    except (Exception, SystemExit) as error:  # as above
        raise LensError(f"{place} cannot be imported ({_one_line(error)})") from error


def resolve(place: str) -> Any:
    """What "module:attribute" names. Raises LensError, which says what is missing."""
    target = _module_of(place)
    try:
        for part in place.partition(":")[2].split("."):
            target = getattr(target, part)
    except Exception as error:  # as above
        raise LensError(f"{place} cannot be imported ({_one_line(error)})") from error
    if not callable(target):
        raise LensError(f"{place} is {shown(target)}, which cannot be called; name a function or a cyclopts App")
    return target


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
    def installed(cls, extra: Iterable[ModuleType] = ()) -> Catalog:
        """Every plugin of the entry-point group `lens.v1`; `LENS_PLUGINS=a,b` narrows it to those names.

        Beside them stand the modules `extra`, whose classes with a `kind` need no hook, and the files that
        `LENS_PLUGIN_FILES` names, separated as PATH is.
        """
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
        for path in plugin_files.from_environment():
            catalog._add(Plugin(path.stem, path.name, "file"), partial(plugin_files.load, path))
        for module in extra:
            catalog._add(Plugin(module.__name__, module.__name__, "0"), partial(plugin_files.with_hooks, module))
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
            self._disable(plugin, both)
            self._disable(twin, both)
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
            for name in RESOLVERS:  # providers are asked by name, resolvers through pluggy, which knows marked ones
                if callable(function := getattr(module, name, None)) and not getattr(function, "lens_impl", None):
                    raise LensError(f"{name} has no @hookimpl, so nothing asks it; decorate it with lens_core.hookimpl")
            self._manager.register(module, name=plugin.name)
        except (Exception, SystemExit) as error:  # whatever a third party's import raises, the others go on
            self._manager.unregister(name=plugin.name) if self._manager.has_plugin(plugin.name) else None
            plugin.error = _one_line(error)
            return
        plugin.module = module

    def _disable(self, plugin: Plugin, error: str) -> None:
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
            self._kinds[kind] = entries = []
            hook = KINDS[kind][0]
            for plugin in list(self.plugins):
                if plugin.error is not None or not hasattr(plugin.module, hook):
                    continue
                offered, problems = _offered(plugin.module, kind)
                if problems:
                    self._disable(plugin, problems[0])
                    continue
                for short, component in offered.items():
                    remember(component, f"{plugin.name}:{short}")
                    entries.append(Entry(kind, plugin.name, short, component))
            entries.sort(key=lambda e: e.name)
        return self._kinds[kind]

    def find(self, kind: str, name: str) -> Entry:
        """The component called `name`: `flux2`, or `lens_flux2:flux2`. Ambiguity and absence are errors."""
        entries = self.entries(kind)
        hits = [e for e in entries if name in (e.name, e.short)]
        if len(hits) == 1:
            return hits[0]
        label = kind.replace("_", " ")
        if hits:
            raise LensError(
                f"{shown(name)} is ambiguous: {', '.join(e.name for e in hits)} are {label}s; write one in full"
            )
        plugin_name = name.partition(":")[0] if ":" in name else ""
        known = [e.short for e in entries] + ([e.name for e in entries] if plugin_name else [])
        message = f"no {label} is called {shown(name)}.{did_you_mean(name, known)}"
        if plugin_name and all(p.name != plugin_name for p in self.plugins):
            message += f" The plugin {shown(plugin_name)} is not installed: pip install the package that brings it."
        raise LensError(message + self.disabled(plugin_name))

    def disabled(self, name: str = "") -> str:
        """The end of a message: which plugins are disabled, of all or of those called `name`, and why, and which files
        offer nothing; "" if none."""
        plugins = [p for p in self.plugins if not name or p.name == name]
        errors = "; ".join(f"{p.name} ({p.error})" for p in plugins if p.error)
        notes = "".join(f" {p.name} {p.note}." for p in plugins if p.note)
        return (f" Disabled: {errors}." if errors else "") + notes

    def commands(self, taken: Collection[str] = ()) -> dict[str, str]:
        """The commands that plugins bring: name -> "module:attribute". A name that is taken, or brought twice, is used
        by nobody: its plugins are disabled."""
        owners: dict[str, Plugin] = {}
        commands: dict[str, str] = {}
        for plugin in list(self.plugins):
            if plugin.error is not None or not hasattr(plugin.module, "lens_commands"):
                continue
            offered, problems = _commands(plugin.module, taken)
            for name in offered.keys() & owners.keys() if not problems else ():
                both = (
                    f"in lens_commands: two plugins bring the command {name!r}: {owners[name].name} and {plugin.name}"
                )
                self._disable(owners[name], both)
                problems.append(both)
            if problems:
                self._disable(plugin, problems[0])
                continue
            owners |= dict.fromkeys(offered, plugin)
            commands |= offered
        return {name: place for name, place in commands.items() if owners[name].error is None}

    def pages(self) -> dict[str, str]:
        """The pages that plugins bring: name -> "module:function". A plugin whose hook fails is disabled."""
        pages: dict[str, str] = {}
        for plugin in list(self.plugins):
            if plugin.error is None and hasattr(plugin.module, "lens_pages"):
                offered, problems = _pages(plugin.module)
                pages |= offered
                if problems:
                    self._disable(plugin, problems[0])
        return pages

    def check(self, taken: Collection[str] = ()) -> dict[str, list[str]]:
        """Ask every plugin everything: name -> all that is wrong with it. Imports what each plugin offers, its commands
        and pages included; `taken` are the names of the core's own."""
        problems_by_plugin: dict[str, list[str]] = {}
        for plugin in list(self.plugins):
            problems = problems_by_plugin.setdefault(plugin.name, [])
            if plugin.module is None:
                problems += [plugin.error] if plugin.error else []
                continue
            for kind, (hook, _) in KINDS.items():
                if not hasattr(plugin.module, hook):
                    continue
                offered, wrong = _offered(plugin.module, kind)
                problems += wrong
                for short, cls in offered.items():
                    if isinstance(cls, type):
                        problems += [f"in {hook}: {hook}[{short!r}] {flaw}" for flaw in _weaknesses(cls, kind)]
            for hook, what, ask, look_up in (
                ("lens_commands", "command", partial(_commands, taken=taken), resolve),
                ("lens_pages", "page", _pages, _module_of),  # the function is looked up by the server that mounts it
            ):
                offered, wrong = ask(plugin.module) if hasattr(plugin.module, hook) else ({}, [])
                problems += wrong
                for name, place in offered.items() if not wrong else ():
                    try:
                        look_up(place)
                    except LensError as error:
                        problems.append(f"in {hook}: the {what} {name!r}: {error}")
            known = [n for n in vars(hookspecs) if n.startswith("lens_")]
            for name, value in vars(plugin.module).items():
                defined_here = isfunction(value) and value.__module__ == plugin.module.__name__
                if defined_here and name not in known and (near := difflib.get_close_matches(name, known, 1, 0.8)):
                    problems.append(f"there is no hook {name!r}, so nothing asks it. Did you mean {near[0]!r}?")
        self.commands(taken)  # which sees what two plugins bring
        for plugin in self.plugins:
            if plugin.error and plugin.error not in problems_by_plugin[plugin.name]:
                problems_by_plugin[plugin.name].insert(0, plugin.error)
        return problems_by_plugin

    def first(self, resolver: str, argument: Any) -> Any:
        """The first answer to a resolver hook, or None. A plugin that raises a LensError speaks for itself."""
        name = "uri" if resolver == "lens_fetch" else "folder"
        kinds: tuple[type[Any], ...] = (str, Path) if resolver == "lens_fetch" else (dict,)
        for impl in reversed(getattr(self._manager.hook, resolver).get_hookimpls()):  # the order that pluggy asks in
            where = f"{impl.plugin_name}: {resolver}({shown(str(argument))})"
            try:
                answer = impl.function(*((argument,) if name in impl.argnames else ()))
            except LensError:
                raise
            except (Exception, SystemExit) as error:
                raise PluginError(f"{where} raised {_one_line(error)}") from error
            if answer is not None and not isinstance(answer, kinds):
                must = " or ".join(kind.__name__ for kind in kinds)
                raise PluginError(f"{where} returned {type(answer).__name__}; it must return a {must}, or None")
            if answer is not None:
                return answer
        return None

    def version(self, plugin: str) -> str | None:
        """`distribution==version` of a plugin, or None where it is not installed."""
        return next((f"{p.distribution}=={p.version}" for p in self.plugins if p.name == plugin), None)
