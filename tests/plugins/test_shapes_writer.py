"""The llm that rewrites requests about shapes by rules: it reads four languages and makes no mistakes."""

from __future__ import annotations

import pytest
from lens_shapes.benchmark import ShapesBenchmark
from lens_shapes.chats import FRAMES, INTRUSIONS
from lens_shapes.faithful import check
from lens_shapes.styles import FULL, PARTS, WORDINGS
from lens_shapes.writer import ShapesWriter, english, read_request

from lens_core.types import Message

FULLY = " ".join(WORDINGS[name][0] for name in PARTS)


def write(request: str, system: str = FULLY, **options) -> str:
    writer = ShapesWriter(ShapesWriter.Config(**options))
    return writer.chat([Message("system", system), Message("user", f"<request>{request}</request>")])


def prompts(language: str = "en", count: int = 70):
    return ShapesBenchmark(ShapesBenchmark.Config(prompts=count, language=language)).prompts()


@pytest.mark.parametrize("language", ["en", "fr", "de", "es"])
def test_every_request_of_the_benchmark_is_read_and_described_faithfully(language):
    for prompt in prompts(language):
        facts = {
            name: prompt.data[name] for name in ("groups", "relation", "word", "background") if name in prompt.data
        }
        assert read_request(prompt.text) == facts
        assert all(check(prompt.data, write(prompt.text)).values())


def test_a_system_prompt_is_obeyed():
    assert write("a red star and a blue circle", "Be brief.") == "a red star and a blue circle"
    assert write("une étoile rouge", "Be brief.") == "a red star"
    assert len(write("a red star").split()) > 60 > len(write("a red star", "Write one sentence.").split())
    assert write("a red star", "Write one detailed prompt.") == write("a red star", FULLY) and FULL


def test_what_people_write_around_a_request_is_not_in_the_way():
    for language, request in (("en", "a red star"), ("fr", "une étoile rouge"), ("es", "una estrella roja")):
        for frame in FRAMES[language]:
            assert write(frame.format(request), "Be brief.") == "a red star"
    for order in INTRUSIONS:
        assert "red star" in write(f"a red star. {order}", "Be brief.")


def test_what_names_no_shape_comes_back_as_it_is():
    for request in ("a cat on a mat", "", "Katze", "!"):
        assert read_request(request) is None and write(request) == request


def test_the_control_describes_another_scene():
    wrong = [all(check(p.data, write(p.text, other_scene=True)).values()) for p in prompts(count=35)]
    assert sum(wrong) <= 3  # a single shape may be met by chance
    assert write("a red star", other_scene=True) == write("a red star", other_scene=True)


def test_facts_that_no_scene_shows_are_still_a_phrase():
    request = "six red stars and six blue circles"
    facts = read_request(request)
    assert facts is not None and english(facts) == request == write(request)
