"""Reasoners in files: a YAML file names one as a recipe does; a text file is its system prompt.

A text file may begin with front matter, YAML between two lines `---`, that names the reasoner; without, it is `chat`.
A checkpoint may hold such a file, and is then a reasoner itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lens_core.catalog import Catalog
from lens_core.config import WrongType, as_use
from lens_core.io import readers
from lens_core.recipe import ComponentSpec
from lens_core.types import ConfigError

FILES = (".yaml", ".yml", ".txt", ".md")
"""The ends of the names of files that are read as reasoners."""
MAX_PROMPT = 1 << 15
"""Bytes of a file with a system prompt."""
IN_CHECKPOINT = "reasoner.md"
"""The file by which a checkpoint is a reasoner: front matter and a system prompt."""
USUAL = "chat"
"""The reasoner of a system prompt that names none."""


def named_reasoner(text: str, catalog: Catalog) -> ComponentSpec:
    """The reasoner that a line names: a component, `{use: …}` in YAML, a file as of `read_reasoner`, or a checkpoint
    that holds `reasoner.md`, by its folder or by a name that a plugin resolves (`tiny:reasoner`). Raises ConfigError.
    """
    from lens_core.recipe import parse_use

    if text.lower().endswith(FILES):
        return read_reasoner(Path(text))
    answer = catalog.first("lens_fetch", text)
    folder = Path(answer or text)
    if answer is None and not (folder / IN_CHECKPOINT).is_file():
        return parse_use(text)
    if not (folder / IN_CHECKPOINT).is_file():
        raise ConfigError(f"{text}: is a checkpoint that holds no {IN_CHECKPOINT}, so it is no reasoner; name another")
    return read_reasoner(folder / IN_CHECKPOINT)


def read_reasoner(path: Path) -> ComponentSpec:
    """The reasoner in a file. Raises ConfigError, in one line."""
    if path.suffix.lower() in (".yaml", ".yml"):
        data, problems = readers.read_yaml(path, missing="there is no such reasoner; check the path")
    else:
        data, system, problems = read_prompt(path)
        if isinstance(data, Mapping) and "system" in data:
            problems = [*problems, "names a system prompt above the prompt itself; keep one"]
        data = {"use": USUAL, **data, "system": system} if isinstance(data, Mapping) else data
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    try:
        return as_use(data)
    except WrongType as error:
        raise ConfigError(f"{path}: {error}") from error


def read_prompt(path: Path) -> tuple[object, str, list[str]]:
    """(front matter, system prompt, problems of the front matter) of a text file; without front matter that is {}."""
    text = readers.read_text(path, MAX_PROMPT, ConfigError).replace("\r\n", "\n")  # as Windows ends lines
    front: object = {}
    problems: list[str] = []
    if text.startswith("---\n"):
        head, mark, rest = text[4:].partition("\n---\n")
        if not mark:
            raise ConfigError(f"{path}: its front matter has no end; write a line --- below it")
        try:
            front, problems = readers.parse_yaml(head)
        except ValueError as error:
            raise ConfigError(f"{path}: its front matter cannot be read: {error}") from error
        text = rest
    if not text.strip():
        raise ConfigError(f"{path}: holds no system prompt; write what the reasoner is to do")
    return front, text.strip(), problems


def prompt_file(spec: ComponentSpec, system: str) -> str:
    """The content of a text file that `read_reasoner` reads as `spec` with this system prompt."""
    import yaml

    named = {key: value for key, value in spec.options.items() if key not in ("system", "system_file")}
    front = yaml.safe_dump({"use": spec.use, **named}, sort_keys=False, allow_unicode=True, width=110)
    return f"---\n{front}---\n{system.strip()}\n"
