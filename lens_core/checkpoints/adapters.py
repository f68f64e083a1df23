"""What an adapter does to the weight W [out,in] of a linear layer: LoRA, LoHa or LoKr, each as DoRA or with a bias too.

| kind | the change of W | factors |
|---|---|---|
| LoRA | s up @ down | down [r,in], up [out,r] |
| LoHa | s (w1_a @ w1_b) * (w2_a @ w2_b), element by element | w1_a, w2_a [out,r], w1_b, w2_b [r,in] |
| LoKr | s kron(w1, w2) | w1 [a,b] and w2 [out/a,in/b], each whole, or a product of two |

s = alpha / rank. DoRA (Liu et al., 2024) keeps lengths apart: W becomes m (W + change) / |W + change|, with a length m
for each row, or, as LyCORIS may store it, for each column. A bias beside `up` adds s b to the layer's.

Sources: PEFT (`tuners/lora`, `loha`, `lokr`) and LyCORIS (`functional`), which tests compare with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import field, frozen
from torch import Tensor

FACTORS = {
    "LoRA": ("down", "up"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
}
"""Kind -> the names of its factors in files; LoRA's in `lora_keys`."""


def _precise(*tensors: Tensor) -> torch.dtype:
    # A product in bfloat16 would lose what a small rank learned.
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _product(factors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """A matrix that is stored whole, or as two of which it is the product."""
    one, *rest = (factor.to(dtype) for factor in factors)
    return one @ rest[0] if rest else one


def _shape(factors: tuple[Tensor, ...]) -> tuple[int, int]:
    return factors[0].shape[0], factors[-1].shape[1]


@frozen
class Adapter:
    """One layer's adapter. Subclasses say what is added to the weight."""

    kind: ClassVar[str]
    alpha: float = field(default=1.0, kw_only=True)
    magnitude: Tensor | None = field(default=None, kw_only=True)  # DoRA's m: [out], or [1,in]
    bias: Tensor | None = field(default=None, kw_only=True)  # [out]

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by their names in files."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        raise NotImplementedError

    @property
    def rank(self) -> int | None:
        """None where no factor shows one."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """s, 1 where no rank is known."""
        return 1.0 if self.rank is None else self.alpha / self.rank

    def product(self, dtype: torch.dtype) -> Tensor:
        """The change [out,in] without its scale."""
        raise NotImplementedError

    def delta(self, weight: Tensor | None = None) -> Tensor:
        """What is added to the layer's own `weight` [out,in], which DoRA alone reads; float32 at least."""
        dtype = _precise(*self.factors.values(), *(() if weight is None else (weight,)))
        change = self.scale * self.product(dtype)
        if self.magnitude is None:
            return change
        if weight is None:
            raise ValueError("DoRA's change depends on the weight")
        before = weight.to(change)
        whole, lengths = before + change, self.magnitude.to(change)
        rows = lengths.ndim == 1
        norms = torch.linalg.vector_norm(whole, dim=1 if rows else 0, keepdim=True)
        # A row of zeros has no direction that could be made longer: it stays.
        stretch = torch.where(norms > 0, (lengths[:, None] if rows else lengths) / norms, 0)
        return whole * stretch - before

    def shift(self) -> Tensor | None:
        """What is added to the layer's bias."""
        return None if self.bias is None else self.scale * self.bias.to(_precise(self.bias))


@frozen
class LoRA(Adapter):
    """down [r,in] and up [out,r]."""

    kind = "LoRA"
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def factors(self) -> dict[str, Tensor]:
        return {"down": self.down, "up": self.up}

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def shape(self) -> tuple[int, int]:
        return _shape((self.up, self.down))

    def product(self, dtype: torch.dtype) -> Tensor:
        return _product((self.up, self.down), dtype)


@frozen
class LoHa(Adapter):
    """The product, element by element, of two products."""

    kind = "LoHa"
    w1: tuple[Tensor, Tensor]
    w2: tuple[Tensor, Tensor]
    alpha: float

    @property
    def factors(self) -> dict[str, Tensor]:
        return dict(zip(FACTORS["LoHa"], (*self.w1, *self.w2), strict=True))

    @property
    def rank(self) -> int:
        return len(self.w1[1])

    @property
    def shape(self) -> tuple[int, int]:
        return _shape(self.w1)

    def product(self, dtype: torch.dtype) -> Tensor:
        return _product(self.w1, dtype) * _product(self.w2, dtype)


@frozen
class LoKr(Adapter):
    """A Kronecker product of two matrices, each of one factor or of two.

    Where both are whole no tensor tells a rank: then `rank` is that of PEFT's config, or None, and s is 1.
    """

    kind = "LoKr"
    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    alpha: float
    rank: int | None

    @property
    def factors(self) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for name, parts in (("lokr_w1", self.w1), ("lokr_w2", self.w2)):
            named |= {name: parts[0]} if len(parts) == 1 else {f"{name}_a": parts[0], f"{name}_b": parts[1]}
        return named

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), (c, d) = _shape(self.w1), _shape(self.w2)
        return a * c, b * d

    def product(self, dtype: torch.dtype) -> Tensor:
        return torch.kron(_product(self.w1, dtype), _product(self.w2, dtype))


def kind_of(names: Mapping[str, object]) -> str | None:
    """The kind that factors of these names belong to; None where they are of none, or of more than one."""
    kinds = [kind for kind, factors in FACTORS.items() if names.keys() & set(factors)]
    return kinds[0] if len(kinds) == 1 else None


def digest(changes: Mapping[str, Adapter]) -> str:
    """A short hash of the adapters of all layers: the same in every key format, another for any other number."""
    sha = hashlib.sha256()
    for layer, adapter in sorted(changes.items()):
        sha.update(f"{layer} {adapter.kind} {adapter.alpha!r}".encode())
        tensors = adapter.factors | {"magnitude": adapter.magnitude, "bias": adapter.bias}
        for name, value in tensors.items():
            if value is not None:
                sha.update(f" {name} {value.dtype} {list(value.shape)} ".encode())
                sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
