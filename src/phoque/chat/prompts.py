"""The prompts of a file: one per line, or rows of JSON."""

import json
from pathlib import Path
from typing import Any

from phoque.errors import UsageError, first_line


def read_prompts(file: Path) -> list[list[dict[str, Any]]]:
    """The conversations of a file, each up to the question that is to be answered.

    A .jsonl row has `prompt`, or `messages` that end with a user's message. Raises UsageError naming the line.
    """
    if file.suffix.lower() in (".csv", ".tsv", ".json", ".parquet"):
        raise UsageError(
            what=f"{file} is no list of prompts.",
            why="A file of prompts has one per line, or rows of JSON in a .jsonl file.",
            fix="Write the prompts to a .txt file, one per line.",
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            what=f"{file} cannot be read.", why="It is not UTF-8 text.", fix="Save it as UTF-8."
        ) from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UsageError(what=f"{file} has no prompt.", why="It is empty.", fix="Write one prompt per line.")
    if file.suffix != ".jsonl":
        return [[{"role": "user", "content": line.strip()}] for _, line in rows]
    return [_parse(line, f"{file}, line {number}") for number, line in rows]


def _parse(line: str, where: str) -> list[dict[str, Any]]:
    try:
        row = json.loads(line)
        if isinstance(row, str):
            row = {"prompt": row}
        if isinstance(row.get("prompt"), str):
            return [{"role": "user", "content": row["prompt"]}]
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        if not all(isinstance(value, str) for turn in messages for value in turn.values()):
            raise ValueError("a role or content is no text")
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("its messages do not end with a user's message")
        return messages
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            what=f"{where} is not a prompt.",
            why=first_line(error) or "It is not JSON.",
            fix='Write {"prompt": "..."} or {"messages": [...]}, ending with a user\'s message.',
        ) from error
