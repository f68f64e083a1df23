"""`lens bench block`: operators are counted, views are not, and a compiler's kernels are its scheduler's."""

from __future__ import annotations

import json

import pytest
import torch
from lens_tools import block_cost
from lens_tools.block_cost import Counting, cost
from torch import nn

from lens_core.cli.main import main


def test_what_computes_is_counted_and_what_only_looks_is_not() -> None:
    x, w = torch.randn(4, 6), torch.randn(6, 6)
    with Counting() as counting:
        y = x.view(2, 12).t()[:3]  # views
        z = torch.cat([x @ w, x])  # a product and a copy
        z.mul_(2)
        y.unsqueeze(0)
    counted = cost(counting.calls, counting.bytes)
    assert counting.calls["mm"] == counting.calls["cat"] == counting.calls["mul_"] == 1
    assert counted.launches == 3 and counted.matrix == 1 and counted.copies == 1
    assert counted.elementwise_bytes == sum(size for name, size in counting.bytes.items() if name != "mm")
    assert counting.bytes["mul_"] == 2 * z.numel() * 4 and counting.bytes["cat"] == 2 * z.numel() * 4


def test_a_block_is_counted_by_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "block", "--no-compile", "--size", "1024", "1024", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    port, lens = figures["ways"]["port"], figures["ways"]["lens"]
    assert lens["elementwise_bytes"] < port["elementwise_bytes"] and lens["matrix"] < port["matrix"]
    # The bound of an eager pass on a GPU (docs/gpu.md): it was 121 when both branches were calls of their own.
    assert lens["launches"] <= 64
    assert figures["operators"]["lens"]["scaled_dot_product_attention"] == 2  # neither has a mask


@pytest.mark.filterwarnings("default")  # what torch's compiler warns of is not ours
def test_a_compilers_kernels_are_counted_with_their_bytes() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Tanh()).requires_grad_(False)
    kernels = block_cost._schedule(block, (torch.randn(4, 8),))
    assert [extern for extern, _ in kernels].count(False) == 1  # one kernel for both activations
    assert all(size > 0 for _, size in kernels)


def test_a_size_off_the_grid_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "block", "--size", "60", "64"]) == 2
    assert "60 px is no multiple of 16" in capsys.readouterr().err
