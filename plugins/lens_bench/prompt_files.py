"""The prompts of the public benchmarks, in their authors' files: found on this disk, or fetched at a pinned revision.

Nothing of them comes with Lens. A file that was fetched stays in the cache, with its SHA-256 beside it, and is refused
once it is another. A benchmark's own number of prompts is checked where the file was not given by the caller.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from lens_core.io import atomic_files, http, json_fields, readers
from lens_core.io.json_fields import FieldError
from lens_core.types import ConfigError, Prompt

LARGEST = 2**26  # bytes of one file
SECONDS = 300.0  # of one download
Row = dict[str, Any]


@frozen
class Source:
    """Where a benchmark's files are: `base` names a revision, `files` are paths below it."""

    name: str
    base: str
    files: tuple[str, ...]


GENEVAL = Source(
    "geneval",
    "https://raw.githubusercontent.com/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f",
    ("prompts/evaluation_metadata.jsonl",),
)
_XOMNI = "https://raw.githubusercontent.com/X-Omni-Team/X-Omni/2b8237bb3789638c290eeda3e83ed81bd3652c3b"
LONGTEXT = {
    "en": Source("longtext", _XOMNI, ("textbench/text_prompts.jsonl",)),
    "zh": Source("longtext", _XOMNI, ("textbench/text_prompts_zh.jsonl",)),
}
_ONEIG = "https://raw.githubusercontent.com/OneIG-Bench/OneIG-Benchmark/41b49831e79e6dde5323618c164da1c4cf0f699d"


def _oneig(ending: str) -> Source:
    sheet = "OneIG-Bench-ZH.csv" if ending else "OneIG-Bench.csv"
    questions = tuple(f"scripts/alignment/Q_D/{name}{ending}.json" for name in ("anime", "human", "object"))
    more = (f"scripts/text/text_content{ending}.csv", f"scripts/reasoning/gt_answer{ending}.json")
    return Source("oneig", _ONEIG, (sheet, *questions, *more, "scripts/style/style.csv"))


ONEIG = {"en": _oneig(""), "zh": _oneig("_zh")}
CVTG_REPOSITORY, CVTG_ARCHIVE = "dnkdnk/CVTG-2K", "CVTG-2K.zip"


# ---- files ----------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/lens/prompts, or ~/.cache/lens/prompts."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lens" / "prompts"


def locate(source: Source, folder: str | None, sha256: str | None = None) -> dict[str, Path]:
    """Each of a source's files on this disk. `given`: the one file, or a folder that holds all of them; None: the
    cache, into which is fetched what it lacks. `sha256`: what the one file must have.

    Raises ConfigError, which names the file that is missing or another.
    """
    if folder is None:
        places = {name: _fetched(source, name) for name in source.files}
    else:
        root = Path(folder).expanduser()
        single = len(source.files) == 1 and not root.is_dir()
        places = {name: root if single else root / name for name in source.files}
        for name, path in places.items():
            if not path.is_file():
                raise ConfigError(f"{path}: there is no such file; {source.name} needs {name} of {source.base}")
    if sha256 is not None:
        (path, *others) = places.values()
        if others:
            raise ConfigError(f"sha256: {source.name} has {len(places)} files; leave it out")
        check_sha256(path, sha256)
    return places


def check_sha256(path: Path, wanted: str) -> None:
    """Raise ConfigError where a file has another SHA-256."""
    digest = hashlib.sha256(readers.read_bytes(path, LARGEST)).hexdigest()
    if digest != wanted.lower():
        raise ConfigError(f"{path}: has the SHA-256 {digest[:16]}…, not {wanted[:16]}…; fetch the file again")


def _fetched(source: Source, name: str) -> Path:
    revision = source.base.rpartition("/")[2]
    path = cache_folder() / source.name / revision[:12] / name
    stamp = path.with_name(f"{path.name}.sha256")
    if path.is_file() and stamp.is_file():
        check_sha256(path, readers.read_text(stamp, 128).strip())
        return path
    url = f"{source.base}/{name}"
    advice = f"download it from {url} and give it with --prompts-file"
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise ConfigError(f"{path}: is not there, and HF_HUB_OFFLINE forbids to fetch it; {advice}")
    try:
        answer = http.get(url, {}, SECONDS, LARGEST)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: is not there and cannot be fetched ({readers.one_line(error)}); {advice}"
        ) from error
    if answer.status != 200 or not answer.body:
        raise ConfigError(f"{path}: is not there, and the server answers {answer.status}; {advice}")
    digest = hashlib.sha256(answer.body).hexdigest()
    atomic_files.write_atomic(path, lambda p: p.write_bytes(answer.body))
    atomic_files.write_text(stamp, f"{digest}\n")
    return path


# ---- rows -----------------------------------------------------------------------------------------------------------


