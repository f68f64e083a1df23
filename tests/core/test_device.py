"""Device discipline without a GPU: the meta device stands in for one.

It has shapes and no values, so whatever reads a value on the way (a wait for the device, on a GPU) fails, and so does
whatever mixes it with the CPU. Gradients work on it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lens_core import Batch, Catalog, LensPipeline, TextFeatures
from lens_core.config import ComponentSpec
from lens_core.recipe import build

STAND_IN = torch.device("meta")


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.installed()


@pytest.fixture(scope="module")
def parts(catalog: Catalog) -> dict[str, Any]:
    """The VAE and the backbone of tiny: on the stand-in."""
    specs = LensPipeline.from_pretrained("tiny:").specs
    built = {}
    for kind in ("vae", "backbone"):
        _, cls, config = build(catalog, kind, specs[kind], "$")
        with STAND_IN:
            built[kind] = cls(config)
    return built


def encoded(parts: dict[str, Any]) -> Batch:
    """Two latents, and text features whose padding is known on the host, as encoders and caches give them."""
    channels, layers, width = parts["backbone"].takes()
    mask = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    features = torch.empty(2, layers, 7, width, device=STAND_IN)
    text = TextFeatures(features, mask.to(STAND_IN), mask)
    return Batch(None, ("a", "b"), (), torch.empty(2, channels, 4, 4, device=STAND_IN), text)


def step(catalog: Catalog, name: str, parts: dict[str, Any], batch: Batch) -> dict[str, nn.Module]:
    """One loss of a method and its gradients."""
    _, cls, config = build(catalog, "method", ComponentSpec(name), "$")
    method = cls(config, LensPipeline(**parts).to(STAND_IN))
    modules: dict[str, nn.Module] = dict(method.trainable_modules())
    rng = torch.Generator().manual_seed(0)
    (micro,) = next(iter(method.steps(iter([batch]), modules, rng)))
    for module_name in method.update_order(0):
        modules[module_name].requires_grad_(True)
        method.loss(module_name, modules, micro, rng).total.backward()
    return modules


def test_flow_matching_reads_no_value_and_mixes_no_device(catalog: Catalog, parts: dict[str, Any]) -> None:
    modules = step(catalog, "flow_matching", parts, encoded(parts))
    assert {p.grad.device for p in modules["backbone"].parameters() if p.grad is not None} == {STAND_IN}


def test_autoencode_reads_no_value_and_mixes_no_device(catalog: Catalog, parts: dict[str, Any]) -> None:
    images = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device=STAND_IN)
    modules = step(catalog, "autoencode", parts, Batch(images, ("a", "b")))
    assert any(p.grad is not None for p in modules["vae"].parameters())


def test_a_guided_velocity_and_the_decoder_read_no_value(parts: dict[str, Any]) -> None:
    pipeline, batch = LensPipeline(**parts), encoded(parts)
    x = batch.latents
    assert isinstance(x, torch.Tensor)
    with torch.no_grad():
        velocity = parts["backbone"](x, torch.empty(2, device=STAND_IN), batch.text)
        assert velocity.shape == x.shape and velocity.device == STAND_IN
        assert pipeline.decode(x).device == STAND_IN
        assert parts["vae"].encode(torch.empty(2, 3, 32, 32, device=STAND_IN)).shape == x.shape


def test_the_stand_in_sees_what_it_is_there_for(parts: dict[str, Any]) -> None:
    x = torch.empty(2, 4, device=STAND_IN)
    with pytest.raises(RuntimeError, match="meta"):
        float(x.sum())  # reads a value
    with pytest.raises(RuntimeError, match=r"meta|device"):
        nn.Linear(4, 4)(x)  # weights on the CPU
