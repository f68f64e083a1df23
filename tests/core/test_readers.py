"""The readers of a stranger's files: what they drop, what they refuse, and that no small file costs much."""

from __future__ import annotations

import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lens_core.catalog import Catalog
from lens_core.io import readers
from lens_core.recipe import parse_use, read_recipe
from lens_core.types import ConfigError, LensError

NESTED = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
"""9^8 values in 300 bytes."""


@pytest.mark.parametrize(
    "text", ["", "text\u00a0art", "1\u202f000", "全角\u3000空白", "co\u00adop", "می\u200cخواهم", "👩\u200d🚀"]
)
def test_a_line_may_hold_every_space_and_joiner(text: str) -> None:
    assert readers.is_line(text)


@pytest.mark.parametrize("value", ["a\nb", "a\tb", "\x1b[31m", "a\x85b", "a\u2028b", "a\u2029b", "\udcff", None, b"a"])
def test_a_line_holds_no_line_end_control_character_or_half_character(value: Any) -> None:
    assert not readers.is_line(value)


def refusal(call: Any, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000
    return text


# ---- values in messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    ["a", "it's\n", b"b", 1, -2.5, True, None, [], [1, "b"], (), (1,), (1, 2), {}, {"a": [1, {"b": None}]}, {3}],
)
def test_a_short_value_is_shown_as_python_writes_it(value: object) -> None:
    assert readers.shown(value) == repr(value)


def test_a_value_of_aliases_is_shown_in_a_moment_and_in_one_line() -> None:
    value: Any = ["x"] * 9
    for _ in range(60):
        value = [value] * 9
    circle: list[Any] = []
    circle.append(circle)
    values = [value, {"a": value}, circle, "x" * 10**7, b"x" * 10**7, 1 << 10**7, {"k" * 10**6: 1}, [*range(10**5)]]
    begun = time.perf_counter()
    for each in values:
        text = readers.shown(each)
        assert len(text) <= readers.SHOWN and "\n" not in text
    assert time.perf_counter() - begun < 1


def test_what_has_a_repr_of_its_own_is_named_and_not_asked() -> None:
    class Slow:
        def __repr__(self) -> str:
            raise AssertionError

    assert readers.shown([Slow()]) == "[<Slow>]"


# ---- text ---------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_dropped_and_other_encodings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbfb")
    assert readers.read_text(path) == "a\ufeffb"
    path.write_bytes("a".encode("utf-16"))
    assert "a.txt: is UTF-16" in refusal(lambda: readers.read_text(path), ConfigError)
    path.write_bytes(b"caf\xe9")
    assert "a.txt: is not UTF-8 (byte 3)" in refusal(lambda: readers.read_text(path), ConfigError)


def test_lines_end_at_line_feeds_alone() -> None:
    assert readers.lines("a\u2028b\x0b\x0c\x1c\x85\u2029c\r\nd\re\n\nf") == [
        "a\u2028b\x0b\x0c\x1c\x85\u2029c",
        "d\re",
        "",
        "f",
    ]
    assert readers.lines("a\n") == readers.lines("a\r\n") == readers.lines("a") == ["a"]
    assert readers.lines("") == []


def test_no_module_splits_text_at_other_than_line_feeds() -> None:
    root = Path(readers.__file__).parents[1]
    files = [*(root / "lens_core").glob("*.py"), *(root / "plugins").rglob("*.py")]
    offences = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in files
        for line in path.read_text(encoding="utf-8").split("\n")
        if re.search(r"\.splitlines\(", line) and "/proc/cpuinfo" not in line and "read_bytes()" not in line
    ]
    assert offences == []


def test_a_file_beyond_its_bound_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(2**33)
    tracemalloc.start()
    text = refusal(lambda: readers.read_text(path, 2**20), ConfigError)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    assert "larger than 1 MiB" in text


@pytest.mark.parametrize("name", ["none", "a\0b", "x" * 300, "a.txt/b"])
def test_a_path_that_leads_nowhere_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    assert "check the path" in refusal(lambda: readers.read_text(tmp_path / name), ConfigError)


