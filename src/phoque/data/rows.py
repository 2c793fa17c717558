"""Rows of a dataset: how they are read, their schemas, and what makes a row unusable for training."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.errors import UsageError, first_line
from phoque.files import sha256

BUNDLED = {"seal": Path(__file__).parent.parent / "assets" / "seal.jsonl"}
SUFFIXES = (".jsonl", ".json", ".parquet")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadRow(ValueError):
    """A row that is skipped; the message is a short reason, by which such rows are counted."""


@dataclass(frozen=True)
class Row:
    """One conversation: `messages` of {role, content}, its source, and its toxicity score if it has one."""

    messages: list[dict[str, str]]
    source: str
    toxicity_score: float | None

    @property
    def first_question(self) -> str:
        """The first user message."""
        return next(turn["content"] for turn in self.messages if turn["role"] == "user")

    def key(self) -> str:
        """Return a hash of the messages, which does not depend on the file or the order of rows."""
        return hashlib.blake2b(json.dumps(self.messages, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A stream of raw rows: `stream` is a datasets.IterableDataset of {line, row, broken}."""

    name: str
    revision: str
    stream: Any


def open_dataset(name: str, split: str, revision: str | None, token: str | None) -> Dataset:
    """Open a bundled dataset, a local file or folder, or a Hub dataset as a stream, without loading it into memory.

    Raises UsageError if there is no dataset of that name.
    """
    if not name:
        raise UsageError(
            what="No dataset.",
            why="Neither --dataset nor DATASET_REPO is set.",
            fix="Set --dataset, or try --dataset seal.",
        )
    path = BUNDLED.get(name) or Path(name).expanduser()
    if path.exists():
        return _open_local(name, path)
    if path.suffix in SUFFIXES or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UsageError(
            what=f"No dataset at {name}.",
            why=f"It is neither a {', '.join(SUFFIXES)} file, nor a folder of them, nor a Hub id.",
            fix="Check --dataset.",
        )
    return _open_hub(name, split, revision, token)


def _open_local(name: str, path: Path) -> Dataset:
    from datasets import IterableDataset

    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES)
    files = [f for f in files if f.suffix in SUFFIXES]
    if not files:
        raise UsageError(
            what=f"{path} is not a dataset.", why=f"It contains no {', '.join(SUFFIXES)} file.", fix="Check --dataset."
        )
    if not any(f.stat().st_size for f in files):
        raise UsageError(what=f"{path} is empty.", why="It contains no rows.", fix="Check how the file was written.")
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(sha256(file)))
    # one entry per file: datasets treats each as a shard, and its state holds the position in each shard
    stream = IterableDataset.from_generator(_read_files, gen_kwargs={"files": [str(f) for f in files]})
    return Dataset(name, digest.hexdigest()[:40], stream)


def _open_hub(name: str, split: str, revision: str | None, token: str | None) -> Dataset:
    from datasets import load_dataset

    from phoque.hub.client import LOOKUP_PATIENCE_S, Hub

    hub = Hub(token, lambda _: None, LOOKUP_PATIENCE_S)
    sha = str(hub.retry(name, lambda: hub.api.dataset_info(name, revision=revision)).sha)
    try:
        stream = load_dataset(name, split=split, streaming=True, revision=sha, token=token)
    except ValueError as error:  # datasets raises it for an unknown split or a repository without data
        raise UsageError(
            what=f"{name} cannot be read.", why=first_line(error), fix="Check the name and the split."
        ) from error
    columns = stream.column_names
    return Dataset(name, sha, stream.map(_add_row_number, with_indices=True, remove_columns=columns))


