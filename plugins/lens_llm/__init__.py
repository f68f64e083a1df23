"""Language models that write prompts and judge pictures by rubrics.

client        llm `openai`: any OpenAI-compatible chat endpoint, with retries, budgets and a cache
completions   what an endpoint's answer is: a reply, or a fault that may pass or not
json_answers  JSON in a model's answer, and whether it fits a schema
budget        calls and USD that were spent, and their ceilings
cache         good answers in files
rubric        reward `rubric`: one call a picture, which answers each of its prompt's rubrics
prompts       benchmark `prompts`: prompt sets in files (`lens-rl/1`), their reader, writer and linter
duplicates    near-duplicates among prompts
taxonomy      what a prompt set is about: the paper's ten categories and five aspects, or others
writing       prompt sets written by a language model from a taxonomy
audit         how far a reward agrees with itself and with another, and what empty pictures score
prompt_sets   prompt sets in files, by a language model or about shapes
recipe_audit  what is known of a recipe with rewards before it runs
commands      what `lens rl` can do: prompts, audit, estimate
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_llms() -> dict[str, type[Any]]:
    from lens_llm.client import OpenAI

    return {"openai": OpenAI}


@hookimpl
def lens_rewards() -> dict[str, type[Any]]:
    from lens_llm.rubric import RubricReward

    return {"rubric": RubricReward}


@hookimpl
def lens_benchmarks() -> dict[str, type[Any]]:
    from lens_llm.prompts import PromptFile

    return {"prompts": PromptFile}


@hookimpl
def lens_commands() -> dict[str, str]:
    return {"rl": "lens_llm.commands:app"}
