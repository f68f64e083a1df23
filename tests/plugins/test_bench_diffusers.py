"""The generator `diffusers` on tiny random pipelines of the classes that the paper compares."""

from __future__ import annotations

import io
import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
import torch
from lens_bench.diffusers_pipeline import Diffusers, fingerprint
from PIL import Image

from lens_core.types import ConfigError, LensError, PictureRequest

SPECIAL = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
}  # fmt: skip


def tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate([*SPECIAL, *ascii_lowercase, " "])}
    tokens = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # a token a character
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<|endoftext|>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def kl_vae(channels: int = 4) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels, norm_num_groups=4, layers_per_block=1, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0,
    )  # fmt: skip


def z_image() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for weight in transformer.parameters():  # some begin empty, some at 0
        torch.nn.init.normal_(weight, std=0.05)
    return ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(), kl_vae(), Qwen3Model(Qwen3Config(**SMALL)).eval(), tokenizer(), transformer
    )


def vision_language() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {k: v for k, v in SMALL.items() if k != "head_dim"}
    rope = {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_scaling": rope, "rope_parameters": {**rope, "rope_theta": 10000.0}},
        vision_config=vision,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, vision_language(), tokenizer(), transformer)


def longcat() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel

    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[8, 4, 4],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return LongCatImagePipeline(scheduler, kl_vae(16), vision_language(), tokenizer(), None, transformer)


MAKERS = {"ZImagePipeline": z_image, "QwenImagePipeline": qwen_image, "LongCatImagePipeline": longcat}


@pytest.fixture(scope="module", params=MAKERS)
def built(request: pytest.FixtureRequest) -> Any:
    pipeline = MAKERS[request.param]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def requests(size: tuple[int, int] | None = (32, 32)) -> list[PictureRequest]:
    return [PictureRequest(p, s, size, f"{i:06d}", 0) for i, (p, s) in enumerate([("red cat", 0), ("blue cat", 5)])]


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.filterwarnings("ignore")
def test_each_class_draws_what_prompt_and_seed_say(built: Any) -> None:
    generator = Diffusers(Diffusers.Config(model="tiny", steps=2, device="cpu", dtype="float32"), built)
    first = list(generator.generate(requests()))
    assert [o.status for o in first] == ["ok", "ok"] and pixels(first[0].image).shape == (32, 32, 3)
    assert [o.sent_prompt for o in first] == ["red cat", "blue cat"], "prompts are sent as they are"
    again = list(generator.generate(requests()))
    assert [o.image for o in again] == [o.image for o in first]
    (other,) = generator.generate([PictureRequest("red cat", 1, (32, 32), "000000")])
    assert other.image != first[0].image
    (alone,) = generator.generate(requests()[1:])
    assert np.abs(pixels(alone.image).astype(int) - pixels(first[1].image)).max() <= 2


@pytest.mark.filterwarnings("ignore")
def test_the_settings_are_recorded_and_no_default_is_silent(built: Any) -> None:
    info = Diffusers(Diffusers.Config(model="tiny", steps=2, device="cpu"), built).describe()
    name = type(built).__name__
    assert info.settings["pipeline"] == name and info.settings["steps"] == 2 and info.settings["prompts"] == "raw"
    default = {"ZImagePipeline": 5.0, "QwenImagePipeline": 4.0, "LongCatImagePipeline": 4.5}[name]
    assert info.settings["guidance_scale"] == default and info.settings["device"] == "cpu"
    assert info.settings.get("enable_prompt_rewrite") == {"LongCatImagePipeline": False}.get(name)
    if name == "QwenImagePipeline":
        assert info.settings["call"] == {"num_inference_steps": 2, "true_cfg_scale": 4.0, "negative_prompt": " "}
    json.dumps(info.settings, allow_nan=False)


@pytest.mark.filterwarnings("ignore")
def test_guidance_reaches_each_class_under_its_own_name(built: Any) -> None:
    drawn = []
    for scale in (1.5, 7.0):
        config = Diffusers.Config(model="tiny", steps=2, guidance_scale=scale, device="cpu")
        drawn.append(next(iter(Diffusers(config, built).generate(requests()[:1]))).image)
    assert drawn[0] != drawn[1]


