"""Rows of Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable


def row(cells: Iterable[object]) -> str:
    """One row of a Markdown table. In a cell `|` is escaped, and line ends and runs of spaces are one space."""
    return "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in cells) + " |"


def header(names: Iterable[object]) -> list[str]:
    """The two lines that begin a Markdown table: the names of its columns, and the rule below them."""
    columns = list(names)
    return [row(columns), "|" + "---|" * len(columns)]
