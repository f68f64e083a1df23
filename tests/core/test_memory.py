"""What a run holds beside its weights: no second copy of them to save, to look, to add gradients up."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import toy
from attrs import evolve
from live import Live
from safetensors.torch import save_file
from torch import Tensor, nn

from lens_core import checkpoint, ranks
from lens_core.catalog import Catalog
from lens_core.config import Recipe, Training, Use, Watch
from lens_core.loop import Run
from lens_core.ranks import Ranks

WIDE = 2**15  # hidden channels: weights that stand out from all else
RECIPE = Recipe(
    method=Use("fit"),
    dataset=Use("squares", {"batch": 1}),
    train=Training(steps=2, ema=0.9, save_every=1, log_every=1),
    pipeline=evolve(toy.PARTS, backbone=Use("mixer", {"width": WIDE}), steps=1),
)
LARGEST = 4 * 8 * WIDE  # bytes of the mixer's largest tensor


def whole(folder: Path) -> list[Path]:
    """The checkpoints of a run, each of whose files has the hash that is written beside it."""
    found = sorted((folder / "checkpoints").glob("step-*"))
    for place in found:
        sums = json.loads((place / "sums.json").read_text())
        there = {p.name for p in place.iterdir()} - {"sums.json"}
        assert there == set(sums), "every file has its hash"
        for name, digest in sums.items():
            assert hashlib.sha256((place / name).read_bytes()).hexdigest() == digest
    return found


def test_saving_copies_no_weight_and_reads_none_again(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(RECIPE, catalog, tmp_path / "a", say=lambda line: None)
    run.train()
    read: list[str] = []
    monkeypatch.setattr(checkpoint, "hash_of", lambda path: read.append(path.name) or "")
    with Live() as live:
        run.save()
    assert read == ["state.json"], "what is large is hashed while it is written"
    assert live.peak <= LARGEST, "at most one tensor at a time"
    monkeypatch.undo()
    Run(RECIPE, catalog, tmp_path / "b", say=lambda line: None).train()
    assert whole(tmp_path / "b")


def test_the_best_weights_are_kept_without_a_copy(catalog: Catalog, tmp_path: Path) -> None:
    watch = Watch(every=1, benchmarks=(Use("reds", {"prompts": 1}),), keep_best="reds", batch=1, size=(16, 16))
    run = Run(evolve(RECIPE, watch=watch), catalog, tmp_path / "a", say=lambda line: None)
    (tmp_path / "a").mkdir()
    state = sum(v.nbytes for v in run.pipeline.backbone.state_dict().values())
    with Live() as live, run._aside(), run._averaged():
        line = run.watcher.look(0, run.nets, run._weights, lambda: False, lambda seen: seen)
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
    found = checkpoint.save_tensors(tmp_path / "ours.safetensors", tensors, {"x": "1"})
    plain = {k: v.contiguous().clone() for k, v in tensors.items()}
    save_file(plain, tmp_path / "theirs.safetensors", {"format": "pt", "x": "1"})
    ours, theirs = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("ours", "theirs"))
    start = 8 + int.from_bytes(theirs[:8], "little")
    assert (len(ours), ours[start:]) == (len(theirs), theirs[start:])
    assert json.loads(ours[8:start]) == json.loads(theirs[8:start])
    assert found == hashlib.sha256(ours).hexdigest()


def test_two_names_may_share_a_tensor_in_a_file(tmp_path: Path) -> None:
    one = torch.randn(3)
    checkpoint.save_tensors(tmp_path / "a.safetensors", {"a": one, "b": one, "c": one[1:]})
    back = checkpoint.read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(back["a"], one) and torch.equal(back["b"], one) and torch.equal(back["c"], one[1:])


# ---- gradients ------------------------------------------------------------------------------------------------


class Two:
    process_index, num_processes, device = 0, 2, torch.device("cpu")


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    found = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


def test_gradients_are_added_up_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sent: list[int] = []

    def all_reduce(flat: Tensor) -> None:  # the other process has the same gradients
        sent.append(flat.nbytes)
        flat.mul_(2)

    monkeypatch.setattr(ranks.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(ranks, "BUCKET", 400)
    learning = parameters((10,), (9, 10), (30, 10), (3,), (5, 2), (7,))
    learning[4].grad = None  # nobody used it
    halves = parameters((8,))[0].detach().to(torch.bfloat16)
    learning.append(nn.Parameter(halves))
    learning[-1].grad = torch.ones_like(halves)
    want = [torch.zeros_like(p) if p.grad is None else 2 * p.grad for p in learning]
    with Live() as live:
        Ranks(Two(), 2).add(learning)
    assert sent == [400, 1200, 80, 16], "what fits goes together; what is larger goes alone, where it lies"
    assert live.peak <= 400 + 40, "a bucket, and the gradient that nobody had"
    assert all(torch.equal(p.grad, w) for p, w in zip(learning, want, strict=True))
