"""A run of two processes is the run of one: same batches, noise and weights; and either goes on with the other."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_worker
import torch
from lens_data.imports import import_folder
from PIL import Image
from torch import Tensor

from lens_core.checkpoints import tensor_files
from lens_core.evaluation import report
from lens_core.evaluation import run as runs
from lens_core.inference.pipeline import LensPipeline
from lens_core.training.distributed import Ranks
from lens_core.types import ConfigError, Prompt

TESTS = Path(__file__).resolve().parents[1]
TWO = pytest.mark.parametrize(
    ("where", "name"),
    [("pair", name) for name in sorted(rank_worker.METHODS)] + [("divided", n) for n in sorted(rank_worker.DIVIDED)],
)
DIVIDED = pytest.mark.parametrize("name", sorted(rank_worker.DIVIDED))
NAMES = pytest.mark.parametrize("name", sorted(rank_worker.METHODS))


def pictures(store: Path) -> None:
    """A training store of 48 pictures of four sizes."""
    folder = store.with_name("pictures")
    folder.mkdir()
    for n in range(48):
        height, width = [(16, 16), (16, 32), (32, 16), (32, 32)][n % 4]
        Image.new("RGB", (width, height), (5 * n, 255 - 5 * n, 99)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"number {n}")
    import_folder(str(store), folder)


def launch(folder: Path, *names: str, world: int = 2, shards: int = 1) -> None:
    """The worker `world` times, as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "plugins")]
    processes = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "rank_worker.py"), str(folder), str(shards), *names],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo",
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(p.returncode for p in processes), "\n".join(err[-2000:] for _, err in outputs)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `alone` and `pair`, each with a finished run of every method, and `divided`, of those that can be."""
    root = tmp_path_factory.mktemp("ranks")
    pictures(root / "store")
    rank_worker.METHODS["packed"]["dataset"]["store"] = os.environ["RANKS_STORE"] = str(root / "store")
    for name in rank_worker.METHODS:
        rank_worker.run(name, root / "alone" / name)
    launch(root / "pair", *rank_worker.METHODS)
    launch(root / "divided", *rank_worker.DIVIDED, shards=2)
    return root


def state(run: Path, step: int = 20) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whoever wrote it."""
    return Ranks(Fake(0, 1), 1).read(run / "checkpoints" / f"step-{step:07d}", {})


def apart(a: dict[str, Tensor], b: dict[str, Tensor], kind: str) -> float:
    names = [n for n in a if n.startswith(kind)]
    assert names and a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in names)


@TWO
def test_two_processes_end_with_the_weights_of_one(where: str, name: str, both: Path) -> None:
    one, two = state(both / "alone" / name), state(both / where / name)
    for kind in ("net/", "ema/") if rank_worker.recipe(name).train.ema_decay else ("net/",):
        assert apart(one, two, kind) <= 1e-5
    begun = state(both / "alone" / name, 10)
    assert apart(begun, one, "net/") > 1e-3, "it must have learned, or being equal says nothing"
    models = [sorted((both / w / name / "model").rglob("*.safetensors")) for w in ("alone", where)]
    assert len(models[0]) == len(models[1]) > (name != "encoded")  # which is a VAE alone
    for a, b in zip(*models, strict=True):
        exported = tensor_files.read_tensors(a), tensor_files.read_tensors(b)
        assert apart(*exported, "") <= 1e-5
        assert a.with_name("config.json").is_file() == b.with_name("config.json").is_file()
        if a.with_name("config.json").is_file():
            assert a.with_name("config.json").read_bytes() == b.with_name("config.json").read_bytes()


@DIVIDED
def test_each_process_writes_its_half(name: str, both: Path) -> None:
    whole, halves = both / "alone" / name, both / "divided" / name
    files = sorted((halves / "checkpoints" / "step-0000020" / "shards").iterdir())
    sizes = [sum(v.numel() for k, v in tensor_files.read_tensors(f).items() if "/" in k) for f in files]
    total = sum(v.numel() for k, v in state(whole).items() if "/" in k)
    assert len(files) == 2 and sum(sizes) == total
    assert max(sizes) < 0.7 * total, "a small layer has no two halves"


