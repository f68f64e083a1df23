"""The curator keeps its contract."""

import numpy as np
from lens_example.curator import Example

from lens_core.testing import check_curator
from lens_core.types import Record


def test_contract() -> None:
    check_curator(Example(Example.Config()))


def test_grey_has_no_colour_and_red_has_all() -> None:
    grey, red = np.full((8, 8, 3), 90, np.uint8), np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    scores = Example(Example.Config()).score([Record(b"", grey), Record(b"", red)])
    assert list(scores["colourfulness"]) == [0.0, 255.0]
