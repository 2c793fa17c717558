"""One reader for disk and Hub: files of any format as a stream of raw rows that is resumed at any row."""

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phoque.data.data_files import (
    FORMATS,
    DataFile,
    SplitFiles,
    find_hub_files,
    find_local_files,
    format_of,
)
from phoque.data.formats import explain_defects, read_arrow, read_csv, read_json, read_parquet
from phoque.data.rows import ANY_SPELLING, COLUMNS, RawRow, column_of, has_conversation
from phoque.errors import UsageError
from phoque.files import local_path, sha256
from phoque.hub.client import LOOKUP_PATIENCE_S, Hub
from phoque.hub.refs import hub_ref, suggest_path

BUNDLED = {"seal": Path(__file__).parent.parent / "assets" / "seal.jsonl"}
MAX_COLUMN_NAMES = 50  # unused columns that are remembered


@dataclass
class RowStream:
    """The rows of several files in order; `read(start)` goes on after any row, without reading the files before it."""

    files: list[DataFile]
    columns: frozenset[str] = COLUMNS
    unused_columns: dict[str, None] = field(default_factory=dict)

    def __iter__(self) -> Iterator[RawRow]:
        return self.read()

    def read(self, file: int = 0, row: int = 0) -> Iterator[RawRow]:
        """Yield the rows after the first `row` rows of file number `file`."""
        for index in range(file, len(self.files)):
            skipped = row if index == file else 0
            for number, (location, value, defect) in enumerate(
                self._read_file(self.files[index], skipped), skipped + 1
            ):
                yield self._select_columns(index, number, location, value, defect)

    def _read_file(self, file: DataFile, skipped: int) -> Iterator[tuple[str, Any, str]]:
        """Yield (location, row, defect) after the first `skipped` rows."""
        prefix = f"{file.name}:" if len(self.files) > 1 else ""
        kind = format_of(file.name)
        with explain_defects(file), file.open() as raw:
            if kind == "parquet":
                rows = read_parquet(raw, self.columns, skipped)
            elif kind == "arrow":
                rows = read_arrow(raw, self.columns, skipped)
            elif kind == "csv":
                rows = read_csv(raw, file, skipped)
            else:
                rows = read_json(raw, file, skipped)
            for unit, number, value, defect in rows:
                yield f"{prefix}{number}" if prefix else f"{unit} {number}", value, defect

    def _select_columns(self, file: int, number: int, location: str, value: Any, defect: str) -> RawRow:
        if not isinstance(value, dict):
            return RawRow(location, file, number, value, (), defect)
        names = tuple(sys.intern(str(name)) for name in value)
        used = {name: value[name] for name in names if name in self.columns}
        others = [name for name in names if name not in self.columns]
        is_found = has_conversation(used)  # then few other spellings are columns: `Context` is none
        for name in list(others):
            column = column_of(name)
            if column in self.columns and used.get(column) is None and (not is_found or column in ANY_SPELLING):
                used[column] = value[name]
                others.remove(name)
        self._note_unused(others)
        return RawRow(location, file, number, used, names, defect)

    def _note_unused(self, names: Iterable[str]) -> None:
        for name in names:
            if len(self.unused_columns) < MAX_COLUMN_NAMES:
                self.unused_columns[name] = None


@dataclass(frozen=True)
class Dataset:
    """A dataset at one revision: a Hub commit, or a digest of the local files.

    `splits` are all that it has, `other_files` those of its files that belong to no split.
    """

    name: str
    revision: str
    stream: RowStream
    split: str = "train"
    splits: tuple[str, ...] = ("train",)
    other_files: tuple[str, ...] = ()


def open_dataset(
    name: str,
    split: str = "train",
    revision: str | None = None,
    hub: Hub | None = None,
    *,
    config: str | None = None,
    columns: frozenset[str] = COLUMNS,
) -> Dataset:
    """Open a bundled dataset, a local file or folder, or a Hub dataset as a stream, without loading it into memory.

    Raises UsageError if there is no such dataset, config or split.
    """
    if split_files := check_dataset(name, split, config):
        digest = hashlib.sha256()
        for file in split_files.files:
            digest.update(bytes.fromhex(sha256(Path(file.path))))
        sha = digest.hexdigest()[:40]
    else:
        hub = hub or Hub(None, lambda _: None, LOOKUP_PATIENCE_S)
        sha, split_files = find_hub_files(name, revision, hub, config, split)
    return Dataset(name, sha, RowStream(split_files.files, columns), split, split_files.splits, split_files.others)


def find_local(name: str, flag: str = "--dataset") -> Path | None:
    """The local file or folder of a dataset, or None for a Hub id. Raises UsageError if it can be neither."""
    if path := BUNDLED.get(name) or local_path(name):
        return path
    ref = hub_ref(name)
    if format_of(name) or ref is None or ref.path:
        raise UsageError(
            what=f"There is no file or folder {name}.",
            why=f"{flag} names it, and it is not a Hub id (owner/name) either.",
            fix=f"Write the dataset as {url[1]}."
            if (url := re.match(r"https?://(?:www\.)?[^/]+/datasets/([\w.-]+/[\w.-]+)", name))
            else suggest_path(name, f"Check the path, or name a dataset on the Hub. Files are {', '.join(FORMATS)}."),
        )
    return None


def check_dataset(name: str, split: str, config: str | None) -> SplitFiles | None:
    """The files of a local dataset, or None for a Hub id.

    Raises UsageError if there is no dataset, split or config of this name, or if it is empty.
    """
    if not name:
        raise UsageError(
            what="No dataset.",
            why="Neither --dataset nor DATASET_REPO is set.",
            fix="Set --dataset, or try the bundled demo: phoque train --preset demo",
        )
    local = find_local(name)
    if local is None:
        return None
    split_files = find_local_files(name, local, config, split)
    if not split_files.local_bytes:
        raise UsageError(what=f"{name} is empty.", why="It contains no rows.", fix="Check how it was written.")
    return split_files