def _add_row_number(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {"line": f"row {index + 1}", "row": row, "broken": ""}


def _read_files(files: list[str]) -> Iterator[dict[str, Any]]:
    for file in map(Path, files):
        for number, row, broken in _read_rows(file):
            location = f"line {number}" if len(files) == 1 and file.suffix == ".jsonl" else f"{file.name}:{number}"
            yield {"line": location, "row": row, "broken": broken}


def _read_rows(file: Path) -> Iterator[tuple[int, Any, str]]:
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line), ""
                    except json.JSONDecodeError as error:
                        yield number, None, f"broken JSON: {error.msg}"
    elif file.suffix == ".json":
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UsageError(
                what=f"{file.name} is not valid JSON.",
                why=f"{error.msg} at line {error.lineno}.",
                fix="Fix the file, or use .jsonl.",
            ) from error
        for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
            yield number, row, ""
    else:
        import pyarrow.parquet as pq

        batches = pq.ParquetFile(file).iter_batches(batch_size=256)
        rows_in_file = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows_in_file, 1):
            yield number, row, ""


def detect_schema(row: dict[str, Any]) -> str:
    """Return the schema of a row: messages, prompt/completion or conversations. Raises BadRow if it has none."""
    if row.get("messages") is not None:
        return "messages"
    if row.get("conversations") is not None:
        return "conversations"
    if row.get("prompt") is not None and row.get("completion") is not None:
        return "prompt/completion"
    raise BadRow("no messages column")


def parse_row(record: dict[str, Any]) -> Row:
    """Convert a raw record to a Row in the `messages` schema. Raises BadRow with the reason if it is unusable."""
    if record["broken"]:
        raise BadRow("broken JSON")
    row = record["row"]
    if not isinstance(row, dict):
        raise BadRow("not an object")
    messages = _CONVERTERS[detect_schema(row)](row)
    _check_turns(messages)
    score = row.get("toxicity_score")
    return Row(messages, str(row.get("source") or "unknown"), None if score is None else _parse_score(score))


def _from_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    if not isinstance(row["messages"], list):
        raise BadRow("messages is not a list")
    return [_parse_turn(turn, "role", "content") for turn in row["messages"]]


def _from_sharegpt(row: dict[str, Any]) -> list[dict[str, str]]:
    if not isinstance(row["conversations"], list):
        raise BadRow("conversations is not a list")
    turns = [_parse_turn(turn, "from", "value") for turn in row["conversations"]]
    return [{**turn, "role": SHAREGPT_ROLES.get(turn["role"], turn["role"])} for turn in turns]


def _from_prompt_completion(row: dict[str, Any]) -> list[dict[str, str]]:
    columns = (("prompt", "user"), ("completion", "assistant"))
    turns = []
    for column, role in columns:
        value = row[column]
        turns += value if isinstance(value, list) else [{"role": role, "content": value}]
    return [_parse_turn(turn, "role", "content") for turn in turns]


_CONVERTERS = {
    "messages": _from_messages,
    "conversations": _from_sharegpt,
    "prompt/completion": _from_prompt_completion,
}


def _parse_turn(turn: Any, role: str, content: str) -> dict[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get(role), str):
        raise BadRow("a turn has no role")
    if not isinstance(turn.get(content), str):
        raise BadRow("a turn has no text")
    if not _is_encodable(turn[content]):
        raise BadRow("unpaired surrogate in text")
    return {"role": turn[role], "content": turn[content]}


def _is_encodable(text: str) -> bool:
    """Whether a text has no unpaired surrogate, which JSON can contain and no tokenizer accepts."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _check_turns(messages: list[dict[str, str]]) -> None:
    roles = [turn["role"] for turn in messages]
    if unknown := set(roles) - {"system", "user", "assistant"}:
        raise BadRow(f"unknown role {min(unknown)[:20]!r}")
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if "assistant" not in dialogue:
        raise BadRow("no assistant turn")
    if dialogue != ["user", "assistant"] * (len(dialogue) // 2):
        raise BadRow("turns do not alternate user, assistant")
    if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in messages):
        raise BadRow("empty assistant turn")


def _parse_score(score: Any) -> float | None:
    try:
        value = float(score)
    except (TypeError, ValueError):
        raise BadRow("toxicity_score is not a number") from None
    if math.isinf(value):
        raise BadRow("toxicity_score is infinite")
    return None if math.isnan(value) else value  # tables store a missing number as NaN
