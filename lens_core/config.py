"""Plain data into frozen attrs objects and back, strictly: unknown keys and wrong types are errors, all raised at once.

`1e-4`, which YAML reads as a string, is a number; `"false"` is no bool. `flaw_of` says why a class cannot be a Config.
"""

from __future__ import annotations

import contextlib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import cattrs
from attrs import field, frozen
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError, IterableValidationError

from lens_core.io import readers
from lens_core.io.readers import one_line, shown
from lens_core.types import ConfigError, did_you_mean
from lens_core.validators import RangeError, Rule

T = TypeVar("T")
SECRET = "lens_secret"
"""The metadata of a field into which a key may be pasted by mistake: what an error says of a value of a wrong type,
which it does not quote. `key_env: str = field(metadata={SECRET: "must be the name of an environment variable"})`"""

SPEED_ONLY = "lens_speed_only"
"""The metadata of a field that changes how fast a result is there, and nothing of it: results are compared without it.
`processes: int = field(default=1, metadata={SPEED_ONLY: True})`"""


@frozen
class ComponentSpec:
    """A named component with the options of its Config, as a recipe writes it."""

    use: str
    options: dict[str, Any] = field(factory=dict)


class WrongType(ValueError):
    """A value of another type than its field's."""


def _exactly(kind: type[Any], words: str) -> Any:
    def check(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            colon = kind is str and isinstance(value, dict) and list(value.values()) == [None]
            name = str(next(iter(value)))[:80] if colon else ""
            hint = f'; put quotes around "{name}:", which YAML takes for a mapping' if colon else ""
            raise WrongType(f"must be {words}, not {shown(value)}{hint}")
        return value

    return check


def _number(value: Any, _: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-4 as a string
    if type(value) not in (int, float):
        raise WrongType(f"must be a number, not {shown(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise WrongType(f"must be a number of at most 1e308, not {shown(value)}") from error


def as_use(value: Any, _: Any = None) -> ComponentSpec:
    """`flux2`, or a mapping with `use`, as a ComponentSpec. Raises WrongType."""
    if isinstance(value, str):
        return ComponentSpec(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("use"), str):
        first = next(iter(value), None) if isinstance(value, Mapping) and len(value) == 1 else None
        name = first if isinstance(first, str) and re.fullmatch(r"[\w:-]{1,60}", first) else "flux2"
        raise WrongType(f"must name a component (`{name}`, or `{{use: {name}, …}}`), not {shown(value)}")
    return ComponentSpec(value["use"], {k: v for k, v in value.items() if k != "use"})


def parse_use(text: str) -> ComponentSpec:
    """A component named in one line of YAML, as on a command line: `shapes`, or `{use: shapes, split: train}`."""
    try:
        value, problems = readers.parse_yaml(text)
        use = as_use(value, None)
    except ValueError as error:  # no YAML, or what as_use refuses
        raise ConfigError(f"{shown(text.rstrip(': ') or text)[1:-1]}: {one_line(error)}") from error
    if problems:
        raise ConfigError([f"{shown(text)[1:-1]}: {problem}" for problem in problems])
    return use


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _tuple(value: Any, hint: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise WrongType(f"must be a list, not {shown(value)}")
    args = typing.get_args(hint)
    kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is ... else list(args)
    if len(kinds) != len(value):
        raise WrongType(f"must have {len(kinds)} items, not {len(value)}")
    return tuple(_CONVERTER.structure(v, k) for v, k in zip(value, kinds, strict=True))


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint)


def _optional(value: Any, hint: Any) -> Any:
    rest = [a for a in typing.get_args(hint) if a is not type(None)]
    if value is None:
        return None
    problems: list[Exception] = []
    for kind in rest:
        try:
            return _CONVERTER.structure(value, kind)
        except Exception as error:  # the next alternative may fit
            problems.append(error)
    raise problems[0]


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _literal(value: Any, hint: Any) -> Any:
    allowed = typing.get_args(hint)
    if not any(type(value) is type(word) and value == word for word in allowed):
        raise WrongType(f"must be {' or '.join(map(str, allowed))}, not {shown(value)}")
    return value


def _all_at_once(cls: type[Any]) -> Any:
    """How cattrs builds `cls`. Where a field is of a wrong type there is nothing to build, and the ranges of the other
    fields are checked one by one, so that their problems are raised together with it."""
    plain = cattrs.gen.make_dict_structure_fn(
        cls, _CONVERTER, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True
    )

    def hook(data: Any, _: Any) -> Any:
        try:
            return plain(data, cls)
        except ClassValidationError as error:
            if any(isinstance(inner, ConfigError) and not _field(inner) for inner in error.exceptions):
                raise  # it was built, and refused its values itself
            failed = {_field(inner) for inner in error.exceptions}
            range_problems: list[str] = []
            for a in attrs.fields(cls):
                if a.name in data and a.name not in failed and isinstance(a.validator, Rule):
                    range_problems += a.validator.problems(_CONVERTER.structure(data[a.name], a.type), a.name)
            more = [RangeError(range_problems)] if range_problems else []
            raise ClassValidationError(error.message, [*error.exceptions, *more], cls) from error

    return hook


def _field(error: BaseException) -> str | None:
    """The field that cattrs was at."""
    note = next((n for n in getattr(error, "__notes__", []) if hasattr(n, "name")), None)
    return note.name if note is not None else None


_CONVERTER = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
_CONVERTER.register_structure_hook(bool, _exactly(bool, "true or false"))
_CONVERTER.register_structure_hook(int, _exactly(int, "a whole number"))
_CONVERTER.register_structure_hook(str, _exactly(str, "text"))
_CONVERTER.register_structure_hook(float, _number)
_CONVERTER.register_structure_hook_func(_is_literal, _literal)
_CONVERTER.register_structure_hook_factory(attrs.has, _all_at_once)
_CONVERTER.register_structure_hook(ComponentSpec, as_use)
_CONVERTER.register_structure_hook_func(_is_tuple, _tuple)
_CONVERTER.register_structure_hook_func(_is_optional, _optional)


def _problems(error: BaseException, path: str, cls: Any) -> list[str]:
    """Flatten cattrs' nested groups into lines, each with its path."""
    if isinstance(error, ClassValidationError):
        fields = {f.name: f for f in attrs.fields(error.cl)} if attrs.has(error.cl) else {}
        lines: list[str] = []
        for inner in error.exceptions:
            name = _field(inner)
            known = fields.get(name or "")
            if known is not None and SECRET in known.metadata:
                lines.append(f"{path}.{name}: {known.metadata[SECRET]}")
            else:
                lines += _problems(inner, f"{path}.{name}" if name else path, (known and known.type) or error.cl)
        return lines
    if isinstance(error, IterableValidationError):
        lines = []
        for inner in error.exceptions:
            note = next((n for n in getattr(inner, "__notes__", []) if hasattr(n, "index")), None)
            lines += _problems(inner, f"{path}[{note.index}]" if note is not None else path, cls)
        return lines
    if isinstance(error, ForbiddenExtraKeysError):
        names = [f.name for f in attrs.fields(error.cl)]
        return [
            f"{path}.{shown(key)[1:-1]}: unknown.{did_you_mean(key, names)} Fields: {', '.join(names) or 'none'}."
            for key in sorted(map(str, error.extra_fields))
        ]
    if isinstance(error, KeyError):
        key = f".{error.args[0]}"  # cattrs names the missing field itself
        return [f"{path.removesuffix(key)}{key}: missing"]
    if isinstance(error, RangeError):
        return [f"{path}.{p}" for p in error.problems]
    if isinstance(error, ConfigError):
        return [f"{path}: {p}" for p in error.problems]
    return [f"{path}: {one_line(error, 1000)}"]


def structure(cls: type[T], data: Any, path: str = "$") -> T:
    """`data` as a `cls`, or a ConfigError that lists every problem with its path."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path}: must be a mapping, not {shown(data)}")
    try:
        return _CONVERTER.structure(data, cls)
    except Exception as error:
        raise ConfigError(_problems(error, path, cls)) from error


def unstructure(config: Any) -> dict[str, Any]:
    """The plain mapping that `structure` would read back."""
    return typing.cast("dict[str, Any]", _plain(config))


def decisive(config: Any) -> dict[str, Any]:
    """The options of a Config that decide results, as plain values: all but those marked SPEED_ONLY."""
    marked = {f.name for f in attrs.fields(type(config)) if f.metadata.get(SPEED_ONLY)}
    return {name: value for name, value in unstructure(config).items() if name not in marked}


def _plain(value: Any) -> Any:
    if isinstance(value, ComponentSpec):
        return {"use": value.use, **_plain(value.options)}
    if attrs.has(type(value)):
        return {f.name: _plain(getattr(value, f.name)) for f in attrs.fields(type(value))}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


class _Options(Rule):
    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self.rules = rules

    def problems(self, value: Any, place: str) -> Iterator[str]:
        for name, rule in self.rules.items():
            if isinstance(value, ComponentSpec) and name in value.options:
                option = value.options[name]
                with contextlib.suppress(WrongType):  # as YAML mistakes it: the rule refuses what is no number at all
                    option = _number(option, None) if isinstance(option, str) else option
                yield from rule.problems(option, f"{place}.{name}")


def options(**rules: Rule) -> Rule:
    """Check the options that a `ComponentSpec` carries for its user, such as the weight of a reward, one rule each."""
    return _Options(rules)


# ---- what a Config may be -------------------------------------------------------------------------------------------

PLAIN = (bool, int, float, str, type(None))
CURES = {"Path": "str", "PosixPath": "str", "Enum": "Literal or str", "set": "tuple", "frozenset": "tuple"}


def flaw_of(config: Any) -> str | None:
    """Why `config` cannot be the Config of a component, or None: it is a frozen attrs class whose fields are of types
    that JSON and YAML hold, and whose defaults are equal after `unstructure`, JSON and `structure`."""
    if not (isinstance(config, type) and attrs.has(config)):
        return "is not an attrs class; decorate it with attrs.frozen"
    if not attrs.inspect(config).is_frozen:
        return "is not frozen; decorate it with attrs.frozen"
    try:
        fields = attrs.fields(attrs.resolve_types(config))
    except Exception as error:  # a name that is not there, or no type at all
        return f"has a field whose type cannot be resolved ({type(error).__name__}: {one_line(error)})"
    for a in fields:
        if not a.init:
            return f"has the field {a.name!r}, which its __init__ does not take, so a recipe cannot set it"
        if a.alias != a.name:
            return f"has the field {a.name!r}, which its __init__ calls {a.alias!r}; give it a name without _"
        foreign = _foreign(a.type, ())
        if foreign:
            return f"has the field {a.name!r} of the type {foreign[0]}, which JSON cannot hold{foreign[1]}"
    for a in fields:
        flaw = _flaw_of_default(config, a)
        if flaw:
            return f"has the field {a.name!r}, whose default {flaw}"
    return None


def _foreign(hint: Any, seen: tuple[Any, ...]) -> tuple[str, str] | None:
    """(name, cure) of the first type in `hint` that no recipe can hold."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is Any or hint in (*PLAIN, ComponentSpec) or hint in seen:
        return None
    if origin is typing.Literal:
        return next(((type(a).__name__, "; use text") for a in args if type(a) not in PLAIN), None)
    if origin in (typing.Union, types.UnionType):
        return next((foreign for a in args if (foreign := _foreign(a, seen))), None)
    if origin in (tuple, list, Sequence) or hint in (tuple, list, dict, Mapping, Sequence):
        return next((foreign for a in args if a is not ... and (foreign := _foreign(a, seen))), None)
    if origin in (dict, Mapping):
        return ("dict with keys other than text", "; use str") if args[0] is not str else _foreign(args[1], seen)
    if attrs.has(hint):
        hints = [a.type for a in attrs.fields(attrs.resolve_types(hint))]
        return next((foreign for h in hints if (foreign := _foreign(h, (*seen, hint)))), None)
    kind = origin or hint
    name = getattr(kind, "__name__", str(kind))
    bases = [base.__name__ for base in getattr(kind, "__mro__", ())]
    cure = next((CURES[b] for b in (name, *bases) if b in CURES), None)
    return name, f"; use {cure}" if cure else "; use numbers, text, tuples and dicts of them"


def _flaw_of_default(config: type[Any], a: attrs.Attribute[Any]) -> str | None:
    default: Any = a.default
    if default is attrs.NOTHING:
        return None
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]  # a class, which attrs types as a function
        if default.takes_self:
            return None  # it depends on the other fields
        try:
            default = default.factory()
        except Exception as error:
            return f"cannot be made ({type(error).__name__}: {one_line(error)})"
    try:
        back = _CONVERTER.structure(json.loads(json.dumps(_plain(default), allow_nan=False)), a.type or Any)
    except Exception as error:
        reason = "; ".join(_problems(error, a.name, config))
        return f"{shown(default)} is not what its type reads ({one_line(reason)})"
    if back != default:
        return f"{shown(default)} comes back from JSON as {shown(back)}"
    if isinstance(a.validator, Rule) and not a.validator.allows(default):
        return f"is out of range ({one_line(next(a.validator.problems(default, a.name)))})"
    return None
