"""Modulation worked out once for all times of a run, so that its weights, a third of the model, need not be there.

All rows of a batch share their time, and a run has few: 20 steps are a table of 35 MB where the published weights take
2.73 GB. The values are those of the plain path, from one product a layer instead of one a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_core import flow
from lens_core.types import move

Visit = Callable[[nn.Module], AbstractContextManager[Any]]
"""A module -> the time for which its weights are where the model runs."""


class Modulation(nn.Linear):
    """A linear layer of the time embedding; `rows` [K,out] are its values at the K times of a table."""

    rows: Tensor | None = None

    def forward(self, time: Tensor) -> Tensor:
        """Embedding [B,D] -> [B,out]; int64 [B] names rows of the table, and no weight is read."""
        if self.rows is None or time.dtype != torch.int64:
            return super().forward(time)
        return self.rows[time]


class Tabulating:
    """What a model gains whose `Modulation` layers read nothing but the embedding of t. It says which they are."""

    time_text_embed: nn.Module
    _times: tuple[float, ...] = ()  # the times that the layers have rows for, in their order
    _origin: Any = None  # what those rows were worked out from
    _temporarily_on_device: Visit | None = None  # while a table is in use: how weights come

    def modulations(self) -> list[Modulation]:
        """The layers that a table stands for; none where another kind of layer, an adapter say, took their place."""
        raise NotImplementedError

    def unused_modules(self) -> list[nn.Module]:
        """What sampling does not need on the accelerator: `precomputed` asks for each of these once."""
        return list(self.modulations())

    @contextmanager
    def precomputed(self, times: Tensor, temporarily_on_device: Visit = nullcontext) -> Iterator[None]:
        """While this lasts, passes without gradient at one of `times` float32 [K] read a table.

        It is worked out here, unless the one of the last run still holds: same times, weights, device and dtype. Then
        `temporarily_on_device` is called with no layer at all. A pass at any other time adds a row; a changed weight
        renews the table.
        """
        before = self._temporarily_on_device
        if not self.modulations():
            yield
            return
        self._temporarily_on_device = temporarily_on_device
        try:
            wanted = tuple(times.tolist())
            if not set(wanted) <= set(self._times):
                self._times = ()
            self._fill(wanted)
            yield
        finally:
            self._temporarily_on_device = before

    def _tabled(self, t: Tensor) -> Tensor | None:
        """t float32 [B] -> int64 [B], the rows for these times; None where the plain path must be taken."""
        if self._temporarily_on_device is None or torch.is_grad_enabled() or not self.modulations():
            return None
        asked = flow.known(t)
        self._fill(asked)
        place = {time: row for row, time in enumerate(self._times)}
        return move(torch.tensor([place[time] for time in asked]), t.device)

    @torch.no_grad()
    def _fill(self, asked: Iterable[float]) -> None:
        layers = self.modulations()
        origin = self._state(layers)
        held = self._times if origin == self._origin else ()
        wanted = (*held, *asked) if held else (*self._times, *asked)
        new = tuple(t for t in dict.fromkeys(wanted) if t not in held)
        if not new:
            return
        assert self._temporarily_on_device is not None
        self._origin = None  # until all layers have their rows
        device = next(self.time_text_embed.parameters()).device
        time = F.silu(self.time_text_embed(torch.tensor(new, dtype=torch.float32, device=device)))
        for layer in layers:
            with self._temporarily_on_device(layer):
                rows = layer(time)
            layer.rows = torch.cat([layer.rows, rows]) if held and layer.rows is not None else rows
        self._times, self._origin = (*held, *new), origin

    def _state(self, layers: list[Modulation]) -> Any:
        """What decides the rows. Where the embedding lies does not: it may come and go with the model."""
        embedding = list(self.time_text_embed.parameters())
        device = embedding[0].device
        casts = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        weights = [p for layer in layers for p in layer.parameters()]
        versions = [(p.dtype, 0 if p.is_inference() else p._version) for p in (*embedding, *weights)]
        return device, casts, versions, [p.data_ptr() for p in weights]
