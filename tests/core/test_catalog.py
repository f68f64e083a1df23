"""Which plugins are found, named and disabled, and the messages about it."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import attrs
import pytest
import toy

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.types import LensError


def plugin(name: str, **hooks: Any) -> types.ModuleType:
    """A plugin module made on the spot; each hook is given as what it returns."""
    module = types.ModuleType(name)
    for hook, answer in hooks.items():
        setattr(module, hook, hookimpl(lambda answer=answer: answer() if callable(answer) else answer))
    return module


def entry_points(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str, str]) -> None:
    """Let these (group, name, module) be what is installed."""
    installed = EntryPoints(EntryPoint(name=name, value=value, group=group) for group, name, value in points)
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **select: installed.select(**select) if select else installed
    )


def only(catalog: Catalog) -> str:
    (error,) = [p.error for p in catalog.plugins if p.error]
    assert error is not None and "\n" not in error
    return error


def test_a_component_answers_to_its_bare_and_its_qualified_name(catalog: Catalog) -> None:
    assert catalog.find("vae", "blocks").cls is catalog.find("vae", "toy:blocks").cls is toy.Blocks
    assert catalog.find("vae", "blocks").name == "toy:blocks"


def test_a_misspelt_name_gets_the_near_one(catalog: Catalog) -> None:
    with pytest.raises(LensError, match=r"^no vae is called 'block'\. Did you mean 'blocks'\?$"):
        catalog.find("vae", "block")
    with pytest.raises(LensError, match=r"no text encoder is called 'toy:lettres'. Did you mean 'toy:letters'"):
        catalog.find("text_encoder", "toy:lettres")


def test_an_unknown_kind_gets_the_near_one(catalog: Catalog) -> None:
    with pytest.raises(LensError, match=r"there is no kind 'vaes'. Did you mean 'vae'"):
        catalog.find("vaes", "blocks")


def test_a_plugin_that_is_not_installed_is_named(catalog: Catalog) -> None:
    with pytest.raises(LensError, match="'lens_acme' is not installed: pip install"):
        catalog.find("vae", "lens_acme:blocks")


def test_two_components_may_share_a_bare_name_only_if_it_is_written_in_full() -> None:
    catalog = Catalog.of(toy, plugin("other", lens_vaes={"blocks": toy.Blocks}))
    with pytest.raises(LensError, match="'blocks' is ambiguous: other:blocks, toy:blocks are vaes; write one in full"):
        catalog.find("vae", "blocks")
    assert catalog.find("vae", "other:blocks").plugin == "other"


def test_of_two_plugins_with_one_name_neither_is_used() -> None:
    catalog = Catalog.of(plugin("twin", lens_vaes={"a": toy.Blocks}), plugin("twin", lens_vaes={"b": toy.Blocks}), toy)
    assert [p.error is None for p in catalog.plugins] == [False, False, True]
    assert [e.name for e in catalog.entries("vae")] == ["toy:blocks"]
    with pytest.raises(LensError, match="two plugins are called 'twin'"):
        catalog.find("vae", "a")


def test_a_misspelt_hook_disables_its_plugin() -> None:
    catalog = Catalog.of(plugin("typo", lens_vea={}))
    assert "there is no hook 'lens_vea'. Did you mean 'lens_vaes'?" in only(catalog)


def test_a_hook_with_an_argument_too_many_disables_its_plugin() -> None:
    module = types.ModuleType("greedy")
    module.lens_vaes = hookimpl(lambda config: {})  # type: ignore[attr-defined]  # made on the spot
    assert "lens_vaes" in only(Catalog.of(module, toy))


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit("boom"), ImportError("boom")])
def test_a_hook_that_raises_disables_its_plugin_and_is_quoted(error: BaseException) -> None:
    def explode() -> None:
        raise error

    catalog = Catalog.of(plugin("bomb", lens_vaes=explode), toy)
    assert [e.name for e in catalog.entries("vae")] == ["toy:blocks"]
    assert f"in lens_vaes: {type(error).__name__}: boom" in only(catalog)
    with pytest.raises(LensError, match=r"Disabled: bomb .*boom"):
        catalog.find("vae", "bombed")


class Unfrozen(toy.Blocks):
    @attrs.mutable
    class Config:
        pass


class Unannounced(toy.Blocks):
    Config = dict  # type: ignore[assignment]  # what the test is about


class Half:
    Config = toy.Blocks.Config

    def encode(self) -> None: ...


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"x": Unfrozen}, "Unfrozen.Config is not frozen; decorate it with attrs.frozen"),
        ({"x": Unannounced}, "Unannounced.Config is not an attrs class"),
        ({"x": object}, "object has no nested Config"),
        ({"x": Half}, "Half lacks decode"),
        ({"x": 3}, "is 3, not a class"),
        ([toy.Blocks], "must return {short name: class}"),
        (None, "must return {short name: class}"),
    ],
)
def test_a_component_that_breaks_its_contract_disables_its_plugin(answer: Any, words: str) -> None:
    catalog = Catalog.of(plugin("bad", lens_vaes=lambda: answer, lens_samplers={"even": toy.Even}))
    assert catalog.entries("vae") == []
    assert words in only(catalog)
    assert catalog.entries("sampler") == [], "a plugin is used whole or not at all"


def test_a_plugin_that_fails_to_import_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, ("lens.v1", "lens_gone", "no_such_module_at_all"), ("lens.v1", "toy", "toy"))
    catalog = Catalog.installed()
    assert "ModuleNotFoundError: No module named 'no_such_module_at_all'" in only(catalog)
    assert catalog.find("vae", "blocks").name == "toy:blocks"


def test_a_plugin_of_another_api_version_is_reported_without_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, ("lens.v2", "lens_future", "antigravity"), ("lens.v1", "toy", "toy"))
    catalog = Catalog.installed()
    assert only(catalog) == "speaks lens.v2, this Lens speaks lens.v1; install a matching version"
    assert "antigravity" not in sys.modules
    with pytest.raises(LensError, match=r"Disabled: lens_future .*speaks lens.v2"):
        catalog.find("vae", "lens_future:new")


def test_lens_plugins_narrows_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, ("lens.v1", "lens_toy", "toy"), ("lens.v1", "lens_other", "no_such_module_at_all"))
    monkeypatch.setenv("LENS_PLUGINS", "toy")
    assert [(p.name, p.error) for p in Catalog.installed().plugins] == [("lens_toy", None)]


def test_a_resolver_that_raises_is_named() -> None:
    module = types.ModuleType("broken")

    def lens_fetch(uri: str) -> None:
        raise RuntimeError("boom")

    module.lens_fetch = hookimpl(lens_fetch)  # type: ignore[attr-defined]  # made on the spot
    with pytest.raises(LensError, match=r"lens_fetch.*RuntimeError: boom"):
        Catalog.of(module).first("lens_fetch", "x:")


def test_every_installed_plugin_keeps_its_contract() -> None:
    catalog = Catalog.installed()
    for kind in ("vae", "text_encoder", "backbone", "sampler", "method", "dataset", "benchmark", "reward"):
        catalog.entries(kind)
    assert {p.name: p.error for p in catalog.plugins if p.error} == {}
    assert catalog.version("lens_flux2") == f"lens-t2i=={importlib.metadata.version('lens-t2i')}"


def commanding(name: str, table: object) -> types.ModuleType:
    @hookimpl
    def lens_commands() -> object:
        return table

    module = types.ModuleType(name)
    module.lens_commands = lens_commands  # type: ignore[attr-defined]
    return module


def test_commands_are_named_and_not_imported() -> None:
    catalog = Catalog.of(
        commanding("one", {"data": "no_such_module.anywhere:app"}), commanding("two", {"judge": "a:b"})
    )
    assert catalog.commands(taken=("train",)) == {"data": "no_such_module.anywhere:app", "judge": "a:b"}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"train": "a:b"}, "'train' is the core's own"),
        ({"data": "rm -rf /"}, 'must be "module:attribute"'),
        ({"data": 3}, 'must be "module:attribute"'),
        (["data"], "in lens_commands"),
    ],
)
def test_a_command_that_cannot_be_disables_its_plugin(table: object, says: str) -> None:
    catalog = Catalog.of(commanding("bad", table), commanding("good", {"judge": "a:b"}))
    assert catalog.commands(taken=("train",)) == {"judge": "a:b"}
    assert says in (catalog.plugins[0].error or "") and catalog.plugins[1].error is None


def test_a_command_that_two_plugins_bring_is_nobodys() -> None:
    catalog = Catalog.of(*(commanding(name, {"data": "a:b"}) for name in ("one", "two")))
    assert catalog.commands() == {}
    assert all("two plugins bring the command 'data'" in (p.error or "") for p in catalog.plugins)
