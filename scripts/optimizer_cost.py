"""CPU time of a training step with AdamW and with Muon, interleaved in one process: the network of
`examples/recipes/tiny/optimizers.yaml`, 32 pictures of 64 px, one thread, medians."""

from __future__ import annotations

import statistics
import time

import torch
from lens_flow.matching import EncodedBatch, FlowMatching
from lens_mmdit.model import LensTransformer2DModel

from lens_core.recipe import Training
from lens_core.training import optimizers
from lens_core.types import TextFeatures

ROUNDS = 14


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LensTransformer2DModel.Config(
        in_channels=32, out_channels=8, num_layers=4, num_attention_heads=3, attention_head_dim=32,
        axes_dims_rope=(8, 12, 12), enc_hidden_dim=128, selected_layer_index=(0, 2),
    )  # fmt: skip
    net = LensTransformer2DModel(config).train()
    method = FlowMatching(FlowMatching.Config(), None)  # type: ignore[arg-type]  # its loss needs no pipeline
    rng = torch.Generator().manual_seed(0)
    text = TextFeatures(torch.randn(32, 2, 34, 128, generator=rng), torch.ones(32, 34, dtype=torch.bool))
    batch = EncodedBatch(torch.randn(32, 32, 8, 8, generator=rng), text)
    named = {
        name: optimizers.build(net, list(net.parameters()), Training(steps=1, optimizer=name))
        for name in ("adamw", "muon")
    }
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(ROUNDS):
        for name, optimizer in named.items():
            begin = time.process_time()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = method.loss("backbone", {"backbone": net}, batch, rng).total
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            seconds[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name}: {median:.3f} s")
    print(f"muon takes {medians['muon'] / medians['adamw']:.2f} times as long")


if __name__ == "__main__":
    main()
