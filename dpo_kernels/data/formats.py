"""Rows of preference data as they stand in a file or an Arrow table, each with its source.

A row's source, as in `"pairs.jsonl, row 12"`, is known here alone: the readers of pandas, pyarrow and `datasets` would
not tell it.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet

from dpo_kernels.data import layouts

if TYPE_CHECKING:
    from datasets import Dataset

RawRows = Iterator[tuple[str, Mapping[str, Any]]]

_TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUFFIXES = (*_TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in _TEXT_SUFFIXES), ".parquet")

_BATCH = 1000  # rows of an Arrow table that are in memory at a time

# What the first bytes of a file give away.
_PARQUET = "Parquet data"
_CONTENTS = (
    (rb"\x1f\x8b", "gzip data"),
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive or an Excel workbook"),
    (rb"\x28\xb5\x2f\xfd", "Zstandard data"),
    (rb"\xfd7zXZ\x00", "xz data"),
    (rb"BZh[1-9]1AY&SY", "bzip2 data"),
    (rb"\x04\x22\x4d\x18", "LZ4 data"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (rb"Rar!\x1a", "a RAR archive"),
    (rb"[\s\S]{257}ustar", "a tar archive"),
    (rb"PAR1", _PARQUET),
    (rb"ARROW1", "Arrow data"),
    (rb"\x89HDF", "HDF5 data"),
    (rb"SQLite format 3\x00", "an SQLite database"),
    (rb"\x80[\x02-\x05][\x95\x7d\x5d\x63\x28]", "a Python pickle"),
    (rb"version https://git-lfs", "a pointer of Git LFS, for which `git lfs pull` fetches the file itself"),
    (rb"(?i:\s*<(!doctype html|html))", "a web page"),
    (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "UTF-32 text (it begins with its byte order mark)"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text (it begins with its byte order mark)"),
)
_SUPPORTED = f"Supported are files that end in {', '.join(SUFFIXES)}, and hold what that says: rename it, or convert it"
_NULL_BYTES = "it holds null bytes, as UTF-16 text and files cut off by a crash do"
_BOM = b"\xef\xbb\xbf"


def read(file: Path) -> RawRows:
    """The rows of a file whose name ends in one of `SUFFIXES`, with their sources, one at a time.

    Raises `ValueError` that names file and row (counted from 1: the line of a JSON Lines file, the element of a JSON
    array, the record of a CSV file) for whatever cannot be read.
    """
    name = file.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return _read_parquet(file)
    return _read_csv(file) if name.endswith((".csv", ".tsv")) else _read_json(file)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """A text file, unpacked. What a damaged archive raises while it is read becomes a `ValueError` with its name."""
    with open(file, "rb") as raw:
        if not file.name.lower().endswith(".gz"):
            _check_contents(raw.peek(512), str(file))
            yield raw
            return
        start = raw.peek(512)
        if start and not start.startswith(b"\x1f\x8b"):
            came = _contents(start) or f"something that begins with {start[:16]!r}"
            raise ValueError(f"{file}: the file holds {came}, not the gzip data that its name promises. {_SUPPORTED}")
        try:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                _check_contents(unpacked.peek(512), f"{file}, unpacked")
                yield unpacked  # type: ignore[misc]
        except EOFError:
            raise ValueError(f"{file}: the gzip data are cut off: the file ends before they do") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{file}: the gzip data are damaged, or followed by something else: {error}") from None


def _contents(start: bytes) -> str | None:
    """What a file that begins so holds, if it is none of the formats of text."""
    return next((what for pattern, what in _CONTENTS if re.match(pattern, start)), None)


def _check_contents(start: bytes, name: str) -> None:
    if what := _contents(start):
        raise ValueError(f"{name}: the file holds {what}, not the UTF-8 text that its name promises. {_SUPPORTED}")


def _is_layout(columns: Collection[str]) -> bool:
    try:
        layouts.recognize(columns)
    except ValueError:
        return False
    return True


# JSON


def _read_json(file: Path) -> RawRows:
    """Rows of JSON Lines, of an array, or of objects over several lines: the contents say which, whatever the name."""
    with _opened(file) as stream:
        lines = ((number, line) for number, line in enumerate(stream, start=1) if line.removeprefix(_BOM).strip())
        number, first = next(lines, (0, b""))
        if not number:
            return
        first = first.removeprefix(_BOM)
        if first.lstrip().startswith(b"[") or _goes_on(first):
            yield from _read_json_text(file, first + stream.read())
            return
        row = _json_line(first, f"{file}, row {number}")
        second = next(lines, None)
        if second is None:
            yield from _of_single_object(row, f"{file}, row {number}", str(file))
            return
        yield f"{file}, row {number}", row
        for number, line in chain([second], lines):
            source = f"{file}, row {number}"
            yield source, _json_line(line, source)


def _goes_on(line: bytes) -> bool:
    """Whether a line of JSON ends inside an object, between two of its fields: it goes on in the next line."""
    try:
        json.loads(line.decode())
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip())
    except (ValueError, RecursionError):  # _json_line says what is wrong
        pass
    return False


def _read_json_text(file: Path, data: bytes) -> RawRows:
    """Elements of an array, or objects one after the other, decoded one by one: the file's text and one row are in
    memory, never all rows."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}: the file is not UTF-8 text: {error}, in line {line}") from None
    del data
    separator = re.compile(r"[\s,\ufeff]*")
    array = text.lstrip().startswith("[")
    at, number = text.index("[") + 1 if array else 0, 0
    first = None
    while True:
        at = separator.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]", at) if array else at == len(text):
            break
        number += 1
        source = f"{file}, row {number}"
        try:
            row, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}: the element is not valid JSON: {_reason(error)}") from None
        row = _object(row, source)
        if number == 1 and not array:
            first = row  # it may be the only one
            continue
        if first is not None:
            yield f"{file}, row 1", first
            first = None
        yield source, row
    if first is not None:
        yield from _of_single_object(first, f"{file}, row 1", str(file))
    if array and text[at + 1 :].strip():
        raise ValueError(f"{file}: the array of {number} rows is followed by {text[at + 1 : at + 41].strip()!r}")


