"""Check that a component keeps its contract: `check_vae` to `check_method`, for the tests of plugin authors."""

from lens_core.testing.checks import (
    check_backbone,
    check_dataset,
    check_method,
    check_reward,
    check_sampler,
    check_text_encoder,
    check_vae,
)

__all__ = [
    "check_backbone",
    "check_dataset",
    "check_method",
    "check_reward",
    "check_sampler",
    "check_text_encoder",
    "check_vae",
]
