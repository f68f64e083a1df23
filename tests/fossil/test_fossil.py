"""A plugin written for `lens.v1` loads unchanged, for as long as v1 is supported."""

from __future__ import annotations

import hashlib
from pathlib import Path

import lens_fossil
import numpy as np
import pytest

from lens_core import hookspecs
from lens_core.catalog import Catalog
from lens_core.checkpoints.manifest import read_manifest, resolve_uri
from lens_core.hookspecs import ENTRY_POINTS
from lens_core.protocols import KINDS
from lens_core.recipe import ComponentSpec, build
from lens_core.types import ConfigError, Record

FROZEN = "b33d8feed4081815"


def test_the_fossil_has_not_been_edited() -> None:
    assert hashlib.sha256(Path(lens_fossil.__file__).read_bytes()).hexdigest()[:16] == FROZEN
    assert ENTRY_POINTS == "lens.v1", "a new API version gets a fossil of its own; this one may then rest"


@pytest.mark.parametrize("kind", KINDS)
def test_the_fossils_components_are_found_and_built(kind: str) -> None:
    catalog = Catalog.of(lens_fossil)
    name, cls, config = build(catalog, kind, ComponentSpec("fossil", {"size": 2, "names": ["a"], "extra": {"x": 1}}))
    assert name == "lens_fossil:fossil"
    assert cls(config).config == lens_fossil.Settings(2, ("a",), {"x": 1.0})
    assert catalog.plugins[0].error is None


def test_the_fossils_resolvers_answer(tmp_path: Path) -> None:
    catalog = Catalog.of(lens_fossil)
    (tmp_path / "fossil").mkdir()
    assert resolve_uri("fossil:", catalog) == Path("/fossils")
    assert read_manifest(tmp_path / "fossil", catalog)["components"] == {}


def test_the_fossil_names_every_hook() -> None:
    hooks = {name for name, hook in vars(hookspecs).items() if hasattr(hook, "lens_spec")}
    assert hooks == {name for name in vars(lens_fossil) if name.startswith("lens_") and name in vars(hookspecs)}


def test_the_fossils_command_is_offered() -> None:
    catalog = Catalog.of(lens_fossil)
    assert catalog.commands() == {"fossil": "lens_fossil:dig"}
    assert all(not problems for problems in catalog.check().values())


def test_the_fossil_refuses_what_its_config_forbids() -> None:
    for size in (0, 101):
        with pytest.raises(ConfigError, match="size"):
            build(Catalog.of(lens_fossil), "vae", ComponentSpec("fossil", {"size": size}))


def test_the_words_of_v1_still_mean_what_they_did() -> None:
    settings = lens_fossil.Settings()
    record = Record(b"", np.zeros((1, 1, 3), np.uint8), brief="abc")
    assert lens_fossil.FossilCurator(settings).score([record]) == {"age": [3.0]}
    assert len(next(lens_fossil.FossilDataset(settings).batches(0, 1))) == 1
    assert lens_fossil.FossilReward(settings).score(None, [lens_fossil.Prompt("a")])[0].value == 1.0