def _of_single_object(row: dict[str, Any], source: str, file: str) -> RawRows:
    """The rows of a file with one object: it is a row, or the list of rows is one of its fields, as in
    `{"data": [...]}`."""
    if _holds_columns(row):
        raise ValueError(
            f"{file}: the file holds columns ({', '.join(row)}), not rows: write one object a row, as pandas does with "
            "to_json(orient='records', lines=True)"
        )
    lists = [name for name, value in row.items() if isinstance(value, list) and all(isinstance(v, dict) for v in value)]
    if _is_layout(row) or not lists:
        yield source, row
    elif len(lists) > 1:
        raise ValueError(
            f"{file}: the file is one object with several lists ({', '.join(lists)}): expected one, of the rows. Save "
            "each in a file of its own"
        )
    else:
        for number, element in enumerate(row[lists[0]], start=1):
            yield f"{file}, row {number}", element


def _holds_columns(row: dict[str, Any]) -> bool:
    """Whether an object has columns of text for fields, as lists or, as pandas writes them, by the index of the row."""
    values = [list(v.values()) if isinstance(v, dict) and all(map(str.isdigit, v)) else v for v in row.values()]
    texts = [v for v in values if isinstance(v, list) and all(isinstance(item, str) for item in v)]
    if len(texts) < len(values) or len({len(text) for text in texts}) != 1:
        return False
    return not any(item.lstrip().startswith(("{", "[")) for item in chain.from_iterable(texts)) and bool(texts[0])


def _json_line(line: bytes, source: str) -> dict[str, Any]:
    try:
        return _object(_DECODER.decode(line.removeprefix(_BOM).decode()), source)
    except _NotAnObject:
        raise
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        reason = _NULL_BYTES if b"\0" in line else _reason(error)
        raise ValueError(f"{source}: the line is not valid JSON: {reason}") from None


class _NotAnObject(ValueError):
    pass


def _object(row: Any, source: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise _NotAnObject(f"{source}: expected a JSON object, got {type(row).__name__}")
    return row


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; JSON's decoder would take the last of two values with one key, without a word."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_with_unique_keys)


# CSV

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}


def _read_csv(file: Path) -> RawRows:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB a cell is less than long responses need
    with _opened(file) as stream:
        # Bytes that are not UTF-8 become lone surrogates here, so that the row which has them can be named.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        header, options, line = _header(file, text)
        if not header:
            return
        named = [place for place, name in enumerate(header, start=1) if not name.startswith(_UNNAMED)]
        columns = max(named, default=0)
        number, reader = 0, csv.reader(text, strict=True, **options)
        while True:
            begins = line + reader.line_num + 1
            source = f"{file}, row {number + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                reason = _CSV_ERRORS.get(str(error), str(error))
                raise ValueError(
                    f"{source}: the record is not valid CSV: {reason}; it begins in line {begins}"
                ) from None
            if cells is None:
                return
            if not any(map(str.strip, cells)):
                continue
            number += 1
            _check_cells(cells, f"{source} (line {begins})")
            too_many = any(map(str.strip, cells[len(header) :]))
            if len(cells) < columns or too_many:
                how = "more" if too_many else "fewer"
                raise ValueError(f"{source}: {how} cells than the header's {columns}: {len(cells)}, in line {begins}")
            row = dict(zip(header, cells, strict=False))
            yield source, {column: cell for column, cell in row.items() if cell or not column.startswith(_UNNAMED)}


_AFTER_QUOTE = (
    "after the quote that closes a cell comes neither a delimiter nor the end of the line (a quote inside a quoted "
    'cell is written twice: "")'
)
_CSV_ERRORS = {
    "line contains NUL": _NULL_BYTES,  # in Python 3.10
    "unexpected end of data": "the quote that opens a cell is never closed",
    **{f"'{delimiter}' expected after '\"'": _AFTER_QUOTE for delimiter in _DELIMITERS},
}
_UNNAMED = "unnamed column "  # and its number: pandas has one for its index, spreadsheets some after the last