def test_evaluations_see_the_same(both: Path) -> None:
    evaluations = []
    for where in ("alone", "pair", "divided"):
        lines = [json.loads(line) for line in (both / where / "watched" / "evaluations.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 10, 20]
        evaluations.append([{k: v for k, v in line.items() if k not in ("seconds", "sha256")} for line in lines])
        assert len(list((both / where / "watched" / "samples").iterdir())) == 3
        assert len(list((both / where / "watched" / "best").iterdir())) == 1
    for line, *others in zip(*evaluations, strict=True):
        for other in others:
            assert other == pytest.approx(line, abs=2e-6)


@pytest.mark.parametrize("where", ["alone", "pair", "divided"])
def test_the_last_evaluation_uses_the_weights_of_the_last_step(where: str, both: Path) -> None:
    run = both / where / "watched"
    evaluation = rank_worker.recipe("watched").evaluation
    assert evaluation is not None
    model = LensPipeline.from_pretrained(run / "model", catalog=rank_worker.installed())  # of the best step
    prefix = "net/backbone/"
    last = {name.removeprefix(prefix): t for name, t in state(run).items() if name.startswith(prefix)}
    model.backbone.load_state_dict(last)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2}
    drawn = torch.cat(list(runs.generate_images(model, [Prompt(p) for p in evaluation.prompts], 0, 16, **settings)))
    want = report.contact_sheet(drawn, evaluation.prompts, [None] * 2, 2)
    with Image.open(run / "samples" / "step-0000020.png") as sheet:
        apart = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).int()
    apart -= torch.frombuffer(bytearray(want.tobytes()), dtype=torch.uint8).int()
    assert int(apart.abs().max()) <= 1


@NAMES
def test_they_log_the_same(name: str, both: Path) -> None:
    logs = [
        [json.loads(line) for line in (both / where / name / "log.jsonl").read_text().splitlines()]
        for where in ("alone", "pair")
    ]
    assert len(logs[0]) == len(logs[1]) == 2  # one process writes
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        metrics = [k for k in a if "/" in k]
        assert [b[k] for k in metrics] == pytest.approx([a[k] for k in metrics], rel=1e-3, abs=1e-5)
    first, second = (json.loads((both / "pair" / name / f"rank-{r}.json").read_text()) for r in range(2))
    assert (first["world"], first["mine"], second["mine"]) == (2, [0], [1])
    assert first["said"] and not second["said"]
    assert first["patience"] >= 3600, "the others wait while the first one draws"


@TWO
def test_a_run_of_two_goes_on_as_one(name: str, where: str, both: Path, tmp_path: Path) -> None:
    begun(both / where / name, tmp_path / "run")
    rank_worker.run(name, tmp_path / "run", **({"fsdp_shards": 2} if where == "divided" else {}))
    data = json.loads((tmp_path / "run" / "rank-0.json").read_text())
    assert any(line.startswith("resumed at step 10") for line in data["said"])
    assert apart(state(both / where / name), state(tmp_path / "run"), "net/") <= 1e-5


def test_a_divided_run_goes_on_whatever_it_was(both: Path, tmp_path: Path) -> None:
    """Two trainable modules: what one process wrote, and what two did, on four processes, each pair with a copy."""
    written = []
    for where in ("alone", "divided"):
        begun(both / where / "two", tmp_path / where / "two")
        recipe = tmp_path / where / "two" / "recipe.json"
        recipe.write_text(recipe.read_text().replace(f'"fsdp_shards": {1 + (where == "divided")}', '"fsdp_shards": 2'))
        launch(tmp_path / where, "two", world=4, shards=2)
        written.append(state(tmp_path / where / "two"))
        data = json.loads((tmp_path / where / "two" / "rank-0.json").read_text())
        assert any(line.startswith("resumed at step 10") for line in data["said"])
    assert apart(*written, "net/") <= 1e-5


