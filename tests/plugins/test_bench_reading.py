"""Reading text: RapidOCR's real models on real fonts, PaddleOCR's configuration, and models that are asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lens_llm
import numpy as np
import pytest
from attrs import field, frozen
from lens_bench.perceive import canary, rapid_ocr, recall, run, vlm
from lens_bench.perceive.rapid_ocr import PADDLE_OPTIONS, PaddleOcr, RapidOcr
from lens_bench.perceive.vlm import ASK, READ, Vlm
from lens_llm.client import OpenAI
from PIL import Image

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec
from lens_core.types import ConfigError, LensError, Message

# ---- RapidOCR --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> RapidOcr:
    return RapidOcr(RapidOcr.Config(threads=1))


def test_the_engine_passes_its_canary(engine: RapidOcr) -> None:
    run.prove(engine)


@pytest.mark.parametrize(("font", "size", "angle"), [("DejaVuSerif-Bold", 24, 0), ("DejaVuSansMono", 40, 15)])
def test_sentences_in_real_fonts_are_read_word_by_word(engine: RapidOcr, font: str, size: int, angle: int) -> None:
    drawn = recall.Drawn(font, size, angle, recall.SENTENCES[1:3])
    ((_, read, words),) = recall.measure(engine, [drawn])
    assert (read, words) == (17, 17)


def test_a_picture_without_text_has_no_lines_and_a_failure_is_no_empty_answer(engine: RapidOcr) -> None:
    empty, strange = engine.perceive([Image.new("RGB", (64, 64), "white"), Image.new("RGB", (5000, 3))], [None] * 2)
    assert empty == []
    assert isinstance(strange, LensError) and "RapidOCR failed" in str(strange)


def test_an_engine_that_reads_nothing_fails_its_canary(engine: RapidOcr) -> None:
    class Blind:
        def perceive(self, images: list[Image.Image], questions: list[None]) -> list[list[str]]:
            return [[]]

    assert canary.sentence(Blind()) == "a picture of 'The quick brown fox jumps 42 times' was read as ''"


def test_the_revision_is_that_of_the_files(engine: RapidOcr) -> None:
    described = engine.describe()
    assert described["model"] == "PP-OCRv6_det_small+PP-OCRv6_rec_small"
    assert len(described["revision"].split("+")) == 3
    assert RapidOcr(RapidOcr.Config(text_score=0.3)).describe()["version"] != described["version"]


def test_without_its_package_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lens-t2i\[bench\]'"):
        RapidOcr(RapidOcr.Config())


def test_paddles_nets_are_not_downloaded_but_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"en_PP-OCRv3_det_mobile\.onnx: is missing; fetch it from the model list"):
        PaddleOcr(PaddleOcr.Config(str(tmp_path)))
    (tmp_path / "en_PP-OCRv3_det_mobile.onnx").write_bytes(b"another net")
    with pytest.raises(ConfigError, match=r"is not the published file \(its SHA-256 differs\)"):
        PaddleOcr(PaddleOcr.Config(str(tmp_path)))
    with pytest.raises(ConfigError, match=r"en_PP-OCRv4_rec_mobile\.onnx: is missing"):
        PaddleOcr(PaddleOcr.Config(str(tmp_path), check_hashes=False))


def test_the_engine_gets_paddleocrs_configuration(tmp_path: Path) -> None:
    """With the wheel's nets under the names of the others: what is tested is what the engine is told to do."""
    bundled = rapid_ocr._package() / "models"
    for part, name in (("Det", "en_PP-OCRv3_det_mobile.onnx"), ("Rec", "en_PP-OCRv4_rec_mobile.onnx")):
        os.symlink(bundled / rapid_ocr.BUNDLED[part], tmp_path / name)
    paddle = PaddleOcr(PaddleOcr.Config(str(tmp_path), check_hashes=False, threads=1))
    (lines,) = paddle.perceive([canary.drawn_text()], [None])
    assert " ".join(lines) == canary.SENTENCE
    engine = paddle._engine
    detector, after = engine.text_det, engine.text_det.postprocess_op
    assert (detector.limit_side_len, detector.limit_type) == (960, "max")
    assert (after.thresh, after.box_thresh, after.unclip_ratio, after.dilation_kernel) == (0.3, 0.6, 1.5, None)
    assert list(detector.mean) == [0.485, 0.456, 0.406] and list(detector.std) == [0.229, 0.224, 0.225]
    assert engine.text_score == 0.5 and not engine.cfg.Global.use_preprocess_img
    assert engine.cfg.Global.use_vertical_padding is False and len(PADDLE_OPTIONS) == 11
    small = detector.get_preprocess()(np.zeros((1000, 2000, 3), np.uint8))
    assert small.shape == (1, 3, 480, 960)