def _each(path: Path, rows: Iterator[tuple[int, Any]], parse: Callable[[Row], Prompt]) -> list[Prompt]:
    """The prompts in a file's rows. Raises ConfigError with a line for each wrong one, or where there is none."""
    prompts, problems = [], []
    for number, row in rows:
        try:
            if isinstance(row, FieldError):
                raise row
            prompts.append(parse(row))
        except FieldError as error:
            problems.append(f"{path}, line {number}: {error}")
    if problems:
        raise ConfigError(problems[:20])
    if not prompts:
        raise ConfigError(f"{path}: holds no prompt; give the benchmark's own file")
    return prompts


def _prompt_text(row: Row, name: str) -> str:
    text = json_fields.text(json_fields.field(row, name), name)
    if not text.strip():
        raise FieldError(name, "is empty")
    return text


def csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """(line, row) of a CSV file with a header."""
    table = csv.DictReader(io.StringIO(readers.read_text(path, LARGEST), newline=""))
    try:
        for row in table:
            yield table.line_num, {str(k): v for k, v in row.items() if k is not None}
    except csv.Error as error:
        raise ConfigError(f"{path}: cannot be read as CSV ({readers.one_line(error)})") from error


def _json_object(path: Path) -> Row:
    try:
        return json_fields.mapping(readers.parse_json(readers.read_bytes(path, LARGEST)), "the file")
    except ValueError as error:
        raise ConfigError(f"{path}: {readers.one_line(error)}") from error


# ---- benchmarks -----------------------------------------------------------------------------------------------------


def geneval(path: Path, check: Callable[[Mapping[str, Any]], Any]) -> list[Prompt]:
    """Entries of GenEval: `task` is the tag, `data["metadata"]` the entry, which `check` raises FieldError about."""
    place = 0

    def parse(row: Row) -> Prompt:
        nonlocal place
        prompt = Prompt(_prompt_text(row, "prompt"), place, str(row.get("tag")), {"metadata": row})
        check({"metadata": row})
        place += 1
        return prompt

    return _each(path, json_fields.numbered(path), parse)


def longtext(path: Path) -> list[Prompt]:
    """LongText-Bench: the id is the file's `prompt_id`, `data["text"]` the list of texts that a picture must show."""

    def parse(row: Row) -> Prompt:
        texts = json_fields.field(row, "text")
        texts = [texts] if isinstance(texts, str) else json_fields.texts(texts, "text")
        number = json_fields.field(row, "prompt_id")
        number = int(number) if isinstance(number, str) and number.isdecimal() else number
        category = json_fields.line(row.get("category", ""), "category")
        data = {"text": texts, "category": category}
        return Prompt(_prompt_text(row, "prompt"), json_fields.whole(number, "prompt_id", low=0), category, data)

    return _each(path, json_fields.numbered(path), parse)


def cvtg(place: Path) -> list[Prompt]:
    """CVTG-2K, from the authors' zip or its folder: eight files of regions 2 to 5, plain and styled."""
    read = _zip_members(place) if place.is_file() else _folder_members(place)
    prompts: list[Prompt] = []
    for style in ("CVTG", "CVTG-Style"):
        for regions in (2, 3, 4, 5):
            category = f"{style}/{regions}"
            name, data = read(category)
            for text in _cvtg_texts(name, data):
                prompts.append(Prompt(text, len(prompts), category, {"category": category}))
    return prompts


def _cvtg_texts(name: str, data: bytes) -> list[str]:
    try:
        rows = json_fields.field(json_fields.mapping(readers.parse_json(data), "the file"), "data_list")
        rows = json_fields.items(rows, "data_list")
        return [_prompt_text(json_fields.mapping(row, f"data_list[{i}]"), "prompt") for i, row in enumerate(rows)]
    except ValueError as error:
        raise ConfigError(f"{name}: {readers.one_line(error)}") from error


def _folder_members(folder: Path) -> Callable[[str], tuple[str, bytes]]:
    def read(category: str) -> tuple[str, bytes]:
        style, regions = category.split("/")
        for spelling in (style, style.replace("Style", "style")):
            path = folder / spelling / f"{regions}.json"
            if path.is_file():
                return str(path), readers.read_bytes(path, LARGEST)
        raise ConfigError(f"{folder / category}.json: there is no such file; give the folder of {CVTG_ARCHIVE}")

    return read


