"""What `lens components` and `lens show` say is what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import attrs
import pytest
from attrs import field, frozen
from lens_tools import reference, reference_commands, reference_pages

from lens_core.catalog import Catalog
from lens_core.cli.main import main
from lens_core.protocols import KINDS
from lens_core.recipe import ComponentSpec, Recipe
from lens_core.types import ConfigError
from lens_core.validators import SEED, each, integer, one_of, optional, real, text, within

PAGES = Path(__file__).parents[2] / "docs" / "components"


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.installed()


def test_the_list_is_that_of_the_catalog(catalog: Catalog) -> None:
    listed = [(row.kind, row.name) for row in reference.list_components(catalog)]
    assert listed == [(kind, entry.name) for kind in KINDS for entry in catalog.entries(kind)]


def test_summaries_read_from_source_are_the_docstrings_of_the_classes(catalog: Catalog) -> None:
    for row in reference.list_components(catalog):
        assert row.text == reference.first_sentence(catalog.find(row.kind, row.name).cls.__doc__), row.name
        assert row.text, f"{row.name} has no docstring"
        assert len(row.text) <= 82, f"{row.name}: `lens components` would cut its line"


def test_listing_components_imports_no_torch() -> None:
    code = "import sys; from lens_core.cli.main import main; main(['components']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_every_option_of_every_component_is_described(catalog: Catalog) -> None:
    for row in reference.list_components(catalog):
        cls = catalog.find(row.kind, row.name).cls
        (description,) = reference.describe(catalog, row.name, row.kind)
        assert [o.name for o in description.options] == [a.name for a in attrs.fields(cls.Config)]
        for option, a in zip(description.options, attrs.fields(cls.Config), strict=True):
            assert (option.default is None) == (a.default is attrs.NOTHING), (row.name, option.name)


@pytest.mark.parametrize("kind", reference.USED_IN)
def test_where_a_kind_is_named_in_a_recipe_is_a_place_that_recipes_have(kind: str) -> None:
    for path in re.findall(r"([\w.]+) of a recipe", reference.USED_IN[kind]):
        section: Any = Recipe
        for name in path.split("."):
            hint = typing.get_type_hints(section)[name]
            # An optional section: the type beside None. A component's own options are of its Config.
            section = next(t for t in (*typing.get_args(hint), hint) if t is not type(None))
            if section is ComponentSpec:
                break


class Base:
    @frozen
    class Config:
        size: int = 3  # px
        first: str = "a"  # replaced below


class Sample(Base):
    @frozen
    class Config(Base.Config):
        # What comes first,
        # on two lines.
        first: str = field(default="b", validator=one_of("b", "c"))
        ratio: float = field(default=0.5, validator=within(0, 1))  # share of the whole
        seed: int = field(default=0, validator=SEED)
        several: tuple[int, ...] = field(default=(1, 2), validator=each(integer(at_least=1), at_least=1))  # counts
        word: str | None = field(default=None, validator=optional(text()))
        above: float = field(default=1.0, validator=real(above=0))


def test_options_have_the_comments_types_ranges_and_defaults_of_the_source() -> None:
    options = {o.name: (o.type, o.default, o.range, o.comment) for o in reference.option_docs(Sample.Config)}
    assert options == {
        "size": ("int", "3", "", "px"),
        "first": ("text", "b", "b or c", "What comes first, on two lines."),
        "ratio": ("number", "0.5", "0 to 1", "share of the whole"),
        "seed": ("int", "0", "0 to 2^63 - 1", ""),
        "several": ("list of int", "[1, 2]", "at least 1 item; each at least 1", "counts"),
        "word": ("text or null", "null", "text that is not blank", ""),
        "above": ("number", "1.0", "above 0", ""),
    }


def test_a_name_of_several_kinds_describes_each_and_a_kind_chooses(catalog: Catalog) -> None:
    kinds = [d.kind for d in reference.describe(catalog, "shapes")]
    assert {"reward", "dataset", "benchmark"} <= set(kinds)
    assert [d.kind for d in reference.describe(catalog, "shapes", "reward")] == ["reward"]


@pytest.mark.parametrize(
    ("kind", "name", "example"),
    [
        ("reward", "lens_shapes:shapes", "rewards: [{use: shapes, partial: false}]"),
        ("benchmark", "lens_shapes:novel", "benchmarks: [{use: novel, "),
        ("curator", "lens_curate:captions", "filters: [captions]"),
        ("generator", "lens_bench:folder", "{use: folder, folder: …, "),
        ("sampler", "lens_flow:heun", "sampler: "),
    ],
)
def test_the_example_of_a_component_has_the_key_that_recipes_read(
    catalog: Catalog, kind: str, name: str, example: str
) -> None:
    assert reference.describe(catalog, name, kind)[0].example.startswith(example)


def test_the_help_of_components_names_every_kind() -> None:
    for command in (reference_commands.components, reference_commands.new_plugin):
        words = re.findall(r"\w+", command.__doc__ or "")
        assert [kind for kind in KINDS if kind not in words] == []


def test_unknown_names_and_kinds_are_one_line(catalog: Catalog, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"no component is called 'eulr'. Did you mean 'euler'\?"):
        reference.describe(catalog, "eulr")
    assert main(["components", "sampller"]) == 2
    assert "Did you mean 'sampler'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        (
            "class Mine:\n    kind = 'reward'\n    def score(self, images, prompts): return []\n",
            "Mine has no nested Config",
        ),
    ],
)
def test_a_plugin_that_is_disabled_is_named_where_its_components_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str, error: str
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    monkeypatch.setenv("LENS_PLUGIN_FILES", "")
    assert main(["--plugin", str(path), "show", "mine", "--kind", "reward"]) == 2
    shown = capsys.readouterr().err
    assert "no reward component is called 'mine'" in shown and "Disabled: broken (" in shown and error in shown
    assert main(["--plugin", str(path), "components", "reward"]) == 0
    printed = capsys.readouterr()
    assert "Disabled: broken (" in printed.err and error in printed.err and "Disabled" not in printed.out


def test_the_pages_are_those_that_the_command_writes(catalog: Catalog) -> None:
    pages = reference_pages.pages(catalog)
    assert sorted(p.stem for p in PAGES.glob("*.md")) == sorted(pages)
    for kind, page in pages.items():
        same = (PAGES / f"{kind}.md").read_text(encoding="utf-8") == page
        assert same, f"docs/components/{kind}.md is stale; run lens components --markdown docs/components"
