"""The processes of a run: which micro-batches are whose, collectives over them, and weights that they hold sharded.

Weights are sharded with FSDP2 (`fully_shard`, over DTensors) and saved with torch's distributed checkpoints, in their
safetensors format: every process writes what it holds, and any number of processes can read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lens_core.checkpoints import tensor_files
from lens_core.io import atomic_files
from lens_core.types import CheckpointError, ConfigError

STATE = "state.safetensors"
"""The file of a checkpoint that one process has written whole."""
SHARDS = "shards"
"""The folder of a checkpoint in which every process has written what it holds."""
BUCKET = 2**26
"""Bytes of gradients that one message sums over the processes."""
ENTRIES = ("packed", "features", "encode", "decode")
"""Ways into a network besides its forward, for which its sharded weights must be gathered as well."""


def seed_of(*numbers: int) -> int:
    """A seed that is a pure function of the numbers, 63 bits: equal for equal numbers on any machine and any rank."""
    packed = struct.pack(f"<{len(numbers)}Q", *(n % 2**64 for n in numbers))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def micro_batches_of(rank: int, world: int, parts: int) -> range:
    """The parts of a batch that the process `rank` of `world` works through, in this order."""
    share = parts // world
    return range(rank * share, (rank + 1) * share)


def local_micro_batches(parts: int) -> range:
    """`parts_of` this process."""
    if not (dist.is_available() and dist.is_initialized()):
        return range(parts)
    return micro_batches_of(dist.get_rank(), dist.get_world_size(), parts)


def all_gather(value: Any) -> list[Any]:
    """What every process gives, in their order; `[value]` where there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    everyone = [value] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def buckets(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """`tensors` in their order, in groups of one dtype and at most `size` bytes; one that is larger is its own."""
    held: list[Tensor] = []
    total = 0
    for tensor in tensors:
        if held and (total + tensor.nbytes > size or tensor.dtype != held[0].dtype):
            yield held
            held, total = [], 0
        held.append(tensor)
        total += tensor.nbytes
    if held:
        yield held


def _sum(bucket: Sequence[Tensor]) -> None:
    """Sum tensors over the processes, in place, in one message."""
    # Many small messages cost latency each, so a bucket is copied into one; a large tensor is not worth the copy.
    if len(bucket) == 1 and bucket[0].is_contiguous():
        dist.all_reduce(bucket[0])
        return
    flat = torch.cat([tensor.flatten() for tensor in bucket])
    dist.all_reduce(flat)
    for tensor, piece in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(piece.view_as(tensor))


class Ranks:
    """The processes of a run, and which parts of a batch are this one's. Alone, it adds nothing to anything.

    `shards`: the processes among which weights are sharded, 0 for all; never more than there are. With fewer than all,
    every so many processes hold a copy (hybrid sharding).
    """

    def __init__(self, accelerator: Any, parts: int, shards: int = 1) -> None:
        self.rank, self.world, self.device = accelerator.process_index, accelerator.num_processes, accelerator.device
        self.micro_batches = max(parts, self.world)
        if self.micro_batches % self.world:
            raise ConfigError(
                f"$.train.micro_batches: {parts} micro-batches have no equal shares for {self.world} processes"
            )
        self.local_micro_batches = micro_batches_of(self.rank, self.world, self.micro_batches)
        self.shards = min(shards or self.world, self.world)
        if self.world % self.shards:
            raise ConfigError(
                f"$.train.fsdp_shards: {self.world} processes have no equal groups of {shards}; use a number that "
                "divides it"
            )
        self.sharded = self.shards > 1  # else all hold everything

    # ---- gradients and numbers ------------------------------------------------------------------------------------

    def all_reduce_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over the processes, in messages of about BUCKET bytes, which is all that is copied of them.
        Those of sharded weights were summed in the backward pass.

        A parameter that no sample used gets a gradient of 0, in one process as in many: whether its moments move must
        not depend on who else was in the batch."""
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        # FSDP2 has already reduced each shard's gradient in its backward pass; reducing again would count it twice.
        if self.world == 1 or self.sharded:
            return
        for bucket in buckets([p.grad for p in parameters if p.grad is not None], BUCKET):
            _sum(bucket)

    @property
    def gradient_scale(self) -> int:
        """What a loss is multiplied by, for FSDP2 takes the mean over the processes where `add` takes the sum."""
        return self.world if self.sharded else 1

    def all_gather(self, value: Any) -> list[Any]:
        """What each process gives, in their order."""
        if self.world == 1:
            return [value]
        everyone = [value] * self.world
        dist.all_gather_object(everyone, value)
        return everyone

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over the processes of a small tensor, where it is."""
        if self.world > 1:
            values = values.clone()  # all_reduce works in place, and callers keep their own part
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        if self.world == 1:
            return bool(flag)
        # Once a step and more: a tensor is one message, where an object is pickled, and sent after its size.
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return bool(value)

    def broadcast(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.world == 1:
            return value
        objects = [value]
        dist.broadcast_object_list(objects, src=0)
        return objects[0]

    def barrier(self) -> None:
        """Until all are here."""
        if self.world > 1:
            # Without device_ids, NCCL guesses the GPU of each process, and warns that the guess may hang.
            nccl = self.device.type == "cuda" and "nccl" in dist.get_backend()
            dist.barrier(device_ids=[self.device.index or 0] if nccl else None)

    # ---- sharded weights ------------------------------------------------------------------------------------------

    def shard(self, modules: Mapping[str, nn.Module]) -> None:
        """Leave each process its share of the weights of `modules`, in place: block by block where a network names its
        blocks, as diffusers' and transformers' do, so that one block at a time is whole.

        Raises ConfigError where two of them stand on the same weights.
        """
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ConfigError(
                f"$.train.fsdp_shards: torch {torch.__version__} would wait for ever where processes use different "
                "weights; use torch 2.13 or newer, or fsdp_shards: 1"
            )
        owners: dict[int, str] = {}
        for module_name, net in modules.items():
            for parameter in net.parameters():
                if (other := owners.setdefault(id(parameter), module_name)) != module_name:
                    raise ConfigError(
                        f"$.train.fsdp_shards: {other} and {module_name} stand on the same weights, which "
                        "cannot be sharded twice; use fsdp_shards: 1"
                    )
        groups = self.world // self.shards
        # One axis shards within a group; with several groups (HSDP) a second one keeps a copy in each, so that weights
        # are gathered over the fast links of one machine, and only gradients cross between machines.
        shape, names = ((self.shards,), ("shard",)) if groups == 1 else ((groups, self.shards), ("copy", "shard"))
        # Nothing here changes a network's answer in place, which is what FSDP2 warns of wherever one is a view.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        for net in modules.values():
            for block in [*_blocks(net), net]:
                # The outermost too goes back to shares after each pass: a pass without gradients may come before one
                # with them, and only what is gathered anew learns that it is to have some.
                # Inner blocks first: what `fully_shard` finds sharded already, the outer call leaves out.
                sharded_block = fully_shard(block, mesh=mesh, reshard_after_forward=True)
                # A process whose captions were all dropped runs no text stream, while another's does.
                sharded_block.set_reduce_scatter_unused_params(True)
            for name in ENTRIES:
                if hasattr(net, name):
                    register_fsdp_forward_method(net, name)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Write what this process holds to the folder `shards` of a checkpoint; all processes call it. The SHA-256 of
        every file that any of them has written, by its path in `folder`, taken while it was written."""
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        place = folder / SHARDS
        written: dict[str, Any] = {}
        if self.rank == 0:
            place.mkdir(parents=True)
        self.barrier()
        try:
            # What is not sharded, random states and buffers, is the first process's.
            planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
            writer = HuggingFaceStorageWriter(path=str(place), save_distributed=True)
            writer.fs = _hashing(written)
            save(dict(tensors), storage_writer=writer, planner=planner)
        except CheckpointException as error:  # of whichever process
            causes = [failure[0] if isinstance(failure, tuple) else failure for failure in error.failures.values()]
            with atomic_files.writing(place):
                raise next((c for c in causes if isinstance(c, OSError)), OSError(str(causes[0]))) from error
        mine = {f"{SHARDS}/{name}": digest.hexdigest() for name, digest in written.items()}
        return {name: file_hash for each in self.all_gather(mine) for name, file_hash in each.items()}

    def read(self, folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a checkpoint, whoever wrote it, sharded as those of the same name in `like` are."""
        if (folder / STATE).is_file():
            return {name: _as(t, like.get(name)) for name, t in tensor_files.read_tensors(folder / STATE).items()}
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata
        from torch.distributed.checkpoint.state_dict_loader import load

        reader = HuggingFaceStorageReader(path=str(folder / SHARDS))
        into: dict[str, Any] = {}
        for name, there in reader.read_metadata().state_dict_metadata.items():
            mine = like.get(name)
            assert isinstance(there, TensorStorageMetadata)  # safetensors hold nothing else
            if isinstance(mine, DTensor) and mine.shape == there.size:
                into[name] = torch.empty_like(mine, dtype=there.properties.dtype)
            elif isinstance(mine, DTensor):
                raise CheckpointError(f"{folder}: {name} is {list(there.size)}, and {list(mine.shape)} in the recipe")
            else:
                into[name] = torch.empty(there.size, dtype=there.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # which is no fault
            load(into, storage_reader=reader, no_dist=self.world == 1)
        return into

    def gather(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` whole, on the CPU of the first process; the others help, and get nothing. All of them call it."""
        gathered: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            full = full_tensor(tensor.detach())
            if self.rank == 0:
                gathered[name] = full.cpu()
        return gathered


def _hashing(written: dict[str, Any]) -> Any:
    """Files for torch's checkpoints whose hashes are taken as they are written, into `written`, by name."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    class Stream(io.BufferedWriter):
        def __init__(self, raw: io.FileIO) -> None:
            super().__init__(raw)
            self.digest = hashlib.sha256()

        def write(self, data: Any, /) -> int:
            self.digest.update(data)
            return super().write(data)

    class Files(FileSystem):
        @contextlib.contextmanager
        def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
            with Stream(io.FileIO(path, mode.replace("b", ""))) as stream:
                written[Path(path).name] = stream.digest
                yield stream

    return Files()


def _blocks(net: nn.Module) -> list[nn.Module]:
    """The modules that `net`, or a part of it, says are to stay whole."""
    names: set[str] = set()
    for module in net.modules():
        for attribute in ("_repeated_blocks", "_no_split_modules"):  # diffusers' and transformers' words
            names |= set(getattr(module, attribute, None) or ())
    return [module for module in net.modules() if type(module).__name__ in names and module is not net]


def full_tensor(tensor: Tensor) -> Tensor:
    """`tensor` with all of its elements. Of a sharded one: all processes must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as(tensor: Tensor, like: Tensor | None) -> Tensor:
    """`tensor`, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
