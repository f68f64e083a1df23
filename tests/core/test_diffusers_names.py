"""What docs/from-diffusers.md promises to those who know diffusers, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lens_core import ConfigError, LensPipeline, TextFeatures
from lens_core.checkpoints.tensor_files import save_tensors

SMALL: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def loaded() -> LensPipeline:
    return LensPipeline.from_pretrained("tiny:")


@pytest.fixture
def pipe(loaded: LensPipeline) -> LensPipeline:
    """A pipeline of its own, on shared parts."""
    return LensPipeline.from_pipe(loaded)


def drawn(pipe: LensPipeline, **arguments: Any) -> Tensor:
    images: Tensor = pipe(**{"prompt": "a red circle", "seed": 3, "output_type": "pt", **SMALL, **arguments}).images
    return images


def test_parts_have_the_names_of_diffusers(pipe: LensPipeline) -> None:
    assert pipe.transformer is pipe.backbone and pipe.scheduler is pipe.sampler
    assert pipe.tokenizer is pipe.text_encoder.tokenizer
    assert set(pipe.components) == {"vae", "text_encoder", "transformer", "scheduler", "tokenizer"}
    other = object()
    pipe.scheduler = other
    assert pipe.sampler is other


def test_another_pipeline_shares_the_parts_and_may_replace_some(loaded: LensPipeline) -> None:
    sampler = object()
    new = LensPipeline.from_pipe(loaded, scheduler=sampler)
    assert new.backbone is loaded.backbone and new.sampler is sampler and loaded.sampler is not sampler
    assert (new.source, new.presets) == (loaded.source, loaded.presets)
    assert torch.equal(drawn(LensPipeline.from_pipe(loaded)), drawn(loaded))
    with pytest.raises(ConfigError, match="has no part 'unet'; parts are vae, text_encoder, backbone, sampler"):
        LensPipeline.from_pipe(loaded, unet=None)


def test_a_single_file_is_read_with_the_options_of_from_pretrained() -> None:
    class Recorder(LensPipeline):
        @classmethod
        def from_pretrained(cls, uri: str | Path, **options: Any) -> Any:
            return uri, options

    read: Any = Recorder.from_single_file("lens.safetensors", vae="vae.safetensors")
    assert read == ("lens.safetensors", {"vae": "vae.safetensors"})


def test_offloading_by_diffusers_names_is_an_offload_plan(pipe: LensPipeline) -> None:
    plain = drawn(pipe)
    for offload, plan in ((pipe.enable_model_cpu_offload, "model"), (pipe.enable_sequential_cpu_offload, "block")):
        offload("cpu")
        assert pipe.offload_manager is not None and pipe.offload_manager.estimate.plan == plan
        assert torch.equal(drawn(pipe), plain)
    pipe.to("cpu")


def test_to_takes_a_device_or_a_dtype_and_refuses_a_device_that_is_not_there() -> None:
    pipe = LensPipeline.from_pretrained("tiny:")
    assert pipe.to(torch.bfloat16).dtype == "bfloat16"
    assert pipe.to("cpu", torch.float32).dtype == "float32"
    assert pipe.to(device="cpu") is pipe
    assert pipe.to(dtype="bfloat16").dtype == "bfloat16" and pipe.to("auto", "float32").dtype == "float32"
    for target, dtype, message in (
        ("gpu", None, "no device is called 'gpu'; use cpu, cuda"),
        ([], None, r"no device is called '\[\]'"),
        (None, torch.int8, "weights cannot be torch.int8; use float32 or bfloat16"),
        (torch.complex64, None, "weights cannot be torch.complex64"),
        (None, "half", "no dtype is called 'half'"),
        *([] if torch.cuda.is_available() else [("cuda", None, "this machine has no CUDA device")]),
        *([] if torch.backends.mps.is_available() else [("mps", None, "mps: torch can use no such device")]),
    ):
        with pytest.raises(ConfigError, match=message):
            pipe.to(target, dtype)
    with pytest.raises(ConfigError, match="give one dtype"):
        pipe.to(torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_safetensors": True}, "from_pretrained has no option 'use_safetensors'. Known: backbone"),
        ({"max_memory": {}}, "no option 'max_memory'. Known: .*device, dtype, offload, .*, prompt_cache, reasoner"),
        ({"devic": "cpu"}, "from_pretrained has no option 'devic'. Did you mean 'device'"),
        ({"prompt_cach": "x"}, "from_pretrained has no option 'prompt_cach'. Did you mean 'prompt_cache'"),
        ({"deferred": ["text_encodr"]}, "a pipeline has no part 'text_encodr'. Did you mean 'text_encoder'"),
        ({"deferred": 5}, "^deferred must be a text"),
        ({"parts": ["vea"]}, "a pipeline has no part 'vea'. Did you mean 'vae'"),
        ({"parts": 5}, "parts must be a text, or a list of texts, not 5"),
        ({"dtype": 5}, "no dtype is called 5"),
        ({"dtype": torch.int8}, "weights cannot be torch.int8"),
        ({"sampler": 5}, "sampler must be a name or a ComponentSpec, not 5; assign pipeline.sampler"),
        ({"reasoner": 5}, "reasoner must be a name, a ComponentSpec or have refine"),
        ({"offload": 5}, "no offload plan is called '5'"),
    ],
)
def test_an_option_that_there_is_not_is_refused_by_its_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LensPipeline.from_pretrained("tiny:", **options)


def test_one_part_may_be_named_alone() -> None:
    pipe = LensPipeline.from_pretrained("tiny:", parts="vae", deferred="vae")
    assert list(pipe.store.deferred) == ["vae"] and pipe.store.loaded["sampler"] is None
    with pytest.raises(ConfigError, match="no offload plan is called 5"):
        pipe.offload(5)


def test_encoded_prompts_draw_what_the_prompts_draw(pipe: LensPipeline) -> None:
    embeds, negative = pipe.encode_prompt(["a red circle", "a blue star"], "a square")
    assert isinstance(embeds, TextFeatures) and negative is not None
    by_text = drawn(pipe, prompt=["a red circle", "a blue star"], negative_prompt="a square")
    by_embeds = drawn(pipe, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert torch.equal(by_text, by_embeds)
    twice = drawn(pipe, prompt=None, prompt_embeds=embeds, num_images_per_prompt=2)
    assert torch.equal(twice, drawn(pipe, prompt=["a red circle", "a blue star"], num_images_per_prompt=2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt_embeds": torch.zeros(1, 2, 3)}, "must be what encode_prompt returned, not Tensor"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1)}, "give a prompt or prompt_embeds, not both"),
        ({}, "prompt"),
    ],
)
def test_prompts_that_are_none_or_both_are_refused(pipe: LensPipeline, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipe(**{"prompt": None, **SMALL, **wrong})


def test_a_batch_of_negative_embeds_must_fit(pipe: LensPipeline) -> None:
    embeds, _ = pipe.encode_prompt("a red circle")
    two, _ = pipe.encode_prompt(["a", "b"])
    with pytest.raises(ConfigError, match="negative_prompt_embeds has 2 rows for 1 prompts"):
        pipe(prompt_embeds=embeds, negative_prompt_embeds=two, guidance_scale=3.0, **SMALL)


def test_latents_that_a_callback_returns_are_sampled_on_from(pipe: LensPipeline) -> None:
    seen: list[float] = []

    def empty(_: Any, step: int, t: float, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(t)
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    changed = drawn(pipe, callback_on_step_end=empty, output_type="latent")
    assert not changed.any() and seen[-1] == 0 and len(seen) == 2
    with pytest.raises(ConfigError, match=r"returned latents \[1\]; they must be a tensor"):
        drawn(pipe, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})


def test_generators_may_be_a_list(pipe: LensPipeline) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = drawn(pipe, prompt=["a red circle"] * 2, seed=None, generator=generators)
    assert torch.equal(both, drawn(pipe, prompt=["a red circle"] * 2))


def test_a_picture_may_be_pil_a_path_an_array_or_a_tensor(pipe: LensPipeline, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [Image.fromarray(array), tmp_path / "a.png", str(tmp_path / "a.png"), array, array[None], tensor]
    kinds += [tensor[None], array / 255.0, tensor[None] / 255]
    first = drawn(pipe, image=kinds[0], strength=0.5)
    for kind in kinds[1:]:
        assert torch.equal(first, drawn(pipe, image=kind, strength=0.5)), type(kind)
    mask = np.zeros((32, 32), dtype=bool)
    mask[:, :16] = True
    by_array = drawn(pipe, image=array, mask_image=mask)
    assert torch.equal(by_array, drawn(pipe, image=array, mask_image=Image.fromarray(mask.astype(np.uint8) * 255)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (3, r"must be a picture \(PIL, path, array or tensor\), not int"),
        (np.zeros((2, 32, 32, 3), np.uint8), r"has the shape \[2, 32, 32, 3\]; it must be \[H,W,3\]"),
        (torch.zeros(32, 32, 3), r"it must be \[3,H,W\] or \[1,3,H,W\]"),
        (np.full((32, 32, 3), 2.0), r"has floats outside of \[0, 1\]; divide by 255"),
        (np.full((32, 32, 3), np.nan), r"has floats outside of \[0, 1\]"),
        (np.zeros((32, 32, 3), np.int64), "is of int64; give uint8, or floats"),
        (np.zeros((0, 32, 3), np.uint8), "has the shape"),
    ],
)
def test_what_is_no_picture_is_refused(pipe: LensPipeline, wrong: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        drawn(pipe, image=wrong)


def lora(path: Path, pipe: LensPipeline, seed: int) -> Path:
    rng = torch.Generator().manual_seed(seed)
    rows, columns = pipe.backbone.transformer_blocks[0].attn.img_qkv.weight.shape
    name = "transformer.transformer_blocks.0.attn.img_qkv"
    down, up = torch.randn(2, columns, generator=rng) / 4, torch.randn(rows, 2, generator=rng) / 4
    save_tensors(path, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    return path


def test_adapters_are_mixed_by_name(tmp_path: Path) -> None:
    pipe = LensPipeline.from_pretrained("tiny:")
    plain = drawn(pipe)
    a, b = (lora(tmp_path / f"{seed}.safetensors", pipe, seed) for seed in (1, 2))
    pipe.load_lora_weights(a, adapter_name="a")
    only_a = drawn(pipe)
    pipe.load_lora_weights(b, adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    assert pipe.loras == ["1.safetensors:0.5", "2.safetensors:0.25"]
    assert not torch.equal(drawn(pipe), plain)
    pipe.set_adapters("a")
    assert pipe.loras == ["1.safetensors:1", "2.safetensors:0"] and torch.equal(drawn(pipe), only_a)
    for wrong, message in ((["c"], "no adapter called 'c' is loaded; loaded are a, b"), (["a", "b"], "one each")):
        with pytest.raises(ConfigError, match=message):
            pipe.set_adapters(wrong, [1.0, 2.0, 3.0] if len(wrong) > 1 else 1.0)
    with pytest.raises(ConfigError, match="an adapter called 'a' is loaded already"):
        pipe.load_lora_weights(a, adapter_name="a")
    for names, weights, message in (
        (5, 1.0, "adapter_names must be a text, or a list of texts, not 5"),
        (["a", "a"], [1.0, 2.0], "an adapter is named twice"),
        ("a", "0.5", "the weight of the adapter 'a' must be a number, not '0.5'"),
        ("a", {"a": 1}, "the weight of the adapter 'a' must be a number"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipe.set_adapters(names, weights)
    tensors: Any = {"a": torch.zeros(1)}
    with pytest.raises(ConfigError, match="a LoRA must be a file or a folder, not dict"):
        pipe.load_lora_weights(tensors)
    with pytest.raises(ConfigError, match="the weight of a LoRA must be a number, not None"):
        pipe.load_lora_weights(a, None)
    with pytest.raises(ConfigError, match="adapter_name must be a text, not 5"):
        pipe.load_lora_weights(a, adapter_name=5)
    pipe.set_adapters(["a", "b"], np.array([0.5, 0.25]))
    assert pipe.loras == ["1.safetensors:0.5", "2.safetensors:0.25"]
    pipe.unload_lora_weights()
    assert torch.equal(drawn(pipe), plain) and pipe.loras == []
    with pytest.raises(ConfigError, match="take LoRAs out with unload_lora_weights"):
        pipe.unfuse_lora()


def test_what_cannot_be_encoded_is_refused_by_its_name() -> None:
    pipe = LensPipeline.from_pretrained("tiny:")
    for prompt, negative, message in (
        ([], None, "there is no prompt"),
        (None, None, "prompt must be a text, or a list of texts, not None"),
        ("a", [5], "negative_prompt must be a text, or a list of texts, but 5 is among them"),
        (["a", "b", "c"], ["x", "y"], "2 negative prompts do not fit 3; give one, or one each"),
    ):
        with pytest.raises(ConfigError, match=message):
            pipe.encode_prompt(prompt, negative)
    assert [len(rows.mask) for rows in pipe.encode_prompt(["a", "b"], ["x"]) if rows is not None] == [2, 2]


def test_a_sampler_may_be_named_and_a_variant_is_refused() -> None:
    assert LensPipeline.from_pretrained("tiny:", sampler="heun").specs["sampler"].use == "lens_flow:heun"
    with pytest.raises(ConfigError, match="variant='fp16': Lens reads one set of files; choose the precision by dtype"):
        LensPipeline.from_pretrained("tiny:", variant="fp16")


def test_printing_a_pipeline_gives_a_readable_account(pipe: LensPipeline) -> None:
    lines = repr(pipe).splitlines()
    assert lines[0] == "LensPipeline(tiny:) on cpu"
    assert lines[1].startswith("  vae           Flux2VAE (lens_flux2:flux2), ") and "float32" in lines[1]
    assert lines[-1].startswith("  presets       20 steps, guidance ")


def test_the_bar_of_a_call_can_be_set(pipe: LensPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    drawn(pipe)
    assert capsys.readouterr().err == ""  # no terminal, no bar
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    drawn(pipe)
    assert "drawing" in capsys.readouterr().err


def test_a_negative_prompt_beside_its_embeds_is_refused(pipe: LensPipeline) -> None:
    _, negative = pipe.encode_prompt("a red circle", "a square")
    with pytest.raises(ConfigError, match="give a negative_prompt or negative_prompt_embeds, not both"):
        drawn(pipe, negative_prompt="a star", negative_prompt_embeds=negative)
    with pytest.warns(UserWarning, match="a negative prompt has no effect at guidance 1"):
        drawn(pipe, negative_prompt_embeds=negative, guidance_scale=1.0)
