"""The embedded checkpoint draws on a GPU what it draws on a CPU, in every way of drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_core import Catalog, ConfigError, LensPipeline
from lens_core.inference import lora
from lens_core.inference.offload_plans import PLANS
from lens_core.recipe import LoraSpec
from lens_core.types import NumericalError

PROMPTS = ["two red circles left of a blue star", "a green square"]
CALL: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 4, "seed": 3}


def draw(pipeline: LensPipeline, **more: Any) -> Tensor:
    latents: Tensor = pipeline(PROMPTS, output_type="latent", **{**CALL, **more}).images
    return latents.float().cpu()


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm())


@pytest.fixture(scope="module")
def reference(installed: Catalog) -> LensPipeline:
    """The same checkpoint on the CPU, float32."""
    return LensPipeline.from_pretrained("tiny:", catalog=installed, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp", "euler_ancestral"])
def test_a_seed_draws_the_same_picture_as_on_a_cpu(sampler: str, tiny: LensPipeline, reference: LensPipeline) -> None:
    for pipeline in (tiny, reference):
        pipeline.use_sampler(sampler)
    got, want = draw(tiny), draw(reference)
    reference.use_sampler("euler")
    assert distance(got, want) < 1e-3


def test_turbo_draws_the_same_picture_as_on_a_cpu(installed: Catalog, device: torch.device) -> None:
    got, want = (
        draw(LensPipeline.from_pretrained("tiny:turbo", catalog=installed, dtype=torch.float32, device=where))
        for where in (device, "cpu")
    )
    assert distance(got, want) < 1e-3


def test_pixels_are_those_of_a_cpu(tiny: LensPipeline, reference: LensPipeline) -> None:
    got, want = (p(PROMPTS, output_type="pt", **CALL).images.cpu().int() for p in (tiny, reference))
    assert got.shape == want.shape and (got - want).abs().float().mean() < 0.5


def test_bfloat16_is_near_float32(tiny: LensPipeline, installed: Catalog, device: torch.device) -> None:
    half = LensPipeline.from_pretrained("tiny:", catalog=installed, dtype=torch.bfloat16, device=device)
    assert half.dtype == "bfloat16"
    got, want = (p(PROMPTS, output_type="pt", **CALL).images.float().cpu() for p in (half, tiny))
    assert (got - want).abs().mean() < 12  # of 255


def test_bfloat16_is_the_default_on_a_gpu(installed: Catalog, device: torch.device) -> None:
    pipeline = LensPipeline.from_pretrained("tiny:", catalog=installed, device=device)
    assert pipeline.dtype == ("bfloat16" if device.type == "cuda" else "float32")


def test_float16_is_refused(tiny: LensPipeline, installed: Catalog, device: torch.device) -> None:
    with pytest.raises((ConfigError, NumericalError), match="float16"):
        LensPipeline.from_pretrained("tiny:", catalog=installed, dtype=torch.float16, device=device)
    with pytest.raises((ConfigError, NumericalError), match="float16"):
        tiny.to(dtype=torch.float16)


def test_a_generator_on_the_device_draws_and_its_state_moves_on(tiny: LensPipeline, device: torch.device) -> None:
    first, second = (
        tiny(
            PROMPTS[0], output_type="latent", generator=torch.Generator(device).manual_seed(5), **{**CALL, "seed": None}
        )
        for _ in range(2)
    )
    assert torch.equal(first.images, second.images) and first.images.device.type == device.type
    generator = torch.Generator(device).manual_seed(5)
    options = {**CALL, "seed": None, "generator": generator, "output_type": "latent"}
    assert not torch.equal(tiny(PROMPTS[0], **options).images, tiny(PROMPTS[0], **options).images)


def test_the_same_call_twice_has_the_same_bits(tiny: LensPipeline) -> None:
    assert torch.equal(draw(tiny), draw(tiny))


def test_an_image_is_the_start_and_a_mask_keeps_the_rest(tiny: LensPipeline, reference: LensPipeline) -> None:
    from PIL import Image

    start = reference(PROMPTS[0], **CALL).images[0]
    mask = Image.new("L", start.size, 0)
    mask.paste(255, (0, 0, 32, 64))
    options = {**CALL, "image": start, "mask_image": mask, "strength": 0.8, "output_type": "pt"}
    got, want = (p(PROMPTS[1], **options).images.cpu().int() for p in (tiny, reference))
    assert (got - want).abs().float().mean() < 1
    plain = torch.from_numpy(__import__("numpy").asarray(start).copy()).permute(2, 0, 1).int()
    assert torch.equal(got[0, :, :, 40:], plain[:, :, 40:])  # far from the mask every pixel is as it was


def test_a_lora_is_folded_in_and_taken_out_bit_for_bit(
    tiny: LensPipeline, reference: LensPipeline, tmp_path: Path
) -> None:
    spec = LoraSpec(rank=2, targets=("attn.img_qkv", "img_mlp.w1"))
    other = LensPipeline.from_pretrained("tiny:", dtype=torch.float32, device="cpu").backbone
    lora.attach(other, spec)
    rng = torch.Generator().manual_seed(1)
    for name, p in other.named_parameters():
        if lora.owned(name):
            p.data = 0.1 * torch.randn(p.shape, generator=rng)
    lora.save(other, spec, tmp_path / "lora.safetensors", "transformer")
    plain = draw(tiny)
    for pipeline in (tiny, reference):
        pipeline.load_lora_weights(tmp_path / "lora.safetensors", 0.7)
    got, want = draw(tiny), draw(reference)
    for pipeline in (tiny, reference):
        pipeline.unload_lora_weights()
    assert distance(got, want) < 1e-3 and distance(plain, want) > 0.01
    assert torch.equal(draw(tiny), plain)


@pytest.mark.parametrize("plan", PLANS)
def test_every_offload_plan_draws_the_same_bits(plan: str, tiny: LensPipeline, device: torch.device) -> None:
    want = draw(tiny)
    tiny.to("cpu")
    tiny.prompt_cache.entries.clear()
    tiny.offload(plan, device)
    got = draw(tiny)
    assert torch.equal(got, want) if plan != "encoder-cpu" else distance(got, want) < 1e-3
    assert torch.equal(draw(tiny), got)


def test_decoding_on_the_device_is_that_of_a_cpu(tiny: LensPipeline, reference: LensPipeline) -> None:
    z = torch.randn(2, tiny.vae.channels, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, want = (p.decode(z.to(p.device)) for p in (tiny, reference))
        assert distance(got, want) < 1e-4
        assert distance(tiny.vae.encode(got), reference.vae.encode(want)) < 1e-4
