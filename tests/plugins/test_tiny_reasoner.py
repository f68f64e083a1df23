"""`tiny:reasoner`, the embedded language model that rewrites requests about shapes."""

from __future__ import annotations

from pathlib import Path

import lens_shapes
import pytest
from lens_reason.policy import default_policy
from lens_shapes.chats import ShapesChats
from lens_shapes.faithful import check
from lens_shapes.scenes import TASKS, prompt_facts

from lens_core import Catalog, ComponentSpec, LensPipeline, Refinement
from lens_core.inference.reasoner_files import named_reasoner
from lens_core.types import CheckpointError, ConfigError

FOLDER = Path(lens_shapes.__file__).parent / "weights" / "reasoner"


@pytest.fixture(scope="module")
def pipeline() -> LensPipeline:
    return LensPipeline.from_pretrained("tiny:rl", reasoner="tiny:reasoner")


def test_its_name_is_a_reasoner_with_the_system_prompt_that_it_was_trained_with():
    spec = named_reasoner("tiny:reasoner", Catalog.installed())
    assert spec.use == "gpt_oss" and spec.options["model"] == "tiny:reasoner"
    assert spec.options["system"] == default_policy("en")


def test_it_takes_three_megabytes_at_most():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) <= 3_000_000


def answered(pipeline: LensPipeline, count: int, **options) -> tuple[list[dict], list[Refinement]]:
    """Facts of held-out requests, and the answers to them."""
    tasks = {task: weight for task, weight in TASKS.items() if task != "novel"}
    chats = ShapesChats(ShapesChats.Config(seed=4, split="all", requests="heldout", tasks=tasks, **options))
    questions = [chats.question(0, row) for row in range(count)]
    return [prompt_facts(scene) for scene, _, _ in questions], pipeline.refine([words for _, words, _ in questions])


def kept(facts: list[dict], answers: list[Refinement]) -> int:
    pairs = zip(facts, answers, strict=True)
    return sum(not answer.reason and all(check(one, answer.text).values()) for one, answer in pairs)


def test_what_held_out_requests_name_is_kept(pipeline):
    facts, answers = answered(pipeline, 32, translated=0.3, intrusions=0.0)
    assert kept(facts, answers) >= 26  # docs/reasoner.md has the share of 600
    assert kept([*facts[1:], facts[0]], answers) <= 4
    assert sum(len(a.text.split()) for a in answers) / len(answers) > 60


def test_orders_in_a_request_are_not_followed(pipeline):
    facts, answers = answered(pipeline, 24, translated=0.0, intrusions=1.0)
    assert kept(facts, answers) >= 17
    assert not any("<|" in answer.text for answer in answers if not answer.reason)


def test_a_system_prompt_decides_how_long_it_writes():
    words = {}
    for system in ("Be brief.", default_policy("en")):
        spec = ComponentSpec("gpt_oss", {"model": "tiny:reasoner", "max_new_tokens": 320, "system": system})
        pipeline = LensPipeline.from_pretrained("tiny:rl", reasoner=spec, parts=("text_encoder",))
        (answer,) = pipeline.refine(["a green ring to the left of a pink heart"])
        words[system] = len(answer.text.split())
    assert words["Be brief."] < 15 < 60 < words[default_policy("en")]


def test_a_checkpoint_that_is_no_reasoner_and_a_wrong_name_are_refused():
    with pytest.raises(ConfigError, match="tiny:rl: is a checkpoint that holds no reasoner"):
        named_reasoner("tiny:rl", Catalog.installed())
    with pytest.raises(CheckpointError, match="tiny:reasoner"):
        named_reasoner("tiny:reasone", Catalog.installed())


def test_a_folder_with_a_reasoner_file_is_a_reasoner(tmp_path):
    (tmp_path / "reasoner.md").write_text("---\nuse: chat\n---\nBe brief.\n")
    spec = named_reasoner(str(tmp_path), Catalog.installed())
    assert (spec.use, spec.options) == ("chat", {"system": "Be brief."})
