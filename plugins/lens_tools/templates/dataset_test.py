"""The dataset keeps its contract."""

from lens_example.dataset import Example

from lens_core.testing import check_dataset


def test_contract() -> None:
    check_dataset(lambda: Example(Example.Config(size=8, batch=4)))


def test_two_processes_share_a_batch() -> None:
    whole, halves = (next(Example(Example.Config(size=8)).batches(0, world)).captions for world in (1, 2))
    assert whole[::2] == halves
