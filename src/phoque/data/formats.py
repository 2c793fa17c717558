"""The formats of data files: JSON Lines, JSON, CSV, Parquet and Arrow, each as a stream of rows with their places.

A reader yields (unit, number, row, defect) after the first `skipped` rows, such as ("line", 3, {...}, "").
"""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from phoque.data.data_files import DataFile, format_of
from phoque.data.rows import COLUMNS, COMMON_WORDS, CONVERSATIONS, column_of, split_columns
from phoque.data.turns import has_surrogate
from phoque.errors import UsageError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

NOT_UTF8 = "not UTF-8"
LOOKED_AT = 50  # lines that are looked at to tell JSON Lines from one JSON document
NESTED = (*CONVERSATIONS, "prompt", "completion", "tools", "functions", "history")  # columns with objects in them
BATCH_ROWS = 64  # rows that are read from a table at once


@contextmanager
def explain_defects(file: DataFile) -> Generator[None]:
    """Raise UsageError for a file whose bytes are not what its name or its first bytes say."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise _unreadable(file, error.encoding.upper(), error) from error
    except csv.Error as error:
        raise _unreadable(file, "CSV", error) from error
    except (OSError, ValueError) as error:
        is_arrow = type(error).__module__.startswith("pyarrow")
        is_ours = type(error) is OSError and error.errno is None and (file.is_compressed or not file.filesystem)
        if not is_arrow and not is_ours:  # for example of the network
            raise
        kind = "compressed" if file.is_compressed else format_of(file.name) or ""
        raise _unreadable(file, kind.capitalize() if kind != "compressed" else kind, error) from error


def read_json(raw: IO[bytes], file: DataFile, skipped: int) -> Iterator[tuple[str, int, Any, str]]:
    """JSON Lines, one document, or documents one after another; which of them is told from the content."""
    text = _decode_stream(raw)
    head = list(islice(text, LOOKED_AT))
    lines = chain(head, text)
    if _is_json_lines(head, file.name):
        yield from _read_json_lines(lines, skipped)
    else:
        yield from _read_json_document("".join(lines), file, skipped)


def _is_json_lines(head: list[str], name: str) -> bool:
    """Whether each line is a document of its own; else a document spans lines, or the file is one document."""
    filled = [line for line in head if line.strip()]
    if not filled:
        return True
    if _is_json(filled[0]):  # a single line that is a list is a file of rows; a single object is a row
        return len(filled) > 1 or (not filled[0].lstrip().startswith("[") and _has_lines(name))
    if filled[0].startswith("{") and _has_lines(name):  # a broken line, or an object over lines that are indented
        return len(filled) == 1 or _has_whole_object(filled)
    return False


def _has_lines(name: str) -> bool:
    """Whether a file's name says that each of its lines is a row."""
    return bool({".jsonl", ".ndjson"} & set(Path(name).suffixes))


def _has_whole_object(lines: Iterable[str]) -> bool:
    return any(line.startswith("{") and _is_json(line) for line in lines)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_json_lines(lines: Iterable[str], skipped: int) -> Iterator[tuple[str, int, Any, str]]:
    rows = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        rows += 1
        if rows <= skipped:
            continue
        if has_surrogate(line):
            yield "line", number, None, NOT_UTF8
            continue
        try:
            yield "line", number, json.loads(line), ""
        except (ValueError, RecursionError):  # ValueError is also for integers of over 4,300 digits
            yield "line", number, None, "broken JSON"


def _read_json_document(text: str, file: DataFile, skipped: int) -> Iterator[tuple[str, int, Any, str]]:
    if has_surrogate(text):
        position = next(index for index, c in enumerate(text) if "\udc80" <= c <= "\udcff")
        line = text.count("\n", 0, position) + 1
        raise UsageError(
            what=f"{file.name} is {NOT_UTF8}.",
            why=f"Line {line} has the byte 0x{ord(text[position]) - 0xDC00:x}, which UTF-8 does not have there.",
            fix=f"Convert it, for example with: iconv -f WINDOWS-1252 -t UTF-8 {file.name} > utf8-{file.name}",
        )
    try:
        values = _parse_documents(text)
    except json.JSONDecodeError as error:
        lines = text.split("\n")
        if _has_lines(file.name) or _has_whole_object(lines[:LOOKED_AT]):
            yield from _read_json_lines(lines, skipped)
            return
        raise UsageError(
            what=f"{file.name} is not valid JSON.",
            why=f"{error.msg} at line {error.lineno}.",
            fix="Fix the file, or write JSON Lines: one object per line.",
        ) from error
    for number, row in enumerate(_list_rows(values), 1):
        if number > skipped:
            yield "row", number, row, ""


def _parse_documents(text: str) -> list[Any]:
    """The JSON documents that a text has one after another, with or without commas between them."""
    decoder, position, values = json.JSONDecoder(), 0, []
    while position < len(text):
        if text[position].isspace() or (values and text[position] == ","):
            position += 1
            continue
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:  # an integer of over 4,300 digits, or brackets in brackets
            raise json.JSONDecodeError(first_line(error), text, position) from None
        values.append(value)
    return values


