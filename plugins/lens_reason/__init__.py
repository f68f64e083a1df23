"""Reasoners: rewrite a request into a detailed prompt before it is drawn, and search for the best system prompt.

policy     the system prompt: the published rules, or a user's own
harmony    GPT-OSS's turns and channels, parsed
cleaning   an answer without what models put around it
checks     whether an answer may be drawn: its language, its quoted words, refusals
rewriting  a batch of requests to answers that may be drawn; what all reasoners share
cache      answers in files
chat       reasoner `chat`: any llm by name
local      reasoner `gpt_oss`: the model's own text encoder, or that of another checkpoint
search     the search for a system prompt, by reflection on scores
state      what a search has paid for, in files, so that it goes on after a kill
judging    a candidate's scores: prompts refined, drawn, judged
results    the candidates of a search, and the best of them
report     what a search found: candidates, plot, and the comparison on held-out prompts
recipe     a search as a YAML file
commands   lens reason
"""

from __future__ import annotations

from typing import Any

from lens_core import hookimpl


@hookimpl
def lens_reasoners() -> dict[str, type[Any]]:
    from lens_reason.chat import ChatReasoner
    from lens_reason.local import GptOssReasoner

    return {"chat": ChatReasoner, "gpt_oss": GptOssReasoner}


@hookimpl
def lens_commands() -> dict[str, str]:
    return {"reason": "lens_reason.commands:app"}
