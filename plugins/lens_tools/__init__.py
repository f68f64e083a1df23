"""Commands beside drawing, training and measuring.

convert   `lens convert`: a checkpoint from one layout to another, or to another dtype, a piece at a time
curves    `lens curves`: what runs have logged, drawn over their steps
doctor    `lens doctor`: this machine, and what would fit on it
commands  what they do on the command line
"""

from __future__ import annotations

from lens_core import hookimpl


@hookimpl
def lens_commands() -> dict[str, str]:
    from lens_tools import commands  # light; so `lens --help` can tell what each is for

    return {name: f"{commands.__name__}:{name}" for name in ("convert", "curves", "doctor")}
