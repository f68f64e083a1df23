"""Dataset `mix`: batches of several datasets in turn, by weight: a few pictures to teach beside many that are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from attrs import evolve, field, frozen

from lens_core.catalog import Catalog
from lens_core.recipe import ComponentSpec, build, options
from lens_core.types import Batch, CheckpointError
from lens_core.validators import SEED, each, real


class Mix:
    """Several datasets by weight: each batch is from one of them.

    Which one is drawn from the seed and the batch's number: on every rank the same one.
    """

    @frozen
    class Config:
        # Datasets: [{use: store, …, weight: 1.0}]; the weight may be left out.
        datasets: tuple[ComponentSpec, ...] = field(validator=each(options(weight=real(above=0)), at_least=1))
        seed: int = field(default=0, validator=SEED)

        def uses(self) -> Iterator[tuple[str, str, ComponentSpec]]:
            """What is checked with this config: (path, kind, use)."""
            for i, use in enumerate(self.datasets):
                component_options = {k: v for k, v in use.options.items() if k != "weight"}
                yield f"datasets[{i}]", "dataset", ComponentSpec(use.use, component_options)

    def __init__(self, config: Config, datasets: list[Any] | None = None) -> None:
        """`datasets` are already built, one for each that the config names; None: those."""
        if datasets is None:
            catalog = Catalog.installed()
            built = [build(catalog, kind, use, f"$.{path}") for path, kind, use in config.uses()]
            datasets = [cls(options) for _, cls, options in built]
        self.datasets, self.seed, self._handed = datasets, config.seed, 0
        shares = np.array([float(use.options.get("weight", 1.0)) for use in config.datasets])
        self._until = np.cumsum(shares / shares.sum())

    @classmethod
    def estimate(cls, config: Config) -> str:
        """What a batch of each dataset that has an estimate costs, as text for a dry run."""
        built = [build(Catalog.installed(), kind, use, f"$.{path}") for path, kind, use in config.uses()]
        return "\n".join(dataset.estimate(options) for _, dataset, options in built if hasattr(dataset, "estimate"))

    def check_encoders(self, pipeline: Any, precision: str) -> None:
        """See `StoreDataset.check_encoders`; of each part that has one."""
        for part in self.datasets:
            if hasattr(part, "check_encoders"):
                part.check_encoders(pipeline, precision)

    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        """Endless."""
        streams = [part.batches(rank, world) for part in self.datasets]
        while True:
            at = float(np.random.default_rng([self.seed, self._handed]).random())
            which = min(int(np.searchsorted(self._until, at, side="right")), len(streams) - 1)
            batch = next(streams[which])
            self._handed += 1
            # equal keys must mean equal pictures, whichever dataset they come from
            yield evolve(batch, keys=tuple(key * len(streams) + which for key in batch.keys))

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self._handed, "datasets": [part.state_dict() for part in self.datasets]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["datasets"]) != len(self.datasets):
            raise CheckpointError(
                f"mix: the checkpoint is of {len(state['datasets'])} datasets, and the recipe names "
                f"{len(self.datasets)}; undo that change of the recipe, or choose a new --output"
            )
        self._handed = int(state["batch"])
        for part, saved in zip(self.datasets, state["datasets"], strict=True):
            part.load_state_dict(saved)
