"""A reasoner in the pipeline: prompts as they were asked and as they are drawn, in results and in pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy
from attrs import evolve, frozen

from lens_core.cli.main import main
from lens_core.cli.options import parse_reasoner
from lens_core.inference import batch, png_metadata, reasoner_files
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.requests import GenerateRequest
from lens_core.recipe import ComponentSpec
from lens_core.types import ConfigError, PluginError, Refinement


class Shout:
    """A reasoner: capitals. Refuses to answer what holds a digit."""

    @frozen
    class Config:
        ending: str = "!"

    def __init__(self, config):
        self.config, self.calls = config, []

    def provenance(self):
        return {"model": "capitals", "system_hash": "0123"}

    def refine(self, prompts):
        self.calls.append(list(prompts))
        return [
            Refinement(p, p, "it holds a digit") if any(map(str.isdigit, p)) else p.upper() + self.config.ending
            for p in prompts
        ]


def test_prompts_are_drawn_as_the_reasoner_words_them(pipeline):
    shout = Shout(Shout.Config())
    plain = pipeline("A CAT!", seed=1, height=32, width=32, output_type="pt")
    assert plain.prompts == (Refinement("A CAT!", "A CAT!"),) and "reasoner" not in plain.settings
    pipeline.use_reasoner(shout)
    drawn = pipeline("a cat", seed=1, height=32, width=32, output_type="pt")
    assert drawn.images.equal(plain.images)
    assert drawn.prompts == (Refinement("a cat", "A CAT!"),)
    assert drawn.settings["reasoner"] == {"name": f"{__name__}:Shout", "model": "capitals", "system_hash": "0123"}
    pipeline.use_reasoner(None)
    assert not pipeline("a cat", seed=1, height=32, width=32, output_type="pt").images.equal(plain.images)


def test_each_prompt_is_sent_once(pipeline):
    shout = Shout(Shout.Config())
    pipeline.use_reasoner(shout)
    result = pipeline(["a", "b", "a"], seed=1, height=32, width=32, num_images_per_prompt=2)
    pipeline(["b", "c"], seed=1, height=32, width=32)
    assert [p.text for p in result.prompts] == ["A!", "A!", "B!", "B!", "A!", "A!"]
    assert shout.calls == [["a", "b"], ["c"]]


def test_arguments_are_checked_before_anybody_is_asked(pipeline):
    shout = Shout(Shout.Config())
    pipeline.use_reasoner(shout)
    with pytest.raises(ConfigError, match="height"):
        pipeline("a", height=33, width=32)
    assert shout.calls == []


def test_an_answer_that_is_not_used_is_reported_with_its_reason(pipeline):
    pipeline.use_reasoner(Shout(Shout.Config()))
    with pytest.warns(UserWarning, match=r"drawn as it is: it holds a digit \('2 cats'\)"):
        result = pipeline(["2 cats", "a cat"], seed=1, height=32, width=32)
    assert result.prompts == (Refinement("2 cats", "2 cats", "it holds a digit"), Refinement("a cat", "A CAT!"))


def test_an_empty_text_is_not_used(pipeline):
    shout = Shout(Shout.Config())
    shout.refine = lambda prompts: [" \n"]
    pipeline.use_reasoner(shout)
    with pytest.warns(UserWarning, match="drawn as it is: it is empty"):
        (prompt,) = pipeline("cat", seed=1, height=32, width=32).prompts
    assert prompt == Refinement("cat", "cat", "it is empty")


def test_a_text_that_the_encoder_would_cut_is_not_used(pipeline):
    pipeline.text_encoder.excess_tokens = lambda prompt: max(0, len(prompt) - 4)
    pipeline.use_reasoner(Shout(Shout.Config("!" * 4)))
    with pytest.warns(UserWarning, match="3 tokens more than the text encoder takes"):
        (prompt,) = pipeline("cat", seed=1, height=32, width=32).prompts
    assert prompt.text == "cat"


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("text", "returned str; it must return one text or Refinement a prompt"),
        ([], "returned 0 answers to 1 prompts"),
        ([3], "returned int"),
        ([Refinement("other", "x")], "answered other prompts"),
    ],
)
def test_a_reasoner_that_answers_otherwise_is_named(pipeline, answers, words):
    shout = Shout(Shout.Config())
    shout.refine = lambda prompts: answers
    pipeline.use_reasoner(shout)
    with pytest.raises(PluginError, match=words):
        pipeline("a", seed=1, height=32, width=32)


def test_an_unknown_reasoner_is_one_line(catalog, checkpoint):
    with pytest.raises(ConfigError, match="no reasoner is called 'chatt'"):
        LensPipeline.from_pretrained(checkpoint, catalog=catalog, reasoner="chatt")


def test_a_picture_records_both_prompts_and_is_reproduced_without_asking(pipeline, tmp_path):
    pipeline.use_reasoner(Shout(Shout.Config()))
    request = GenerateRequest(height=32, width=32)
    (done,) = batch.generate_files(pipeline, request, batch.image_tasks(["a cat"], tmp_path / "x.png", seed=3))
    _, facts = png_metadata.facts(tmp_path / "x.png")
    assert facts["prompt"] == "A CAT!" and facts["requested_prompt"] == "a cat"
    assert facts["reasoner"] == {"name": f"{__name__}:Shout", "model": "capitals", "system_hash": "0123"}
    # The recorded prompt alone gives the picture again.
    pipeline.use_reasoner(None)
    again = pipeline(facts["prompt"], seed=facts["seed"], height=32, width=32)
    assert again.images[0].tobytes() == png_metadata.facts(tmp_path / "x.png")[0].tobytes()
    # Another reasoner is another request, and so is none.
    prints = {
        request.fingerprint(pipeline, "a cat", 3),
        done.facts["request"] if "request" in done.facts else facts["request"],
    }
    assert len(prints) == 2


def test_reproduce_asks_nobody(tmp_path, monkeypatch, capsys):
    small = ["--size", "64x64", "--steps", "1", "--offload", "none"]
    assert main(["generate", "a red circle", "-o", str(tmp_path / "a.png"), "--seed", "1", *small]) == 0
    _, facts = png_metadata.facts(tmp_path / "a.png")
    facts |= {
        "requested_prompt": "a circle",
        "reasoner": {"name": "lens_reason:chat", "model": "m", "system_hash": "1"},
    }
    png_metadata.save(png_metadata.facts(tmp_path / "a.png")[0], tmp_path / "b.png", facts)
    capsys.readouterr()
    assert main(["generate", "--reproduce", str(tmp_path / "b.png"), "-o", str(tmp_path / "c.png")]) == 0
    assert capsys.readouterr().out == "identical\n"
    _, copied = png_metadata.facts(tmp_path / "c.png")
    assert copied["requested_prompt"] == "a circle" and copied["reasoner"]["model"] == "m"
    assert main(["generate", "--reproduce", str(tmp_path / "b.png"), "--reasoner", "chat"]) == 2
    assert "leave --reasoner out" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"requested_prompt": 3}, {"reasoner": "chat"}, {"reasoner": {"name": 1}}])
def test_unsound_facts_about_a_reasoner_are_refused(pipeline, tmp_path, wrong):
    list(
        batch.generate_files(
            pipeline, GenerateRequest(height=32, width=32), batch.image_tasks(["a"], tmp_path / "x.png", seed=3)
        )
    )
    image, facts = png_metadata.facts(tmp_path / "x.png")
    png_metadata.save(image, tmp_path / "x.png", facts | wrong)
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        png_metadata.facts(tmp_path / "x.png")


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_a_reasoner_is_named_in_a_line_or_a_file(tmp_path):
    assert parse_reasoner(None) is None
    assert parse_reasoner("chat").use == "chat"
    assert parse_reasoner("{use: tiny, batch_size: 2}").options == {"batch_size": 2}
    assert parse_reasoner(str(write(tmp_path / "r.yaml", "use: tiny\nbatch_size: 3\n"))).options == {"batch_size": 3}
    plain = parse_reasoner(str(write(tmp_path / "p.txt", "\ufeffBe brief.\n")))
    assert (plain.use, plain.options) == ("chat", {"system": "Be brief."})
    front = parse_reasoner(
        str(write(tmp_path / "q.txt", "---\nuse: tiny\nbatch_size: 4\n---\nBe long.\n\nAnd kind.\n"))
    )
    assert (front.use, front.options) == ("tiny", {"batch_size": 4, "system": "Be long.\n\nAnd kind."})


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.txt", b"\xff\xfe\x00", "is UTF-16"),
        ("p.txt", b"caf\xe9", "is not UTF-8"),
        ("p.txt", b"x" * 33_000, "larger than 32 KiB"),
        ("p.txt", b" \n", "holds no system prompt"),
        ("p.txt", b"---\nuse: tiny\n", "its front matter has no end"),
        ("p.txt", b"---\nuse: [\n---\nx", "its front matter cannot be read"),
        ("p.txt", b"---\n- 3\n---\nx", "must name a component"),
        ("p.txt", b"---\nsystem: x\n---\ny", "names a system prompt above"),
        ("p.yaml", b"3", "must name a component"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_reasoner_is_one_line(tmp_path, name, data, words):
    with pytest.raises(ConfigError, match=words) as error:
        parse_reasoner(str(write(tmp_path / name, data)))
    assert len(str(error.value).splitlines()) == 1 and name in str(error.value)
    with pytest.raises(ConfigError, match="there is no such reasoner"):
        parse_reasoner(str(tmp_path / "absent.yaml"))


def test_a_recipe_names_a_reasoner_for_its_evaluations(catalog):
    with pytest.raises(ConfigError, match="no reasoner is called 'chat'"):
        LensPipeline.from_parts(evolve(toy.PARTS, reasoner=ComponentSpec("chat")), catalog)


def test_a_reasoner_is_not_saved(pipeline, tmp_path):
    pipeline.use_reasoner(Shout(Shout.Config()))
    pipeline.save_pretrained(tmp_path / "m")
    assert "reasoner" not in json.loads((tmp_path / "m" / "lens.json").read_text())["components"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_front_matter_with_the_line_ends_of_windows_is_read(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "reasoner.md"
    path.write_bytes(mark + b"---\r\nuse: gpt_oss\r\n---\r\nWrite\r\nmore.\r\n")
    assert reasoner_files.read_prompt(path) == ({"use": "gpt_oss"}, "Write\nmore.", [])
