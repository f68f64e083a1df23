"""The llm keeps its contract."""

import pytest
from lens_example.llm import Example

from lens_core import LensError
from lens_core.testing import check_llm
from lens_core.types import Message


def test_contract() -> None:
    check_llm(Example(Example.Config(default="a red circle")))


def test_an_unknown_message_is_an_error_without_a_default() -> None:
    with pytest.raises(LensError, match="no answer to 'hello'"):
        Example(Example.Config()).chat([Message("user", "hello")])
