"""Device discipline without a GPU: the meta device stands in for one.

It has shapes and no values, so whatever reads a value on the way (a wait for the device, on a GPU) fails, and so does
whatever mixes it with the CPU. Gradients work on it.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lens_core import Batch, Catalog, ConfigError, LensPipeline, TextFeatures
from lens_core.config import ComponentSpec
from lens_core.evaluation import bench
from lens_core.evaluation.bench import BenchmarkRequest
from lens_core.evaluation.pipeline_generator import PipelineGenerator
from lens_core.inference.guidance import guided_velocity
from lens_core.inference.parts import resolve_device
from lens_core.inference.requests import ModelRequest
from lens_core.recipe import build
from lens_core.types import LensError, move

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


def test_a_mask_that_only_the_gpu_has_is_read_once_and_not_in_every_step(parts: dict[str, Any]) -> None:
    class Mask(torch.Tensor):
        """A mask on a GPU, as far as anybody looks."""

        reads = 0
        device = torch.device("cuda:1")  # type: ignore[assignment]

        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            Mask.reads += 1
            return self.as_subclass(torch.Tensor)

    text = TextFeatures(torch.zeros(1, 2, 3, 4), torch.ones(1, 3, dtype=torch.bool).as_subclass(Mask))
    seen: list[TextFeatures] = []

    class Backbone(nn.Linear):
        def forward(self, x: torch.Tensor, t: torch.Tensor, text: TextFeatures) -> torch.Tensor:  # type: ignore[override]
            seen.append(text)
            _ = text.known
            return x

    x = torch.zeros(1, 2, 4, 4)
    for negative in (None, text):
        velocity = guided_velocity(Backbone(1, 1), text, negative, 3.0)
        before, Mask.reads = Mask.reads, 0
        for _ in range(3):
            velocity(x, torch.ones(1))
        assert Mask.reads == 0 and before == 1 + (negative is not None)
    assert len(seen) == 12


def test_the_mask_of_a_negative_prompt_is_known_on_the_host() -> None:
    pipeline = LensPipeline.from_pretrained("tiny:", device="cpu")
    text = pipeline._encode_negative(["", "a blue square"])
    assert text is not None and text.host is not None and torch.equal(text.host, text.mask)
    assert not text.mask[0].any() and text.mask[1].any() and not text.features[0].any()


def test_only_a_copy_to_cuda_is_asynchronous_and_its_source_is_pinned() -> None:
    calls: list[Any] = []

    class Host:
        device = torch.device("cpu")

        def pin_memory(self) -> Host:
            calls.append("pinned")
            return self

        def to(self, device: str, **options: Any) -> None:
            calls.append((device, options))

    tensor: Any = Host()
    for device in ("cuda:1", "mps", "cpu"):
        move(tensor, device)
    assert calls == ["pinned", ("cuda:1", {"non_blocking": True}), ("mps", {}), ("cpu", {})]


def test_a_gpu_that_is_not_there_is_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1") and resolve_device("cuda") == torch.device("cuda")
    with pytest.raises(ConfigError, match=r"^cuda:2: CUDA devices are numbered from 0, and there are 2; use cuda:1$"):
        resolve_device("cuda:2")


def test_a_device_whose_package_is_missing_is_refused() -> None:
    with pytest.raises(ConfigError, match="hpu: torch can use no such device on this machine; use cpu"):
        resolve_device("hpu")


def test_modules_go_home_where_not_all_of_them_fit() -> None:
    from lens_gpt_oss.generation import _all_on_one_device

    moves: list[Any] = []

    class Recorded(nn.Linear):
        def to(self, device: Any) -> None:  # type: ignore[override]
            moves.append(device)
            if len(moves) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

    unused = [Recorded(1, 1), Recorded(1, 1)]
    model = SimpleNamespace(embed_tokens=nn.Linear(1, 1, device=STAND_IN))
    encoder = SimpleNamespace(model=model, unused_modules=lambda: unused)
    with pytest.raises(torch.OutOfMemoryError), _all_on_one_device(encoder):
        pass
    assert moves == [STAND_IN, STAND_IN, torch.device("cpu"), torch.device("cpu")]


def test_a_benchmark_plans_offloading_for_its_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []
    model = SimpleNamespace(
        vae=SimpleNamespace(downscale=8), presets={"steps": 20, "guidance_scale": 4.0}, size=lambda *wanted: wanted[:2]
    )

    def load(self: ModelRequest, workload: Any, catalog: Any) -> Any:
        planned.append(workload(model))
        raise LensError("far enough")

    def describe(generator: PipelineGenerator) -> Any:
        return generator.describe()

    monkeypatch.setattr(ModelRequest, "load", load)
    monkeypatch.setattr(bench.contracts, "describe", describe)
    generator = ComponentSpec("pipeline", {"batch_size": 3, "steps": 7, "negative_prompt": "x"})
    for size in ((64, 96), None):
        with pytest.raises(LensError, match="far enough"):
            bench.run_benchmark(BenchmarkRequest("shapes", generator, size, limit=1), tmp_path)
    assert [w.size for w in planned] == [(64, 96), planned[1].size] and planned[0].batch == 3
    assert planned[0].steps == 7 and not planned[0].guided
