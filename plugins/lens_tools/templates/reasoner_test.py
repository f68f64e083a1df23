"""The reasoner keeps its contract."""

from lens_example.reasoner import Example

from lens_core.testing import check_reasoner


def test_contract() -> None:
    check_reasoner(Example(Example.Config()))


def test_a_request_that_names_the_style_stays_as_it_is() -> None:
    assert Example(Example.Config(style="at dusk")).refine(["a red barn at dusk"]) == ["a red barn at dusk"]
