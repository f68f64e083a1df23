"""The cache of latents and text features: as if encoded online, filled in parts, never mixed."""

from __future__ import annotations

import hashlib
import io
import json
import re
import resource
import signal
from itertools import islice
from pathlib import Path

import lens_data
import lens_flow
import numpy as np
import pytest
import torch
import toy
from attrs import evolve
from lens_data import caching
from lens_data.caching import encoders
from lens_data.commands import cache
from lens_data.dataset import StoreDataset, fill_cache
from lens_data.store import Store
from lens_flow.matching import EncodedBatch, FlowMatching
from PIL import Image

from lens_core.catalog import Catalog
from lens_core.inference.pipeline import LensPipeline
from lens_core.io.atomic_files import WriteError
from lens_core.recipe import read_recipe, structure
from lens_core.training.trainer import Trainer
from lens_core.types import Batch, ConfigError, LensError

pytestmark = pytest.mark.filterwarnings("ignore:.*is corrupt")
BUCKETS = (((32, 32), (32, 48)),)


def row(number: int) -> dict[str, object]:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40 + 20 * (number % 2), 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = file.getvalue()
    words = {"brief": f"no {number}", "dense": f"the number {number}"}
    facts = {"height": 40, "width": pixels.shape[1], "source": "test", "image": data}
    return {"id": hashlib.sha256(data).hexdigest(), **facts, **words}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """20 pictures, two of them torn."""
    rows = [row(n) for n in range(20)]
    for n in (4, 7):
        rows[n]["image"] = rows[n]["image"][:500]
    Store(str(tmp_path / "store"), create=True).add(rows)
    return tmp_path / "store"


def config(store: Path, **changes: object) -> StoreDataset.Config:
    return StoreDataset.Config(
        **{"store": str(store), "buckets": BUCKETS, "batch": 4, "dense_caption_ratio": 0.5, "cache": "c", **changes}
    )


def take(config: StoreDataset.Config, number: int) -> list[Batch]:
    return list(islice(StoreDataset(config).batches(0, 1), number))


def quiet(_: str) -> None:
    pass


