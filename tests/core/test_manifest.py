"""The manifest: what a killed run has finished is kept, what it has not is generated again, and nothing is mixed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import asdict

from lens_core.evaluation.manifest import Entry, Manifest, parse
from lens_core.types import ConfigError

PROMPTS = {"000": "a dog", "001": "a cat"}


def filled(folder: Path, **about: Any) -> Manifest:
    manifest = Manifest(folder, "m", "1", **about)
    manifest.add_picture(("000", 0), "a dog", b"zero", seconds=1.5, seed=7, sent_prompt="a photo of a dog")
    manifest.add_outcome(("000", 1), "a dog", "refused", "moderation_blocked", seconds=0.5)
    manifest.add_outcome(("001", 0), "a cat", "failed", "timeout", seconds=60.0)
    return manifest


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    manifest = filled(tmp_path)
    again = Manifest(tmp_path, "m", "1")
    assert again.entries == manifest.entries and again.seconds == 62
    assert again.entries["000", 0] == Entry(
        "000", 0, "a dog", "a photo of a dog", 7, "m", "1", "ok", 1.5, "images/000_0.png",
        hashlib.sha256(b"zero").hexdigest(),
    )  # fmt: skip
    assert (tmp_path / "images" / "000_0.png").read_bytes() == b"zero"
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert rows[1] | {"status": "refused", "reason": "moderation_blocked", "file": "", "sha256": ""} == rows[1]


def test_only_what_is_missing_or_failed_is_generated(tmp_path: Path) -> None:
    assert Manifest(tmp_path, "m").missing(PROMPTS, 2) == [("000", 0), ("000", 1), ("001", 0), ("001", 1)]
    filled(tmp_path)
    again = Manifest(tmp_path, "m", "1")
    assert again.missing(PROMPTS, 2) == [("001", 0), ("001", 1)], "a refusal is an outcome"
    again.add_picture(("001", 0), "a cat", b"one", seconds=1)
    assert Manifest(tmp_path, "m", "1").missing(PROMPTS, 2) == [("001", 1)]
    assert Manifest(tmp_path, "m", "1").missing(PROMPTS, 1) == []


@pytest.mark.parametrize("cut", [1, 5, 100])
def test_a_torn_last_line_is_ignored_and_goes_before_the_next(cut: int, tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / "manifest.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = Manifest(tmp_path, "m", "1")
    assert ("001", 0) not in again.entries and len(again.entries) == 2
    assert path.read_bytes() == whole[:-cut], "reading changes nothing"
    again.add_picture(("001", 1), "a cat", b"one", seconds=1)
    assert path.read_bytes().startswith(b"".join(whole.splitlines(True)[:2]))
    assert Manifest(tmp_path, "m", "1").entries == again.entries and len(again.entries) == 3


def test_a_file_that_is_one_torn_line_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"{" + b" " * 10_000)
    manifest = Manifest(tmp_path, "m")
    assert manifest.entries == {}
    manifest.add_picture(("000", 0), "a dog", b"zero", seconds=1)
    assert len(path.read_bytes().splitlines()) == 1 and Manifest(tmp_path, "m").entries == manifest.entries


KILLED = """
import sys
from pathlib import Path
from lens_core.evaluation.manifest import Manifest
manifest = Manifest(Path(sys.argv[1]), "m")
for key in manifest.missing({str(i): "a dog" for i in range(4000)}, 1):
    manifest.add_picture(key, "a dog", b"x" * 1000, seconds=1)
    print(key[0], flush=True)
