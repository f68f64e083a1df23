"""What a training run consists of, built once from its recipe: networks, optimizers, averages, random state, counters.

`step`, `checkpointing`, `nonfinite` and `export` are functions of a `TrainingState`; a `Trainer` is one that runs.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lens_core.attribution import building, trainable_modules_of
from lens_core.catalog import Catalog
from lens_core.checkpoints import packed_linear
from lens_core.inference import lora
from lens_core.inference.pipeline import LensPipeline
from lens_core.io.progress import print_line
from lens_core.recipe import Recipe, Training, build
from lens_core.training import frozen_weights, memory_estimate, optimizers
from lens_core.training.distributed import Ranks
from lens_core.training.evaluator import Evaluator
from lens_core.training.spikes import SpikeDetector
from lens_core.training.trackers import check_trackers
from lens_core.types import CheckpointError, ConfigError

TIMEOUT = timedelta(hours=6)
"""How long processes wait for the one that evaluates or exports, which may draw pictures for hours."""


class TrainingState:
    """One run in the folder `out`. Raises ConfigError where recipe, method, dataset and processes do not fit."""

    def __init__(self, recipe: Recipe, catalog: Catalog, out: Path, log: Callable[[str], None] | None = None) -> None:
        from accelerate.utils import set_seed

        self.recipe, self.catalog, self.out, self.train_config = recipe, catalog, out, recipe.train
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        check_trackers(recipe.train.trackers)
        self.accelerator = _accelerator(recipe.train, out)
        self.ranks = Ranks(self.accelerator, recipe.train.micro_batches, recipe.train.fsdp_shards)
        printer = log or print_line
        self.log: Callable[[str], None] = printer if self.ranks.rank == 0 else lambda line: None
        set_seed(recipe.seed)  # before anything is built: initial weights are part of the recipe
        unread = frozen_weights.unread(recipe, catalog)  # the dataset brings what these would make
        self.pipeline = LensPipeline.from_parts(recipe.pipeline, catalog, unread).to(self.accelerator.device)
        self.start_version = self.pipeline.version  # hash of the start; "" without one. Before anything is replaced
        name, method, config = build(catalog, "method", recipe.method, "$.method")
        with building(name):
            self.method = method(config, self.pipeline)
        self.datasets = self._build_datasets()
        self.evaluator: Evaluator | None = None
        if recipe.evaluation is not None:
            with self.isolated_rng():
                self.evaluator = Evaluator(
                    recipe.evaluation, catalog, self.pipeline, self.method, out, self.log, writes=self.ranks.rank == 0
                )
        memory_estimate.check_sizes(recipe, catalog, self.pipeline)
        self._check_encoders(unread)  # before training changes or casts the encoders
        self.modules = trainable_modules_of(self.method)
        self._prepare_modules()
        self._prepare_optimization()
        self.rng = torch.Generator().manual_seed(recipe.seed)
        if recipe.train.activation_checkpointing:
            self._checkpoint_activations()
        self.recipe_changes: list[str] = []  # where the recipe differs from the one that the run was started with
        self.step = 0
        self.saved_step = 0  # of the newest checkpoint
        self.rotated_step = 0  # of the newest checkpoint that older ones were removed for
        self.last_good_step = -1  # the newest one with finite losses; checkpoints up to it are known to be good
        self.spike_detector = SpikeDetector(recipe.train.spike, tuple(self.modules))

    # ---- set-up -------------------------------------------------------------------------------------------------

    def _build_datasets(self) -> list[Any]:
        """One dataset for each micro-batch of this process, all in one state; none for a method that reads none."""
        recipe, shards_itself = self.recipe, getattr(self.method, "shards_itself", False)
        datasets: list[Any] = []
        if recipe.dataset is not None:
            name, dataset, config = build(self.catalog, "dataset", recipe.dataset, "$.dataset")
            with building(name):
                datasets = [dataset(config) for _ in self.ranks.local_micro_batches]
        elif self.ranks.micro_batches > 1 and not shards_itself:
            raise ConfigError(f"{recipe.method.use} reads no dataset, so it cannot be split; run it as one process")
        if self.ranks.sharded and shards_itself:
            raise ConfigError(
                f"$.train.fsdp_shards: {recipe.method.use} shards its work unevenly, so processes cannot gather each "
                "other's weights in step; use fsdp_shards: 1, and train.lora where memory is short"
            )
        return datasets

    def _check_encoders(self, unread: tuple[str, ...]) -> None:
        """Have datasets, that of the validation too, refuse encoders other than those which made what they hold."""
        held = [] if self.evaluator is None else [self.evaluator.held]
        for dataset in (*self.datasets[:1], *held):
            if hasattr(dataset, "check_encoders"):
                dataset.check_encoders(self.pipeline, self.train_config.precision)
        if self.datasets and hasattr(self.datasets[0], "check_encoders"):
            self.pipeline.defer(unread)

    def _prepare_modules(self) -> None:
        """Attach LoRA, cast what is frozen, compile and shard, in this order: each works on what the last one made."""
        config = self.train_config
        for net in self.modules.values():
            packed_linear.unpack_all(net)  # quantised weights cannot take a step, nor a LoRA be merged into them
        for part in (*self.pipeline.present().values(), *self.modules.values()):
            part.requires_grad_(False).eval()
        optimizers.check_module_names(config, self.modules)
        for module_name, spec in config.lora.items():
            lora.attach(self.modules[module_name], spec)
            self.modules[module_name].requires_grad_(False)
        # What never learns: networks of the method, such as a teacher, and frozen parts of the pipeline.
        self.frozen_modules = frozen_weights.of_method(self.method, self.modules)
        self.frozen_cast: frozen_weights.FrozenCast | None = None
        if config.precision == "bf16":
            modules = self.pipeline.present() | self.frozen_modules
            frozen = frozen_weights.frozen_parameters(modules.values(), self.modules, config.lora)
            self.frozen_cast = frozen_weights.FrozenCast(modules, frozen)
        # A module that FSDP2 has sharded stays sharded, so `export` fills a copy without weights instead.
        self.meta_copies = (
            {module_name: _meta_copy(net) for module_name, net in self.modules.items()} if self.ranks.sharded else {}
        )
        if config.compile:
            for net in self.modules.values():
                # A stack of equal blocks compiles once, as one block; diffusers' models say which those are.
                getattr(net, "compile_repeated_blocks", net.compile)()
        self.ranks.shard(self.modules | frozen_weights.apart(self.frozen_modules, self.modules))

    def _prepare_optimization(self) -> None:
        """What of each trainable module is trained, by what, and averaged into what."""
        config = self.train_config
        self.trainable_parameters = {
            module_name: [p for name, p in net.named_parameters() if module_name not in config.lora or lora.owned(name)]
            for module_name, net in self.modules.items()
        }
        self.trainable_fraction = {
            module_name: sum(p.numel() for p in self.trainable_parameters[module_name])
            / sum(p.numel() for p in net.parameters())
            for module_name, net in self.modules.items()
        }
        self.optimizers = {
            module_name: optimizers.build(module, self.trainable_parameters[module_name], config, self.ranks.sharded)
            for module_name, module in self.modules.items()
        }
        self.ema: dict[str, dict[str, Tensor]] = {
            module_name: {k: v.detach().clone() for k, v in self.trainable_state(module_name).items()}
            for module_name in self.modules
            if config.ema_decay and self.in_pipeline(module_name)  # what is exported
        }
        self.exported_modules = [
            module_name for module_name in self.modules if module_name in config.lora or self.in_pipeline(module_name)
        ]

    def _checkpoint_activations(self) -> None:
        for module_name, net in self.modules.items():
            if not _checkpoints_activations((net,)):
                self.log(f"{module_name} has no blocks to compute again; its activations are all kept")
        # Gradients pass through frozen networks too, where a discriminator reads their features.
        _checkpoints_activations(self.frozen_modules.values())

    # ---- what the other modules ask -----------------------------------------------------------------------------

    def in_pipeline(self, module_name: str) -> bool:
        """Whether a trainable module is a part of the pipeline, and so of the exported model."""
        return any(self.modules[module_name] is part for part in self.pipeline.present().values())

    def trainable_state(self, module_name: str) -> dict[str, Tensor]:
        """The part of a module's state that its training changes: what checkpoints hold and EMA averages."""
        net = self.modules[module_name]
        return lora.tensors(net) if module_name in self.train_config.lora else net.state_dict()

    def load_trainable_state(self, module_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `trainable_state` returned. Raises CheckpointError for the tensors of another network."""
        mine = self.trainable_state(module_name)
        names = sorted(tensors.keys() | mine.keys())
        wrong = next((name for name in names if _shape(tensors, name) != _shape(mine, name)), None)
        if wrong is not None:
            raise CheckpointError(
                f"{self.out}: the checkpoint's {module_name} is another network than the recipe's: {wrong} is "
                f"{_shape(tensors, wrong)} there and {_shape(mine, wrong)} here; undo that change of the recipe, or "
                "choose a new --output"
            )
        self.modules[module_name].load_state_dict(tensors, strict=module_name not in self.train_config.lora)

    def autocast(self) -> torch.autocast:
        """Autocast to bfloat16 where the recipe says so; without its cache where weights are sharded."""
        half = self.train_config.precision == "bf16"
        # The cache would hold a cast of every weight until the pass is over; sharded, one block at a time is whole.
        cached = not self.ranks.sharded
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=half, cache_enabled=cached)

    @contextlib.contextmanager
    def isolated_rng(self) -> Iterator[None]:
        """Run something that is no part of the training: it advances no random state of it and compiles nothing."""
        cuda = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        eager = torch.compiler.set_stance("force_eager" if self.train_config.compile else "default")
        with torch.random.fork_rng(cuda), torch.no_grad(), self.autocast(), eager:
            yield


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "missing"


def _accelerator(config: Training, out: Path) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(
        mixed_precision="no",  # Accelerate has one precision a process; a recipe has one a run
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(out), str(out / "trackers")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)] if several else [],
        cpu=several and not torch.cuda.is_available(),  # else it would start each process alone
    )


def _checkpoints_activations(modules: Iterable[nn.Module]) -> bool:
    """Turn on activation checkpointing where networks can; whether all could."""
    able = [
        net for net in modules if hasattr(net, "enable_gradient_checkpointing")
    ]  # diffusers' and transformers' name
    for net in able:
        net.enable_gradient_checkpointing()  # type: ignore[operator]  # a method, though nn.Module's type says a tensor
    return len(able) == len(list(modules))


def _meta_copy(net: nn.Module) -> nn.Module:
    """`net` with every shape and no weights."""
    memo: dict[int, Any] = {id(t): t.to("meta") for t in net.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, memo)