# ---- the table of recall ---------------------------------------------------------------------------------------------


def test_recall_counts_words_once_each_and_intervals_count_pictures() -> None:
    drawn = recall.Drawn("DejaVuSans", 24, 0, ("The library opens", "the mill"))
    assert recall.words_read(drawn, ["the LIBRARY, opens"]) == (3, 5)
    assert recall.words_read(drawn, ["the the the mill mill"]) == (3, 5)
    results = [(drawn, 5, 5), (drawn, 0, 5)]
    estimate = recall.recall(results)
    assert estimate.value == 0.5 and estimate.distinct == 2
    assert estimate.high - estimate.low > 0.8  # two pictures say little, however many words they have
    assert "| DejaVuSans | 24 | 0.50 |" in recall.table(results)


def test_no_word_of_a_turned_drawing_is_cut_off() -> None:
    for angle in (0, 30, 90):
        picture = np.asarray(recall.draw(recall.Drawn("DejaVuSans", 24, angle, recall.SENTENCES[:1])))
        edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edges == 255).all() and (picture < 64).any()


# ---- models that are asked -------------------------------------------------------------------------------------------


class FakeLLM:
    """Reads every drawn sentence, and answers as it is told to."""

    @frozen
    class Config:
        model: str = "fake-vl"
        max_tokens: int = 1024
        yes: str = field(default="Yes")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.messages: list[Message] = []

    def chat(self, messages: list[Message]) -> str:
        (message,) = messages
        self.messages.append(message)
        assert message.images[0].startswith(b"\x89PNG")
        if message.text == READ:
            return canary.SENTENCE
        if "refuse" in message.text:
            raise LensError("content_filter: refused")
        return self.config.yes if "red" in message.text else "No"


def model(**options: Any) -> tuple[Vlm, FakeLLM]:
    llm = FakeLLM(FakeLLM.Config(**options))
    return Vlm(Vlm.Config(ComponentSpec("fake")), llm), llm


def test_a_model_is_asked_the_prompt_that_stands_in_the_question() -> None:
    perceiver, llm = model()
    picture = Image.new("RGB", (8, 8), "red")
    answers = perceiver.perceive([picture] * 3, [ASK.format(question="Is it red?"), "refuse this", READ])
    assert answers[0] == "Yes" and answers[2] == canary.SENTENCE
    assert isinstance(answers[1], LensError) and str(answers[1]) == "content_filter: refused"
    assert llm.messages[0].text == "Is it red?. Please answer 'Yes' or 'No' only."
    assert READ.startswith("Recognize the text in the image, only reply") and "'No text recognized'." in READ


def test_a_model_that_does_not_say_exactly_yes_fails_its_canary() -> None:
    run.prove(model()[0])
    with pytest.raises(LensError, match=r"'Is there a red circle in the image\?' .* answered with 'Yes\.', not 'Yes'"):
        run.prove(model(yes="Yes.")[0])


def test_answers_with_fewer_tokens_come_from_the_same_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Catalog, "installed", classmethod(lambda cls: Catalog.of(lens_llm)))
    options = {"model": "m", "max_tokens": 900, "max_calls": 3, "base_url": "http://localhost:1/v1"}
    perceiver = Vlm(Vlm.Config(ComponentSpec("openai", options)))
    short, whole = perceiver._llm(128), perceiver._llm(None)
    assert isinstance(short, OpenAI) and (short.config.max_tokens, whole.config.max_tokens) == (128, 900)
    assert short.config.as_is and whole.config.as_is, "a reading that is cut off counts as far as it goes"
    assert short.budget is whole.budget and perceiver._llm(128) is short
    described = perceiver.describe()
    assert described["model"] == "m" and "localhost" not in str(described)
    assert perceiver.estimate(10).calls == 10


def test_what_decides_an_answer_decides_its_identity_and_what_does_not_does_not() -> None:
    def identity(**options: Any) -> dict[str, str]:
        return Vlm(
            Vlm.Config(ComponentSpec("fake"), revision=""), OpenAI(OpenAI.Config(model="m", **options))
        ).describe()

    assert identity() == identity(retries=0, cache="elsewhere", key_env="OTHER_KEY", concurrency=2, timeout=5.0)
    assert identity() != identity(temperature=0.5)
    assert identity() != identity(request={"seed": 1})
    assert set(vlm.OPERATIONAL) <= {a.name for a in OpenAI.Config.__attrs_attrs__}  # type: ignore[attr-defined]
