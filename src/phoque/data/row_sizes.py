"""How many tokens each row of a dataset has: kept in phoque's cache, so that only new rows are encoded in a scan.

Rendering and tokenizing take most of the time of a scan. What is kept is found by the row's content, so a dataset that
was edited costs its changed rows, and what the encoding depends on is in the name of the file.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phoque.data.chat_template import ChatTemplate
from phoque.data.rows import Row
from phoque.data.turns import BadRow
from phoque.errors import UsageError
from phoque.files import read_json_object, sha256, write_atomically

METHOD = 1  # how phoque encodes a row; another number leaves what was kept unused
PACKAGES = ("jinja2", "tokenizers", "transformers")  # their versions may change an encoding
TOKENIZER_FILES = ("tokenizer*", "tekken*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*")
MIN_KEPT_ROWS = 1000  # in a smaller dataset, all rows are encoded within a second
CHECKED_ROWS = 16  # known rows that are encoded nevertheless; if one differs, what was kept is not used


@dataclass(frozen=True, slots=True)
class RowSize:
    """The tokens of an encoded row, those that carry loss, and what its encoding notes."""

    tokens: int
    trained_tokens: int
    notes: tuple[str, ...] = ()


class RowSizes:
    """The sizes of rows, encoded here or known from an earlier scan; without a file, all are encoded."""

    def __init__(self, chat: ChatTemplate, file: Path | None = None) -> None:
        self._chat, self._file = chat, file
        self._known: dict[str, Any] = _read(file) if file and file.is_file() else {}
        self._seen: dict[str, Any] = {}
        self._unchecked = CHECKED_ROWS
        self._has_new = False

    def measure(self, row: Row) -> RowSize:
        """The size of a row. Raises BadRow if it cannot be encoded."""
        if self._file is None:
            return self._encode(row)
        key = _hash_row(row)
        entry = self._known.get(key)
        if entry is None or self._unchecked:
            try:
                new: Any = list(asdict(self._encode(row)).values())
            except BadRow as reason:
                new = str(reason)
            new = json.loads(json.dumps(new))
            if entry is not None:
                self._unchecked -= 1
            if entry not in (None, new):  # something that the name of the file does not tell
                self._known, self._unchecked = {}, 0
            self._has_new |= entry != new
            entry = new
        self._seen[key] = entry
        if isinstance(entry, str):
            raise BadRow(entry)
        tokens, trained_tokens, notes = entry
        return RowSize(tokens, trained_tokens, tuple(notes))

    def save(self) -> None:
        """Keep the sizes of the rows that were measured, if any is new and they are many."""
        if self._file and self._has_new and len(self._seen) >= MIN_KEPT_ROWS:
            write_atomically(self._file, json.dumps(self._seen, separators=(",", ":")))

    def _encode(self, row: Row) -> RowSize:
        encoded = self._chat.encode_row(row)
        return RowSize(len(encoded.ids), encoded.trained_tokens, encoded.notes)


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except UsageError:  # damaged, which costs encoding all rows again
        return {}


def _hash_row(row: Row) -> str:
    """A hash of all that the encoding of a row depends on."""
    content = json.dumps([row.messages, row.tools, sorted(row.untrained)])
    return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()


def find_sizes_file(cache: Path, dataset: str, model: Path, chat: ChatTemplate) -> Path | None:
    """Where the sizes of a dataset's rows are kept for a model; None if its template writes the date."""
    if "strftime_now" in chat.template:
        return None
    files = sorted({file for pattern in TOKENIZER_FILES for file in model.glob(pattern) if file.is_file()})
    parts = [METHOD, dataset, chat.options, *map(version, PACKAGES), *((file.name, sha256(file)) for file in files)]
    name = hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
    return cache / "row-sizes" / f"{name}.json"