def begun(run: Path, copy: Path) -> None:
    """`copy` is `run` as it was halfway."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-0000020")
    shutil.rmtree(copy / "model")


def test_a_lost_or_altered_share_is_found(both: Path, tmp_path: Path) -> None:
    for harm in ("lost", "altered"):
        begun(both / "divided" / "one", tmp_path / harm)
        newest = tmp_path / harm / "checkpoints" / "step-0000010"
        shutil.copytree(newest, tmp_path / harm / "checkpoints" / "step-0000005")
        share = sorted((newest / "shards").iterdir())[1]
        if harm == "lost":
            share.unlink()
        else:
            share.write_bytes(share.read_bytes()[:-1] + b"\x01")
        rank_worker.run("one", tmp_path / harm, fsdp_shards=2)
        said = json.loads((tmp_path / harm / "rank-0.json").read_text())["said"]
        assert any("step-0000010 is damaged" in line and share.name in line for line in said), said
        assert any("step-0000005" in line and line.startswith("resumed") for line in said), said


def test_the_parts_decide_and_not_only_the_batch(both: Path, tmp_path: Path) -> None:
    rank_worker.run("one", tmp_path / "run", micro_batches=1)
    assert apart(state(both / "alone" / "one"), state(tmp_path / "run"), "net/") > 1e-4, "noise is drawn part by part"


class Fake:
    def __init__(self, rank: int, world: int) -> None:
        self.process_index, self.num_processes, self.device = rank, world, torch.device("cpu")


def test_parts_are_shared_out_evenly() -> None:
    assert [list(Ranks(Fake(r, 2), 6).local_micro_batches) for r in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert Ranks(Fake(1, 4), 1).micro_batches == 4  # at least one each
    with pytest.raises(ConfigError, match="3 micro-batches have no equal shares for 2 processes"):
        Ranks(Fake(0, 2), 3)


def test_shards_are_at_most_the_processes() -> None:
    assert [Ranks(Fake(0, w), 1, s).shards for w, s in ((1, 0), (1, 8), (4, 0), (4, 2), (4, 8))] == [1, 1, 4, 2, 4]
    assert not Ranks(Fake(0, 1), 1, 8).sharded and Ranks(Fake(0, 4), 1, 2).sharded
    with pytest.raises(ConfigError, match=r"\$.train.fsdp_shards: 4 processes have no equal groups of 3"):
        Ranks(Fake(0, 4), 1, 3)


def test_what_holds_anywhere_is_one_message_in_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, sent = Ranks(Fake(0, 2), 2), []

    def all_reduce(value: torch.Tensor, op: Any) -> None:
        sent.append((int(value), value.device.type, op))
        value.fill_(max(int(value), others))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    for mine, others in ((False, 0), (False, 1), (True, 0), (True, 1)):
        assert ranks.any(mine) is bool(mine or others)
    assert [flag for flag, *_ in sent] == [0, 0, 1, 1]
    assert {(where, op) for _, where, op in sent} == {("cpu", torch.distributed.ReduceOp.MAX)}
    assert Ranks(Fake(0, 1), 1).any(True) and not Ranks(Fake(0, 1), 1).any(False) and len(sent) == 4


@pytest.mark.parametrize(
    ("device", "backend", "gpus"), [("cuda:1", "nccl", [1]), ("cuda:1", "gloo", None), ("cpu", "gloo", None)]
)
def test_a_barrier_names_the_gpu_of_its_process_where_nccl_would_guess(
    device: str, backend: str, gpus: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, waits = Ranks(Fake(1, 2), 2), []
    ranks.device = torch.device(device)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "barrier", lambda device_ids: waits.append(device_ids))
    ranks.barrier()
    assert waits == [gpus]


def test_what_stands_on_the_same_weights_is_not_divided() -> None:
    ranks, layer = Ranks(Fake(0, 2), 1, 2), torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="a and b stand on the same weights"):
        ranks.shard({"a": torch.nn.Sequential(layer), "b": torch.nn.Sequential(layer)})


def test_a_method_that_shares_out_unevenly_keeps_its_weights_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("lens_core.training.state.Ranks", lambda _, parts, shards: Ranks(Fake(0, 2), parts, shards))
    with pytest.raises(ConfigError, match="diffusion_nft shards its work unevenly"):
        rank_worker.run("rewarded", tmp_path, fsdp_shards=2)
