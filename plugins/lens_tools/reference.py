"""What every component is and takes, read from the code: for `lens components`, `lens show` and docs/components/.

A list of components reads source files without importing them, so that no model code is loaded. What describes one
component imports its class.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
import typing
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
from attrs import frozen

from lens_core.catalog import Catalog, Entry, Plugin
from lens_core.config import ComponentSpec, unstructure
from lens_core.io.readers import read_text
from lens_core.protocols import KINDS
from lens_core.types import ConfigError, did_you_mean
from lens_core.validators import Rule

USED_IN = {
    "vae": "pipeline.vae of a recipe, or LensPipeline(vae=…)",
    "text_encoder": "pipeline.text_encoder of a recipe, or LensPipeline(text_encoder=…)",
    "backbone": "pipeline.backbone of a recipe, or LensPipeline(backbone=…)",
    "sampler": "pipeline.sampler of a recipe, lens generate --sampler, or LensPipeline(sampler=…)",
    "reward": "method.rewards of a recipe whose method is diffusion_nft; lens rl audit",
    "reasoner": "pipeline.reasoner of a recipe, lens generate --reasoner, or LensPipeline(reasoner=…)",
    "method": "method of a recipe",
    "dataset": "dataset or evaluation.validation of a recipe",
    "curator": "the filters of a lens data curate recipe",
    "benchmark": "lens bench NAME, or evaluation.benchmarks of a recipe",
    "generator": "lens bench --generator",
    "perceiver": "the options of a benchmark that reads pictures with models, as lens bench runs it",
    "llm": "wherever an option is an llm: rewards, reasoners, captioners, lens rl prompts",
}
"""Kind -> where its components are named."""
FORMATS = {
    "reward": "rewards: [{}]",
    "curator": "filters: [{}]",
    "benchmark": "benchmarks: [{}]",
    "generator": "{}",
    "perceiver": "{}",
}
"""Kind -> how a component is written there, if that is not `KIND: {}`."""


@frozen
class Summary:
    """One line of a list of components."""

    kind: str
    name: str  # plugin:short
    text: str  # the first sentence of its docstring


@frozen
class Option:
    """One field of a Config."""

    name: str
    type: str
    default: str | None  # as YAML has it; None: must be given
    range: str  # what its validator allows, in words
    comment: str  # what stands beside it in the source


@frozen
class Description:
    """One component, whole."""

    kind: str
    name: str
    distribution: str
    docstring: str
    options: tuple[Option, ...]
    methods: tuple[str, ...]  # signatures that its kind requires
    used_in: str
    example: str  # a line of YAML that names it


# ---- the list -------------------------------------------------------------------------------------------------------


def list_components(catalog: Catalog, kind: str | None = None) -> list[Summary]:
    """Every component, of `kind` or of all kinds, by kind and name. Raises ConfigError for an unknown kind."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"there is no kind {kind!r}.{did_you_mean(kind, KINDS)} Kinds: {', '.join(KINDS)}.")
    rows: list[Summary] = []
    for each in [kind] if kind else KINDS:
        components = []
        for plugin in catalog.plugins:
            if plugin.error is None and hasattr(plugin.module, KINDS[each][0]):
                components += _summaries(catalog, plugin, each)
        rows += sorted(components, key=lambda row: row.name)
    return rows


def _summaries(catalog: Catalog, plugin: Plugin, kind: str) -> list[Summary]:
    texts = _texts_in_source(typing.cast(ModuleType, plugin.module), KINDS[kind][0])
    if texts is None:  # the hook does more than import and return: ask it
        entries = [e for e in catalog.entries(kind) if e.plugin == plugin.name]
        texts = {e.short: e.cls.__doc__ or "" for e in entries}
    return [Summary(kind, f"{plugin.name}:{short}", first_sentence(text)) for short, text in texts.items()]


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, on one line, without its full stop."""
    paragraph = " ".join(inspect.cleandoc(docstring).partition("\n\n")[0].split())
    return re.split(r"(?<!\bal)\. (?=[A-Z`])", paragraph, maxsplit=1)[0].removesuffix(".")


def _texts_in_source(module: ModuleType, hook: str) -> dict[str, str] | None:
    """Short name -> docstring, of a hook that imports its classes and returns a dict of them; None of another hook."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(getattr(module, hook)))).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    if not isinstance(function, ast.FunctionDef):
        return None
    places: dict[str, tuple[str, str]] = {}
    for node in function.body:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            places |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
            pairs = list(zip(node.value.keys, node.value.values, strict=True))
            texts: dict[str, str | None] = {}
            for key, value in pairs:
                if not (isinstance(key, ast.Constant) and isinstance(value, ast.Name) and value.id in places):
                    return None
                texts[str(key.value)] = _docstring(*places[value.id])
            return None if None in texts.values() else typing.cast("dict[str, str]", texts)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return None
    return None


