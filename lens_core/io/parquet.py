"""Rows of parquet files, as Hugging Face datasets have them: a column of image files, and columns of captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from lens_core.io import sources
from lens_core.io.sources import CAPTION_KEYS, IMAGE_NAMES, SourceItem, files_below
from lens_core.types import ConfigError


def is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


@frozen
class RowGroup:
    """A row group of a parquet file, the least that is read on its own; `first` is the number of its first row."""

    file: Path
    group: int
    first: int
    rows: int
    image: str  # the column of image files
    texts: dict[str, str]  # the columns of captions, and the key of each


def read_parquet(path: Path, image_column: str = "", text_column: str = "") -> Iterator[SourceItem]:
    """Rows of one parquet file, or of all below a folder. Raises ConfigError if the first file that can be read has
    no such columns; others of that kind are counted."""
    for entry in list_groups(path, image_column, text_column):
        if isinstance(entry, SourceItem):
            yield entry
        else:
            yield from read_group(entry)


def list_groups(
    path: Path, image_column: str = "", text_column: str = "", captions: bool = True
) -> Iterator[RowGroup | SourceItem]:
    """What `read_parquet` reads, in its order, without reading a row; an item for each file that cannot be used.
    `captions`: whether a file without a column of captions is refused."""
    first, faults = True, list[SourceItem]()
    for file in files_below(path, is_parquet, faults):
        reader = _opened(file)
        if isinstance(reader, SourceItem):
            yield reader
            continue
        with reader:
            try:
                image, texts = _columns(file, reader.schema_arrow, image_column, text_column, captions)
            except ConfigError:
                if first:
                    raise
                yield SourceItem(file.name, fault="parquet file without the columns of the first")
                continue
            first = False
            names = {key: "text" if key == text_column else key.lower() for key in texts}
            start = 0
            for group in range(reader.num_row_groups):
                rows = reader.metadata.row_group(group).num_rows
                yield RowGroup(file, group, start, rows, image, names)
                start += rows
    yield from faults


def _opened(file: Path) -> Any:
    """A reader of a parquet file; an item for one that cannot be read."""
    import pyarrow.parquet as pq

    try:
        reader = pq.ParquetFile(file, buffer_size=1024**2, page_checksum_verification=True)
        _ = reader.schema_arrow
    except Exception as error:  # pyarrow raises whatever it stumbles over: OSError, ValueError, its own
        return sources.broken(file.name, error, "damaged parquet file")
    return reader


def read_group(entry: RowGroup) -> Iterator[SourceItem]:
    """The rows of a row group, in their order."""
    reader = _opened(entry.file)
    if isinstance(reader, SourceItem):
        yield reader
        return
    with reader:
        if entry.group >= reader.num_row_groups:
            yield SourceItem(entry.file.name, fault="damaged parquet file")
        else:
            yield from _read_rows(reader, entry)


def _read_rows(reader: Any, entry: RowGroup) -> Iterator[SourceItem]:
    name, image, texts, group, row = entry.file.name, entry.image, entry.texts, entry.group, entry.first
    about = reader.metadata.row_group(group)
    size = sum(
        about.column(i).total_uncompressed_size
        for i in range(about.num_columns)
        if about.column(i).path_in_schema.partition(".")[0] in (image, *texts)
    )
    if size > max(about.num_rows, 1) * sources.LARGEST_PICTURE:
        yield SourceItem(f"{name}:{row} to {row + about.num_rows - 1}", fault=sources.TOO_LARGE)
        return
    # A batch is held whole, so it has as many rows as make about 64 MiB; but in a large group one cell may be most
    # of it, and pyarrow doubles the room of a batch until it fits.
    rows = 1 if size > 2 * sources.LARGEST_PICTURE else min(64, max(1, 64 * 1024**2 * about.num_rows // max(size, 1)))
    try:
        for batch in reader.iter_batches(rows, row_groups=[group], columns=[image, *texts], use_threads=False):
            cells = {key: _binary(batch, column) for column, key in texts.items()}
            files = _binary(batch, image)
            for at in range(batch.num_rows):
                data = _cell(files, at, sources.LARGEST_PICTURE)
                captions: dict[str, Any] = {
                    key: _cell(column, at, sources.LARGEST_TEXT) for key, column in cells.items()
                }
                if any(text is False for text in captions.values()):
                    captions = {
                        **{key: text for key, text in captions.items() if text is not False},
                        "fault": sources.LONG_TEXT,
                    }
                if isinstance(data, bool):
                    yield SourceItem(f"{name}:{row}", fault=sources.TOO_LARGE)
                else:
                    yield SourceItem(f"{name}:{row}", data, (captions,))
                row += 1
    except Exception as error:  # whatever a damaged file makes pyarrow raise; it is counted, and the next group is read
        yield sources.broken(f"{name}:{row}", error, "damaged row group, its rest is lost")


def _binary(batch: Any, name: str) -> Any:
    """A column of a batch as bytes: a text may not be UTF-8, whatever its type says."""
    import pyarrow as pa

    column = batch.column(batch.schema.get_all_field_indices(name)[0])
    if pa.types.is_struct(column.type):
        column = column.flatten()[column.type.get_field_index("bytes")]
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column if _is_bytes(column.type) else column.cast(pa.large_binary())


def _cell(column: Any, at: int, most: int) -> bytes | bool | None:
    """Bytes; None where there are none; False where there are more than `most`."""
    buffer = column[at].as_buffer()
    return None if buffer is None else buffer.size <= most and buffer.to_pybytes()


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_bytes(kind))


def _columns(file: Path, schema: Any, image: str, text: str, captions: bool) -> tuple[str, list[str]]:
    """The columns of pictures and of captions. Raises ConfigError, also where it is not clear which is meant."""
    import pyarrow as pa

    def holds_files(kind: Any) -> bool:
        return _is_bytes(kind) or (
            pa.types.is_struct(kind)
            and kind.get_field_index("bytes") >= 0
            and _is_bytes(kind.field(kind.get_field_index("bytes")).type)
        )

    kinds = {f.name: f.type for f in schema}
    for name, option in ((image, "image"), (text, "text")):
        if name and name not in kinds:
            raise ConfigError(f"{file}: has no column {name!r} among {', '.join(kinds)}; correct --{option}-column")
    if not image:
        image = _image_column(file, {name: kind for name, kind in kinds.items() if holds_files(kind)}, kinds)
    elif not holds_files(kinds[image]):
        raise ConfigError(f"{file}: its column {image!r} is {str(kinds[image])[:80]}, not image files; name another")
    texts = [text] if text else [n for key in CAPTION_KEYS for n in kinds if n.lower() == key and _is_text(kinds[n])]
    if not texts and captions:
        raise ConfigError(f"{file}: has no caption column among {', '.join(kinds)}; name it with --text-column")
    if text and not _is_text(kinds[text]):
        raise ConfigError(f"{file}: its column {text!r} is {str(kinds[text])[:80]}, not text; name another")
    return image, texts


def _image_column(file: Path, able: Mapping[str, Any], among: Iterable[str]) -> str:
    import pyarrow as pa

    for name in IMAGE_NAMES:
        for column in able:
            if column.lower() == name:
                return column
    structs = [name for name, kind in able.items() if pa.types.is_struct(kind)]
    if len(structs) == 1:
        return structs[0]
    what = f"several image columns, {', '.join(structs)}" if structs else f"no image column among {', '.join(among)}"
    raise ConfigError(f"{file}: has {what}; name it with --image-column")
