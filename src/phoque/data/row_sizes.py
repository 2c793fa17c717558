"""How many tokens each row of a dataset has: kept in phoque's cache, so that only new rows are encoded in a scan.

In a run of several processes, each packs all rows by these sizes and encodes only the rows that it trains on.

Rendering and tokenizing take most of the time of a scan. What is kept is found by the row's content, so a dataset that
was edited costs its changed rows, and what the encoding depends on is in the name of the file.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phoque.data.chat_template import ChatTemplate, EncodedChat
from phoque.data.rows import Row
from phoque.errors import UsageError
from phoque.files import read_json_object, sha256, write_atomically
from phoque.version import __version__

PACKAGES = ("jinja2", "tokenizers", "transformers")  # their versions may change an encoding
SIZES_FOLDER = "row-sizes"  # in phoque's cache
MIN_KEPT_ROWS = 1000  # in a smaller dataset, all rows are encoded within a second


@dataclass(frozen=True, slots=True)
class RowSize:
    """The tokens of an encoded row, those that carry loss, and what its encoding notes."""

    tokens: int
    trained_tokens: int
    notes: tuple[str, ...] = ()


class StaleSizes(Exception):
    """A row has another size than was kept: something has changed that the name of the file does not tell."""


class RowSizes:
    """The sizes of rows, encoded here or known from an earlier scan; without a file, none is known or kept.

    Rows that cannot be encoded are not kept, because the reason may quote their text.
    """

    def __init__(self, chat: ChatTemplate, file: Path | None = None) -> None:
        self._chat, self.file = chat, file
        self._known: dict[str, Any] = _read(file) if file and file.is_file() else {}
        self._seen: dict[str, Any] = {}

    def measure(self, row: Row, encoded: EncodedChat | None = None) -> RowSize:
        """The size of a row, which may be `encoded` already. Raises BadRow if it cannot be encoded, or StaleSizes."""
        key = _hash_row(row) if self.file else ""
        known = self._known.get(key)
        if encoded is None and known is not None:
            tokens, trained_tokens, notes = known
            size = RowSize(tokens, trained_tokens, tuple(notes))
        else:
            encoded = encoded or self._chat.encode_row(row)
            size = RowSize(len(encoded.ids), encoded.trained_tokens, encoded.notes)
        entry = [size.tokens, size.trained_tokens, list(size.notes)]
        if known not in (None, entry):
            raise StaleSizes
        if self.file:
            self._seen[key] = entry
        return size

    def find(self, row: Row) -> RowSize | None:
        """The size of a row that the scan has measured, if it kept it."""
        entry = self._seen.get(_hash_row(row)) if self._seen else None
        return None if entry is None else RowSize(entry[0], entry[1], tuple(entry[2]))

    def forget(self) -> None:
        """Use nothing of what was kept."""
        self._known, self._seen = {}, {}

    def save(self) -> None:
        """Keep the sizes of the rows that were measured, if any is new and they are many."""
        if self.file and len(self._seen) >= MIN_KEPT_ROWS and not self._seen.keys() <= self._known.keys():
            with suppress(OSError):  # a cache that cannot be written costs the next start its time, and nothing else
                write_atomically(self.file, json.dumps(self._seen, separators=(",", ":")))


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except UsageError:  # damaged, which costs encoding all rows again
        return {}


def _hash_row(row: Row) -> str:
    """A hash of all that the encoding of a row depends on."""
    content = json.dumps([row.messages, row.tools, sorted(row.untrained)])
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


def find_sizes_file(cache: Path, dataset: str, tokenizer_files: Sequence[Path], chat: ChatTemplate) -> Path | None:
    """Where the sizes of a dataset's rows are kept for a tokenizer; None if its template writes the present date."""
    if chat.writes_date and chat.today is None:
        return None
    digests = [(file.name, sha256(file)) for file in tokenizer_files]
    templates = chat.tokenizer.chat_template  # a folder may have more of them, beside the tokenizer's files
    today = str(chat.today) if chat.writes_date else ""
    parts = [__version__, dataset, chat.options, templates, today, *map(version, PACKAGES), *digests]
    name = hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
    return cache / SIZES_FOLDER / f"{name}.json"
