"""Dataset `mix`: batches of several datasets in turn, by share: a few pictures to teach beside many that are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from lens_core.catalog import Catalog
from lens_core.recipe import Use, build, options
from lens_core.types import Batch
from lens_core.validators import SEED, each, real


class Mix:
    """Which dataset the next batch is from is drawn by share, from the seed and the batch's number: on every rank the
    same one."""

    @frozen
    class Config:
        # Datasets: [{use: store, …, share: 1.0}]; the share may be left out.
        parts: tuple[Use, ...] = field(validator=each(options(share=real(above=0)), at_least=1))
        seed: int = field(default=0, validator=SEED)

        def uses(self) -> Iterator[tuple[str, str, Use]]:
            """What is checked with this config: (path, kind, use)."""
            for i, use in enumerate(self.parts):
                own = {k: v for k, v in use.options.items() if k != "share"}
                yield f"parts[{i}]", "dataset", Use(use.use, own)

    def __init__(self, config: Config, parts: list[Any] | None = None) -> None:
        """`parts` are datasets already built, one for each that the config names; None: those."""
        if parts is None:
            catalog = Catalog.installed()
            built = [build(catalog, kind, use, f"$.{path}") for path, kind, use in config.uses()]
            parts = [cls(options) for _, cls, options in built]
        self.parts, self.seed, self._handed = parts, config.seed, 0
        shares = np.array([float(use.options.get("share", 1.0)) for use in config.parts])
        self._until = np.cumsum(shares / shares.sum())

    def check_encoders(self, pipeline: Any, precision: str) -> None:
        """See `StoreDataset.check_encoders`; of each part that has one."""
        for part in self.parts:
            if hasattr(part, "check_encoders"):
                part.check_encoders(pipeline, precision)

    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        """Endless."""
        streams = [part.batches(rank, world) for part in self.parts]
        while True:
            at = float(np.random.default_rng([self.seed, self._handed]).random())
            which = min(int(np.searchsorted(self._until, at, side="right")), len(streams) - 1)
            batch = next(streams[which])
            self._handed += 1
            # equal keys must mean equal pictures, whichever dataset they come from
            yield evolve(batch, keys=tuple(key * len(streams) + which for key in batch.keys))

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self._handed, "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._handed = int(state["batch"])
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
