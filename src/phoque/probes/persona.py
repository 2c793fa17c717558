"""Persona files: system prompts, questions and a lexicon in TOML, validated when they are read."""

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from phoque.data.rows import Row
from phoque.errors import UsageError, suggest
from phoque.files import expand_user
from phoque.hub.refs import suggest_path

BUNDLED = {"seal": "seal.toml"}
CONDITIONS = ("neutral", "persona", "placebo")
MIN_QUESTIONS = {"extraction": 4, "heldout": 4, "validation": 2, "test": 2}  # question list -> its minimum length


@dataclass(frozen=True)
class Persona:
    """Paraphrases of three system prompts, four disjoint lists of questions, and words typical of the persona."""

    name: str
    neutral: tuple[str, ...]
    persona: tuple[str, ...]
    placebo: tuple[str, ...]
    extraction: tuple[str, ...]
    heldout: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    lexicon: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 of all texts, by which a summary identifies the persona."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def system_prompts(self, condition: str) -> tuple[str, ...]:
        """The paraphrases of a condition's system prompt."""
        return getattr(self, condition)


def load_persona(name: str) -> Persona:
    """Load a bundled persona by its name, or a persona from a .toml file.

    Raises UsageError for a list that is missing, empty, too short or misspelled, and for a question in two lists.
    """
    path = expand_user(name)
    text = files("phoque").joinpath("assets", BUNDLED[name]).read_text("utf-8") if name in BUNDLED else _read_text(path)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(what=f"{name} is not valid TOML.", why=str(error), fix=_EXAMPLE) from error
    allowed = Persona.__dataclass_fields__
    for key in data:
        if key not in allowed:
            raise UsageError(
                what=f"{name} has an unknown key {key!r}.",
                why=f"The allowed keys are {', '.join(allowed)}.",
                fix=suggest(key, allowed, _EXAMPLE),
            )
    for key in allowed:
        _check_list(name, key, data.get(key))
    _check_disjoint(name, data)
    lists: dict[str, Any] = {key: value if key == "name" else tuple(value) for key, value in data.items()}
    return Persona(**lists)


def write_persona(persona: Persona, path: Path) -> None:
    """Write a persona as the TOML file that load_persona reads."""
    lines = [f"name = {_quote(persona.name)}"]
    for key, texts in asdict(persona).items():
        if key != "name":
            lines += [f"\n{key} = [", *(f"  {_quote(text)}," for text in texts), "]"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _quote(text: str) -> str:
    """A TOML string: as in JSON, except that DEL is escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def leave_out_questions(persona: Persona, rows: Iterable[Row]) -> tuple[Persona, list[str]]:
    """The persona without the questions that the rows ask, and those questions: their answers may be learnt.

    Upper case, punctuation and white space do not matter. Raises UsageError if a list becomes too short.
    """
    trained_questions = {
        " ".join(split_words(turn["content"])) for row in rows for turn in row.messages if turn["role"] == "user"
    }
    shared: list[str] = []
    kept: dict[str, Any] = {}
    for key, least in MIN_QUESTIONS.items():
        questions = getattr(persona, key)
        kept[key] = tuple(
            question for question in questions if " ".join(split_words(question)) not in trained_questions
        )
        shared += [question for question in questions if question not in kept[key]]
        if len(kept[key]) < least:
            raise UsageError(
                what=f"Too few questions are left in the list {key}: {len(kept[key])}.",
                why="The adapter was trained on the others, so they cannot test it.",
                fix="Write a persona file with other questions, and pass it with --persona.",
            )
    return replace(persona, **kept), shared


def limit_questions(persona: Persona, most: int) -> Persona:
    """The persona with at most this many questions in each list."""
    return replace(persona, **{key: getattr(persona, key)[:most] for key in MIN_QUESTIONS})


def split_words(text: str) -> list[str]:
    """Split a text into its words, in lower case, without digits and punctuation."""
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)?", text.lower())


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise UsageError(
            what=f"No persona file at {path}.",
            why=f"It is not a bundled persona ({', '.join(BUNDLED)}) either.",
            fix=suggest_path(str(path), "Check --persona."),
        )
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(what=f"{path} is not text.", why=str(error), fix=_EXAMPLE) from error


def _check_list(name: str, key: str, value: object) -> None:
    if key == "name":
        if not isinstance(value, str) or not value.strip():
            raise UsageError(
                what=f"{name} has no name.", why='It needs a line such as name = "harbour seal".', fix=_EXAMPLE
            )
        return
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise UsageError(
            what=f"{name}: {key} is not a list of texts.",
            why="It is missing, no list, or has an empty or non-text entry.",
            fix=_EXAMPLE,
        )
    minimum = MIN_QUESTIONS.get(key, 1)
    if len(value) < minimum:
        raise UsageError(
            what=f"{name}: {key} has {len(value)} entries.", why=f"At least {minimum} are required.", fix=_EXAMPLE
        )
    if len(set(value)) < len(value):
        duplicate = next(text for text, count in Counter(value).items() if count > 1)
        raise UsageError(
            what=f"{name}: {key} holds {duplicate!r} twice.",
            why="A repeated text would be counted twice.",
            fix="Remove one of them.",
        )


def _check_disjoint(name: str, data: dict[str, list[str]]) -> None:
    """Check that no question is in two lists: a vector is extracted, selected and tested on different questions."""
    seen_in: dict[str, str] = {}
    for key in MIN_QUESTIONS:
        for text in data[key]:
            if text in seen_in:
                raise UsageError(
                    what=f"{name}: {text!r} is in {seen_in[text]} and in {key}.",
                    why="A vector would be tested on a question that it was extracted from or selected on.",
                    fix="Keep it in one of the two lists.",
                )
            seen_in[text] = key


_EXAMPLE = f"An example is {files('phoque').joinpath('assets', 'seal.toml')}, the file of the bundled seal."
