"""What the pipeline promises about seeds, sizes, guidance, precision and files."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from torch import Tensor

from lens_core import flow
from lens_core.catalog import Catalog
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.pixels import to_images, to_pixels
from lens_core.recipe import ComponentSpec, PipelineSpec
from lens_core.types import CheckpointError, ConfigError, LensError, NumericalError

SIZE: dict[str, Any] = {"height": 32, "width": 48}


def latents(pipeline: LensPipeline, *prompts: str, **settings: Any) -> Tensor:
    result: Tensor = pipeline(list(prompts), output_type="latent", **{**SIZE, **settings}).images
    return result


def test_a_seed_draws_one_picture_alone_and_in_any_batch(pipeline: LensPipeline) -> None:
    together = latents(pipeline, "a", "longer", "c", seed=5)
    for i, prompt in enumerate(("a", "longer", "c")):
        torch.testing.assert_close(together[i : i + 1], latents(pipeline, prompt, seed=5 + i), atol=1e-5, rtol=0)
    chosen = latents(pipeline, "c", "a", seed=[7, 5])
    torch.testing.assert_close(chosen, together[[2, 0]], atol=1e-5, rtol=0)


def test_another_seed_and_another_prompt_draw_other_pictures(pipeline: LensPipeline) -> None:
    first = latents(pipeline, "a", seed=1)
    assert (first - latents(pipeline, "a", seed=2)).abs().max() > 0.1
    assert (first - latents(pipeline, "b", seed=1)).abs().max() > 1e-3


def test_a_seed_nobody_gave_is_reported_and_draws_the_same_again(pipeline: LensPipeline) -> None:
    result = pipeline("a", **SIZE, output_type="latent")
    assert torch.equal(result.images, latents(pipeline, "a", seed=result.seeds[0]))


def test_generators_stand_for_seeds(pipeline: LensPipeline) -> None:
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    assert torch.equal(latents(pipeline, "a", "b", generator=generators), latents(pipeline, "a", "b", seed=3))


def test_noise_is_drawn_packed(pipeline: LensPipeline) -> None:
    drawn = pipeline.noise([torch.Generator().manual_seed(3)], (2, 3))
    packed = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, packed.reshape(1, 2, 3, 4).permute(0, 3, 1, 2))


def test_given_latents_take_the_place_of_noise(pipeline: LensPipeline) -> None:
    noise = pipeline.noise([torch.Generator().manual_seed(3)], (2, 3))
    assert torch.equal(latents(pipeline, "a", latents=noise), latents(pipeline, "a", seed=3))
    with pytest.raises(ConfigError, match=r"latents must be \[1, 4, 2, 3\], not \[1, 4, 3, 2\]"):
        latents(pipeline, "a", latents=noise.mT)


def test_several_pictures_a_prompt_have_seeds_of_their_own(pipeline: LensPipeline) -> None:
    result = pipeline(["a", "b"], **SIZE, seed=1, num_images_per_prompt=2, output_type="latent")
    assert result.seeds == (1, 2, 3, 4)
    torch.testing.assert_close(result.images, latents(pipeline, "a", "a", "b", "b", seed=1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"height": 30, "width": 32}, "height 30 is not a multiple of 16 px, the VAE's grid; use 32"),
        ({"height": 32, "width": 0}, "width 0 is not a multiple"),
        ({"height": -16, "width": 16}, "height -16 is not a multiple"),
        ({"height": 32, "aspect_ratio": "1:1"}, "not both"),
        ({"aspect_ratio": "3by2"}, "aspect ratio '3by2' must be width:height"),
        ({"aspect_ratio": "1:0"}, "aspect ratio '1:0'"),
        ({"aspect_ratio": "1:100"}, "between 1:10 and 10:1"),
        ({"aspect_ratio": "nan:1"}, "aspect ratio"),
        ({"seed": [1, 2]}, "2 seeds do not fit 1 pictures"),
        ({"generator": torch.Generator(), "seed": 1}, "not both"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts do not fit 1 pictures"),
        ({"output_type": "jpg"}, "output_type must be pil, pt, np or latent, not 'jpg'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, not 0"),
        ({"prompt": []}, "there is no prompt"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(call: dict[str, Any], words: str, pipeline: LensPipeline) -> None:
    with pytest.raises(ConfigError, match=words):
        pipeline(**{"prompt": "a", **call})
    assert pipeline.backbone.calls == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, not 0"),
        ({"num_inference_steps": -3}, "num_inference_steps must be at least 1, not -3"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number, not 2.5"),
        ({"num_inference_steps": True}, "num_inference_steps must be a whole number, not True"),
        ({"num_inference_steps": np.bool_(True)}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": "4"}, "num_inference_steps must be a whole number, not '4'"),
        ({"num_inference_steps": 2**20}, "num_inference_steps must be at most 65536"),
        ({"base_resolution": 0}, "base_resolution must be at least 1, not 0"),
        ({"base_resolution": 64.5}, "base_resolution must be a whole number, not 64.5"),
        ({"base_resolution": 10**9}, "base_resolution must be at most 16384"),
        ({"height": 32.0}, r"height must be a whole number, not 32\.0"),
        ({"width": "32"}, "width must be a whole number, not '32'"),
        ({"height": True}, "height must be a whole number, not True"),
        ({"height": 0}, "height 0 is not a multiple of 16"),
        ({"height": 2**20}, "height must be at most 16384"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number, not nan"),
        ({"guidance_scale": math.inf}, "guidance_scale must be a finite number, not inf"),
        ({"guidance_scale": True}, "guidance_scale must be a number, not True"),
        ({"guidance_scale": "5"}, "guidance_scale must be a number, not '5'"),
        ({"guidance_interval": 0.5}, "guidance_interval is two times"),
        ({"guidance_interval": (0.1, 0.2, 0.3)}, "guidance_interval is two times"),
        ({"guidance_interval": (0, "1")}, "guidance_interval must be a number, not '1'"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a whole number, not 1.5"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt must be a whole number, not True"),
        ({"aspect_ratio": 1.5}, "aspect_ratio must be a text"),
        ({"aspect_ratio": ""}, "must be width:height"),
        ({"prompt": None}, "prompt must be a text, or a list of texts, not None"),
        ({"prompt": b"a"}, "prompt must be a text"),
        ({"prompt": ["a", 3]}, "prompt must be a text, or a list of texts, but 3 is among them"),
        ({"negative_prompt": [None]}, "negative_prompt must be a text"),
        ({"negative_prompt": 3}, "negative_prompt must be a text"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"seed": True}, "seed must be a whole number, not True"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"seed": 2**64}, "seed must be at most"),
        ({"seed": ["a"]}, "seed must be a whole number, not 'a'"),
        ({"generator": [3]}, "generator must be a torch.Generator"),
        ({"generator": 5}, "generator must be a torch.Generator, or a list of them, not 5"),
        ({"callback_on_step_end": 5}, "callback_on_step_end must be a function .* not 5"),
        ({"latents": np.zeros((1, 4, 2, 3))}, "latents must be a tensor, not ndarray"),
        ({"image": 3}, r"image must be a picture \(PIL, path, array or tensor\), not int"),
    ],
    ids=str,
)
def test_arguments_of_the_wrong_kind_or_size_are_refused_by_name(
    call: dict[str, Any], words: str, pipeline: LensPipeline
) -> None:
    with pytest.raises(ConfigError, match=words):
        pipeline(**{"prompt": "a", **call})
    assert pipeline.backbone.calls == []


def test_numpy_numbers_are_numbers(pipeline: LensPipeline) -> None:
    plain = latents(pipeline, "a", seed=3, num_inference_steps=2, guidance_scale=2.0)
    counted = pipeline(
        "a", height=np.int64(32), width=np.int32(48), num_inference_steps=np.int64(2), seed=np.uint8(3),
        guidance_scale=np.float32(2), num_images_per_prompt=np.int16(1), output_type="latent",
    )  # fmt: skip
    assert torch.equal(counted.images, plain) and counted.seeds == (3,)
    assert json.loads(json.dumps(counted.settings))["steps"] == 2
    assert pipeline("a", **SIZE, seed=np.array([3]), output_type="latent").seeds == (3,)


def test_presets_that_no_picture_can_be_drawn_with_are_refused(pipeline: LensPipeline) -> None:
    pipeline.presets["steps"] = 0
    with pytest.raises(ConfigError, match="num_inference_steps must be at least 1"):
        pipeline("a", **SIZE)


def test_reported_seeds_alone_draw_their_pictures(pipeline: LensPipeline) -> None:
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    one = generator(3)
    result = pipeline("a", **SIZE, generator=one, num_images_per_prompt=2, output_type="latent")
    assert result.seeds == (3, None)
    torch.testing.assert_close(result.images[:1], latents(pipeline, "a", seed=3))
    assert (result.images[1:] - latents(pipeline, "a", seed=3)).abs().max() > 0.1
    assert pipeline("a", **SIZE, generator=one).seeds == (None,), "it has been drawn from"
    assert pipeline(["a", "b"], **SIZE, generator=[generator(3), generator(4)]).seeds == (3, 4)
    again = generator(5)
    assert pipeline(["a", "b"], **SIZE, generator=[again, again]).seeds == (5, None)
    noise = pipeline.noise([generator(3)], (2, 3))
    assert pipeline("a", **SIZE, latents=noise, seed=9).seeds == (None,)


def test_aspect_ratios_are_width_to_height_and_keep_the_area(pipeline: LensPipeline) -> None:
    high, wide = pipeline.size(aspect_ratio="2:1", base_resolution=64)
    assert (high, wide) == (48, 96)
    assert pipeline.size(aspect_ratio="1:2", base_resolution=64) == (96, 48)
    assert pipeline.size(height=32) == (32, 32)
    pipeline.presets["sizes"] = {"64": {"2:1": [32, 128]}}
    assert pipeline.size(aspect_ratio="2:1", base_resolution=64) == (32, 128)


def test_guidance_of_1_runs_no_unconditional_pass(pipeline: LensPipeline) -> None:
    latents(pipeline, "abc", "d", seed=0, guidance_scale=1.0)
    assert pipeline.backbone.calls == [(2, 3)] * 3
    pipeline.backbone.calls.clear()
    latents(pipeline, "abc", "d", seed=0, guidance_scale=2.0)
    assert pipeline.backbone.calls == [(2, 3), (2, 0)] * 3, "the empty prompt has no tokens"


def test_guidance_keeps_each_tokens_length() -> None:
    rng = torch.Generator().manual_seed(0)
    c, u = (torch.randn(2, 4, 3, 3, generator=rng) for _ in range(2))
    guided = flow.guide(c, u, 5.0)
    torch.testing.assert_close(guided.norm(dim=1), c.norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(guided, u + 5 * (c - u), dim=1), torch.ones(2, 3, 3))
    assert torch.equal(flow.guide(torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 1), 5.0), torch.zeros(1, 4, 1, 1))


def test_a_negative_prompt_changes_the_picture_unless_guidance_is_off(pipeline: LensPipeline) -> None:
    plain, kept = (latents(pipeline, "a", seed=0, guidance_scale=3.0, negative_prompt=n) for n in (None, "zzz"))
    assert (plain - kept).abs().max() > 1e-3
    assert torch.equal(plain, latents(pipeline, "a", seed=0, guidance_scale=3.0, negative_prompt=""))
    off = latents(pipeline, "a", seed=0, guidance_scale=1.0)
    with pytest.warns(UserWarning, match="a negative prompt has no effect at guidance 1; give"):
        assert torch.equal(off, latents(pipeline, "a", seed=0, guidance_scale=1.0, negative_prompt="zzz"))
    pipeline.presets["guidance_scale"] = 1.0
    with pytest.warns(UserWarning, match="a negative prompt has no effect at guidance 1"):
        latents(pipeline, "a", seed=0, negative_prompt=["zzz"])
    for nothing in (None, "", [""]):  # warnings are errors
        latents(pipeline, "a", seed=0, negative_prompt=nothing)


def test_what_has_no_effect_is_said(pipeline: LensPipeline) -> None:
    plain = latents(pipeline, "a", seed=0, guidance_scale=1.0)
    with pytest.warns(UserWarning, match="a guidance interval has no effect at guidance 1"):
        assert torch.equal(plain, latents(pipeline, "a", seed=0, guidance_scale=1.0, guidance_interval=(0.1, 1.0)))
    with pytest.warns(UserWarning, match="a base resolution has no effect beside a size"):
        assert torch.equal(plain, latents(pipeline, "a", seed=0, guidance_scale=1.0, base_resolution=64))


def test_an_empty_negative_prompt_among_others_is_still_empty(pipeline: LensPipeline) -> None:
    mixed = latents(pipeline, "a", "a", seed=[0, 0], guidance_scale=3.0, negative_prompt=["", "zzz"])
    torch.testing.assert_close(mixed[:1], latents(pipeline, "a", seed=0, guidance_scale=3.0))
    torch.testing.assert_close(mixed[1:], latents(pipeline, "a", seed=0, guidance_scale=3.0, negative_prompt="zzz"))


def test_latents_that_leave_the_finite_numbers_stop_the_run(pipeline: LensPipeline) -> None:
    with torch.no_grad():
        pipeline.backbone.outer.bias[0] = math.inf
    with pytest.raises(NumericalError, match=r"step 1 of 3 in torch\.float32"):
        latents(pipeline, "a", seed=0)


def test_float16_is_refused_where_the_backbone_refuses_it(
    pipeline: LensPipeline, checkpoint: Path, catalog: Catalog
) -> None:
    with pytest.raises(ConfigError, match="overflows in float16"):
        pipeline.to(dtype=torch.float16)
    for name in ("float16", torch.float16):
        with pytest.raises(ConfigError, match="overflows in float16"):
            LensPipeline.from_pretrained(checkpoint, catalog=catalog, dtype=name)
    assert next(pipeline.vae.parameters()).dtype == torch.float32


def test_bfloat16_draws_nearly_the_same_picture(pipeline: LensPipeline, checkpoint: Path, catalog: Catalog) -> None:
    half = LensPipeline.from_pretrained(checkpoint, catalog=catalog, torch_dtype=torch.bfloat16)
    assert next(half.backbone.parameters()).dtype == torch.bfloat16
    assert (latents(half, "a", seed=0) - latents(pipeline, "a", seed=0)).abs().max() < 0.1


@pytest.mark.parametrize(("option", "words"), [({"dtype": "float46"}, "no dtype"), ({"device": "warp"}, "no device")])
def test_unknown_dtypes_and_devices_are_refused(
    option: dict[str, str], words: str, checkpoint: Path, catalog: Catalog
) -> None:
    with pytest.raises(ConfigError, match=words):
        LensPipeline.from_pretrained(checkpoint, catalog=catalog, **option)  # type: ignore[arg-type]  # one of two names


def test_a_saved_pipeline_draws_the_identical_picture(
    pipeline: LensPipeline, checkpoint: Path, catalog: Catalog, tmp_path: Path
) -> None:
    again = LensPipeline.from_pretrained(checkpoint, catalog=catalog, device="cpu")
    assert torch.equal(latents(again, "a", seed=0), latents(pipeline, "a", seed=0))
    assert again.presets == pipeline.presets
    assert again.specs == {
        "vae": ComponentSpec("toy:blocks"),
        "text_encoder": ComponentSpec("toy:letters"),
        "backbone": ComponentSpec("toy:mixer", {"width": 16}),
        "sampler": ComponentSpec("toy:even"),
    }
    again.save_pretrained(tmp_path / "third")
    third = LensPipeline.from_pretrained(tmp_path / "third", catalog=catalog)
    assert third.version == again.version, "a copy of a checkpoint is the same checkpoint"


def test_parts_of_a_checkpoint_can_be_replaced(pipeline: LensPipeline, checkpoint: Path, catalog: Catalog) -> None:
    mixed = LensPipeline.from_parts(
        PipelineSpec(start=str(checkpoint), backbone=ComponentSpec("mixer", {"width": 8})), catalog
    )
    assert torch.equal(mixed.vae.gain, pipeline.vae.gain)
    assert mixed.backbone.inner.out_features == 8


def test_a_part_put_in_by_hand_cannot_be_saved_without_its_name(pipeline: LensPipeline, tmp_path: Path) -> None:
    with pytest.raises(LensError, match="vae was put in by hand"):
        LensPipeline(vae=pipeline.vae).save_pretrained(tmp_path / "x")


@pytest.mark.parametrize("kind", ["vae", "text_encoder", "backbone", "sampler"])
def test_an_assigned_part_forgets_what_the_one_before_was_built_from(
    kind: str, checkpoint: Path, catalog: Catalog, tmp_path: Path
) -> None:
    pipeline = LensPipeline.from_pretrained(checkpoint, catalog=catalog)
    was, version = getattr(pipeline, kind), pipeline.version
    setattr(pipeline, kind, was)
    assert pipeline.version == version and kind in pipeline.specs, "the same part is no other"
    mine = type("Mine", (type(was),), {})(type(was).Config())
    setattr(pipeline, kind, mine)
    assert getattr(pipeline, kind) is mine and kind not in pipeline.specs
    settings = pipeline("a", **SIZE, seed=0).settings
    assert settings["model_hash"] != version
    assert ("sampler" in settings) == (kind != "sampler")
    before = {p.name: p.stat().st_mtime_ns for p in checkpoint.iterdir()}
    for folder in (tmp_path / "x", checkpoint):
        with pytest.raises(
            LensError, match=rf"{kind} was put in by hand: say how .*pipeline\.specs\['{kind}'\] = ComponentSpec"
        ):
            pipeline.save_pretrained(folder)
    assert not (tmp_path / "x").exists()
    assert before == {p.name: p.stat().st_mtime_ns for p in checkpoint.iterdir()}, "nothing there was touched"
    pipeline.specs[kind] = ComponentSpec(
        {"vae": "toy:blocks", "text_encoder": "toy:letters", "backbone": "toy:mixer"}.get(kind, "toy:even")
    )
    pipeline.save_pretrained(tmp_path / "x")
    again = LensPipeline.from_pretrained(tmp_path / "x", catalog=catalog)
    assert torch.equal(latents(again, "a", seed=0), latents(pipeline, "a", seed=0))


def test_a_part_that_no_folder_can_hold_is_named_before_anything_is_written(
    pipeline: LensPipeline, catalog: Catalog, tmp_path: Path
) -> None:
    class Mine:
        layers, width = 1, 8

    pipeline.put("text_encoder", Mine(), ComponentSpec("toy:letters"))
    with pytest.raises(LensError, match=r"text_encoder: Mine has no save\(folder\)"):
        pipeline.save_pretrained(tmp_path / "x")
    pipeline.catalog = catalog
    pipeline.put("sampler", pipeline.sampler, ComponentSpec("toy:uneven"))
    pipeline.put("text_encoder", None)
    with pytest.raises(ConfigError, match="no sampler is called 'toy:uneven'"):
        pipeline.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_loras_go_with_the_backbone_that_they_are_in(pipeline: LensPipeline, tmp_path: Path) -> None:
    from lens_core.checkpoints.adapters import LoRA
    from lens_core.checkpoints.lora_keys import write

    write(tmp_path / "a.safetensors", {"inner": LoRA(torch.ones(1, 5), torch.ones(16, 1), 1.0)})
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    fresh = type(pipeline.backbone)(type(pipeline.backbone).Config())
    weight = fresh.inner.weight.clone()
    pipeline.backbone = fresh
    assert pipeline.loras == []
    pipeline.unload_lora_weights()
    assert torch.equal(fresh.inner.weight, weight)


def test_a_checkpoint_goes_into_a_folder_alone(
    pipeline: LensPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, catalog: Catalog
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"^file: is a file; choose a new folder$"):
        pipeline.save_pretrained("file")
    pipeline.save_pretrained("~/model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "home"]
    assert LensPipeline.from_pretrained("~/model", catalog=catalog).version


def test_names_of_the_hub_are_refused_where_they_are_not_read(pipeline: LensPipeline, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^org/repo: there is no such LoRA; names of the Hub are not read here"):
        pipeline.load_lora_weights("org/repo")
    with pytest.raises(ConfigError, match=r"^revision='main': write it into the name, org/name@main$"):
        LensPipeline.from_pretrained("org/name", revision="main")


def test_a_lora_without_a_name_gets_one_that_is_free(pipeline: LensPipeline, tmp_path: Path) -> None:
    from lens_core.checkpoints.adapters import LoRA
    from lens_core.checkpoints.lora_keys import write

    write(tmp_path / "a.safetensors", {"inner": LoRA(torch.ones(1, 5), torch.ones(16, 1), 1.0)})
    pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="default_1")
    for _ in range(2):
        pipeline.load_lora_weights(tmp_path / "a.safetensors")
    pipeline.set_adapters(["default_1", "default_0", "default_2"], [1, 2, 3])
    assert pipeline.loras == ["a.safetensors:1", "a.safetensors:2", "a.safetensors:3"]


def test_a_callback_may_replace_the_latents_of_several_pictures_at_strength_0(pipeline: LensPipeline) -> None:
    from PIL import Image

    def replaced(pipeline: LensPipeline, step: int, t: float, values: dict[str, Any]) -> dict[str, Any]:
        rows = torch.arange(2.0).view(2, 1, 1, 1)
        return {"latents": rows.expand_as(values["latents"])}

    start = {"image": Image.new("RGB", (48, 32), "red"), "strength": 0.0, "output_type": "latent"}
    latents = pipeline(["a", "b"], **start, seed=0, callback_on_step_end=replaced).images
    assert latents[0].eq(0).all() and latents[1].eq(1).all()


def test_model_index_has_what_each_component_says_of_itself(
    pipeline: LensPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a/model_index.json").read_text()) == {"_class_name": "LensPipeline"}
    monkeypatch.setattr(type(pipeline.vae), "model_index", {"vae": ("acme", "Blocks")}, raising=False)
    monkeypatch.setattr(type(pipeline.sampler), "model_index", {"scheduler": ("acme", "Even")}, raising=False)
    pipeline.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a/model_index.json").read_text()) == {
        "_class_name": "LensPipeline", "vae": ["acme", "Blocks"], "scheduler": ["acme", "Even"],
    }  # fmt: skip


def test_the_core_names_no_model_class() -> None:
    import lens_core

    for path in Path(lens_core.__file__).parent.rglob("*.py"):
        source = path.read_text()
        named = [n for n in ("AutoencoderKL", "GptOss", "Transformer2DModel", "EulerDiscrete") if n in source]
        assert not named, path


def test_a_pipeline_that_lacks_a_part_says_so(pipeline: LensPipeline) -> None:
    with pytest.raises(LensError, match="there is no backbone and no sampler"):
        LensPipeline(vae=pipeline.vae, text_encoder=pipeline.text_encoder)("a")


def test_the_callback_sees_every_step(pipeline: LensPipeline) -> None:
    seen: list[tuple[int, float]] = []
    last: list[Tensor] = []

    def callback(_: Any, step: int, t: float, facts: dict[str, Any]) -> None:
        seen.append((step, t))
        last[:] = [facts["latents"]]

    drawn = latents(pipeline, "a", seed=0, num_inference_steps=4, callback_on_step_end=callback)
    assert seen == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0.0)]
    assert torch.equal(last[0], drawn)


def test_output_types_are_one_picture(pipeline: LensPipeline) -> None:
    pil, pt, array = (pipeline("a", **SIZE, seed=0, output_type=k).images for k in ("pil", "pt", "np"))
    assert pil[0].size == (48, 32) and pt.shape == (1, 3, 32, 48) and array.shape == (1, 32, 48, 3)
    assert pt.dtype == torch.uint8 and array.dtype == np.uint8
    assert np.array_equal(np.asarray(pil[0]), array[0]) and np.array_equal(pt[0].permute(1, 2, 0).numpy(), array[0])


def test_pixels_and_images_convert_exactly() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_images(to_pixels(images)), images)
    assert to_images(torch.tensor([[[[-2.0, -1.0, 1.0, 2.0]]]])).flatten().tolist() == [0, 0, 255, 255]


def test_the_settings_say_what_was_drawn(pipeline: LensPipeline, checkpoint: Path, catalog: Catalog) -> None:
    again = LensPipeline.from_pretrained(checkpoint, catalog=catalog)
    settings = again("a", **SIZE, seed=0, guidance_scale=2.0, negative_prompt="b").settings
    assert settings == {
        "height": 32,
        "width": 48,
        "steps": 3,
        "guidance_scale": 2.0,
        "negative_prompt": "b",
        "model": str(checkpoint),
        "model_hash": again.version,
        "dtype": "float32",
        "sampler": {"use": "toy:even"},
    }
    assert len(again.version) == 16


def test_a_part_that_a_copy_is_given_stays_with_the_copy(catalog: Catalog) -> None:
    pipeline = LensPipeline.from_parts(toy.PARTS, catalog)
    original, other = pipeline.backbone, copy.copy(pipeline)
    other.backbone = copy.deepcopy(original)
    assert pipeline.backbone is original and other.backbone is not original
    assert "backbone" in pipeline.specs
