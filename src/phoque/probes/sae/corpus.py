"""The training corpus of a dictionary, as token ids: chats, the base model's own answers, and general text."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phoque.data.readers import Dataset, open_dataset
from phoque.data.rows import parse_row
from phoque.data.turns import BadRow
from phoque.errors import UsageError
from phoque.files import expand_user
from phoque.hub.client import Hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_TOKENS = 256  # tokens in a chunk of general text
HELD_OUT_EVERY = 20  # one row in this many, of each kind, is held out to judge the dictionary
PYTHON_DOCS = "python"  # the --text value that stands for the documentation inside Python
KINDS = ("chat", "answer", "text")


@dataclass
class Corpus:
    """Rows of token ids: those to train on, and those held out, by kind. `sources` names where each kind comes from."""

    train: list[list[int]] = field(default_factory=list)
    held_out: dict[str, list[list[int]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """The hash of all rows, which identifies this corpus in the cache."""
        return hashlib.sha256(json.dumps([self.train, self.held_out]).encode()).hexdigest()

    def add(self, kind: str, ids: list[int]) -> None:
        """Add a row; the first of every HELD_OUT_EVERY rows of a kind is held out."""
        index = self.counts[kind]
        self.counts[kind] += 1
        (self.held_out[kind] if index % HELD_OUT_EVERY == 0 else self.train).append(ids)


@dataclass(frozen=True)
class Conversations:
    """Conversations as token ids, and the first user message of each."""

    name: str
    ids: list[list[int]]
    questions: list[str]


def read_conversations(
    dataset: Dataset,
    encode: Callable[[Sequence[Any]], list[int]],
    tokens: int,
    max_length: int,
    excluded: frozenset[str],
) -> Conversations:
    """Read conversations from a dataset until they have `tokens` tokens.

    Conversations that begin with an excluded question are skipped, malformed rows too; longer conversations are cut at
    `max_length` tokens. Raises UsageError if no conversation is left.
    """
    conversations, questions, total = [], [], 0
    for raw in dataset.stream:
        if total >= tokens:
            break
        try:
            row = parse_row(raw)
        except BadRow:
            continue  # `phoque train` counts and reports malformed rows
        question = row.first_question
        if question in excluded:
            continue
        ids = encode(row.messages)[:max_length]
        conversations.append(ids)
        questions.append(question)
        total += len(ids)
    if not conversations:
        raise UsageError(
            what=f"There is no usable conversation in {dataset.name}.",
            why="Every row is malformed or begins with a question that is compared on.",
            fix="Check --chats and --dataset.",
        )
    return Conversations(f"{dataset.name}@{dataset.revision[:12]}", conversations, questions)


def read_text_chunks(
    name: str, tokenizer: "PreTrainedTokenizerBase", tokens: int, hub: Hub | None
) -> tuple[str, list[list[int]]]:
    """Read general text in chunks of CONTEXT_TOKENS tokens until they have `tokens` tokens or the text ends.

    `name` is `python` (the documentation that ships inside Python), a .txt file, or a dataset with a `text` column.
    Returns (a label with the revision, chunks). Raises UsageError if there is no text.
    """
    label, documents = _open_documents(name, hub)
    prefix = find_prefix_ids(tokenizer)
    size = CONTEXT_TOKENS - len(prefix)
    chunks: list[list[int]] = []
    buffer: list[int] = []
    for text in documents:
        buffer += tokenizer(text, add_special_tokens=False)["input_ids"]
        while len(buffer) >= size:
            chunks.append(prefix + buffer[:size])
            buffer = buffer[size:]
        if len(chunks) * CONTEXT_TOKENS >= tokens:
            break
    if buffer and not chunks:
        chunks.append(prefix + buffer)
    if not chunks:
        raise UsageError(
            what=f"There is no text in {name}.", why="It is empty.", fix="Name another source with --text."
        )
    return label, chunks


def parse_split(name: str) -> tuple[str, str]:
    """Split OWNER/NAME:SPLIT into dataset and split; the split is `train` for OWNER/NAME and for existing paths."""
    dataset, _, split = name.partition(":")
    return (dataset, split) if split and not expand_user(name).exists() else (name, "train")


def find_prefix_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Find the token ids that this tokenizer puts before every text, such as a BOS token."""
    without_prefix = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_prefix = tokenizer("a")["input_ids"]
    return with_prefix[: with_prefix.index(without_prefix[0])]


def _open_documents(name: str, hub: Hub | None) -> tuple[str, Iterator[str]]:
    if name == PYTHON_DOCS:
        from platform import python_version
        from pydoc_data.topics import topics

        return f"the documentation of Python {python_version()}", iter(topics.values())
    path = expand_user(name)
    if path.suffix == ".txt" and path.is_file():
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(
                what=f"{path} is not UTF-8.",
                why=str(error),
                fix=f"Convert it, for example with: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > converted.txt",
            ) from error
        return f"{name}@{hashlib.sha256(text.encode()).hexdigest()[:12]}", iter([text])
    dataset = open_dataset(*parse_split(name), None, hub, columns=frozenset(["text"]))
    return f"{name}@{dataset.revision[:12]}", _iter_text_column(dataset)


def _iter_text_column(dataset: Dataset) -> Iterator[str]:
    for raw in dataset.stream:
        row = raw.row
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UsageError(
                what=f"{dataset.name} has no text column.",
                why=f"Its {raw.location} has {', '.join(raw.columns) or raw.defect or 'no object'}.",
                fix="Name a dataset that has one text per row in the column `text`.",
            )
        yield row["text"]
