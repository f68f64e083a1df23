"""Lens: a plugin-based framework for text-to-image models.

What most scripts and plugins need can be imported from here: `from lens_core import LensPipeline, Catalog, hookimpl`.
A name is loaded when it is first used, so `import lens_core` is instant and imports no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lens_core.catalog import Catalog
    from lens_core.config import ComponentSpec, structure
    from lens_core.hookspecs import hookimpl
    from lens_core.inference.pipeline import LensPipeline, Result
    from lens_core.protocols import BaseMethod
    from lens_core.recipe import Recipe, build, read_recipe
    from lens_core.training.trainer import Trainer
    from lens_core.types import (
        Batch,
        CheckpointError,
        ConfigError,
        LensError,
        Loss,
        Message,
        PluginError,
        Prompt,
        Record,
        Refinement,
        Score,
        TextFeatures,
    )
else:
    # A type checker that saw this function would take any name for one of the package's.
    def __getattr__(name: str) -> object:
        """Load a public name from the module that defines it. AttributeError for any other."""
        from importlib import import_module

        if name not in _MODULES:
            raise AttributeError(f"module 'lens_core' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"lens_core.{_MODULES[name]}"), name)
        return value


_MODULES = {
    "BaseMethod": "protocols",
    "Batch": "types",
    "Catalog": "catalog",
    "CheckpointError": "types",
    "ComponentSpec": "config",
    "ConfigError": "types",
    "LensError": "types",
    "LensPipeline": "inference.pipeline",
    "Loss": "types",
    "Message": "types",
    "Refinement": "types",
    "PluginError": "types",
    "Prompt": "types",
    "Recipe": "recipe",
    "Record": "types",
    "Result": "inference.pipeline",
    "Score": "types",
    "TextFeatures": "types",
    "Trainer": "training.trainer",
    "build": "recipe",
    "hookimpl": "hookspecs",
    "read_recipe": "recipe",
    "structure": "config",
}

__all__ = [
    "BaseMethod",
    "Batch",
    "Catalog",
    "CheckpointError",
    "ComponentSpec",
    "ConfigError",
    "LensError",
    "LensPipeline",
    "Loss",
    "Message",
    "PluginError",
    "Prompt",
    "Recipe",
    "Record",
    "Refinement",
    "Result",
    "Score",
    "TextFeatures",
    "Trainer",
    "build",
    "hookimpl",
    "read_recipe",
    "structure",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
