"""Plugins of one file: `lens --plugin ./mine.py …`, and modules that Catalog.installed(extra=…) takes."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from lens_core import plugin_files
from lens_core.catalog import Catalog
from lens_core.cli.main import main
from lens_core.types import ConfigError, LensError

REWARD = '''
from attrs import frozen
from lens_core import Score

class HalfRed:
    """Share of red in a picture. The rest does not count."""
    kind = "reward"

    @frozen
    class Config:
        power: float = 1.0  # of the share

    def __init__(self, config):
        self.config = config

    def score(self, images, prompts):
        return [Score("ok", float(p[0].float().mean() / 255)) for p in images]
'''


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(plugin_files.VARIABLE, "")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def written(folder: Path, text: str, name: str = "my_reward.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_class_with_a_kind_is_offered_by_its_name_in_snake_case(tmp_path: Path) -> None:
    plugin_files.add_to_environment([str(written(tmp_path, REWARD))])
    for _ in range(2):  # each command asks for a catalog of its own
        entry = Catalog.installed().find("reward", "half_red")
        assert entry.name == "my_reward:half_red"


def test_the_command_line_lists_and_describes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plugin", str(written(tmp_path, REWARD)), "show", "half_red"]) == 0
    shown = capsys.readouterr().out
    assert "power: number = 1.0" in shown and "of the share" in shown
    assert main([f"--plugin={tmp_path / 'my_reward.py'}", "components", "reward"]) == 0
    assert "my_reward:half_red" in capsys.readouterr().out


def test_hooks_of_a_file_are_asked_as_those_of_a_package(tmp_path: Path) -> None:
    hook = '\n@hookimpl\ndef lens_rewards():\n    return {"red": HalfRed}\n'
    text = "from lens_core import hookimpl\n" + REWARD.replace('    kind = "reward"\n', "") + hook
    plugin_files.add_to_environment([str(written(tmp_path, text, "my_hooks.py"))])
    assert Catalog.installed().find("reward", "red").name == "my_hooks:red"


def test_a_file_that_fails_is_disabled_and_its_error_is_quoted(tmp_path: Path) -> None:
    plugin_files.add_to_environment([str(written(tmp_path, "1 / 0\n", "my_fault.py"))])
    catalog = Catalog.installed()
    assert catalog.find("vae", "flux2").short == "flux2"
    with pytest.raises(ConfigError.__mro__[1], match=r"my_fault \(ZeroDivisionError"):
        catalog.find("reward", "half_red")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (REWARD.replace('"reward"', '"rewrd"'), "there is no kind 'rewrd'. Did you mean 'reward'?"),
        (REWARD + "\nclass Other(HalfRed):\n    kind = 'reward'\n    name = 'half_red'\n", "two rewards are called"),
        (REWARD + "\ndef lens_rewards():\n    return {}\n", "keep one of both"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    plugin_files.add_to_environment([str(written(tmp_path, text, "my_wrong.py"))])
    for _ in range(2):  # each command asks for a catalog of its own
        (error,) = [p.error for p in Catalog.installed().plugins if p.name == "my_wrong"]
        assert error is not None and message in error and "\n" not in error


def test_a_file_that_offers_nothing_is_imported_by_others_and_listed_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    helper = written(tmp_path, "def half(value):\n    return value / 2\n", "my_helper.py")
    mine = written(tmp_path, "from my_helper import half\n" + REWARD)
    for _ in range(2):  # each command asks for a catalog of its own
        assert main(["--plugin", str(helper), "--plugin", str(mine), "plugins", "--check"]) == 0
        stdout = capsys.readouterr().out
        assert "offers nothing; give a class of its own a line such as kind = 'reward'" in stdout
    catalog = Catalog.installed()
    assert catalog.find("reward", "half_red").name == "my_reward:half_red"
    with pytest.raises(LensError, match=r"no reward is called 'x'\..* my_helper offers nothing; give a class"):
        catalog.find("reward", "x")


@pytest.mark.parametrize("words", [["--plugin", "nowhere.py", "plugins"], ["--plugin", ".", "plugins"], ["--plugin"]])
def test_a_file_that_is_not_there_is_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("lens: --plugin")
    assert not os.environ[plugin_files.VARIABLE]


def test_a_file_may_not_hide_a_module(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a module called 'json' is in use already; rename the file"):
        plugin_files.load(written(tmp_path, REWARD, "json.py"))


def test_a_module_with_classes_is_a_plugin_of_a_script() -> None:
    module = types.ModuleType("my_script")
    exec(compile(REWARD, "my_script", "exec"), module.__dict__)  # as if it were the running script
    sys.modules["my_script"] = module
    assert Catalog.installed(extra=[module]).find("reward", "half_red").name == "my_script:half_red"


@pytest.mark.parametrize(
    ("name", "snake"), [("HashedWords", "hashed_words"), ("CLIPScore", "clip_score"), ("VAE2", "vae2"), ("A", "a")]
)
def test_snake_case(name: str, snake: str) -> None:
    assert plugin_files.snake_case(name) == snake
