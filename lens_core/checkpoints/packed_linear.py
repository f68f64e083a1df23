"""Linear layers that stay quantised in memory, in a format of `gguf_types`: the weight is dequantised in each forward.

A layer keeps its class and its name; only `weight` is no parameter any more, but a property over the buffer `packed`,
uint8 [out,bytes]. Outputs are bit for bit those of the layer with the dequantised weight in the same dtype.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from attrs import frozen
from torch import Tensor, nn

from lens_core.checkpoints.gguf_files import GgufTensor
from lens_core.checkpoints.gguf_types import block_of, dequantize, stays_packed
from lens_core.checkpoints.lazy_tensors import LazyTensor

DTYPE = torch.bfloat16  # of a weight whose file is read without another one; what `GgufTensor.dtype` says
TRANSIENT = 16  # bytes a value that dequantising takes for a moment: codes, scales, float32, and the result

if TYPE_CHECKING:
    _Base = nn.Linear
else:
    _Base = object


@frozen
class PackedWeight:
    """What a layer held while it was quantised."""

    form: str
    packed: Tensor

    def plain(self) -> Tensor:
        """float32 [out,in]"""
        return dequantize(self.form, self.packed)


class PackedLinear(_Base):
    """Mixed into the class of a linear layer by `pack`."""

    form: str
    packed: Tensor
    like: Tensor  # empty; the dtype of the weight, which a cast of the model changes as it does all floats

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a parameter in nn.Linear
        return dequantize(self.form, self.packed).to(self.like.dtype)


@functools.cache
def _packed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with the property: a subclass, so that code that looks for its class still finds it."""
    return type(f"Packed{cls.__name__}", (PackedLinear, cls), {})


def pack(layer: nn.Linear, form: str, packed: Tensor) -> None:
    """Let `layer` hold its weight as `packed`, in place."""
    dtype = layer.weight.dtype
    delattr(layer, "weight")
    layer.register_buffer("packed", packed)
    # Not persistent: it is no part of what a file holds. On the device of the values, which may be meta.
    layer.register_buffer("like", torch.empty(0, dtype=dtype, device=packed.device), persistent=False)
    # The class last: while it has the property, no parameter `weight` can be taken away.
    setattr(layer, "form", form)  # noqa: B010  # a plain attribute, which torch's types do not know of modules
    layer.__class__ = _packed_class(type(layer))  # type: ignore[assignment,arg-type]  # a subclass of its class


@torch.no_grad()
def unpack(layer: PackedLinear) -> PackedWeight:
    """Give `layer` a plain weight, in place -> what it held, for `repack`."""
    before, weight = PackedWeight(layer.form, layer.packed), layer.weight
    _forget(layer)
    layer.__class__ = type(layer).__mro__[2]
    layer.weight = nn.Parameter(weight, requires_grad=False)  # type: ignore[misc]  # its class is another one now
    return before


def repack(layer: nn.Linear, before: PackedWeight) -> None:
    """Put back a copy of what `unpack` returned: copies of a model share it, and an offload plan moves tensors."""
    pack(layer, before.form, before.packed.to(layer.weight.device, copy=True))


def _forget(layer: PackedLinear) -> None:
    del layer.packed, layer.like, layer.form


def packed_layers(module: nn.Module) -> dict[str, PackedLinear]:
    """Name -> layer, for all that are quantised."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, PackedLinear)}


def unpack_all(module: nn.Module) -> None:
    """Give every layer a plain weight, for training, which has to change it."""
    for layer in packed_layers(module).values():
        unpack(layer)


def keep_packed(module: nn.Module, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Let the linear layers of `module`, on the meta device, stay quantised where `tensors` are -> the tensors to load:
    `L.packed` instead of `L.weight` for those."""
    result = dict(tensors)
    for name, layer in list(module.named_modules()):
        tensor = tensors.get(f"{name}.weight")
        if not isinstance(layer, nn.Linear) or not isinstance(tensor, GgufTensor) or not stays_packed(tensor.form):
            continue
        values, size = block_of(tensor.form)
        fits = tuple(layer.weight.shape) == tensor.shape and tensor.packed.shape == (
            tensor.shape[0],
            tensor.shape[1] // values * size,
        )
        if fits:
            pack(layer, tensor.form, torch.empty(tensor.packed.shape, dtype=torch.uint8, device="meta"))
            del result[f"{name}.weight"]
            result[f"{name}.packed"] = tensor.packed
    return result


def set_dtype(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Say what dtype the weights of a module have that was just loaded: `like` stands in no file."""
    for layer in packed_layers(module).values():
        layer.like = torch.empty(0, dtype=dtype or DTYPE, device=layer.packed.device)


def plain_tensors(module: nn.Module) -> dict[str, LazyTensor]:
    """The state of `module` with plain weights, each dequantised when it is read."""
    layers = packed_layers(module)
    inside = {f"{name}.packed" for name in layers}
    state = {name: LazyTensor.of(t) for name, t in module.state_dict().items() if name not in inside}
    return state | {f"{name}.weight": _lazy(layer) for name, layer in layers.items()}


def _lazy(layer: PackedLinear) -> LazyTensor:
    def rows(dtype: torch.dtype) -> Iterator[Tensor]:
        yield layer.weight.to("cpu", dtype)

    return LazyTensor((layer.out_features, layer.in_features), layer.like.dtype, rows)


def transient_bytes(module: nn.Module) -> int:
    """The bytes that dequantising the largest layer takes for a moment."""
    sizes = [layer.in_features * layer.out_features for layer in packed_layers(module).values()]
    return TRANSIENT * max(sizes, default=0)


def note(module: nn.Module, part: str) -> str:
    """How the layers are held and what it saves, for people to read; empty where none is quantised."""
    layers = packed_layers(module).values()
    if not layers:
        return ""
    held = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    plain = held + sum(layer.in_features * layer.out_features * layer.like.dtype.itemsize for layer in layers)
    plain -= sum(layer.packed.nbytes for layer in layers)
    forms = " and ".join(form for form, _ in Counter(layer.form for layer in layers).most_common())
    return (
        f"{part}: {len(layers)} layers stay in {forms}, each dequantised as it runs; {held / 1e9:.1f} GB instead of "
        f"{plain / 1e9:.1f}"
    )
