"""Check that a component keeps its contract, for the tests of plugin authors: one `check_…` a kind."""

from lens_core.testing.checks import (
    check_backbone,
    check_dataset,
    check_method,
    check_sampler,
    check_text_encoder,
    check_vae,
)
from lens_core.testing.service_checks import (
    check_benchmark,
    check_curator,
    check_generator,
    check_llm,
    check_perceiver,
    check_reasoner,
    check_reward,
)

__all__ = [
    "check_backbone",
    "check_benchmark",
    "check_curator",
    "check_dataset",
    "check_generator",
    "check_llm",
    "check_method",
    "check_perceiver",
    "check_reasoner",
    "check_reward",
    "check_sampler",
    "check_text_encoder",
    "check_vae",
]