# ---- JSON ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 65 + "]" * 65, "deeper than 64"),
        ("[" * 500 + "]" * 500, "deeper than 64"),
        ("[" * 100_000, "deeper than 64"),
        ('{"a":' * 100_000, "deeper than 64"),
        ("9" * 65, "65 digits"),
        ("-" + "9" * 5000, "digits"),
        ("1e999", "beyond"),
        ("[NaN]", "NaN"),
        ("-Infinity", "Infinity"),
        ('{"a": 1, "a": 2}', "twice"),
        ('["\\ud800"]', "half a character"),
        ('{"\\udc00": 1}', "half a character"),
        ("", "Expecting"),
    ],
)
def test_json_that_would_hurt_is_refused(text: str, words: str) -> None:
    assert words in refusal(lambda: readers.parse_json(text))


def test_json_within_the_bounds_is_what_it_says() -> None:
    deep = "[" * 64 + "]" * 64
    assert str(readers.parse_json(deep)) == deep
    assert readers.parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    assert readers.parse_json(b'\xef\xbb\xbf{"[": "[[["}') == {"[": "[[["}
    assert readers.parse_json("9" * 64) == int("9" * 64)
    assert readers.parse_json("[-Infinity]", finite=False) == [float("-inf")]
    assert readers.parse_json('{"a": 1, "a": 2}', allow_duplicate_keys=True) == {"a": 2}


def test_a_log_with_a_line_without_end_costs_no_memory_for_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with path.open("wb") as file:
        file.write(b'{"step": 1}\n"')
        file.seek(2**27)
        file.write(b'"\n{"step": 2}\n')
    tracemalloc.start()
    assert [line["step"] for line in readers.json_lines(path)] == [1, 2]
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


# ---- YAML ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (NESTED, "100000 values"),
        ("a: &a {x: 1, y: 2}\nb: {<<: [" + ", ".join(["*a"] * 40_000) + "]}\n", "values"),
        ("[" * 65 + "]" * 65, "deeper than 64"),
        ("[" * 20_000, "deeper than 64"),
        ("{a: " * 50_000, "deeper than 64"),
        ("a: 1" + ":1" * 100_000, "digits"),
        ("a: 0x" + "f" * 100_000, "digits"),
        ("a: " + "1" * 5000, "digits"),
        ("a: !!int ''", "tag"),
        ("a: !!bool x", "tag"),
        ("a: !!timestamp x", "tag"),
        ("a: 2026-99-99", "month"),
        ("a: !!python/object/apply:os.system [ls]", "constructor"),
        ('a: "\\ud800"', "half a character"),
        ("a: 1\n" * 60_000, "characters"),
        ("? [a]\n: b", "unhashable"),
        ("---\na\n---\nb", "single document"),
        ("\x00", "special characters"),
    ],
)
def test_yaml_that_would_hurt_is_refused_in_a_moment(text: str, words: str) -> None:
    begun = time.process_time()
    assert words in refusal(lambda: readers.parse_yaml(text))
    assert time.process_time() - begun < 5


def test_yaml_within_the_bounds_is_what_it_says() -> None:
    assert readers.parse_yaml("\ufeffa: &a [1, 2]\nb: *a\n") == ({"a": [1, 2], "b": [1, 2]}, [])
    assert readers.parse_yaml("") == (None, [])
    assert readers.parse_yaml("a: 1\na: 2\n")[1] == ["$.a: stands in lines 1 and 2; keep one"]
    assert "within what it stands for" in readers.parse_yaml("a: &a [*a]")[1][0]


@pytest.mark.parametrize(
    "place", ["lr: *h", "betas: *h", "lr_multipliers: *h", "threads: *h", "precision: *h", "lora: *h"]
)
@pytest.mark.parametrize("levels", [2, 4, 8])
def test_aliases_in_a_recipe_never_cost_more_than_a_moment(
    place: str, levels: int, tmp_path: Path, catalog: Catalog
) -> None:
    nested = "".join(NESTED.splitlines(keepends=True)[: levels - 1]) or NESTED
    last = "abcdefgh"[max(levels - 2, 0)]
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{nested}method: fit\ntrain: {{steps: 1, {place.replace('*h', f'*{last}')}}}\n")
    begun = time.process_time()
    tracemalloc.start()
    with pytest.raises(ConfigError) as caught:
        read_recipe(path, catalog)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - begun < 5 and peak < 2**27
    assert all(len(problem) < 600 for problem in caught.value.problems)


def test_a_component_in_one_line_is_bounded_too() -> None:
    for text in (
        "{use: a, x: &a [*a]}",
        "{use: a, use: b}",
        "[" * 1000,
        "!!int ''",
        "x" * 300_000,
        "{use: 0x" + "f" * 999,
    ):
        refusal(lambda text=text: parse_use(text), LensError)  # type: ignore[misc]  # mypy reads no default of a lambda
