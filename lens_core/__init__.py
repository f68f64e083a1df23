"""Lens: a plugin-based framework for text-to-image models."""

from lens_core.hookspecs import hookimpl

__all__ = ["hookimpl"]
__version__ = "0.1.0"
