"""Beginning at a picture, drawing part of one anew, and guidance for part of the way, on every sampler."""

from __future__ import annotations

import sys
from typing import Any

import lens_flow
import numpy as np
import pytest
import torch
import toy
from PIL import Image
from torch import Tensor

from lens_core.catalog import Catalog
from lens_core.inference.image_to_image import read_init_image, to_tensor
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.pixels import to_pixels
from lens_core.io.images import to_rgb
from lens_core.types import ConfigError

SAMPLERS = pytest.mark.parametrize("name", ["euler", "heun", "dpmpp", "euler_ancestral"])
HOW: dict[str, Any] = {"output_type": "pt", "seed": 3, "num_inference_steps": 8}


@pytest.fixture
def drawn(pipeline: LensPipeline) -> LensPipeline:
    """The toy pipeline on the samplers of lens_flow."""
    pipeline.catalog = Catalog.of(toy, lens_flow, sys.modules[__name__])
    pipeline.use_sampler("euler")
    return pipeline


def photo(height: int = 32, width: int = 48, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def left_half(height: int = 32, width: int = 48) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return Image.fromarray(mask)


def latents(pipeline: LensPipeline, **call: Any) -> Tensor:
    result: Tensor = pipeline("a cat", **{**HOW, "output_type": "latent", **call}).images
    return result


def source(pipeline: LensPipeline, picture: Image.Image) -> Tensor:
    latent: Tensor = pipeline.vae.encode(to_pixels(to_tensor(picture))).detach()
    return latent


@SAMPLERS
def test_strength_1_is_the_picture_from_noise_alone(name, drawn):
    drawn.use_sampler(name)
    alone = drawn("a cat", height=32, width=48, **HOW).images
    assert torch.equal(drawn("a cat", image=photo(), strength=1.0, **HOW).images, alone)


def test_strength_0_is_what_the_vae_makes_of_the_picture(drawn):
    result = latents(drawn, image=photo(), strength=0.0)
    assert torch.equal(result, source(drawn, photo()))


@SAMPLERS
def test_the_less_strength_the_nearer_to_the_picture(name, drawn):
    drawn.use_sampler(name)
    z = source(drawn, photo())
    little, much = (float((latents(drawn, image=photo(), strength=s) - z).norm()) for s in (0.1, 1.0))
    assert 0 < little < 0.6 * much


@pytest.mark.parametrize(("strength", "steps"), [(0.5, 4), (0.01, 1), (0.8, 6), (1.0, 8)])
def test_strength_is_the_share_of_steps_that_are_made(strength, steps, drawn):
    seen: list[float] = []
    drawn("a cat", image=photo(), strength=strength, callback_on_step_end=lambda p, i, t, k: seen.append(t), **HOW)
    assert seen == drawn.sampler.times((2, 3), 8)[-steps:].tolist()


def test_it_begins_with_as_much_noise_as_the_time_asks_for(drawn, monkeypatch):
    begun: list[Tensor] = []
    walk = type(drawn.sampler).sample
    monkeypatch.setattr(
        type(drawn.sampler),
        "sample",
        lambda self, v, x, steps, start=0: (begun.append(x), walk(self, v, x, steps, start))[1],
    )
    latents(drawn, image=photo(), strength=0.5)
    t = float(drawn.sampler.times((2, 3), 8)[4])
    noise = drawn.noise([torch.Generator().manual_seed(3)], (2, 3))
    torch.testing.assert_close(begun[0], (1 - t) * source(drawn, photo()) + t * noise)


@SAMPLERS
@pytest.mark.parametrize("strength", [None, 0.5])
def test_what_is_not_masked_stays_in_latents_and_in_pixels(name, strength, drawn):
    drawn.use_sampler(name)
    how = {"image": photo(), "mask_image": left_half(), "strength": strength}
    z = source(drawn, photo())
    result = latents(drawn, **how)
    # 24 of 48 px: of the three cells across, the second holds the border and is drawn anew with the first
    assert torch.equal(result[..., 2:], z[..., 2:])
    assert (result[..., :2] - z[..., :2]).abs().min() > 0
    images = drawn("a cat", **how, **HOW).images[0]
    before = to_tensor(photo())[0]
    assert torch.equal(images[:, :, 24:], before[:, :, 24:])
    assert not torch.equal(images[:, :, :24], before[:, :, :24])


def test_what_stays_is_held_on_the_way_and_not_only_pasted(drawn):
    """At every time, the kept latents are the picture with that time's noise: what the model sees around the hole."""
    seen: list[tuple[float, Tensor]] = []
    noise = drawn.noise([torch.Generator().manual_seed(3)], (2, 3))
    drawn(
        "a cat", image=photo(), mask_image=left_half(), **HOW,
        callback_on_step_end=lambda p, i, t, k: seen.append((t, k["latents"])),
    )  # fmt: skip
    z = source(drawn, photo())
    for t, x in seen:
        torch.testing.assert_close(x[..., 2:], ((1 - t) * z + t * noise)[..., 2:], atol=1e-5, rtol=1e-5)


def test_a_picture_alone_is_the_one_in_a_batch_with_new_noise_too(drawn):
    drawn.use_sampler("euler_ancestral")
    how = {**HOW, "output_type": "latent", "height": 32, "width": 48}
    together = drawn(["a", "b"], **how).images
    alone = drawn("b", **{**how, "seed": 4}).images
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(together[:1], drawn("a", **{**how, "seed": 5}).images, atol=0.1)


def test_guidance_can_be_kept_to_an_interval(drawn):
    size = {"height": 32, "width": 48}
    calls_made: list[tuple[float, int]] = []
    forward = drawn.backbone.forward

    def spy(x: Tensor, t: Tensor, text: Any) -> Tensor:
        calls_made.append((float(t[0]), text.features.shape[2]))
        return forward(x, t, text)

    drawn.backbone.forward = spy
    whole = latents(drawn, **size, guidance_scale=5.0)
    assert torch.equal(latents(drawn, **size, guidance_scale=5.0, guidance_interval=(0.0, 1.0)), whole)
    times = drawn.sampler.times((2, 3), 8)[:-1].tolist()
    low, high = times[5], times[2]
    calls_made.clear()
    part = latents(drawn, **size, guidance_scale=5.0, guidance_interval=(low, high))
    guided = [t for t in times if [a for a, _ in calls_made].count(t) == 2]
    assert guided == times[2:5]  # low is outside, high within
    assert not torch.equal(part, whole)
    none = latents(drawn, **size, guidance_scale=5.0, guidance_interval=(0.0, times[-1] / 2))
    assert torch.equal(none, latents(drawn, **size, guidance_scale=1.0))


@pytest.mark.parametrize("size", [(40, 64), (40, 70), (32, 64)])
def test_a_mask_that_is_enlarged_keeps_its_thin_lines(size):
    mask = Image.new("L", (60, 40), 255)
    mask.paste(0, (22, 0, 23, 40))  # one column of pixels stays
    _, _, repainted = read_init_image(photo(40, 60), mask, None, size)
    kept = ~repainted[0, 0]
    assert kept.shape == size and 1 <= kept[0].sum() <= 2 and (kept == kept[0]).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"strength": 0.5}, "a strength without a picture has no effect"),
        ({"mask_image": left_half()}, "a mask without a picture has no effect"),
        ({"image": photo(), "strength": 1.5}, r"strength is 1.5; it must be in \[0, 1\]"),
        ({"image": photo(), "strength": float("nan")}, "strength is nan"),
        ({"image": photo(33, 48)}, "height 33 is not a multiple of 16 px, the VAE's grid; use 32"),
        ({"image": photo(), "mask_image": left_half(32, 32)}, "the mask is 32x32 px and the picture 32x48"),
        ({"image": photo(), "mask_image": Image.new("L", (48, 32))}, "the mask is black all over"),
        ({"guidance_interval": (0.5, 0.5)}, "0 <= low < high <= 1"),
        ({"guidance_interval": (-0.1, 0.5)}, "0 <= low < high <= 1"),
        ({"guidance_interval": (float("nan"), 1)}, "0 <= low < high <= 1"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(call, words, drawn):
    with pytest.raises(ConfigError, match=words):
        drawn("a cat", **HOW, **call)


def test_a_sampler_that_begins_at_noise_alone_is_named(pipeline):
    with pytest.raises(ConfigError, match="can only begin at noise: use strength 1"):
        pipeline("a cat", image=photo(), strength=0.5, **HOW)
    pipeline("a cat", image=photo(), strength=1.0, **HOW)


def test_a_size_that_is_asked_for_resizes_picture_and_mask(drawn):
    how = {"image": photo(64, 96), "mask_image": left_half(64, 96), "height": 32, "width": 48}
    images = drawn("a cat", **how, **HOW).images[0]
    want = to_tensor(photo(64, 96).resize((48, 32)))[0]
    assert torch.equal(images[:, :, 24:], want[:, :, 24:])


def test_one_white_pixel_of_a_larger_mask_is_repainted(drawn):
    mask = Image.new("L", (96, 64))
    mask.putpixel((3, 5), 255)
    how = {"image": photo(64, 96), "height": 32, "width": 48}
    before = drawn("a cat", strength=0.0, mask_image=mask, **how, **HOW).images
    after = drawn("a cat", mask_image=mask, **how, **HOW).images
    changed = (before != after).any(dim=1)[0].nonzero()
    assert changed.tolist() == [[2, 1]]


def test_a_mask_that_is_white_and_transparent_keeps_the_picture_there(drawn):
    clear = Image.new("RGBA", (48, 32), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (0, 0, 24, 32))
    images = drawn("a cat", image=photo(), mask_image=clear, **HOW).images
    assert torch.equal(images, drawn("a cat", image=photo(), mask_image=left_half(), **HOW).images)


def test_a_picture_of_sixteen_bits_is_drawn_upon_as_its_upper_eight(drawn):
    deep = Image.fromarray(np.full((32, 48), 100 * 257, np.uint16))
    images = drawn("a cat", image=deep, mask_image=left_half(), **HOW).images[0]
    assert (images[:, :, 24:] == 100).all()


def test_any_picture_becomes_rgb_upright_and_over_white():
    grey = Image.new("L", (4, 2), 9)
    assert to_rgb(grey).getpixel((0, 0)) == (9, 9, 9)
    clear = Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("RGB", (4, 2), (10, 20, 30)).quantize(4)
    assert to_rgb(palette).getpixel((0, 0)) == (10, 20, 30)
    turned = Image.new("RGB", (4, 2))
    turned.putpixel((0, 0), (255, 0, 0))
    turned.getexif()[0x0112] = 6  # to be turned by a quarter, clockwise
    upright = to_rgb(turned)
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (255, 0, 0)


def test_the_settings_tell_what_it_began_with(drawn):
    settings = drawn(
        "a", image=photo(), mask_image=left_half(), strength=0.5, guidance_interval=(0.1, 1), **HOW
    ).settings
    assert settings["strength"] == 0.5 and settings["guidance_interval"] == [0.1, 1]
    assert settings["sampler"] == {"use": "lens_flow:euler", "mu": None}
    other = drawn("a", image=photo(seed=1), mask_image=left_half(), strength=0.5, **HOW).settings
    assert other["image_hash"] != settings["image_hash"] and other["mask_hash"] == settings["mask_hash"]
    plain = drawn("a", height=32, width=48, **HOW).settings
    assert not {"strength", "image_hash", "mask_hash", "guidance_interval"} & plain.keys()