@pytest.mark.filterwarnings("ignore")
def test_longcat_rewrites_only_where_it_is_asked_to_and_what_it_sent_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = longcat()
    pipeline.set_progress_bar_config(disable=True)
    questions: list[Any] = []

    def rewire(prompt: Any, device: Any) -> list[str]:
        questions.append(prompt)
        return [f"{one} blue" for one in prompt]

    monkeypatch.setattr(pipeline, "rewire_prompt", rewire)
    config = Diffusers.Config(model="tiny", steps=1, device="cpu", prompt_rewrite=True)
    (outcome,) = Diffusers(config, pipeline).generate(requests()[:1])
    assert outcome.sent_prompt == "red cat blue" and questions == [["red cat"]], "once, and not again within the call"
    assert Diffusers(config, pipeline).describe().settings["prompts"] == "refined"
    off = Diffusers.Config(model="tiny", steps=1, device="cpu")
    (plain,) = Diffusers(off, pipeline).generate(requests()[:1])
    assert len(questions) == 1 and plain.image != outcome.image


@pytest.mark.filterwarnings("ignore")
def test_a_saved_pipeline_is_loaded_by_the_name_of_its_class(tmp_path: Path) -> None:
    pipeline = z_image()
    pipeline.save_pretrained(tmp_path / "z")
    config = Diffusers.Config(model=str(tmp_path / "z"), pipeline="ZImagePipeline", steps=1, device="cpu")
    generator = Diffusers(config)
    info = generator.describe()
    assert info.revision == fingerprint(tmp_path / "z") and len(info.revision) == 16
    (outcome,) = generator.generate(requests()[:1])
    pipeline.set_progress_bar_config(disable=True)
    (direct,) = Diffusers(Diffusers.Config(model="m", steps=1, device="cpu"), pipeline).generate(requests()[:1])
    assert np.abs(pixels(outcome.image).astype(int) - pixels(direct.image)).max() <= 1
    (tmp_path / "z" / "scheduler" / "scheduler_config.json").write_text("{}")
    assert fingerprint(tmp_path / "z") != info.revision


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"call": {"prompt": "x"}}, r"call\.prompt: is set by the benchmark"),
        ({"call": {"x": float("nan")}}, "call: must be what JSON can hold"),
        ({"steps": 0}, "steps"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Diffusers.Config(model="m", **options)


def test_what_cannot_be_loaded_or_drawn_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no pipeline called 'ZimagePipeline'\. Did you mean 'ZImagePipeline'"):
        Diffusers(Diffusers.Config(model="m", pipeline="ZimagePipeline")).describe()
    with pytest.raises(ConfigError, match="no pipeline called 'os'"):
        Diffusers(Diffusers.Config(model="m", pipeline="os")).describe()
    with pytest.raises(LensError, match="cannot be read as ZImagePipeline") as error:
        Diffusers(Diffusers.Config(model=str(tmp_path), pipeline="ZImagePipeline")).describe()
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_an_argument_that_the_class_does_not_take_is_named() -> None:
    pipeline = z_image()
    with pytest.raises(ConfigError, match=r"takes no 'cfg_normalisation'\. Did you mean 'cfg_normalization'"):
        Diffusers(Diffusers.Config(model="m", call={"cfg_normalisation": True}), pipeline).describe()
    with pytest.raises(ConfigError, match="cannot rewrite prompts"):
        Diffusers(Diffusers.Config(model="m", prompt_rewrite=True), pipeline).describe()
    with pytest.raises(LensError, match="ZImagePipeline cannot draw: "):
        list(Diffusers(Diffusers.Config(model="m", steps=1, device="cpu"), pipeline).generate(requests((33, 32))))


def test_a_picture_that_the_pipelines_checker_withholds_is_refused() -> None:
    from types import SimpleNamespace

    class Checked:
        def __call__(self, prompt: Any, generator: Any, output_type: str, num_inference_steps: int = 3) -> Any:
            return SimpleNamespace(images=[Image.new("RGB", (2, 2))] * len(prompt), nsfw_content_detected=[False, True])

    outcomes = list(Diffusers(Diffusers.Config(model="m"), Checked()).generate(requests(None)))
    assert [outcome.status for outcome in outcomes] == ["ok", "refused"]
    assert outcomes[1].reason.startswith("nsfw_content_detected: ")
