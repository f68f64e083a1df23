"""What is wrong with a plugin is found before it is used: field types at discovery, all else by `plugins --check`."""

from __future__ import annotations

import enum
import importlib.metadata
import json
import sys
import types
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, Literal

import attrs
import pytest
import toy
from attrs import field, frozen
from torch import nn

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.cli.main import main
from lens_core.config import flaw_of
from lens_core.recipe import ComponentSpec
from lens_core.types import LensError, PluginError
from lens_core.validators import integer


class Colour(enum.Enum):
    RED = "red"


class Loud(enum.StrEnum):
    YES = "yes"


@frozen
class Inner:
    width: int = 3


@frozen
class InnerPath:
    folder: Path = Path("x")


def config(hint: Any, default: Any = attrs.NOTHING, **more: Any) -> type[Any]:
    """A frozen Config with one field."""
    return attrs.make_class("Config", {"it": field(type=hint, default=default, **more)}, frozen=True)


@pytest.mark.parametrize(
    ("hint", "default"),
    [
        (int, 1),
        (float, 1),
        (float, 0.5),
        (str, "x"),
        (bool, True),
        (Any, [1, {"a": None}]),
        (int | None, None),
        (Literal["a", "b"], "a"),
        (tuple[int, ...], (1, 2)),
        (tuple[tuple[int, float], ...], ((1, 0.5),)),
        (dict[str, float], attrs.Factory(dict)),
        (dict[str, tuple[str, ...]], attrs.Factory(dict)),
        (ComponentSpec, ComponentSpec("x")),
        (tuple[ComponentSpec, ...], (ComponentSpec("a", {"b": 1}),)),
        (Inner, Inner()),
        (Inner | None, None),
        (list[int], attrs.Factory(list)),
        (int, attrs.NOTHING),
        (dict[str, Any], attrs.Factory(dict)),
    ],
)
def test_a_field_that_json_holds_is_fine(hint: Any, default: Any) -> None:
    assert flaw_of(config(hint, default)) is None


