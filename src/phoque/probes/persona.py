"""A persona file: system prompts, questions and words, in TOML, checked when it is read."""

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
from phoque.errors import PhoqueError

BUNDLED = {"seal": "seal.toml"}
SYSTEMS = ("neutral", "persona", "placebo")
QUESTIONS = {"extraction": 4, "heldout": 4, "validation": 2, "test": 2}  # and the least of each
WORDS = 12  # taken from data that brings no lexicon
SEEN = 5  # times that such a word must be in it


@dataclass(frozen=True)
class Persona:
    """Paraphrases of three system prompts, four disjoint lists of questions, and the persona's own words."""

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
        """What pins these texts in a summary."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def systems(self, condition: str) -> tuple[str, ...]:
        """The paraphrases of a condition's system prompt."""
        return getattr(self, condition)


def read_persona(name: str) -> Persona:
    """A bundled persona by its name, or a .toml file.

    Raises PhoqueError (2) for a list that is missing, empty, too short or misspelt, and for a question in two lists.
    """
    path = Path(name).expanduser()
    text = files("phoque").joinpath("assets", BUNDLED[name]).read_text("utf-8") if name in BUNDLED else _text(path)
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PhoqueError(f"{name} is not valid TOML.", str(error), _SEE) from error
    known = Persona.__dataclass_fields__
    for key in found:
        if key not in known:
            raise PhoqueError(f"{name} has an unknown list {key!r}.", f"It may have {', '.join(known)}.", _SEE)
    for key in known:
        _check(name, key, found.get(key))
    _refuse_shared(name, found)
    lists: dict[str, Any] = {key: value if key == "name" else tuple(value) for key, value in found.items()}
    return Persona(**lists)


def from_rows(persona: Persona, rows: Iterable[Row], name: str) -> Persona:
    """`persona` with the system prompts and the words of the data that an adapter was trained on.

    The words are those that the answers have far more often than the questions. Raises PhoqueError (2) if no row has a
    system prompt.
    """
    systems: Counter[str] = Counter()
    said: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for row in rows:
        for turn in row.messages:
            if turn["role"] == "system":
                systems[turn["content"]] += bool(turn["content"].strip())
            else:
                (said if turn["role"] == "assistant" else asked).update(set(words(turn["content"])))
    common = tuple(text for text, count in systems.most_common(3) if count)
    if not common:
        raise PhoqueError(
            f"No row of {name} has a system prompt.",
            "The persona has no prompt to be asked for with.",
            "Write a persona file and name it with --persona.",
        )
    total, others = sum(said.values()), sum(asked.values())
    lift = {w: n / total / ((asked[w] + 1) / (others + 1)) for w, n in said.items() if n >= SEEN and len(w) > 2}
    lexicon = tuple(sorted(lift, key=lambda w: (-lift[w] * said[w] ** 0.5, w))[:WORDS]) or persona.lexicon
    return replace(persona, name=f"the persona of {name}", persona=common, lexicon=lexicon)


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)?", text.lower())


def _text(path: Path) -> str:
    if not path.is_file():
        raise PhoqueError(
            f"No persona file at {path}.", f"It is neither a file nor one of {', '.join(BUNDLED)}.", "Check --persona."
        )
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PhoqueError(f"{path} is not text.", str(error), _SEE) from error


def _check(name: str, key: str, value: object) -> None:
    if key == "name":
        if not isinstance(value, str) or not value.strip():
            raise PhoqueError(f"{name} has no name.", 'It wants a line such as name = "harbour seal".', _SEE)
        return
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise PhoqueError(f"{name}: {key} is not a list of texts.", "It is missing, or holds something else.", _SEE)
    least = QUESTIONS.get(key, 1)
    if len(value) < least:
        raise PhoqueError(f"{name}: {key} has {len(value)} entries.", f"At least {least} are needed.", _SEE)
    if len(set(value)) < len(value):
        twice = next(text for text, count in Counter(value).items() if count > 1)
        raise PhoqueError(f"{name}: {key} holds {twice!r} twice.", "It would count twice.", "Remove one of them.")


def _refuse_shared(name: str, found: dict[str, list[str]]) -> None:
    """What a vector is made from, chosen on and judged on must be different questions."""
    home: dict[str, str] = {}
    for key in QUESTIONS:
        for text in found[key]:
            if text in home:
                raise PhoqueError(
                    f"{name}: {text!r} is in {home[text]} and in {key}.",
                    "The evidence would be measured on what the vector was made from.",
                    "Keep it in one of them.",
                )
            home[text] = key


_SEE = "See the README on persona files; the bundled one is src/phoque/assets/seal.toml."
