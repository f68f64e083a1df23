"""The optimizer `muon`: torch's own Muon and AdamW, in one, that resumes exactly and refuses what it cannot do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve
from torch import Tensor, nn

from lens_core import Catalog, LensPipeline, Recipe, Trainer, structure
from lens_core.recipe import Training
from lens_core.training import memory_estimate, muon, optimizers, throughput
from lens_core.training.muon import Muon, block_matrices, orthogonalise
from lens_core.types import ConfigError


class Stack(nn.Module):
    """Blocks with matrices of two shapes, biases and norms, and layers beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.inner = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8)) for _ in range(3)]
        )

    def blocks(self) -> list[nn.Module]:
        return list(self.inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.inner:
            x = x + block(x)
        return x


def stack(seed: int = 0) -> Stack:
    torch.manual_seed(seed)
    return Stack()


def both(net: nn.Module, **options: Any) -> Muon:
    parameters = list(net.parameters())
    matrices = block_matrices(net, parameters)
    return Muon(matrices, [p for p in parameters if all(p is not m for m in matrices)], **options)


def learn(net: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        net.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_torchs_muon_and_torchs_adamw(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "has_fast_bfloat16", lambda device: True)  # torch's is always in bfloat16
    ours, theirs = stack(), stack()
    parameters = list(theirs.parameters())
    matrices = block_matrices(theirs, parameters)
    others = [p for p in parameters if all(p is not m for m in matrices)]
    assert len(matrices) == 6 and len(others) == len(parameters) - 6
    reference = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.02, betas=(0.9, 0.99), weight_decay=decay, fused=True),
    ]
    learn(ours, [both(ours, lr=0.02, weight_decay=decay)], 12)
    learn(theirs, reference, 12)
    before = dict(stack().named_parameters())
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # bfloat16 products of several matrices at once may round differently.
        moved = (other - before[name]).norm()
        assert (one - other).norm() <= 0.02 * moved, name


def test_a_learning_rate_may_be_a_tensor() -> None:
    numbers, tensors = stack(), stack()
    learn(numbers, [both(numbers, lr=0.02)], 1)  # one step: bfloat16 makes more of the last bit in the next
    learn(tensors, [both(tensors, lr=torch.tensor(0.02))], 1)
    for one, other in zip(numbers.parameters(), tensors.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 9), (3, 9, 5), (1, 7, 7)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    done = orthogonalise(matrices).float()
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ done @ v.mT
    values = torch.diagonal(inner, dim1=1, dim2=2)
    assert values[s > 0.2 * s[:, :1]].min() > 0.6 and values.max() < 1.35
    assert (inner - torch.diag_embed(values)).abs().max() < 0.05


@pytest.mark.parametrize("fast", [True, False])
def test_a_cpu_without_bfloat16_orthogonalises_in_float32(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "has_fast_bfloat16", lambda device: fast)
    matrices = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(1))
    exact = np.stack([m.T / np.linalg.norm(m) for m in matrices.double().numpy()])
    for _ in range(5):
        square = exact @ exact.transpose(0, 2, 1)
        exact = 3.4445 * exact + (-4.775 * square + 2.0315 * square @ square) @ exact
    done = orthogonalise(matrices)
    assert done.dtype == (torch.bfloat16 if fast else torch.float32)
    error = (done.double() - torch.from_numpy(exact.transpose(0, 2, 1))).abs().max()
    assert error < (0.05 if fast else 1e-5)


