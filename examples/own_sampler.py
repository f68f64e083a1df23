"""A sampler of your own in a pipeline: `python examples/own_sampler.py [file.png]`.

This one is Euler's method with even times. Give it a name with a plugin, and checkpoints can record it.
"""

import sys

import torch
from attrs import frozen

from lens_core import LensPipeline
from lens_core.testing import check_sampler

file = sys.argv[1] if len(sys.argv) > 1 else "own_sampler.png"


class EvenEuler:
    """x moves by (t' - t) v(x, t), in steps of equal length."""

    @frozen
    class Config:
        pass

    def __init__(self, config):
        pass

    def times(self, size, steps):
        return torch.linspace(1, 0, steps + 1)

    def sample(self, velocity, x, steps, start=0):
        times = self.times(x.shape[2:], steps).tolist()
        for t, after in zip(times[start:-1], times[start + 1 :], strict=True):
            x = x + (after - t) * velocity(x, torch.full((len(x),), t))
            yield after, x


check_sampler(EvenEuler(EvenEuler.Config()))  # what every sampler must keep

pipeline = LensPipeline.from_pretrained("tiny:")
pipeline.sampler = EvenEuler(EvenEuler.Config())
pipeline("a yellow ring", seed=5).images[0].save(file)
print(file)