def test_training_from_the_cache_equals_training_online(store, pipeline):
    fill_cache(config(store), pipeline, log=quiet)
    online = take(config(store, cache=""), 20)
    cached = take(config(store), 20)
    method = FlowMatching(FlowMatching.Config(), pipeline)
    steps = method.steps(iter(online), method.trainable_modules(), torch.Generator())
    for (sample,), before, batch in zip(steps, online, cached, strict=True):
        assert batch.images is None and batch.captions == before.captions and batch.keys == before.keys
        torch.testing.assert_close(batch.latents, sample.z, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(batch.text.features, sample.text.features, rtol=1e-6, atol=1e-6)
        assert torch.equal(batch.text.mask, sample.text.mask)
        losses = [
            method.loss("backbone", method.trainable_modules(), s, torch.Generator().manual_seed(1)).total
            for s in (sample, EncodedBatch(batch.latents, batch.text))
        ]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert {tuple(b.latents.shape[1:]) for b in cached} == {(4, 2, 2), (4, 2, 3)}
    assert {c.split()[0] for b in cached for c in b.captions} == {"no", "the"}


def test_a_corrupt_picture_is_noted_and_replaced_as_online(store, pipeline):
    log = []
    fill_cache(config(store), pipeline, log=log.append)
    assert log[-1] == "cache c: rank 0 of 1 is done; 60 encoded, 2 corrupt pictures"  # 20 pictures, 40 captions
    datasets = [StoreDataset(config(store, cache=name)) for name in ("c", "")]
    captions = [[b.captions for b in islice(d.batches(0, 1), 20)] for d in datasets]
    assert captions[0] == captions[1]
    assert set(datasets[0].corrupt) == set(datasets[1].corrupt) and len(datasets[0].corrupt) == 2


def test_a_cache_that_was_not_finished_is_refused_then_gone_on_with(store, pipeline, monkeypatch):
    monkeypatch.setattr(caching, "FLUSH", 1)
    encode, calls = caching._text, []

    def dying(*arguments: object) -> dict[str, torch.Tensor]:
        calls.append(arguments)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(caching, "_text", dying)
    with pytest.raises(KeyboardInterrupt):
        fill_cache(config(store), pipeline, log=quiet)
    with pytest.raises(LensError, match=r"the cache 'c' lacks 50 of 60 latents and texts; run `lens data cache`"):
        StoreDataset(config(store))
    fill_cache(config(store), pipeline, log=quiet)
    assert len(calls) == 11 + 30 and len(take(config(store), 3)) == 3
    fill_cache(config(store), pipeline, log=quiet)
    assert len(calls) == 41


def test_a_full_disk_is_one_line_and_the_cache_goes_on_afterwards(store, pipeline):
    Store(str(store)).side_table("cache-c", {"key": "string", "data": "large_binary"}, json.dumps(encoders(pipeline)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
        with pytest.raises(WriteError, match=r"store: cannot be written: File too large; make room"):
            fill_cache(config(store), pipeline, log=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    fill_cache(config(store), pipeline, log=quiet)
    assert len(take(config(store), 3)) == 3


def test_ranks_share_the_work_and_the_result_is_that_of_one(store, pipeline):
    log = []
    for rank in (2, 0, 1):
        fill_cache(config(store), pipeline, rank, 3, log.append)
    fill_cache(config(store, cache="whole"), pipeline, log=quiet)
    shares = [int(line.split("; ")[1].split()[0]) for line in log if "is done" in line]
    assert sum(shares) == 60 and min(shares) > 8
    for a, b in zip(take(config(store), 8), take(config(store, cache="whole"), 8), strict=True):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.text.features, b.text.features)


def test_only_captions_that_can_be_drawn_are_encoded(store, pipeline):
    log = []
    fill_cache(config(store, dense_caption_ratio=1.0), pipeline, log=log.append)
    assert "; 40 encoded" in log[-1]
    with pytest.raises(LensError, match="lacks 20 of 60"):
        StoreDataset(config(store))


def test_another_encoder_needs_another_cache(store, pipeline):
    fill_cache(config(store), pipeline, log=quiet)
    with torch.no_grad():
        pipeline.vae.gain.add_(1)
    with pytest.raises(LensError, match="is of another VAE or text encoder; give the new one another name"):
        fill_cache(config(store), pipeline, log=quiet)
    fill_cache(config(store, cache="second"), pipeline, log=quiet)
    assert not torch.equal(take(config(store), 1)[0].latents, take(config(store, cache="second"), 1)[0].latents)


def test_a_cache_must_be_there_and_have_a_name(store, pipeline):
    with pytest.raises(LensError, match="has no cache 'c'; fill it with `lens data cache`"):
        StoreDataset(config(store))
    with pytest.raises(ConfigError, match="names no cache"):
        fill_cache(config(store, cache=""), pipeline, log=quiet)
    pipeline.vae = None
    with pytest.raises(ConfigError, match="needs a vae and a text_encoder"):
        fill_cache(config(store), pipeline, log=quiet)
    with pytest.raises(ConfigError, match="rank 2 must be"):
        cache(Path("recipe.yaml"), rank=2, world=2)


def test_a_recipe_fills_its_cache_and_trains_from_its_store(store, tmp_path, monkeypatch, capsys):
    catalog = Catalog.of(toy, lens_data, lens_flow)
    monkeypatch.setattr(Catalog, "installed", lambda: catalog)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
        pipeline: {{vae: blocks, text_encoder: letters, backbone: mixer, sampler: even, steps: 2}}
        method: flow_matching
        dataset: {{use: store, store: {store}, buckets: [[[32, 32], [32, 48]]], batch: 4, cache: c}}
        train: {{steps: 3}}
    """)
    assert cache(recipe) == 0
    assert capsys.readouterr().out.endswith("40 encoded, 2 corrupt pictures\n")
    assert len(take(config(store, dense_caption_ratio=1.0), 3)) == 3
    recipe.write_text(recipe.read_text().replace(", cache: c", ""))
    report = Trainer(read_recipe(recipe, catalog), catalog, tmp_path / "run", log=quiet).train()
    assert report.steps == 3 and (tmp_path / "run" / "model" / "lens.json").is_file()
    recipe.write_text(recipe.read_text().replace("use: store, ", "use: words, "))
    with pytest.raises(ConfigError, match="no dataset is called 'words'"):
        cache(recipe)
    recipe.write_text(re.sub(r" *dataset: .*\n", "", recipe.read_text()))
    with pytest.raises(ConfigError, match="has no dataset"):
        cache(recipe)


RECIPE = """
    pipeline: {{vae: blocks, text_encoder: letters, backbone: mixer, sampler: even, steps: 2}}
    method: flow_matching
    dataset: {dataset}
    train: {{steps: 3}}
"""


@pytest.mark.parametrize("nested", [False, True])
def test_training_asks_what_made_its_cache_and_names_both(store, tmp_path, monkeypatch, nested):
    catalog = Catalog.of(toy, lens_data, lens_flow)
    monkeypatch.setattr(Catalog, "installed", lambda: catalog)
    plain = f"{{use: store, store: {store}, buckets: [[[32, 32], [32, 48]]], batch: 4, cache: c}}"
    mixed = f"{{use: mix, datasets: [{plain}]}}" if nested else plain
    for name, dataset in (("plain", plain), ("mixed", mixed)):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(dataset=dataset))
    cache(tmp_path / "plain.yaml")

    def run(*changes: str) -> Trainer:
        return Trainer(read_recipe(tmp_path / "mixed.yaml", catalog, changes), catalog, tmp_path / "run", log=quiet)

    run()
    # the toy VAE has no random weights: another seed is another text encoder alone
    for change, wrong in (("seed=1", ["text encoder"]), ("train.precision=bf16", ["vae", "text encoder"])):
        with pytest.raises(LensError, match="is of another VAE or text encoder; give the new one another") as caught:
            run(change)
        (line,) = str(caught.value).splitlines()
        assert [kind for kind in ("vae", "text encoder") if f"its {kind} is toy:" in line] == wrong
        hashes = re.findall(r"hash ([0-9a-f]{16})", line)
        assert len(hashes) == len(set(hashes)) == 2 * len(wrong)
        assert ("in bf16" in line) == (change != "seed=1")
    pipeline = Trainer(read_recipe(tmp_path / "plain.yaml", catalog), catalog, tmp_path / "b", log=quiet).pipeline
    with torch.no_grad():
        pipeline.vae.gain.add_(1)
    with pytest.raises(LensError, match="its vae is") as caught:
        StoreDataset(config(store, dense_caption_ratio=1.0)).check_encoders(pipeline, "fp32")
    assert "its text encoder is" not in str(caught.value)


def test_what_made_a_cache_is_weights_dtype_class_config_records_and_precision(pipeline, monkeypatch):
    def encoder() -> str:
        return caching.encoders(pipeline)["text_encoder"]["hash"]

    seen = [encoder()]
    assert encoder() == seen[0]

    def changed(value: str) -> None:
        assert value not in seen
        seen.append(value)

    changed(caching.encoders(pipeline, "bf16")["text_encoder"]["hash"])
    pipeline.text_encoder.config = toy.Mixer.Config(width=7)
    changed(encoder())
    pipeline.text_encoder.config = toy.Mixer.Config(width=8)
    changed(encoder())
    pipeline.text_encoder.provenance = lambda: {"date": "2026-05-20"}
    changed(encoder())
    pipeline.text_encoder.provenance = lambda: {"date": "2026-05-21"}
    changed(encoder())
    pipeline.text_encoder.to(torch.bfloat16)
    changed(encoder())
    pipeline.text_encoder.to(torch.float32)
    pipeline.text_encoder.__class__ = type("Letters", (toy.Letters,), {"__module__": "elsewhere"})
    changed(encoder())
    with torch.no_grad():
        pipeline.text_encoder.table.weight[0, 0] += 1
    changed(encoder())
    assert caching.encoders(pipeline)["vae"] == caching.encoders(pipeline)["vae"]


def test_a_cache_that_does_not_say_what_made_it_is_refused(store, pipeline):
    fill_cache(config(store), pipeline, log=quiet)
    for words in ("0123456789abcdef", "[1]", '{"vae": 1}', "{}"):
        Store(str(store)).side_table(f"cache-{len(words)}", {"key": "string", "data": "large_binary"}, words)
        with pytest.raises(LensError, match="its vae is not known, this one toy:blocks in fp32"):
            fill_cache(config(store, cache=str(len(words))), pipeline, log=quiet)


def test_a_run_from_a_cache_holds_no_encoder_and_exports_both(store, pipeline, tmp_path):
    catalog = Catalog.of(toy, lens_data, lens_flow)
    LensPipeline.from_parts(toy.PARTS, catalog).save_pretrained(tmp_path / "start")
    text = f"""
        pipeline: {{start: {tmp_path / "start"}, steps: 2}}
        method: flow_matching
        dataset: {{use: store, store: {store}, buckets: [[[32, 32], [32, 48]]], batch: 4, cache: c}}
        train: {{steps: 3}}
    """
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = read_recipe(tmp_path / "recipe.yaml", catalog)
    start = LensPipeline.from_parts(recipe.pipeline, catalog)
    settings = structure(StoreDataset.Config, recipe.dataset.options)
    fill_cache(settings, start, log=quiet)
    run = Trainer(recipe, catalog, tmp_path / "run", log=quiet)
    assert set(run.pipeline.present()) == {"backbone"}
    run.train()
    made = LensPipeline.from_pretrained(tmp_path / "run" / "model", catalog=catalog)
    assert torch.equal(made.vae.gain, start.vae.gain)
    assert torch.equal(made.text_encoder.table.weight, start.text_encoder.table.weight)
    assert not torch.equal(made.backbone.outer.weight, start.backbone.outer.weight)


def test_a_part_that_is_replaced_or_put_off_is_not_read(tmp_path, monkeypatch):
    catalog = Catalog.of(toy)
    LensPipeline.from_parts(toy.PARTS, catalog).save_pretrained(tmp_path / "start")
    read = []
    for cls in (toy.Blocks, toy.Letters, toy.Mixer):
        load = cls.load.__func__
        monkeypatch.setattr(cls, "load", classmethod(lambda c, *a, load=load, **k: read.append(c) or load(c, *a, **k)))
    parts = evolve(toy.PARTS, start=str(tmp_path / "start"), vae=None, text_encoder=None, sampler=None)
    pipeline = LensPipeline.from_parts(parts, catalog, deferred=["vae", "text_encoder"])
    assert read == [] and isinstance(pipeline.backbone, toy.Mixer)
    state = torch.get_rng_state()
    assert isinstance(pipeline.vae, toy.Blocks) and isinstance(pipeline.text_encoder, toy.Letters)
    assert read == [toy.Blocks, toy.Letters] and torch.equal(torch.get_rng_state(), state)
    pipeline.defer(["vae", "text_encoder", "backbone"])
    assert set(pipeline.present()) == {"backbone"}, "a new part can be read from nowhere"
    assert pipeline("red", height=16, width=16, num_inference_steps=1, seed=0).images