def _docstring(module: str, name: str) -> str | None:
    """The docstring of a class of a module that is not imported; None where its source does not define it."""
    try:
        spec = find_spec(module)
        tree = ast.parse(read_text(Path(spec.origin))) if spec and spec.origin else None
    except (ImportError, OSError, ValueError, SyntaxError):
        return None
    for node in tree.body if tree else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ast.get_docstring(node) or ""
    return None


# ---- one component --------------------------------------------------------------------------------------------------


def describe(catalog: Catalog, name: str, kind: str | None = None) -> list[Description]:
    """Every component called `name`, `plugin:short` or short, one a kind. Raises ConfigError where there is none."""
    rows = [row for row in list_components(catalog, kind) if name in (row.name, row.name.partition(":")[2])]
    if not rows:
        every = list_components(catalog, kind)
        known = sorted({row.name.partition(":")[2] for row in every} | {row.name for row in every})
        of = f" {kind}" if kind else ""
        raise ConfigError(
            f"no{of} component is called {name!r}.{did_you_mean(name, known)} lens components lists all."
            + catalog.disabled(name.partition(":")[0] if ":" in name else "")
        )
    return [_description(catalog, catalog.find(row.kind, row.name)) for row in rows]


def _description(catalog: Catalog, entry: Entry) -> Description:
    options = tuple(option_docs(entry.cls.Config))
    return Description(
        kind=entry.kind,
        name=entry.name,
        distribution=catalog.version(entry.plugin) or "",
        docstring=inspect.cleandoc(entry.cls.__doc__ or ""),
        options=options,
        methods=tuple(_signatures(KINDS[entry.kind][1])),
        used_in=USED_IN[entry.kind],
        example=_example(entry, options),
    )


def _signatures(protocol: type[Any]) -> list[str]:
    methods = {n: v for n, v in vars(protocol).items() if inspect.isfunction(v) and not n.startswith("_")}
    return [
        f"{n}{inspect.signature(v)}".replace("(self, ", "(").replace("(self)", "()").replace("'", "")
        for n, v in methods.items()
    ]


def _example(entry: Entry, options: tuple[Option, ...]) -> str:
    """A line of YAML that names the component, with its required options and the first one that has a default."""
    required = [o for o in options if o.default is None]
    optional = [o for o in options if o.default not in (None, "null")]
    words = [f"{o.name}: …" for o in required] + [f"{o.name}: {o.default}" for o in optional[:1]]
    spec = f"{{{', '.join([f'use: {entry.short}', *words])}}}" if words else entry.short
    return FORMATS.get(entry.kind, f"{entry.kind}: {{}}").format(spec)


def option_docs(config: type[Any]) -> list[Option]:
    """The fields of a Config, each with the comment beside or above it."""
    comments: dict[str, str] = {}
    for cls in reversed(config.__mro__):  # a field of a base class is described there, unless it is written anew
        comments |= _comments(cls) if attrs.has(cls) else {}
    return [
        Option(a.name, _type_name(a.type), _default(a), a.validator.words() if isinstance(a.validator, Rule) else "",
               comments.get(a.name, ""))
        for a in attrs.fields(attrs.resolve_types(config))
    ]  # fmt: skip


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if hint is ComponentSpec:
        return "component"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(map(str, args))
    if origin is tuple or origin is list:
        items = args[:1] if len(args) == 2 and args[1] is ... else args
        return f"list of {' and '.join(dict.fromkeys(_type_name(a) for a in items))}"
    if origin is dict or (origin is not None and origin.__name__ == "Mapping"):
        return f"mapping to {_type_name(args[1])}"
    if args:
        return " or ".join(_type_name(a) for a in args)
    return {"str": "text", "int": "int", "float": "number", "bool": "true or false"}.get(
        getattr(hint, "__name__", ""), getattr(hint, "__name__", str(hint))
    )


def _default(a: attrs.Attribute[Any]) -> str | None:
    if a.default is attrs.NOTHING:
        return None
    value: Any = a.default
    if isinstance(value, attrs.Factory):  # type: ignore[arg-type]  # a class, which attrs types as a function
        if value.takes_self:
            return "depends on the others"
        value = value.factory()
    return yaml_text(unstructure(value))


def yaml_text(value: Any) -> str:
    """Plain data on one line, as YAML has it."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _comments(config: type[Any]) -> dict[str, str]:
    """Field -> the comment at the end of its lines, or on the lines above it."""
    try:
        source = textwrap.dedent(inspect.getsource(config))
    except (OSError, TypeError):
        return {}
    (tree,) = ast.parse(source).body
    comments: dict[int, str] = {}
    alone: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# type:", "# fmt:")):
            comments[token.start[0]] = token.string.lstrip("# ").partition("  # ")[0]
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    by_field: dict[str, str] = {}
    for node in tree.body if isinstance(tree, ast.ClassDef) else ():
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        lines = [n for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments]
        above = node.lineno - 1
        while above in alone:
            lines.insert(0, above)
            above -= 1
        by_field[node.target.id] = " ".join(comments[n] for n in lines)
    return by_field