@pytest.mark.parametrize(
    ("hint", "default", "words"),
    [
        (Path, Path("x"), "type Path, which JSON cannot hold; use str"),
        (Path | None, None, "type Path"),
        (tuple[Path, ...], (), "type Path"),
        (dict[str, Path], attrs.Factory(dict), "type Path"),
        (Colour, Colour.RED, "type Colour, which JSON cannot hold; use Literal or str"),
        (Loud, Loud.YES, "type Loud"),
        (set[str], attrs.Factory(set), "type set, which JSON cannot hold; use tuple"),
        (set, attrs.Factory(set), "type set"),
        (frozenset[int], frozenset(), "type frozenset"),
        (bytes, b"", "type bytes"),
        (complex, 1j, "type complex"),
        (dict[int, str], attrs.Factory(dict), "dict with keys other than text"),
        (InnerPath, attrs.Factory(InnerPath), "type Path"),
        (nn.Module, None, "type Module"),
        ("no_such_name", 1, "cannot be resolved"),
        (int, "three", "is not what its type reads"),
        (int, None, "is not what its type reads"),
        (int, 1.0, "is not what its type reads"),
        (tuple[int, ...], [1], "comes back from JSON as (1,)"),
        (float, float("nan"), "is not what its type reads"),
        (Any, Path("x"), "is not what its type reads"),
        (Any, (1, 2), "comes back from JSON as [1, 2]"),
        (int, attrs.Factory(lambda: 1 // 0), "cannot be made (ZeroDivisionError"),
    ],
)
def test_a_field_that_does_not_make_the_round_trip_is_refused_with_the_reason(
    hint: Any, default: Any, words: str
) -> None:
    flaw = flaw_of(config(hint, default))
    assert flaw is not None and words in flaw and "'it'" in flaw.replace("cannot be resolved", "'it'")


def test_a_default_out_of_its_own_range_is_refused() -> None:
    assert "out of range" in str(flaw_of(config(int, 0, validator=integer(at_least=1))))


def test_a_field_that_a_recipe_cannot_name_is_refused() -> None:
    assert "_secret" in str(flaw_of(attrs.make_class("Config", {"_secret": field(type=int, default=1)}, frozen=True)))
    assert "does not take" in str(flaw_of(config(int, 1, init=False)))


def test_a_sampler_whose_config_has_a_path_is_disabled_with_the_reason() -> None:
    class Odd(toy.Even):
        Config = config(Path, Path("x"))  # type: ignore[assignment]  # what the test is about

    catalog = Catalog.of(toy, module("odd", lens_samplers={"odd": Odd}))
    with pytest.raises(LensError, match=r"Disabled: odd .*'it' of the type Path, which JSON cannot hold; use str"):
        catalog.find("sampler", "odd")


# ---- asking everything ----------------------------------------------------------------------------------------------


def module(name: str, **hooks: Any) -> types.ModuleType:
    module_type = types.ModuleType(name)
    for hook, answer in hooks.items():
        setattr(module_type, hook, hookimpl(lambda answer=answer: answer))
    return module_type


class Half(toy.Even):
    sample = None  # type: ignore[assignment]  # what the test is about


class Unfrozen(toy.Even):
    @attrs.mutable
    class Config:
        pass


class Silent(toy.Weights):
    """A backbone that inherits torch's placeholder."""


class Shy(toy.Even):
    def __init__(self) -> None:
        pass


class Hasty(toy.Even):
    def sample(self, velocity: Any) -> Any:  # type: ignore[override]  # what the test is about
        return velocity


def fetch(uri: str) -> Path | None:
    return None


def unmarked() -> types.ModuleType:
    module_type = types.ModuleType("unmarked")
    module_type.lens_fetch = fetch  # type: ignore[attr-defined]  # without @hookimpl
    return module_type


def misspelt() -> types.ModuleType:
    module_type = types.ModuleType("misspelt")
    module_type.lens_sampler = types.FunctionType(fetch.__code__, {"__name__": "misspelt"})  # type: ignore[attr-defined]
    return module_type


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        (module("p", lens_samplers=["a list"]), "lens_samplers must return {short name: class}, not ['a list']"),
        (module("p", lens_samplers={"x": Half}), "Half lacks sample(), which every sampler has"),
        (module("p", lens_samplers={"x": Unfrozen}), "Unfrozen.Config is not frozen"),
        (module("p", lens_samplers={"x": Shy}), "cannot be built as Shy(config)"),
        (module("p", lens_backbones={"x": Silent}), "Silent lacks forward()"),
        (
            module("p", lens_samplers={"x": Hasty}),
            "Hasty.sample(self, velocity) cannot be called as sample(velocity, x, ",
        ),
        (module("p", lens_samplers={"a:b": toy.Even}), "'a:b' is no name of a component; use letters"),
        (module("p", lens_samplers={"": toy.Even}), "'' is no name of a component"),
        (
            module("p", lens_pages={"mine": "no_such_module:page"}),
            "in lens_pages: the page 'mine': no_such_module:page",
        ),
        (module("p", lens_pages=["mine"]), 'lens_pages must return {name: "module:function"}, not'),
        (module("p", lens_commands={"train": "a:b"}), "the command 'train' is the core's own"),
        (module("p", lens_commands={"mine": "no_such_module:app"}), "No module named 'no_such_module'"),
        (module("p", lens_commands={"mine": "json:no_such_function"}), "no_such_function"),
        (module("p", lens_commands={"mine": "json:__doc__"}), "cannot be called"),
        (module("p", lens_commands=["mine"]), 'lens_commands must return {name: "module:attribute"}'),
        (module("p", lens_commands={"Mine Own Thing": "json:loads"}), "is no name of a command"),
        (unmarked(), "lens_fetch has no @hookimpl"),
        (misspelt(), "there is no hook 'lens_sampler', so nothing asks it. Did you mean 'lens_samplers'?"),
    ],
)
def test_check_finds_it(plugin: types.ModuleType, words: str) -> None:
    problems = Catalog.of(toy, plugin).check(taken=("train",))
    assert any(words in problem for problem in problems[plugin.__name__]), problems
    assert problems["toy"] == []
    assert all("\n" not in problem for problem in problems[plugin.__name__])


