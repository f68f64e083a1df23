"""The method keeps its contract."""

from types import SimpleNamespace
from typing import Any

import torch
from lens_example.method import Example
from torch import Tensor, nn

from lens_core import Batch, TextFeatures
from lens_core.testing import check_method


class Net(nn.Module):
    """The smallest backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, t: Tensor, text: TextFeatures) -> Tensor:
        v: Tensor = self.layer(x) * t.view(-1, 1, 1, 1)
        return v


def make() -> Example:
    def encode(value: Any) -> Any:
        return value if isinstance(value, Tensor) else TextFeatures.empty(len(value), 1, 1, like=torch.zeros(1))

    part = SimpleNamespace(encode=encode)
    return Example(Example.Config(), SimpleNamespace(backbone=Net(), vae=part, text_encoder=part))


def test_contract() -> None:
    grey = [Batch(torch.full((2, 3, 8, 8), level, dtype=torch.uint8), ("grey", "grey")) for level in (50, 200)]
    check_method(make, grey)
