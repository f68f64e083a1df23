"""A reasoner of rules: it adds words that the model knows well to every request."""

from __future__ import annotations

from collections.abc import Sequence

from attrs import field, frozen

from lens_core.validators import text


class Example:
    """Append `style` to each request that does not contain it."""

    @frozen
    class Config:
        style: str = field(default="soft morning light", validator=text())

    def __init__(self, config: Config) -> None:
        self.config = config

    def refine(self, prompts: Sequence[str]) -> list[str]:
        """Requests -> prompts, in their order."""
        style = self.config.style
        return [request if style in request else f"{request}, {style}" for request in prompts]

    def provenance(self) -> dict[str, str]:
        """What a picture records beside the reasoner's name."""
        return {"style": self.config.style}
