"""The generator keeps its contract."""

from lens_example.generator import Example

from lens_core.testing import check_generator
from lens_core.types import PictureRequest


def test_contract() -> None:
    check_generator(Example(Example.Config()))


def test_a_blank_prompt_is_refused() -> None:
    (outcome,) = Example(Example.Config()).generate([PictureRequest(" ")])
    assert (outcome.status, outcome.image) == ("refused", b"")
