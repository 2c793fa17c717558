"""Read the questions that two models are compared on."""

import json
from typing import Any

from phoque.errors import UsageError
from phoque.files import expand_user, split_lines
from phoque.probes.persona import MIN_QUESTIONS, Persona

MIN_PROMPTS = 6


def find_questions(name: str, persona: Persona) -> tuple[list[str], list[str]]:
    """Return the distinct questions of a file, or all of the persona's if `name` is empty; and notes for the user.

    A .txt file has one question per line, a .json file a list, a .jsonl file one object per line; an object is a row
    of a dataset or has a `prompt`. Raises UsageError for a file with other content or too few questions.
    """
    if not name:
        return [question for key in MIN_QUESTIONS for question in getattr(persona, key)], []
    path = expand_user(name)
    if not path.is_file():
        raise UsageError(
            what=f"No file of prompts at {name}.", why="--prompts-file points to it.", fix="Check the path."
        )
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".txt":
            entries: list[Any] = split_lines(text)
        elif path.suffix == ".jsonl":
            entries = [json.loads(line) for line in split_lines(text)]
        else:
            entries = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(
            what=f"{name} cannot be read.", why=str(error), fix="Give UTF-8 text or valid JSON."
        ) from error
    if not isinstance(entries, list):
        raise UsageError(
            what=f"{name} is not a list.", why=f"It is one {type(entries).__name__}.", fix='Write ["…", "…"].'
        )
    questions = [_extract_question(name, number, entry) for number, entry in enumerate(entries, 1)]
    questions = [question for question in questions if question]
    unique = list(dict.fromkeys(questions))
    if len(unique) < MIN_PROMPTS:
        raise UsageError(
            what=f"{name} has {len(unique)} prompts.",
            why=f"Each prompt is one observation; at least {MIN_PROMPTS} are needed.",
            fix="Add more prompts; several dozen are better.",
        )
    return unique, [f"{len(questions) - len(unique)} duplicate prompts are ignored"] if len(unique) < len(
        questions
    ) else []


def _extract_question(name: str, number: int, entry: Any) -> str:
    if isinstance(entry, dict):
        turns = entry.get("messages") or []
        user_turns = [t.get("content") for t in turns if isinstance(t, dict) and t.get("role") == "user"]
        entry = user_turns[0] if user_turns else entry.get("prompt")
    if not isinstance(entry, str):
        raise UsageError(
            what=f"{name}: entry {number} is not a prompt.",
            why="It is neither a string nor a row with a user turn.",
            fix="Fix it or remove it.",
        )
    return entry.strip()