@pytest.mark.parametrize(
    ("device", "capabilities", "fast"),
    [
        ("cpu", {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        ("cpu", {"architecture": "x86_64"}, False),
        ("cpu", {"architecture": "x86_64", "avx512_bf16": True}, True),
        ("cpu", {"architecture": "x86_64", "amx_bf16": True}, True),
        ("cpu", {"architecture": "aarch64"}, True),
        ("cuda", {"architecture": "x86_64"}, True),
    ],
)
def test_which_devices_are_fast_in_bfloat16(
    device: str, capabilities: dict[str, Any], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert throughput.has_fast_bfloat16(torch.device(device)) is fast


def test_torch_still_says_what_an_x86_cpu_has() -> None:
    known = torch.cpu.get_capabilities()
    assert "architecture" in known and (
        known["architecture"] != "x86_64" or {"avx512_bf16", "amx_bf16"} <= known.keys()
    )


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    straight = stack()
    learn(straight, [both(straight, lr=0.01)], 6)
    first = stack()
    optimizer = both(first, lr=0.01)
    learn(first, [optimizer], 3)
    state = copy.deepcopy(optimizer.state_dict())
    second = stack(seed=5)
    second.load_state_dict(first.state_dict())
    resumed = both(second, lr=0.01)
    resumed.load_state_dict(state)
    learn(second, [resumed], 3, first=3)
    for one, other in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_without_gradients_nothing_moves_and_a_closure_is_refused() -> None:
    net = stack()
    optimizer = both(net, lr=0.1)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_a_network_without_blocks_gets_adamw_for_everything() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 4)
    reference = copy.deepcopy(net)
    muon = optimizers.build(net, list(net.parameters()), Training(steps=1, lr=0.01, optimizer="muon"))
    adamw = optimizers.build(reference, list(reference.parameters()), Training(steps=1, lr=0.01))
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    for model, optimizer in ((net, muon), (reference, adamw)):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    assert torch.equal(net.weight, reference.weight)


def test_sharded_weights_are_refused() -> None:
    net = stack()
    with pytest.raises(ConfigError, match=r"muon needs whole matrices.*fsdp_shards: 1"):
        optimizers.build(net, list(net.parameters()), Training(steps=1, optimizer="muon"), sharded=True)


RECIPE: dict[str, Any] = {
    "pipeline": {"start": "tiny:"},
    "method": {"use": "flow_matching"},
    "dataset": {"use": "shapes", "sizes": [[64, 64]], "batch": 2},
    "train": {"steps": 4, "lr": 1e-3, "optimizer": "muon", "ema_decay": 0.9, "save_every": 2, "threads": 1},
}


def stopped_run(recipe: Recipe, folder: Path) -> None:
    """The first two steps of a run."""
    run = Trainer(recipe, Catalog.installed(), folder, log=lambda _: None)
    step = run._step
    run._step = lambda *a: (step(*a), setattr(run, "_stop", run.step == 2))[0]  # type: ignore[method-assign]  # a signal
    assert run.train().model is None


def test_a_run_with_muon_resumes_bit_for_bit(tmp_path: Path) -> None:
    recipe = structure(Recipe, RECIPE)
    catalog = Catalog.installed()
    Trainer(recipe, catalog, tmp_path / "straight", log=lambda _: None).train()
    stopped_run(recipe, tmp_path / "stopped")
    Trainer(recipe, catalog, tmp_path / "stopped", log=lambda _: None).train()
    file = "model/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "stopped" / file).read_bytes()


def test_another_optimizer_goes_on_from_the_weights_alone_and_only_if_asked(tmp_path: Path) -> None:
    recipe = structure(Recipe, RECIPE)
    stopped_run(evolve(recipe, train=evolve(recipe.train, optimizer="adamw")), tmp_path)
    with pytest.raises(ConfigError, match="optimizer was"):
        Trainer(recipe, Catalog.installed(), tmp_path, log=lambda _: None).train()
    lines: list[str] = []
    result = Trainer(recipe, Catalog.installed(), tmp_path, log=lines.append, allow_changed=True).train()
    assert result.steps == 4 and "backbone: muon begins without the state of another optimizer" in lines


def test_a_dry_run_counts_one_moment_of_a_matrix_and_two_of_the_rest() -> None:
    recipe, catalog = structure(Recipe, RECIPE), Catalog.installed()
    adamw = evolve(recipe, train=evolve(recipe.train, optimizer="adamw"))
    backbone = LensPipeline.from_pretrained("tiny:").backbone
    parameters = list(backbone.parameters())
    matrices = sum(p.numel() for p in block_matrices(backbone, parameters))
    sizes = [memory_estimate.memory(one, catalog)[0] for one in (recipe, adamw)]
    assert sizes[1]["backbone: AdamW's moments"] == 8 * sum(p.numel() for p in parameters)
    assert sizes[1]["backbone: AdamW's moments"] - sizes[0]["backbone: Muon's moments"] == 4 * matrices > 0
