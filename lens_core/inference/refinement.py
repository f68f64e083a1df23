"""Requests on their way to the text encoder: what a reasoner makes of them, and what a picture records of that."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lens_core.attribution import building, calling, name_of, refuse
from lens_core.catalog import Catalog
from lens_core.inference.reasoner_files import named_reasoner
from lens_core.io.readers import shown
from lens_core.recipe import ComponentSpec, build
from lens_core.types import ConfigError, PluginError, Refinement

MAX_IN_MEMORY = 1 << 16
"""Answers that a pipeline keeps of earlier calls."""


def make_reasoner(reasoner: Any, catalog: Catalog | None) -> Any:
    """The component that a name (as of `named_reasoner`) or a ComponentSpec stands for; a component, or None, as it is.
    Raises ConfigError."""
    if not isinstance(reasoner, str | ComponentSpec):
        if reasoner is not None and not callable(getattr(reasoner, "refine", None)):
            raise ConfigError(
                f"reasoner must be a name, a ComponentSpec or have refine(prompts), not {shown(reasoner)}"
            )
        return reasoner
    catalog = catalog or Catalog.installed()
    spec = named_reasoner(reasoner, catalog) if isinstance(reasoner, str) else reasoner
    name, cls, config = build(catalog, "reasoner", spec, "reasoner")
    with building(name):
        return cls(config)


def refine(reasoner: Any, prompts: Sequence[str], encoder: Any = None) -> list[Refinement]:
    """What `reasoner` makes of each of several different prompts. Without a reasoner they stay as they are.

    A text that `encoder` would have to cut is not used. Warns of every answer that is not used, with the reason.
    """
    if reasoner is None:
        return [Refinement(prompt, prompt) for prompt in prompts]
    with calling(reasoner, "refine"):
        answers = reasoner.refine(prompts)
    answers = [_fitting(one, encoder) for one in _checked(reasoner, answers, prompts)]
    unused = [one for one in answers if one.reason]
    if unused:
        others = f", and {len(unused) - 1} more" if len(unused) > 1 else ""
        warnings.warn(
            f"the reasoner's answer is not used, and the request drawn as it is: {unused[0].reason} "
            f"({unused[0].request[:60]!r}{others})",
            stacklevel=5,
        )
    return answers


def _checked(reasoner: Any, answers: Any, prompts: Sequence[str]) -> list[Refinement]:
    must = "it must return one text or Refinement a prompt"
    if isinstance(answers, str) or not isinstance(answers, Sequence):
        refuse(reasoner, "refine", answers, must)
    if len(answers) != len(prompts):
        raise PluginError(
            f"{name_of(reasoner)}.refine returned {len(answers)} answers to {len(prompts)} prompts; {must}"
        )
    checked = []
    for prompt, answer in zip(prompts, answers, strict=True):
        one = Refinement(prompt, answer) if isinstance(answer, str) else answer
        if not isinstance(one, Refinement) or not all(isinstance(t, str) for t in (one.request, one.text, one.reason)):
            refuse(reasoner, "refine", answer, must)
        if one.request != prompt:
            raise PluginError(f"{name_of(reasoner)}.refine answered other prompts; {must}, in their order")
        checked.append(one)
    return checked


def _fitting(one: Refinement, encoder: Any) -> Refinement:
    if one.request.strip() and not one.text.strip():
        return Refinement(one.request, one.request, one.reason or "it is empty")
    if encoder is None or one.text == one.request or not hasattr(encoder, "excess_tokens"):
        return one
    with calling(encoder, "excess_tokens"):
        excess = encoder.excess_tokens(one.text)
    if not excess:
        return one
    return Refinement(one.request, one.request, f"it has {excess} tokens more than the text encoder takes")


def provenance(reasoner: Any) -> dict[str, str]:
    """What a picture records of the reasoner: its name and, where it says so, its model and more."""
    if reasoner is None:
        return {}
    with calling(reasoner, "provenance"):
        more = dict(reasoner.provenance()) if hasattr(reasoner, "provenance") else {}
    return {"name": name_of(reasoner), **{str(key): str(value) for key, value in more.items()}}
