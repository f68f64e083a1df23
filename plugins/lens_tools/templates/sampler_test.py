"""The sampler keeps its contract."""

import torch
from lens_example.sampler import Example

from lens_core.testing import check_sampler


def test_contract() -> None:
    check_sampler(Example(Example.Config()))


def test_halving_the_steps_quarters_the_error() -> None:
    """dx/dt = x from t = 1 to 0 ends at x(1) / e."""
    sampler, start = Example(Example.Config(shift=1.0)), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    ends = [list(sampler.sample(lambda x, t: x, start, steps))[-1][1].item() for steps in (10, 20)]
    errors = [abs(end - torch.e**-1) for end in ends]
    assert 3.5 < errors[0] / errors[1] < 4.5
