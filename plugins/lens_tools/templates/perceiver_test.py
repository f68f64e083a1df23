"""The perceiver keeps its contract."""

from lens_example.perceiver import Example
from PIL import Image

from lens_core.testing import check_perceiver


def test_contract() -> None:
    check_perceiver(Example(Example.Config()), ["Is the picture blue?", "Is the picture green?"])


def test_grey_is_no_colour() -> None:
    grey = Image.new("RGB", (8, 8), (90, 90, 90))
    assert Example(Example.Config()).perceive([grey], ["Is it red?"]) == ["No"]