def test_check_calls_a_stochastic_sampler_with_its_noise_by_keyword() -> None:
    class Noisy(toy.Even):
        stochastic = True

        def sample(self, velocity: Any, x: Any, steps: int, start: int = 0, *, draw: Any) -> Any:  # type: ignore[override]
            return iter(())

    class Deaf(toy.Even):
        stochastic = True

    problems = Catalog.of(module("p", lens_samplers={"noisy": Noisy, "deaf": Deaf})).check()["p"]
    assert len(problems) == 1 and "Deaf.sample(" in problems[0]
    assert problems[0].endswith("cannot be called as sample(velocity, x, steps, draw=…)")


def test_check_lists_every_problem_of_a_plugin() -> None:
    bad = module("bad", lens_samplers={"a": Half, "b": Unfrozen}, lens_vaes=[], lens_commands={"x": "no_such:y"})
    assert len(Catalog.of(bad).check()["bad"]) == 4


def test_check_says_that_weights_cannot_be_saved() -> None:
    class Fleeting:
        Config = toy.Blocks.Config
        encode = decode = toy.Blocks.encode

        def __init__(self, config: Any) -> None: ...

    problems = Catalog.of(module("f", lens_vaes={"x": Fleeting})).check()["f"]
    assert problems == ["in lens_vaes: lens_vaes['x'] lacks save and load, without which no checkpoint can hold it"]


def test_a_plugin_whose_pages_fail_is_disabled_and_the_others_are_mounted() -> None:
    good, bad = module("good", lens_pages={"mine": "json:loads"}), types.ModuleType("bad")
    bad.lens_pages = lambda: 1 / 0  # type: ignore[attr-defined]
    catalog = Catalog.of(bad, good)
    assert catalog.pages() == {"mine": "json:loads"}
    assert catalog.disabled() == " Disabled: bad (in lens_pages: ZeroDivisionError: division by zero)."


def installed(monkeypatch: pytest.MonkeyPatch, *plugins: types.ModuleType) -> None:
    for plugin in plugins:
        monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    entries = EntryPoints(EntryPoint(name=p.__name__, value=p.__name__, group="lens.v1") for p in plugins)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **how: entries.select(**how) if how else entries)


def test_the_command_exits_with_1_where_anything_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch, toy)
    assert main(["plugins", "--check"]) == 0
    assert "every plugin keeps its contract" in capsys.readouterr().out
    installed(monkeypatch, toy, module("bad", lens_samplers={"a": Half}, lens_commands={"mine": "no_such:y"}))
    assert main(["plugins", "--check"]) == 1
    stdout = capsys.readouterr().out
    assert "Half lacks sample()" in stdout and "No module named 'no_such'" in stdout and "2 problems" in stdout
    assert main(["plugins", "--check", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [len(row["problems"]) for row in rows] == [2, 0]
    assert main(["plugins"]) == 0


def test_a_command_that_cannot_be_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch, module("bad", lens_commands={"vanished": "no_such_module:app"}))
    assert main(["vanished"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and "no_such_module:app cannot be imported" in stderr


# ---- resolvers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolver", "answer", "words"),
    [
        ("lens_fetch", ["x"], "returned list; it must return a str or Path, or None"),
        ("lens_describe", "x", "returned str; it must return a dict, or None"),
    ],
)
def test_a_resolver_that_answers_nonsense_is_named(resolver: str, answer: Any, words: str) -> None:
    made = types.ModuleType("odd")
    hook = (lambda uri: answer) if resolver == "lens_fetch" else (lambda folder: answer)
    setattr(made, resolver, hookimpl(hook))
    with pytest.raises(PluginError, match=rf"odd: {resolver}\('x'\) {words}"):
        Catalog.of(made).first(resolver, "x")


# ---- LENS_DEBUG -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["train", "no-such.yaml"], ["generate"], ["plugins", "--nonsense"]])
def test_the_traceback_of_a_handled_error_is_shown_on_request(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch, toy)
    for value, shown in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("LENS_DEBUG", value)
        assert main(arguments) == 2
        stderr = capsys.readouterr().err
        assert ("Traceback (most recent call last)" in stderr) == shown
        assert stderr.strip().splitlines()[-1].startswith("lens: ")