def _zip_members(path: Path) -> Callable[[str], tuple[str, bytes]]:
    try:
        archive = zipfile.ZipFile(io.BytesIO(readers.read_bytes(path, LARGEST)))
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{path}: is no zip archive; give {CVTG_ARCHIVE} or its folder") from error

    def read(category: str) -> tuple[str, bytes]:
        wanted = f"/{category.lower()}.json"
        info = next((i for i in archive.infolist() if f"/{i.filename.lower()}".endswith(wanted)), None)
        if info is None:
            raise ConfigError(f"{path}: holds no {category}.json; give {CVTG_ARCHIVE} as its authors have it")
        if info.file_size > LARGEST:
            raise ConfigError(f"{path}: {info.filename} is larger than {LARGEST >> 20} MiB; check the file")
        try:
            with archive.open(info) as member:
                return f"{path}: {info.filename}", member.read(LARGEST + 1)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, ValueError, EOFError) as error:
            raise ConfigError(f"{path}: {info.filename} cannot be read ({readers.one_line(error)})") from error

    return read


CATEGORIES = {
    "Anime_Stylization": "anime", "Portrait": "human", "General_Object": "object", "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning", "Multilingualism": "multilingualism",
}  # fmt: skip
"""OneIG's categories, and how its side files call them."""


def oneig(files: Mapping[str, Path], language: str) -> list[Prompt]:
    """OneIG: `task` is the category; `data` has, where the prompt counts for it, text_content, questions and
    dependencies, style, and answer."""
    ending = "" if language == "en" else "_zh"
    sheet = next(path for name, path in files.items() if name.startswith("OneIG-Bench"))
    column = "prompt_en" if language == "en" else "prompt_cn"
    texts = _column(files[f"scripts/text/text_content{ending}.csv"], "text_content")
    styles = _column(files["scripts/style/style.csv"], "class")
    answers = _json_object(files[f"scripts/reasoning/gt_answer{ending}.json"])
    questions = {
        name: _questions(files[f"scripts/alignment/Q_D/{name}{ending}.json"]) for name in ("anime", "human", "object")
    }
    place = 0

    def parse(row: Row) -> Prompt:
        nonlocal place
        category = json_fields.choice(json_fields.field(row, "category"), "category", list(CATEGORIES))
        name = json_fields.text(json_fields.field(row, "id"), "id")
        short = CATEGORIES[category]
        data: Row = {"category": category, "official_id": name}
        if short == "text":
            data["text_content"] = json_fields.field(texts, name, "text_content.")
        if short in questions:
            data |= json_fields.field(questions[short], name, f"{short}.")
        if short == "reasoning":
            data["answer"] = json_fields.text(json_fields.field(answers, name, "gt_answer."), f"gt_answer.{name}")
        if short == "anime" and (style := styles.get(name, "").strip()) and style.lower() != "nan":
            data["style"] = style.lower().replace(" ", "_")
        place += 1
        return Prompt(_prompt_text(row, column), place - 1, category, data)

    return _each(sheet, csv_rows(sheet), parse)


def _column(path: Path, name: str) -> dict[str, str]:
    """Id -> the text in one column of a side file."""
    column = {}
    for number, row in csv_rows(path):
        if not isinstance(row.get("id"), str) or not isinstance(row.get(name), str):
            raise ConfigError(f"{path}, line {number}: lacks id or {name}; give the authors' file")
        column[row["id"]] = row[name]
    return column


def _questions(path: Path) -> dict[str, Row]:
    """Id -> {questions: {number: text}, dependencies: {number: [numbers]}}, numbers as texts. In the authors' files
    both may be JSON within JSON."""
    by_name = {}
    for name, entry in _json_object(path).items():
        try:
            entry = json_fields.mapping(entry, name)
            parts = []
            for key in ("question", "dependency"):
                value = json_fields.field(entry, key, f"{name}.")
                value = readers.parse_json(value) if isinstance(value, str) else value
                parts.append(json_fields.mapping(value, f"{name}.{key}"))
            questions, parents = parts
            for key, question in questions.items():
                json_fields.text(question, f"{name}.question.{key}")
            dependencies = {
                key: [str(p) for p in json_fields.items(v, f"{name}.dependency")] for key, v in parents.items()
            }
            by_name[name] = {"questions": questions, "dependencies": dependencies}
        except ValueError as error:
            raise ConfigError(f"{path}: {readers.one_line(error)}") from error
    return by_name


def evenly(prompts: list[Prompt], count: int | None) -> list[Prompt]:
    """`count` of the prompts, spread evenly over the file, or all. Raises ConfigError for more than there are."""
    if count is None:
        return prompts
    if count > len(prompts):
        raise ConfigError(f"prompts: there are {len(prompts)} prompts, not {count}; ask for fewer")
    return [prompts[i * len(prompts) // count] for i in range(count)]


def check_count(name: str, prompts: list[Prompt], wanted: int) -> list[Prompt]:
    """The prompts, unless a file that was fetched has another number than the benchmark."""
    if len(prompts) != wanted:
        raise ConfigError(f"{name}: the file has {len(prompts)} prompts, and the benchmark {wanted}; fetch it again")
    return prompts
