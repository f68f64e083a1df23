"""Render an untrusted chat template in a process of its own, with little time and memory.

A template is a program: two nested loops run for hours, `{{ 'a' * 3000000000 }}` takes 3 GB, both while it is compiled
or between two bytecodes, where a sandbox within the process cannot stop it. So it runs in a child that the operating
system ends. The parent never does more than read the child's answer, which has a bound too.

Run as a script, it reads {template, messages, date, variables} as JSON from stdin and writes {text} or {error} to
stdout.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

LARGEST = 2**18  # bytes of a template; GPT-OSS's own has 16 KB
LONGEST = 100_000  # characters of a rendering
SECONDS = 2  # of processor time
PATIENCE = 30  # seconds of waiting, on a machine that is busy with something else
MEMORY = 2**29  # bytes of address space
PLAIN = {"add_generation_prompt": False}  # the variables of a template beside messages


def environment(date: str) -> Any:
    """Jinja as transformers sets it up for chat templates, on the day `date` (YYYY-MM-DD)."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> NoReturn:
        raise TemplateError(reason)

    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    jinja.globals |= {"strftime_now": datetime.fromisoformat(date).strftime, "raise_exception": refuse}
    return jinja


def render_here(
    template: str, messages: Sequence[dict[str, str]], date: str, variables: Mapping[str, Any] | None = None
) -> str:
    """The text of `messages` by a template that is trusted. Raises ValueError where it refuses a message."""
    from jinja2 import TemplateError

    try:
        text = environment(date).from_string(template).render(**PLAIN | dict(variables or {}), messages=messages)
    except (TemplateError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    return str(text)


def render(
    template: str, messages: Sequence[dict[str, str]], date: str, variables: Mapping[str, Any] | None = None
) -> str:
    """The text of `messages` by a template that is not trusted. Raises ValueError with the reason, in one line."""
    if len(template) > LARGEST:
        raise ValueError(f"it has {len(template)} characters; at most {LARGEST} are run")
    task = json.dumps(
        {"template": template, "messages": list(messages), "date": date, "variables": dict(variables or {})}
    )
    try:
        # -P: the folder of this file holds modules whose names others may use.
        child = subprocess.run(
            [sys.executable, "-P", str(Path(__file__))], input=task.encode(), capture_output=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"it was not rendered within {PATIENCE} s") from error
    try:
        answer = json.loads(child.stdout)
    except ValueError as error:
        raise ValueError(f"it takes more than {SECONDS} s or {MEMORY >> 20} MiB") from error
    if "error" in answer:
        raise ValueError(str(answer["error"]))
    return str(answer["text"])


def _answer(task: dict[str, Any]) -> dict[str, str]:
    """What the child writes."""
    jinja = environment(task["date"])
    _limit()
    try:
        text = jinja.from_string(task["template"]).render(**PLAIN | task["variables"], messages=task["messages"])
        if len(text) > LONGEST:
            return {"error": f"it renders {len(text)} characters; at most {LONGEST} are taken"}
        text.encode()
        return {"text": text}
    except Exception as error:  # whatever the template raises
        return {"error": f"{type(error).__name__}: {' '.join(str(error)[:800].split())[:200]}"}


def _limit() -> None:
    try:
        import resource
    except ImportError:  # not on this system: the parent's patience is the only limit
        return
    for kind, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(kind)
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (bound, bound))
        except (ValueError, OSError):  # a system that has the name of a limit and not the limit
            continue


if __name__ == "__main__":
    json.dump(_answer(json.load(sys.stdin)), sys.stdout)