def _list_rows(values: list[Any]) -> list[Any]:
    """The rows of JSON documents: a list, objects one after another, {"data": [...]}, or a table by columns."""
    if len(values) != 1:
        return values
    (value,) = values
    if isinstance(value, list):
        is_one_conversation = bool(value) and all(isinstance(v, dict) and {"role", "from"} & v.keys() for v in value)
        return [value] if is_one_conversation else value
    if not isinstance(value, dict):
        return [value]
    names, table = value.get("columns"), value.get("data")
    is_split = isinstance(names, list) and isinstance(table, list)
    if is_split and all(isinstance(cells, list) and len(cells) == len(names) for cells in table):
        return [dict(zip(names, cells, strict=True)) for cells in table]
    tables = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict | list)]
    if not (COLUMNS - COMMON_WORDS) & set(map(column_of, value)) and len(tables) == 1:
        return tables[0]
    columns = list(value.values())
    if columns and all(isinstance(c, dict) and c.keys() == columns[0].keys() for c in columns):
        return [{name: column[key] for name, column in value.items()} for key in columns[0]]
    rows = split_columns(value)
    # a list of objects is the turns of one conversation, or its tools
    return [value] if rows is None or any(isinstance(cell, dict) for row in rows for cell in row.values()) else rows


def _decode_stream(raw: Any) -> io.TextIOWrapper:
    """The text, in the encoding that its first bytes show; bytes that UTF-8 does not have become lone surrogates."""
    buffered = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
    head = buffered.peek(4)[:4]
    encoding = "utf-8-sig"
    if head in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        encoding = "utf-32"
    elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif head[1:2] == head[3:4] == b"\0":
        encoding = "utf-16-le"
    elif head[0:1] == head[2:3] == b"\0":
        encoding = "utf-16-be"
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    return io.TextIOWrapper(buffered, encoding=encoding, errors=errors, newline=None)


def read_csv(raw: IO[bytes], file: DataFile, skipped: int) -> Iterator[tuple[str, int, Any, str]]:
    """The rows of a table of text, with commas, semicolons or tabs, whichever the header has most of.

    Rows whose cells are all empty are left out.
    """
    text = _decode_stream(raw)
    csv.field_size_limit(sys.maxsize)
    header = next(text, "")
    delimiters = {mark: header.count(mark) for mark in (",", ";", "\t")}
    # strict: a quote that is never closed is an error, not a cell that holds the rest of the file
    delimiter = max(delimiters, key=delimiters.__getitem__)
    table = csv.DictReader(chain([header], text), delimiter=delimiter, strict=True)
    if repeated := [name for name, count in Counter(table.fieldnames or ()).items() if name and count > 1]:
        raise UsageError(
            what=f"{file.name} names the column {repeated[0]!r} twice.",
            why="Which of the two is meant cannot be told.",
            fix="Rename one of them.",
        )
    number, rows = 0, iter(table)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):  # a quote that is never closed: the rest of the file is in its cell
                raise
            number += 1
            if number > skipped:
                yield "row", number, None, "broken quotes"
            continue
        extra = row.pop(None, None)  # cells beyond the header's; a spreadsheet writes empty ones, and empty rows
        if not any(row.values()) and not any(extra or ()):
            continue
        number += 1
        if number <= skipped:
            continue
        values = [value for value in row.values() if isinstance(value, str)]
        if any(map(has_surrogate, values)):
            yield "row", number, None, NOT_UTF8
        elif any(extra or ()):
            yield "row", number, None, "more cells than columns"
        else:
            yield "row", number, {key: value or None for key, value in row.items()}, ""


def read_parquet(raw: IO[bytes], columns: frozenset[str], skipped: int) -> Iterator[tuple[str, int, Any, str]]:
    """The rows of a Parquet file, of which only `columns` are read; the others are None."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(raw)
    names = table.schema_arrow.names
    used = [name for name in names if column_of(name) in columns]
    number = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if number + rows <= skipped:
            number += rows
            continue
        for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=used):
            for row in _rows_of(batch, names):
                number += 1
                if number > skipped:
                    yield "row", number, row, ""


def read_arrow(raw: IO[bytes], columns: frozenset[str], skipped: int) -> Iterator[tuple[str, int, Any, str]]:
    """Files of the Arrow stream format, as `save_to_disk` writes them, or of the Arrow file format."""
    import pyarrow as pa

    try:
        batches: Iterable[pa.RecordBatch] = pa.ipc.open_stream(raw)
        names = batches.schema.names  # ty: ignore[missing-attribute]
    except pa.ArrowInvalid:
        raw.seek(0)
        reader = pa.ipc.open_file(raw)
        names = reader.schema.names
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    number = 0
    for batch in batches:
        if number + batch.num_rows <= skipped:
            number += batch.num_rows
            continue
        for row in _rows_of(batch.select([name for name in names if column_of(name) in columns]), names):
            number += 1
            if number > skipped:
                yield "row", number, row, ""


def _rows_of(batch: "pa.RecordBatch", names: list[str]) -> Iterator[dict[str, Any]]:
    """Rows as dicts that have every column's name; columns that were not read are None."""
    absent = dict.fromkeys(names)
    for row in batch.to_pylist():
        yield absent | {
            name: _without_nulls(value) if column_of(name) in NESTED else value for name, value in row.items()
        }


def _without_nulls(value: Any) -> Any:
    """Without the nulls that a table adds to give all objects of a column the same keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _unreadable(file: DataFile, kind: str, error: Exception) -> UsageError:
    return UsageError(
        what=f"{file.name} is not a readable {kind} file.",
        why=first_line(error),
        fix="Check that the file was written and copied completely.",
    )
