"""What a run holds and does not train: parts of the pipeline, networks of the method, layers beside adapters.

Where a run computes in 16 bits, autocast casts every float32 weight anew in each pass. What does not learn is cast once
instead, and takes half the room. What rounding changed is kept on the host, for the model that is exported at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lens_core.catalog import Catalog
from lens_core.inference import lora
from lens_core.recipe import Recipe, build


def unread(recipe: Recipe, catalog: Catalog) -> tuple[str, ...]:
    """The encoders that a run never asks for: its dataset gives latents and text features (`cache` of its config names
    where they are), its method takes them (`takes_encoded`), and nothing is drawn meanwhile."""
    if recipe.dataset is None or recipe.evaluation is not None:
        return ()
    _, _, dataset = build(catalog, "dataset", recipe.dataset, "$.dataset")
    _, method, _ = build(catalog, "method", recipe.method, "$.method")
    if not (getattr(dataset, "cache", "") and getattr(method, "takes_encoded", False)):
        return ()
    return ("vae", "text_encoder")


def of_method(method: object, roles: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The networks that a method holds and never changes (`frozen()`), by name; a role is none of them."""
    found = method.frozen() if hasattr(method, "frozen") else {}
    return {name: net for name, net in found.items() if all(net is not role for role in roles.values())}


def frozen_copy(net: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of `net` that does not learn, over the same tensors where they are `shared`: those are held once, and
    adapters can be put beside the layers of either."""
    memo = {id(tensor): tensor for tensor in shared}
    return copy.deepcopy(net, memo).requires_grad_(False).eval()


def apart(nets: Mapping[str, nn.Module], roles: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of `nets` that share no weight with a role."""
    taken = {id(p) for net in roles.values() for p in net.parameters()}
    return {name: net for name, net in nets.items() if all(id(p) not in taken for p in net.parameters())}


def frozen_parameters(
    nets: Iterable[nn.Module], roles: Mapping[str, nn.Module], low: Iterable[str]
) -> list[nn.Parameter]:
    """The parameters of `nets` that do not learn, each once: none of a role that learns in full; of the roles `low`,
    which learn through adapters, all but those."""
    low = set(low)
    learning = {id(p) for role, net in roles.items() if role not in low for p in net.parameters()}
    found: dict[int, nn.Parameter] = {}
    for net in nets:
        for name, parameter in net.named_parameters():
            if id(parameter) not in learning and not lora.owned(name):
                found[id(parameter)] = parameter
    return list(found.values())


class FrozenCast:
    """Frozen float32 parameters, cast to bfloat16 in place; `restore` undoes it. Buffers stay as they are: they are
    small, and statistics among them are divided by."""

    def __init__(self, nets: Mapping[str, nn.Module], frozen: Iterable[nn.Parameter]) -> None:
        ids = {id(p) for p in frozen}
        self.names = {
            key: {n for n, p in net.named_parameters() if id(p) in ids and p.dtype == torch.float32}
            for key, net in nets.items()
        }
        self.kept: dict[str, dict[str, Tensor]] = {key: {} for key in nets}
        for key, net in nets.items():
            for name, parameter in net.named_parameters():
                if name not in self.names[key] or parameter.dtype != torch.float32:
                    continue  # the second: another network shares it, and came before
                half = parameter.data.bfloat16()
                if not torch.equal(half.float(), parameter.data):
                    self.kept[key][name] = parameter.data.cpu()
                parameter.data = half

    @torch.no_grad()
    def restore(self, key: str, net: nn.Module) -> None:
        """Give the network `key`, or what has its names by now, the float32 values that it had."""
        for name, parameter in net.named_parameters():
            if name in self.names.get(key, ()):
                kept = self.kept[key].get(name)
                parameter.data = parameter.data.float() if kept is None else kept.to(parameter.device)
