"""What a run holds beside its weights: no second copy of them to save, to evaluate, to add gradients up."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import lens_dmd2
import lens_mmdit
import pytest
import rank_worker
import torch
import toy
from attrs import evolve
from live import Live
from safetensors.torch import save_file
from torch import Tensor, nn

from lens_core.catalog import Catalog
from lens_core.checkpoints import manifest, tensor_files
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import ComponentSpec, Evaluation, LoraSpec, Recipe, Training
from lens_core.training import checkpointing, distributed
from lens_core.training.distributed import Ranks
from lens_core.training.ema import ema_weights
from lens_core.training.step import next_micro_batches, optimizer_step
from lens_core.training.trainer import Trainer

WIDE = 2**15  # hidden channels: weights that stand out from all else
RECIPE = Recipe(
    method=ComponentSpec("fit"),
    dataset=ComponentSpec("squares", {"batch": 1}),
    train=Training(steps=2, ema_decay=0.9, save_every=1, log_every=1),
    pipeline=evolve(toy.PARTS, backbone=ComponentSpec("mixer", {"width": WIDE}), steps=1),
)
LARGEST = 4 * 8 * WIDE  # bytes of the mixer's largest tensor


def whole(folder: Path) -> list[Path]:
    """The checkpoints of a run, each of whose files has the hash that is written beside it."""
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    for place in checkpoints:
        sums = json.loads((place / "sums.json").read_text())
        there = {p.name for p in place.iterdir()} - {"sums.json"}
        assert there == set(sums), "every file has its hash"
        for name, digest in sums.items():
            assert hashlib.sha256((place / name).read_bytes()).hexdigest() == digest
    return checkpoints


def test_saving_copies_no_weight_and_reads_none_again(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(RECIPE, catalog, tmp_path / "a", log=lambda line: None)
    run.train()
    read: list[str] = []
    monkeypatch.setattr(manifest, "hash_of", lambda path: read.append(path.name) or "")
    with Live() as live:
        checkpointing.save(run)
    assert read == ["state.json"], "what is large is hashed while it is written"
    assert live.peak <= LARGEST, "at most one tensor at a time"
    monkeypatch.undo()
    Trainer(RECIPE, catalog, tmp_path / "b", log=lambda line: None).train()
    assert whole(tmp_path / "b")


def test_the_best_weights_are_kept_without_a_copy(catalog: Catalog, tmp_path: Path) -> None:
    evaluation = Evaluation(
        every=1, benchmarks=(ComponentSpec("reds", {"prompts": 1}),), keep_best="reds", batch_size=1, size=(16, 16)
    )
    run = Trainer(evolve(RECIPE, evaluation=evaluation), catalog, tmp_path / "a", log=lambda line: None)
    (tmp_path / "a").mkdir()
    state = sum(v.nbytes for v in run.pipeline.backbone.state_dict().values())
    with Live() as live, run.isolated_rng(), ema_weights(run):
        line = run.evaluator.evaluate(0, run.modules, run.export_weights, lambda: False, lambda seen: seen)
    file = tmp_path / "a" / "best" / "step-0000000.safetensors"
    assert line["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert live.peak < 0.7 * state


def test_a_file_of_tensors_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one = torch.randn(4, 6)
    tensors = {
        "b.half": one.bfloat16(), "a": one, "é": one.double(), "n": torch.tensor(3), "none": torch.zeros(0, 3),
        "bytes": one.byte(), "yes": one > 0, "narrow": one.half(), "eight": one.to(torch.float8_e4m3fn),
        "turned": one.T, "part": one[1:3],
    }  # fmt: skip
    digest = tensor_files.save_tensors(tmp_path / "ours.safetensors", tensors, {"x": "1"})
    plain = {k: v.contiguous().clone() for k, v in tensors.items()}
    save_file(plain, tmp_path / "theirs.safetensors", {"format": "pt", "x": "1"})
    ours, theirs = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("ours", "theirs"))
    start = 8 + int.from_bytes(theirs[:8], "little")
    assert (len(ours), ours[start:]) == (len(theirs), theirs[start:])
    assert json.loads(ours[8:start]) == json.loads(theirs[8:start])
    assert digest == hashlib.sha256(ours).hexdigest()


def test_two_names_may_share_a_tensor_in_a_file(tmp_path: Path) -> None:
    one = torch.randn(3)
    tensor_files.save_tensors(tmp_path / "a.safetensors", {"a": one, "b": one, "c": one[1:]})
    back = tensor_files.read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(back["a"], one) and torch.equal(back["b"], one) and torch.equal(back["c"], one[1:])


# ---- gradients ------------------------------------------------------------------------------------------------


class Two:
    process_index, num_processes, device = 0, 2, torch.device("cpu")


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    result = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in result:
        p.grad = torch.randn_like(p)
    return result


def test_gradients_are_added_up_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sent: list[int] = []

    def all_reduce(flat: Tensor) -> None:  # the other process has the same gradients
        sent.append(flat.nbytes)
        flat.mul_(2)

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "BUCKET", 400)
    learning = parameters((10,), (9, 10), (30, 10), (3,), (5, 2), (7,))
    learning[4].grad = None  # nobody used it
    halves = parameters((8,))[0].detach().to(torch.bfloat16)
    learning.append(nn.Parameter(halves))
    learning[-1].grad = torch.ones_like(halves)
    want = [torch.zeros_like(p) if p.grad is None else 2 * p.grad for p in learning]
    with Live() as live:
        Ranks(Two(), 2).all_reduce_gradients(learning)
    assert sent == [400, 1200, 80, 16], "what fits goes together; what is larger goes alone, where it lies"
    assert live.peak <= 400 + 40, "a bucket, and the gradient that nobody had"
    assert all(torch.equal(p.grad, w) for p, w in zip(learning, want, strict=True))


# ---- what does not learn --------------------------------------------------------------------------------------


def dtypes(net: nn.Module) -> set[torch.dtype]:
    return {p.dtype for p in net.parameters()}


def test_frozen_parts_sit_in_sixteen_bits_and_are_exported_as_they_were(catalog: Catalog, tmp_path: Path) -> None:
    half = evolve(RECIPE, pipeline=toy.NARROW, train=evolve(RECIPE.train, precision="bf16"))
    run = Trainer(half, catalog, tmp_path / "a", log=lambda line: None)
    parts = run.pipeline.text_encoder, run.pipeline.vae
    assert [dtypes(part) for part in parts] == [{torch.bfloat16}] * 2
    assert dtypes(run.pipeline.backbone) == {torch.float32}, "it learns"
    run.train()
    whole = Trainer(evolve(RECIPE, pipeline=toy.NARROW), catalog, tmp_path / "b", log=lambda line: None).pipeline
    again = LensPipeline.from_pretrained(tmp_path / "a" / "model", catalog=catalog)
    assert dtypes(again.text_encoder) == {torch.float32}
    assert torch.equal(again.text_encoder.table.weight, whole.text_encoder.table.weight), "bit for bit"


def test_what_an_adapter_leaves_alone_sits_in_sixteen_bits_too(catalog: Catalog, tmp_path: Path) -> None:
    train = evolve(RECIPE.train, precision="bf16", ema_decay=0.0, lr=1e-2, lora={"backbone": LoraSpec(rank=2)})
    run = Trainer(evolve(RECIPE, pipeline=toy.NARROW, train=train), catalog, tmp_path / "a", log=lambda line: None)
    named = dict(run.pipeline.backbone.named_parameters())
    assert {p.dtype for n, p in named.items() if ".lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in named.items() if ".lora_" not in n} == {torch.bfloat16}
    first = Trainer(
        evolve(RECIPE, pipeline=toy.NARROW), catalog, tmp_path / "b", log=lambda line: None
    ).pipeline.backbone
    before = first.inner.weight.detach().clone()
    run.train()
    low = tensor_files.read_tensors(tmp_path / "a" / "adapters" / "backbone" / "pytorch_lora_weights.safetensors")
    change = low["transformer.inner.lora_B.weight"] @ low["transformer.inner.lora_A.weight"]
    after = LensPipeline.from_pretrained(tmp_path / "a" / "model", catalog=catalog).backbone.inner.weight
    assert change.abs().max() > 0
    torch.testing.assert_close(after, before + change, rtol=0, atol=1e-7)


def test_nothing_is_cast_where_a_run_computes_in_float32(catalog: Catalog, tmp_path: Path) -> None:
    run = Trainer(RECIPE, catalog, tmp_path / "a", log=lambda line: None)
    assert all(dtypes(net) == {torch.float32} for net in run.pipeline.present().values())


def test_a_teacher_sits_in_sixteen_bits_is_divided_and_computes_again(tmp_path: Path, monkeypatch: Any) -> None:
    divided: dict[str, nn.Module] = {}
    monkeypatch.setattr(Ranks, "shard", lambda self, modules: divided.update(modules))
    backbone = ComponentSpec("mmdit", {k: v for k, v in rank_worker.BLOCKS.items() if k != "use"})
    recipe = Recipe(
        method=ComponentSpec(
            "dmd2", {"gan_weight": 0.1, "discriminator_blocks": [0], "fake_score_updates": 1, "ida": 1.0}
        ),
        dataset=ComponentSpec("squares"),
        train=Training(steps=1, precision="bf16", activation_checkpointing=True),
        pipeline=evolve(toy.PARTS, backbone=backbone, guidance_scale=3.0, steps=2),
    )
    run = Trainer(recipe, Catalog.of(toy, lens_dmd2, lens_mmdit), tmp_path / "a", log=lambda line: None)
    teacher = run.method.teacher
    assert divided == {**run.modules, "teacher": teacher}
    assert dtypes(teacher) == {torch.bfloat16} and dtypes(run.modules["fake"]) == {torch.float32}
    assert teacher.gradient_checkpointing and run.modules["generator"].gradient_checkpointing


def test_the_gradient_of_the_gan_alone_is_taken_where_it_is_logged(tmp_path: Path, monkeypatch: Any) -> None:
    taken: list[int] = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: taken.append(run.step) or grad(*a, **k))
    backbone = ComponentSpec("mmdit", {k: v for k, v in rank_worker.BLOCKS.items() if k != "use"})
    recipe = Recipe(
        method=ComponentSpec(
            "dmd2", {"gan_weight": 0.1, "discriminator_blocks": [0], "fake_score_updates": 1, "ida": 1.0}
        ),
        dataset=ComponentSpec("squares"),
        train=Training(steps=5, log_every=2, save_every=9),
        pipeline=evolve(toy.PARTS, backbone=backbone, guidance_scale=3.0, steps=2),
    )
    run = Trainer(recipe, Catalog.of(toy, lens_dmd2, lens_mmdit), tmp_path / "a", log=lambda line: None)
    run.train()
    assert taken == [1, 3, 4], "the steps whose line is written"
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "generator/gan_dm_ratio" in line] == [2, 4, 5]


def test_the_host_waits_for_the_device_once_an_optimizer_step(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing waits, but what would is the same: a tensor's value that Python asks for."""
    run = Trainer(evolve(RECIPE, pipeline=toy.NARROW), catalog, tmp_path / "a", log=lambda line: None)
    syncs: list[str] = []
    parts = run._micro_batch_streams()
    micro = [next_micro_batches(run, steps) for steps in parts]
    for name in ("__float__", "__bool__", "__int__", "item", "tolist", "numpy"):
        plain = getattr(Tensor, name)

        def note(self: Tensor, *args: Any, plain: Any = plain, name: str = name, **kwargs: Any) -> Any:
            syncs.append(name)
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, note)
    for turn, module_name in enumerate(("critic", "backbone")):
        syncs.clear()
        optimizer_step(run, module_name, turn, micro)
        assert syncs == ["tolist"], module_name
