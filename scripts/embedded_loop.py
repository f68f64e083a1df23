"""How the embedded backbone learns: a cache of latents and text on the device, and one whole optimizer step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from embedded_scenes import Group
from lens_flow.matching import EncodedBatch, FlowMatching
from lens_tools import cuda_graphs
from torch import Tensor, nn

from lens_core import LensPipeline
from lens_core.inference.pixels import to_images, to_pixels
from lens_core.training.muon import Muon, block_matrices
from lens_core.types import TextFeatures

MODES = ("eager", "graph", "compile", "compile-graph")


class TextStore:
    """Features of distinct captions, each encoded once, padded to `tokens` columns; a row of none at 0."""

    def __init__(self, layers: int, width: int, tokens: int, capacity: int, device: torch.device) -> None:
        self.tokens, self.used = tokens, 1
        self.features = torch.zeros(capacity + 1, layers, tokens, width, dtype=torch.bfloat16, device=device)
        self.lengths = torch.zeros(capacity + 1, dtype=torch.int64, device=device)
        self.rows: dict[bytes, int] = {}

    def add(self, encoder: Any, captions: Sequence[bytes]) -> list[int]:
        """The rows of captions, which are int16 tokens; new ones are encoded. One that is too long for the store gets
        the row of no text."""
        new = [c for c in dict.fromkeys(captions) if c not in self.rows and len(c) <= 2 * self.tokens]
        self.rows |= {c: 0 for c in captions if len(c) > 2 * self.tokens}
        if new:
            lengths = torch.tensor([len(c) // 2 for c in new])
            width = int(lengths.max())
            padded = b"".join(c.ljust(2 * width, b"\0") for c in new)
            ids = torch.frombuffer(bytearray(padded), dtype=torch.int16).view(len(new), width).long()
            text = encoder.encode_ids(ids, torch.arange(width) < lengths[:, None])
            stop = self.used + len(new)
            self.features[self.used : stop, :, :width] = text.features.to(torch.bfloat16)
            self.lengths[self.used : stop] = lengths.to(self.lengths.device)
            self.rows |= {c: self.used + place for place, c in enumerate(new)}
            self.used = stop
        return [self.rows[c] for c in captions]


class Cache:
    """Latents and caption rows of the scenes of one group, on the device; chunks are added in any order."""

    def __init__(self, group: Group, channels: int, cell: int, store: TextStore, device: torch.device) -> None:
        height, width = (side // cell for side in group.size)
        self.group, self.store, self.used = group, store, 0
        self.latents = torch.zeros(group.count, channels, height, width, dtype=torch.bfloat16, device=device)
        self.texts = torch.zeros(group.count, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, vae: Any, images: Tensor, rows: Tensor) -> None:
        """Encode images uint8 [B,H,W,3] whose captions are `rows` of the store."""
        device = self.latents.device
        pixels = to_pixels(images.to(device).permute(0, 3, 1, 2))
        stop = self.used + len(images)
        self.latents[self.used : stop] = vae.encode(pixels).to(torch.bfloat16)
        self.texts[self.used : stop] = rows.to(device)
        self.used = stop

    def draw(self, count: int, dropout: float, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """`count` random samples: latents, text features, and their mask, all False for a share of `dropout`."""
        device = self.latents.device
        rows = torch.randint(self.used, (count,), generator=rng, device=device)
        texts = self.texts[rows]
        kept = torch.rand(count, generator=rng, device=device) >= dropout
        lengths = self.store.lengths[texts] * kept
        mask = torch.arange(self.store.tokens, device=device) < lengths[:, None]
        return self.latents[rows], self.store.features[texts], mask


class Step:
    """One optimizer step on a batch: loss, gradients, clipping, Muon, average. A CUDA graph launches it as one."""

    def __init__(self, method: FlowMatching, net: nn.Module, mode: str, ema_decay: float) -> None:
        self.method, self.net, self.graphed = method, net, mode.endswith("graph")
        self.device = next(net.parameters()).device
        net.requires_grad_(True).train()
        self.compiled = mode.startswith("compile")
        if self.compiled:
            for block in net.transformer_blocks:  # type: ignore[union-attr]  # a module list
                block.compile(dynamic=True)
        self.parameters = list(net.parameters())
        matrices = block_matrices(net, self.parameters)
        inner = {id(p) for p in matrices}
        self.lr = torch.zeros((), device=self.device)
        self.optimizer = Muon(matrices, [p for p in self.parameters if id(p) not in inner], self.lr)
        self.average = [p.detach().clone() for p in self.parameters]
        self.ema_decay = ema_decay
        self.rng = torch.Generator() if self.device.type == "cpu" else torch.cuda.default_generators[self.device.index]
        self.losses: dict[str, Tensor] = {}  # by group: the sum of the losses, and how many, since `take_losses`
        self._graphs: dict[str, Any] = {}
        self._pool: Any = None

    def __call__(self, name: str, z: Tensor, features: Tensor, mask: Tensor) -> None:
        """Learn from a batch of the group `name`, whose batches all have one shape."""
        self.losses.setdefault(name, torch.zeros(2, device=self.device))
        if not self.graphed:
            try:
                self._run(name, z, _text(features, mask))
            except RuntimeError as error:
                if not self.compiled:
                    raise
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}; goes on uncompiled", flush=True)
                self.plain()
            return
        if name not in self._graphs:
            try:
                self._graphs[name] = self._record(name, z, features, mask)
            except RuntimeError as error:  # no graph, or nothing compiled, is slower and no reason to stop
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}; goes on without graphs", flush=True)
                self.plain()
            return
        graph, held = self._graphs[name]
        for to, value in zip(held, (z, features, mask), strict=True):
            to.copy_(value)
        graph.replay()

    def plain(self) -> None:
        """From now on, no graphs and nothing compiled."""
        self.graphed = self.compiled = False
        self._graphs.clear()
        for block in self.net.transformer_blocks:  # type: ignore[union-attr]  # a module list
            block._compiled_call_impl = None

    def _record(self, name: str, z: Tensor, features: Tensor, mask: Tensor) -> Any:
        """Three real steps, so that every kernel is chosen and every state exists, then the recording of one."""
        held = (z.clone(), features.clone(), mask.clone())
        text = _text(*held[1:])
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run(name, held[0], text)
        torch.cuda.current_stream().wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, _ = cuda_graphs.record(lambda: self._run(name, held[0], text), self._pool)
        return graph, held

    def _run(self, name: str, z: Tensor, text: TextFeatures) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            loss = self.method.loss("backbone", {"backbone": self.net}, EncodedBatch(z, text), self.rng).total
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - self.ema_decay)
            self.losses[name] += torch.stack([loss.detach().float(), torch.ones_like(loss).float()])

    def take_losses(self) -> dict[str, float]:
        """The mean loss of each group since the last call; waits for the device."""
        means = {}
        for name, held in self.losses.items():
            total, count = held.tolist()
            held.zero_()
            if count:
                means[name] = total / count
        return means

    @torch.no_grad()
    def copy(self, to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Write values into tensors that a graph may hold."""
        for one, value in zip(to, values, strict=True):
            one.copy_(value)

    @contextlib.contextmanager
    def outside(self) -> Any:
        """Where other models run: nothing is compiled."""
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            yield


def draw(
    pipeline: LensPipeline, text: TextFeatures, seeds: Sequence[int], side: int, steps: int, guidance: float
) -> Tensor:
    """A picture of `side` px for each text, uint8 [B,3,side,side] on the CPU, from the noise of its seed."""
    cells = side // pipeline.vae.downscale
    noise = partial(pipeline.noise, [torch.Generator().manual_seed(seed) for seed in seeds], (cells, cells))
    x = noise()
    for _, z in pipeline.sample(text, x, steps, guidance, draw=noise):
        x = z
    return to_images(pipeline.decode(x)).cpu()


def _text(features: Tensor, mask: Tensor) -> TextFeatures:
    """`host` says what a graph may rely on: that every column is in use, and that not all rows are full."""
    host = torch.zeros(mask.shape, dtype=torch.bool)
    host[0] = True
    return TextFeatures(features, mask, host)
