"""The questions that two models are compared on."""

import json
from pathlib import Path
from typing import Any

from phoque.errors import PhoqueError
from phoque.probes.persona import QUESTIONS, Persona

FEWEST = 6


def find_questions(name: str, persona: Persona) -> tuple[list[str], list[str]]:
    """Questions from a file, or all of the persona's, each once; and what a user should know about them.

    A .txt file has one a line, a .json file a list, a .jsonl file one object a line; an object is a row of a dataset,
    or has a `prompt`. Raises PhoqueError (2) for a file that holds something else, or too few.
    """
    if not name:
        return [question for key in QUESTIONS for question in getattr(persona, key)], []
    path = Path(name).expanduser()
    if not path.is_file():
        raise PhoqueError(f"No file of prompts at {name}.", "--prompts-file names it.", "Check the path.")
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".txt":
            entries: list[Any] = text.splitlines()
        elif path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PhoqueError(f"{name} cannot be read.", str(error), "It wants text, or valid JSON.") from error
    if not isinstance(entries, list):
        raise PhoqueError(f"{name} is not a list.", f"It holds one {type(entries).__name__}.", 'Write ["…", "…"].')
    found = [_question(name, number, entry) for number, entry in enumerate(entries, 1)]
    found = [question for question in found if question]
    once = list(dict.fromkeys(found))
    if len(once) < FEWEST:
        raise PhoqueError(
            f"{name} has {len(once)} prompts.",
            f"A prompt is one observation; at least {FEWEST} are needed.",
            "Write more of them; some dozens are better.",
        )
    return once, [f"{len(found) - len(once)} prompts are there twice and count once"] if len(once) < len(found) else []


def _question(name: str, number: int, entry: Any) -> str:
    if isinstance(entry, dict):
        turns = entry.get("messages") or []
        asked = [t.get("content") for t in turns if isinstance(t, dict) and t.get("role") == "user"]
        entry = asked[0] if asked else entry.get("prompt")
    if not isinstance(entry, str):
        raise PhoqueError(
            f"{name}: entry {number} is no prompt.",
            "It is neither a text nor a row with a user's turn.",
            "Mend it or take it out.",
        )
    return entry.strip()