def _header(file: Path, lines: io.TextIOWrapper) -> tuple[list[str], dict[str, Any], int]:
    """Names of the columns, options of the reader, and the number of lines that were read for them."""
    options: dict[str, Any] = {}
    count = 0
    for line in lines:
        count += 1
        hint = re.fullmatch(r'"?sep=(.)"?\s*', line)
        if hint:  # Excel's
            options["delimiter"] = hint[1]
        elif line.strip(" \r\n" + "".join(_DELIMITERS)):
            break
    else:
        return [], {}, 0
    _check_cells([line], f"{file}, header")
    options = options or {"delimiter": _delimiter(line, file)}
    (names,) = csv.reader([line], **options)
    # `prompt, chosen, rejected`: then the space after a delimiter is no part of the cells either.
    options["skipinitialspace"] = all(name.startswith(" ") for name in names[1:])
    header = [name.strip("\ufeff \t\r\n") or f"{_UNNAMED}{place}" for place, name in enumerate(names, start=1)]
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{file}: the header has the column {twice[0]!r} twice")
    return header, options, count


def _delimiter(header: str, file: Path) -> str:
    """The delimiter with which the header's names are those of a known layout, or else the most names."""
    order = sorted(_DELIMITERS, key=lambda mark: mark != "\t") if ".tsv" in file.suffixes else list(_DELIMITERS)
    names = {mark: [name.strip() for name in next(csv.reader([header], delimiter=mark))] for mark in order}
    best = max(order, key=lambda mark: (_is_layout(names[mark]), len(names[mark])))
    if len(names[best]) == 1:
        raise ValueError(
            f"{file}: the header has one column only, {header.strip()!r:.80}. Tried as delimiters: "
            f"{', '.join(_DELIMITERS[mark] for mark in order)}"
        )
    return best


def _check_cells(cells: list[str], where: str) -> None:
    text = "".join(cells)
    if "\0" in text:
        raise ValueError(f"{where}: {_NULL_BYTES}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        raise ValueError(f"{where}: it is not UTF-8 text: byte 0x{byte:02x}; save the file as UTF-8") from None


# Arrow


def _read_parquet(file: Path) -> RawRows:
    with open(file, "rb") as raw:
        what = _contents(raw.peek(512))
    if what and what != _PARQUET:
        raise ValueError(f"{file}: the file is not valid Parquet: it holds {what}")
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        schema = parquet.schema_arrow
        columns = None if len(readable(schema)) == len(schema) else readable(schema)
        tables = (pa.Table.from_batches([b]) for b in parquet.iter_batches(batch_size=_BATCH, columns=columns))
        yield from arrow_rows(schema, tables, str(file))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: the file is not valid Parquet: {error}") from None


def dataset_rows(dataset: Dataset, origin: str) -> RawRows:
    """Rows of a `datasets.Dataset`, in whatever format it gives them to others."""
    schema = dataset.features.arrow_schema
    tables = dataset.select_columns(readable(schema)).with_format("arrow").iter(_BATCH)
    return arrow_rows(schema, tables, origin)


def readable(schema: pa.Schema) -> list[str]:
    """The columns that hold no images, audio or other bytes, which would take time and memory for nothing."""

    def is_media(kind: pa.DataType) -> bool:
        if hasattr(kind, "value_type"):
            return is_media(kind.value_type)
        if pa.types.is_struct(kind):
            return {field.name for field in kind} == {"bytes", "path"}  # how `datasets` stores them
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return [field.name for field in schema if not is_media(field.type)]


def arrow_rows(schema: pa.Schema, tables: Iterable[pa.Table], origin: str) -> RawRows:
    """Rows of tables with the `readable` columns of a schema; columns of bytes are empty in them.

    JSON text is parsed where the schema says that it is JSON. Everywhere else, objects lose the keys that are null:
    Arrow gives each the keys of all others.
    """
    names = schema.names
    if len(set(names)) < len(names):
        raise ValueError(f"{origin}: there are two columns {next(n for n in names if names.count(n) > 1)!r}")
    number = 0
    for table in tables:
        try:
            rows = table.to_pylist()
        except UnicodeDecodeError as error:
            raise ValueError(f"{origin}, row {number + 1} to {number + len(table)}: not UTF-8 text: {error}") from None
        for values in rows:
            number += 1
            source = f"{origin}, row {number}"
            try:
                row = {field.name: _value(values.get(field.name, b""), field.type) for field in schema}
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{source}: not valid JSON: {_reason(error)}") from None
            yield source, row


def _value(value: Any, kind: pa.DataType) -> Any:
    if value is None or value == b"":
        return value
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_map(kind):
        return {key: _value(item, kind.item_type) for key, item in value}
    if pa.types.is_struct(kind):
        return {f.name: _value(value[f.name], f.type) for f in kind if value[f.name] is not None}
    return [_value(item, kind.value_type) for item in value] if isinstance(value, list) else value
