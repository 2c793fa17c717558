"""What a dictionary is trained on: chats as they are, the base model's own answers, and general text, as token ids."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phoque.data.rows import BadRow, Dataset, open_dataset, parsed
from phoque.errors import PhoqueError

CONTEXT = 256  # tokens in a piece of general text
HELD_OUT = 20  # one chat and one piece of text in so many is kept for judging
PYTHON = "python"  # the name of the text that every Python brings along
KINDS = ("chat", "answer", "text")


@dataclass
class Texts:
    """Rows of token ids with what each is, those to train on and those held out; `sha256` pins them all."""

    train: list[list[int]] = field(default_factory=list)
    held_out: dict[str, list[list[int]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    counted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """What pins these texts."""
        return hashlib.sha256(json.dumps([self.train, self.held_out]).encode()).hexdigest()

    def add(self, kind: str, ids: list[int]) -> None:
        """One more row; the first of every HELD_OUT is held out."""
        number = self.counted[kind]
        self.counted[kind] += 1
        (self.held_out[kind] if number % HELD_OUT == 0 else self.train).append(ids)


@dataclass(frozen=True)
class Chats:
    """Conversations as token ids, and the first question of each."""

    name: str
    ids: list[list[int]]
    questions: list[str]


def chats(
    dataset: Dataset, encode: Callable[[Sequence[Any]], list[int]], tokens: int, longest: int, without: frozenset[str]
) -> Chats:
    """Conversations of a dataset, `tokens` tokens of them; those that ask a question of `without` are left out.

    Longer ones are cut at `longest` tokens. Raises PhoqueError (2) if there is none.
    """
    found, questions, total = [], [], 0
    for record in dataset.stream:
        if total >= tokens:
            break
        try:
            row = parsed(record)
        except BadRow:
            continue  # `phoque train` counts and names them
        first = row.first_question
        if first in without:
            continue
        ids = encode(row.messages)[:longest]
        found.append(ids)
        questions.append(first)
        total += len(ids)
    if not found:
        raise PhoqueError(
            f"There is no conversation in {dataset.name}.", "The dictionary would never see a chat.", "Check --chat."
        )
    return Chats(f"{dataset.name}@{dataset.revision[:12]}", found, questions)


def pieces(name: str, tokenizer: Any, tokens: int, token: str | None) -> tuple[str, list[list[int]]]:
    """General text in pieces of CONTEXT tokens, at least `tokens` of them if there is so much, and what names it.

    `python` is the documentation that ships inside Python; else a text file, or a dataset with a `text` column.
    Raises PhoqueError (2) if there is no text.
    """
    label, documents = _documents(name, token)
    begin = beginning(tokenizer)
    size = CONTEXT - len(begin)
    found: list[list[int]] = []
    rest: list[int] = []
    for text in documents:
        rest += tokenizer(text, add_special_tokens=False)["input_ids"]
        while len(rest) >= size:
            found.append(begin + rest[:size])
            rest = rest[size:]
        if len(found) * CONTEXT >= tokens:
            break
    if rest and not found:
        found.append(begin + rest)
    if not found:
        raise PhoqueError(f"There is no text in {name}.", "It is empty.", "Check --text.")
    return label, found


def named_split(name: str) -> tuple[str, str]:
    """A dataset and the split of it that is meant: OWNER/NAME:SPLIT, or OWNER/NAME for its `train`."""
    whole, _, split = name.partition(":")
    return (whole, split) if split and not Path(name).expanduser().exists() else (name, "train")


def beginning(tokenizer: Any) -> list[int]:
    """The token ids that this tokenizer puts before every text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return whole[: whole.index(plain[0])]


def _documents(name: str, token: str | None) -> tuple[str, Iterator[str]]:
    if name == PYTHON:
        from platform import python_version
        from pydoc_data.topics import topics

        return f"the documentation of Python {python_version()}", iter(topics.values())
    path = Path(name).expanduser()
    if path.suffix == ".txt" and path.is_file():
        text = path.read_text("utf-8", errors="replace")
        return f"{name}@{hashlib.sha256(text.encode()).hexdigest()[:12]}", iter([text])
    dataset = open_dataset(*named_split(name), None, token)
    return f"{name}@{dataset.revision[:12]}", _text_column(dataset)


def _text_column(dataset: Dataset) -> Iterator[str]:
    for record in dataset.stream:
        row = record["row"]
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise PhoqueError(
                f"{dataset.name} has no text column.",
                f"Its {record['line']} holds {', '.join(row) if isinstance(row, dict) else 'no object'}.",
                "Name a dataset with one text a row in `text`.",
            )
        yield row["text"]
