"""Lists and descriptions of components as text for a terminal, and as Markdown pages for docs/components/."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lens_core.catalog import Catalog
from lens_core.io import markdown
from lens_core.io.atomic_files import write_atomic
from lens_core.protocols import KINDS
from lens_tools.reference import USED_IN, Description, Option, Summary, describe, list_components

FOOTNOTE = "This page is written by `lens components --markdown docs/components`; a test compares it with the code."


def listing(rows: Sequence[Summary], width: int = 110) -> str:
    """Components under their kinds, a line each."""
    column = max((len(row.name) for row in rows), default=0) + 2
    lines: list[str] = []
    for kind in dict.fromkeys(row.kind for row in rows):
        lines += ["", kind] if lines else [kind]
        for row in rows:
            if row.kind == kind:
                lines.append(f"  {row.name:{column}}{textwrap.shorten(row.text, width - column, placeholder=' …')}")
    return "\n".join(lines)


def as_text(component: Description) -> str:
    """One component for a terminal."""
    lines = [f"{component.name}  ({component.kind}, {component.distribution})", "", component.docstring, ""]
    lines.append("Options" if component.options else "It has no options.")
    for option in component.options:
        default = "required" if option.default is None else f"= {option.default}"
        lines.append(f"  {option.name}: {option.type} {default}" + (f"  [{option.range}]" if option.range else ""))
        lines += textwrap.wrap(option.comment, 104, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", f"Used in     {component.used_in}", f"Example     {component.example}"]
    lines += ["", f"Every {component.kind} has", *(f"  {method}" for method in component.methods)]
    return "\n".join(lines)


def write(catalog: Catalog, folder: Path) -> list[Path]:
    """One page a kind that has components -> the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, text in pages(catalog).items():
        write_atomic(folder / f"{kind}.md", partial(Path.write_text, data=text, encoding="utf-8"))
        written.append(folder / f"{kind}.md")
    return written


def pages(catalog: Catalog) -> dict[str, str]:
    """Kind -> its page of Markdown."""
    page_by_kind: dict[str, str] = {}
    for kind in KINDS:
        rows = list_components(catalog, kind)
        if rows:
            page_by_kind[kind] = _page(kind, [d for row in rows for d in describe(catalog, row.name, kind)])
    return page_by_kind


def _page(kind: str, components: Sequence[Description]) -> str:
    lines = [f"# {kind}", "", f"Named in: {USED_IN[kind]}. Every {kind} has:", "", "```python"]
    lines += [*components[0].methods, "```", ""]
    for component in components:
        lines += [f"## {component.name}", "", _paragraphs(component.docstring), ""]
        lines += ["```yaml", component.example, "```", ""]
        if component.options:
            lines += ["| option | type | default | range | |", "|---|---|---|---|---|"]
            lines += [_row(option) for option in component.options]
        else:
            lines.append("It has no options.")
        lines.append("")
    return "\n".join([*lines, FOOTNOTE, ""])


def _paragraphs(docstring: str) -> str:
    """A docstring, with what is indented in it kept as it is."""
    return "\n".join(f"    {line}" if line.startswith(" ") else line for line in docstring.splitlines())


def _row(option: Option) -> str:
    default = "required" if option.default is None else f"`{option.default}`"
    cells = (f"`{option.name}`", option.type, default, option.range, option.comment)
    return markdown.row(cells)
