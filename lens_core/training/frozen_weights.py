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


def of_method(method: object, trainable: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The networks that a method holds and never changes (`frozen()`), by name; trainable modules are none of them."""
    modules = method.frozen() if hasattr(method, "frozen") else {}
    return {name: net for name, net in modules.items() if all(net is not other for other in trainable.values())}


def frozen_copy(net: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of `net` that does not learn, over the same tensors where they are `shared`: those are held once, and
    adapters can be put beside the layers of either."""
    memo = {id(tensor): tensor for tensor in shared}
    return copy.deepcopy(net, memo).requires_grad_(False).eval()


def apart(modules: Mapping[str, nn.Module], trainable: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of `modules` that share no weight with a trainable one."""
    taken = {id(p) for net in trainable.values() for p in net.parameters()}
    return {name: net for name, net in modules.items() if all(id(p) not in taken for p in net.parameters())}


def frozen_parameters(
    modules: Iterable[nn.Module], trainable: Mapping[str, nn.Module], low: Iterable[str]
) -> list[nn.Parameter]:
    """The parameters of `modules` that do not learn, each once: none of a module that is trained in full; of those in
    `low`, which are trained as LoRAs, all but the LoRA's."""
    low = set(low)
    learning = {id(p) for module_name, net in trainable.items() if module_name not in low for p in net.parameters()}
    parameters: dict[int, nn.Parameter] = {}
    for net in modules:
        for name, parameter in net.named_parameters():
            if id(parameter) not in learning and not lora.owned(name):
                parameters[id(parameter)] = parameter
    return list(parameters.values())


class FrozenCast:
    """Frozen float32 parameters, cast to bfloat16 in place; `restore` undoes it. Buffers stay as they are: they are
    small, and statistics among them are divided by."""

    def __init__(self, modules: Mapping[str, nn.Module], frozen: Iterable[nn.Parameter]) -> None:
        ids = {id(p) for p in frozen}
        self.names = {
            key: {n for n, p in net.named_parameters() if id(p) in ids and p.dtype == torch.float32}
            for key, net in modules.items()
        }
        self.kept: dict[str, dict[str, Tensor]] = {key: {} for key in modules}
        for key, net in modules.items():
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