"""


def test_a_run_that_is_killed_loses_no_picture_that_it_reported(tmp_path: Path) -> None:
    kept: set[str] = set()
    for _ in range(2):
        run = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert run.stdout is not None
        reported = [run.stdout.readline().strip() for _ in range(15)]
        run.send_signal(signal.SIGKILL)
        reported += run.stdout.read().split("\n")[:-1]
        run.wait()
        run.stdout.close()
        assert kept.isdisjoint(reported), "none is generated twice"
        manifest = Manifest(tmp_path, "m")
        manifest.check_pictures()
        kept = {prompt_id for prompt_id, _ in manifest.entries}
        assert kept >= set(reported)
    assert 30 <= len(kept) < 4000


def test_processes_write_files_of_their_own_and_read_them_all(tmp_path: Path) -> None:
    filled(tmp_path)
    other = Manifest(tmp_path, "m", "1", process=1)
    other.add_picture(("001", 0), "a cat", b"one", seconds=1)
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["manifest-1.jsonl", "manifest.jsonl"]
    for process in (0, 1, 2):
        assert Manifest(tmp_path, "m", "1", process).missing(PROMPTS, 2) == [("001", 1)]


# ---- what is wrong ------------------------------------------------------------------------------------------------


def test_a_missing_and_a_changed_picture_are_one_line_each(tmp_path: Path) -> None:
    manifest = filled(tmp_path)
    manifest.add_picture(("001", 1), "a cat", b"one", seconds=1)
    manifest.check_pictures()
    (tmp_path / "images" / "000_0.png").unlink()
    (tmp_path / "images" / "001_1.png").write_bytes(b"two")
    with pytest.raises(ConfigError) as error:
        Manifest(tmp_path, "m", "1").check_pictures()
    first, second = error.value.problems
    assert "000_0.png: is missing" in first and "001_1.png: is not the picture that was generated" in second
    with pytest.raises(ConfigError) as error:
        manifest.check_pictures([("001", 1), ("000", 1)])
    assert len(error.value.problems) == 1


def test_pictures_of_another_system_revision_or_prompt_are_not_mixed_in(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(ConfigError, match="system: the pictures are of 'm', not of 'n'; choose another folder"):
        Manifest(tmp_path, "n", "1")
    with pytest.raises(ConfigError, match="revision: the pictures are of '1', not of '2'"):
        Manifest(tmp_path, "m", "2")
    with pytest.raises(ConfigError, match="holds pictures of other prompts for 001"):
        Manifest(tmp_path, "m", "1").missing(PROMPTS | {"001": "a bird"}, 2)


def test_a_picture_is_written_once(tmp_path: Path) -> None:
    manifest = filled(tmp_path)
    for key in (("000", 0), ("000", 1)):
        with pytest.raises(ConfigError, match="is there already"):
            manifest.add_picture(key, "a dog", b"other", seconds=1)
    assert (tmp_path / "images" / "000_0.png").read_bytes() == b"zero"


def test_two_lines_that_disagree_about_a_picture_are_refused(tmp_path: Path) -> None:
    entry = asdict(filled(tmp_path).entries["000", 0])
    (tmp_path / "manifest-1.jsonl").write_text(json.dumps(entry | {"sha256": "0" * 64}) + "\n")
    with pytest.raises(ConfigError, match="picture 0 has another outcome in an earlier line"):
        Manifest(tmp_path, "m", "1")
    (tmp_path / "manifest-1.jsonl").write_text(json.dumps(entry) + "\n")
    assert len(Manifest(tmp_path, "m", "1").entries) == 3, "the same line twice says the same"


@pytest.mark.parametrize("prompt_id", ["", "../x", "a/b", ".hidden", "a b", "a" * 101, "é", "a\n"])
def test_a_prompt_id_that_is_no_file_name_is_refused_and_nothing_is_written(prompt_id: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompt_id: must be 1 to 100 letters"):
        Manifest(tmp_path, "m").add_picture((prompt_id, 0), "a dog", b"zero", seconds=1)
    assert list(tmp_path.iterdir()) == []


SOUND = asdict(
    Entry("0", 0, "a dog", "a dog", None, "m", "", "ok", 1.0, "images/0_0.png", hashlib.sha256(b"").hexdigest())
)
WRONG = [
    ({"file": "/etc/passwd"}, "file: must be images/0_0.png"),
    ({"file": "images/../0_0.png"}, "file: must be images/0_0.png"),
    ({"file": "images/0_1.png"}, "file: must be images/0_0.png"),
    ({"sha256": "A" * 64}, "sha256: must be 64 hexadecimal digits"),
    ({"status": "done"}, "status: 'done' is unknown."),
    ({"status": "refused"}, "file: a picture that is refused has no file"),
    ({"seed": -1}, "seed: must be a whole number of at least 0, not -1"),
    ({"seconds": -1}, "seconds: must be at least 0"),
    ({"seconds": None}, "seconds: must be a finite number"),
    ({"index": True}, "index: must be a whole number"),
    ({"prompt": None}, "prompt: must be a text"),
    ({"promt": "x"}, "promt: 'promt' is unknown. Did you mean 'prompt'?"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_a_wrong_line_is_one_line_with_its_number_and_its_field(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert asdict(parse(SOUND)) == SOUND
    path = tmp_path / "manifest.jsonl"
    path.write_text(json.dumps(SOUND) + "\n" + json.dumps(SOUND | change) + "\n")
    with pytest.raises(ConfigError) as error:
        Manifest(tmp_path, "m")
    assert len(error.value.problems) == 1 and str(error.value).startswith(f"{path}, line 2: {message}")


def test_a_torn_line_in_the_middle_is_no_interruption(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"prompt_id": \n' + json.dumps(SOUND) + "\n")
    with pytest.raises(ConfigError, match="line 1: line: is not JSON"):
        Manifest(tmp_path, "m")
