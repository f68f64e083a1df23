"""Contract checks for plugin authors: `check_vae` to `check_method` prove that a component keeps its protocol."""

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
