"""Modulation computed once for all times of a run, so that its weights, a third of the model, can stay off the GPU.

Modulation depends on the time alone, and a run has few times: 20 steps are a table of 35 MB where the published weights
take 2.73 GB. The values are those of the plain path, from one matrix product a layer instead of one a step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lens_core import flow
from lens_core.types import move

DeviceContext = Callable[[nn.Module], AbstractContextManager[Any]]
"""A module -> a context in which its weights are on the device that the model runs on."""


class Modulation(nn.Linear):
    """A linear layer of the time embedding; `table` [K,out] holds its outputs at K times."""

    table: Tensor | None = None

    def forward(self, time: Tensor) -> Tensor:
        """Embedding [B,D] -> [B,out]; int64 [B] are rows of the table, for which no weight is read."""
        # The dtype tells the two apart, so that a block passes either on without knowing which it is.
        if self.table is None or time.dtype != torch.int64:
            return super().forward(time)
        return self.table.index_select(0, time)  # indexing asks more of the host


@functools.lru_cache(maxsize=1024)
def row_numbers(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Rows of a table as int64 [B] on `device`. Kept, so that a step copies nothing there, and can be recorded."""
    with torch.inference_mode(False):
        return move(torch.tensor(rows), device)


class PrecomputedModulation:
    """A mixin for models with `Modulation` layers, which keeps the tables of these layers up to date."""

    time_text_embed: nn.Module
    _times: tuple[float, ...] = ()  # the times of the tables' rows, in order
    _origin: Any = None  # `_state` when the tables were computed
    _temporarily_on_device: DeviceContext | None = None  # set while the tables are in use

    def modulations(self) -> list[Modulation]:
        """The layers that have a table; none where one was replaced by another kind of layer, as by an adapter."""
        raise NotImplementedError

    def unused_modules(self) -> list[nn.Module]:
        """The modules that sampling does not need on the GPU: `precomputed` brings each there once."""
        return list(self.modulations())

    @contextmanager
    def precomputed(self, times: Tensor, temporarily_on_device: DeviceContext = nullcontext) -> Iterator[None]:
        """In this context, passes without gradient at one of `times` float32 [K] read the tables.

        They are computed here, unless those of the last run are still valid: same times, weights, device and dtype.
        Then `temporarily_on_device` is not called. A pass at any other time adds a row; a changed weight renews the
        tables.
        """
        before = self._temporarily_on_device
        if not self.modulations():
            yield
            return
        self._temporarily_on_device = temporarily_on_device
        try:
            wanted = tuple(times.tolist())
            if not set(wanted) <= set(self._times):
                self._times = ()  # begin anew, or the tables would grow from run to run
            self._extend_tables(wanted)
            yield
        finally:
            self._temporarily_on_device = before

    def _table_rows(self, t: Tensor) -> Tensor | None:
        """t float32 [B] -> int64 [B], the rows of these times; None where the layers must be evaluated instead."""
        if self._temporarily_on_device is None or torch.is_grad_enabled() or not self.modulations():
            return None
        times = flow.known(t)
        self._extend_tables(times)
        row_of = {time: row for row, time in enumerate(self._times)}
        return row_numbers(tuple(row_of[time] for time in times), t.device)

    @torch.no_grad()
    def _extend_tables(self, times: Iterable[float]) -> None:
        """Add rows for those of `times` that have none; compute all rows anew if the weights changed."""
        layers = self.modulations()
        origin = self._state(layers)
        valid = self._times if origin == self._origin else ()
        wanted = (*valid, *times) if valid else (*self._times, *times)
        new = tuple(t for t in dict.fromkeys(wanted) if t not in valid)
        if not new:
            return
        assert self._temporarily_on_device is not None
        self._origin = None  # so that an error half-way leaves no table that passes for valid
        device = next(self.time_text_embed.parameters()).device
        time = F.silu(self.time_text_embed(torch.tensor(new, dtype=torch.float32, device=device)))
        for layer in layers:
            with self._temporarily_on_device(layer):
                rows = layer(time)
            layer.table = torch.cat([layer.table, rows]) if valid and layer.table is not None else rows
        self._times, self._origin = (*valid, *new), origin

    def _state(self, layers: list[Modulation]) -> Any:
        """All that the tables depend on: device, autocast, and the version of each weight."""
        embedding = list(self.time_text_embed.parameters())
        device = embedding[0].device
        autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
        casts = torch.get_autocast_dtype(device.type) if autocast else None
        weights = [p for layer in layers for p in layer.parameters()]
        # torch counts the changes of a tensor in `_version`; inference tensors have no such count.
        versions = [(p.dtype, 0 if p.is_inference() else p._version) for p in (*embedding, *weights)]
        # Not the embedding's address: offloading moves it with the model, which changes no value.
        return device, casts, versions, [p.data_ptr() for p in weights]
