"""`lens ledger`, as a plain function; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lens_core.cli.terminal import json_text


def ledger(folder: Path, *, json_: Annotated[bool, Parameter(name="--json", negative="")] = False) -> int:
    """What was sent to image APIs and what it cost, by model, from a run's ledger.

    Parameters
    ----------
    folder
        The folder of a ledger, or of a run with one in it.
    json_
        Print every request as a line of JSON instead.
    """
    from attrs import asdict

    from lens_remote.ledger import read_lines, table

    lines = read_lines(folder)
    print("\n".join(json_text(asdict(line)) for line in lines) if json_ else table(lines))
    return 0
