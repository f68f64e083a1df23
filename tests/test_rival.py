"""The law: installing a plugin changes nothing. A rival of every kind is installed, and no figure moves."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from torch import nn

from lens_core import hookimpl
from lens_core.catalog import Catalog
from lens_core.cli.main import main
from lens_core.protocols import KINDS

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))


class Other(nn.Module):
    """A component of any kind, which has all that its protocol asks for, and is not the published one of anything."""

    channels, downscale, layers, width = 3, 2, 1, 5

    @frozen
    class Config:
        size: int = 7

    def __init__(self, config: Any = None, pipeline: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(7))

    @staticmethod
    def refuses(dtype: torch.dtype) -> str | None:
        return f"acme's rival runs in nothing, and so not in {dtype}"

    @classmethod
    def diagnose(cls) -> dict[str, str]:
        return {"kernels": "none"}


def _unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("nobody has named it")


def _offering(cls: type[Any]) -> Any:
    def offer() -> dict[str, type[Any]]:
        return {"rival": cls}

    return hookimpl(offer)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin with a component of every kind, as if pip had installed it; in the alphabet it comes before ours."""
    module: Any = types.ModuleType("a_rival")
    for kind, (hook, protocol) in KINDS.items():
        wanted = [n for n, v in vars(protocol).items() if callable(v) and not n.startswith("_")]
        setattr(module, hook, _offering(type(f"Other{kind}", (Other,), dict.fromkeys(wanted, _unused))))
    monkeypatch.setitem(sys.modules, "a_rival", module)
    known = importlib.metadata.entry_points
    mine = importlib.metadata.EntryPoint("a_rival", "a_rival", "lens.v1")

    def entry_points(**select: Any) -> Any:
        return (*known(**select), mine) if select.get("group") == "lens.v1" else known(**select)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    catalog = Catalog.installed()
    assert all(any(e.name == "a_rival:rival" for e in catalog.entries(kind)) for kind in KINDS)
    assert not [p.error for p in catalog.plugins if p.error]


COMMANDS = [["doctor", "--table"], ["rl", "estimate", str(ROOT / "examples" / "recipes" / "rl_nft.yaml")]]
COMMANDS += [["train", str(recipe), "--dry-run"] for recipe in RECIPES]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(Path(word).name for word in c))
def test_installing_a_rival_of_every_kind_changes_no_figure(
    command: list[str], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 0
    before = capsys.readouterr().out
    request.getfixturevalue("installed")
    assert main(command) == 0
    assert capsys.readouterr().out == before


def test_the_doctor_speaks_of_the_published_parts(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    summaries = []
    for _ in range(2):
        assert main(["doctor", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        summaries.append({k: report[k] for k in ("dtypes", "attention", "published model", "text encoder")})
        request.getfixturevalue("installed")
    assert summaries[0] == summaries[1]
