"""Chat templates and tokenizers of strangers: rendered and read within limits of time and memory, or refused."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lens_gpt_oss import sandbox, template
from lens_gpt_oss.encoder import GptOssEncoder
from lens_gpt_oss.template import CHAT_TEMPLATE, HARMONY, Wrapper, conversation, open_tokenizer, render, train_tokenizer

from lens_core.types import CheckpointError, ConfigError, LensError

DAY = "2026-05-20"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""GPT-OSS's pattern."""
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def refusal(call: Callable[[], Any], kind: type[LensError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1000
    return text


# ---- templates ----------------------------------------------------------------------------------------------------

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LOOPS, "more than 2 s or 512 MiB"),
        ("{{ 'a' * 3000000000 }}", "MemoryError"),
        ("{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "MemoryError"),
        ("{{ 9 ** (9 ** 9) }}", "more than 2 s"),
        ("{{ 1/0 }}", "ZeroDivisionError"),
        ("{{ range(10**9)|list }}", "OverflowError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ raise_exception(7) }}", "7"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'x' %}", "loader"),
        ("{{ 'a' * 200000 }}", "200000 characters"),
        ("{{ strftime_now(7) }}", "TypeError"),
        ("{{ '\\ud800' }}", "Unicode"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "Error"),
        ("x" * 2**19, "524288 characters"),
        ("{{ [1,2]|sum(attribute='x') }}", "Error"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    ],
)  # fmt: skip
def test_a_template_that_hangs_grows_or_fails_is_one_line(text: str, words: str) -> None:
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert words in refusal(lambda: render(text, conversation("x"), DAY))
    assert time.process_time() - begun < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


@pytest.mark.parametrize("known", [CHAT_TEMPLATE, HARMONY])
def test_a_template_in_a_process_of_its_own_renders_what_it_does_here(known: str) -> None:
    assert sandbox.render(known, conversation("ä\u2028 x"), DAY) == render(known, conversation("ä\u2028 x"), DAY)
    assert "2026-05-20" in render(known, conversation("x"), DAY)


def test_only_the_templates_of_this_package_run_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = []
    monkeypatch.setattr(sandbox, "render", lambda text, *_: rendered.append(text) or "")
    for text in (CHAT_TEMPLATE, HARMONY, CHAT_TEMPLATE + " ", "{{ 1 }}"):
        render(text, conversation("x"), DAY)
    assert rendered == [CHAT_TEMPLATE + " ", "{{ 1 }}"]


# ---- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a red cat sits on a blue mat"] * 3, 400).save_pretrained(folder)
    (folder / "sound.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return folder


def changed(saved: Path, **sections: Any) -> Path:
    data = json.loads((saved / "sound.json").read_text(encoding="utf-8"))
    (saved / "tokenizer.json").write_text(json.dumps(data | sections), encoding="utf-8")
    return saved


def split(pattern: str) -> dict[str, Any]:
    whole = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [whole, byte]}


GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    "sections",
    [
        {"normalizer": GROW},
        {"normalizer": {"type": "Sequence", "normalizers": [GROW] * 4}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [GROW]}]}},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 9}},
        {"normalizer": {"type": "ByteLevel"}},
        {"normalizer": [1]},
        {"normalizer": {"type": "Sequence", "normalizers": 7}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 2}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}},
        {"pre_tokenizer": split("(a+)+$")},
        {"pre_tokenizer": split("(?:a|a)*b")},
        {"pre_tokenizer": split("(a*)b")},
        {"pre_tokenizer": split("a*a*a*b")},
        {"pre_tokenizer": split(r"(a)\1")},
        {"pre_tokenizer": split("a{1,9999}b")},
        {"pre_tokenizer": split("x" * 3000)},
        {"pre_tokenizer": split("[a")},
        {"model": {"type": "None"}},
        {"added_tokens": 7},
    ],
)
def test_a_tokenizer_that_multiplies_a_text_or_takes_long_is_refused(sections: dict[str, Any], saved: Path) -> None:
    assert "holds no tokenizer that can be read" in refusal(lambda: open_tokenizer(changed(saved, **sections)))


@pytest.mark.parametrize("pattern", [O200K, CL100K, GPT2])
def test_the_patterns_of_published_tokenizers_are_read(pattern: str, saved: Path) -> None:
    tokenizer = open_tokenizer(changed(saved, pre_tokenizer=split(pattern), normalizer={"type": "NFC"}))
    text = "It's 12345 RED Cats,\n\n  naïve — 猫 !!!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_a_panic_of_the_tokenizers_library_is_one_line(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class PanicException(BaseException):
        pass

    def panic() -> None:
        raise PanicException("Onig: retry-limit-in-match over")

    assert "retry-limit" in refusal(lambda: template.guarded(panic))
    with pytest.raises(KeyboardInterrupt):
        template.guarded(lambda: (_ for _ in ()).throw(KeyboardInterrupt))


@pytest.mark.parametrize("change", [{"model_max_length": "x"}, {"model_max_length": []}, {"padding_side": "up"}])
def test_a_setting_that_makes_a_tokenizer_fail_is_one_line(change: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    for path in changed(saved).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | change), encoding="utf-8")
    assert "tokenizer" in refusal(lambda: Wrapper(open_tokenizer(tmp_path), DAY))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizers_file_beyond_its_bound_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    for path in changed(saved).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / name).open("r+b") as file:
        file.truncate(2**27)
    assert "larger than" in refusal(lambda: open_tokenizer(tmp_path))


def test_a_long_prompt_costs_no_more_than_what_can_be_kept_of_it(saved: Path) -> None:
    wrapper = Wrapper(open_tokenizer(changed(saved)), DAY)
    longest = len(wrapper.head) + len(wrapper.tail) + 50
    (short,), _ = wrapper.ids(["a red cat " * 1000], longest)
    begun = time.process_time()
    (long,), (cut,) = wrapper.ids(["a red cat " * 10**6], longest)
    assert time.process_time() - begun < 2
    assert long == short and cut > 1000


def test_a_prompt_with_half_a_character_is_refused_by_its_place(saved: Path) -> None:
    wrapper = Wrapper(open_tokenizer(changed(saved)), DAY)
    assert "prompt 1 holds '\\udcff'" in refusal(lambda: wrapper.ids(["a", "\udcff"], 512), LensError)


def test_a_token_whose_number_the_encoder_does_not_have_is_refused(saved: Path) -> None:
    sound = json.loads((saved / "sound.json").read_text(encoding="utf-8"))
    model = sound["model"]
    last = max(model["vocab"], key=model["vocab"].get)
    tokenizer = open_tokenizer(changed(saved, model=model | {"vocab": model["vocab"] | {last: 10**6}}))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}  # fmt: skip
    encoder = GptOssEncoder(GptOssEncoder.Config(vocab_size=400, selected_layers=(0,), **small))
    with pytest.raises(ConfigError, match="number 1000000"):
        encoder.tokenizer = tokenizer
