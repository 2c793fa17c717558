"""Rows: which columns hold a conversation, how they become messages, and what makes a row unusable for training."""

import hashlib
import json
import math
import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from phoque.data.turns import HAS_MEDIA, ROLES, BadRow, Turn, as_json, check_text, parse_cell, parse_turn

EXPORTS = {"contents": "contents of Gemini", "chat_messages": "chat_messages of Claude"}
CONVERSATIONS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog", "turns", *EXPORTS)
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
    ("question", "response"),
    ("problem", "solution"),
    ("prompt", "answer"),
    ("input", "response"),
    ("user", "assistant"),
    ("context", "response"),
)
# columns of a question and its answer, in order of preference, and what a reader calls that schema
PAIRS = {pair: "/".join(pair) for pair in _PAIRS}
PAIRS["instruction", "output"] = "Alpaca (instruction, input, output)"
CONTEXT = ("input", "context")  # more text that belongs to a question
SYSTEM = ("system", "system_prompt", "systeminstruction", "system_instruction")
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
OPTIONAL = ("source", "toxicity_score", "label", "tools", "functions", "history", *SYSTEM, *MEDIA)
COMMON_WORDS = frozenset(("user", "assistant", "problem", "solution"))  # which are columns only as pairs
ANY_SPELLING = frozenset(("tools", "functions", *SYSTEM))  # as `systemInstruction` beside the turns of Gemini
TELLING = ("chosen", "rejected", "text", "input_ids")  # columns of data that is no conversation, which a reason names
COLUMNS = frozenset([*CONVERSATIONS, *(name for pair in PAIRS for name in pair), *CONTEXT, *OPTIONAL, *TELLING])


# reasons that an error message explains further
NO_COLUMNS = "no conversation columns"
PREFERENCE_DATA = "preference data (chosen, rejected)"
PREFERRED_TALKS, PREFERRED_TEXTS = f"{PREFERENCE_DATA} of whole conversations", f"{PREFERENCE_DATA} without turns"
PREFERRED_TURNS = f"{PREFERENCE_DATA} after a conversation"
BAD_ANSWERS = "answers with `label` false: if that marks bad ones, delete these rows"
BAD_LABELS = (False, 0, "false", "False", "0")
TOKENIZED_DATA = "tokenized data (input_ids)"
UNREADABLE_TURNS = "a list of turns as text that is neither JSON nor Python"
ONE_TEXT = "one text, no turns"
ROLE_IN_TEXT = re.compile(r"""["'](?:role|from)["']\s*:""")


def column_of(name: str) -> str:
    """The column that a name stands for: white space around it and capitals make no other column, as in `Prompt `."""
    plain = name.strip().casefold()
    return plain if plain in COLUMNS else name


def has_conversation(row: dict[str, Any]) -> bool:
    """Whether a row has a column with turns, or a question and its answer."""
    pairs = (all(row.get(name) is not None for name in pair) for pair in PAIRS)
    return any(row.get(name) is not None for name in CONVERSATIONS) or any(pairs)


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it was read: the columns that are used, the names of all, and what is wrong if it could not be read.

    `file` and `number` are its position in the dataset: the number of its file, and its own within the file, from 1.
    """

    location: str
    file: int
    number: int
    row: Any = None
    columns: tuple[str, ...] = ()
    defect: str = ""


@dataclass(frozen=True)
class Row:
    """One conversation in the `messages` schema, with what the dataset says about it.

    `untrained` are the indices of assistant turns that the dataset marks as context. `schema` is how it was read,
    `notes` what was changed on the way, and `unknown_keys` the keys of turns that phoque does not know.
    """

    messages: list[dict[str, Any]]
    source: str = "unknown"
    toxicity_score: float | None = None
    tools: list[dict[str, Any]] | None = None
    untrained: frozenset[int] = frozenset()
    schema: str = "messages"
    notes: tuple[str, ...] = ()
    unknown_keys: tuple[str, ...] = ()

    @property
    def system(self) -> str | None:
        """The system message that the row begins with, or None."""
        return self.messages[0]["content"] if self.messages[0]["role"] == "system" else None

    @property
    def first_question(self) -> str:
        """The first user message, or an empty text."""
        return next((turn["content"] for turn in self.messages if turn["role"] == "user"), "")

    @cached_property
    def dialogue(self) -> list[str]:
        """The normalized texts of all turns but the system message, each after its role."""
        return [
            f"{turn['role']} {normalize_text(turn['content'])}" for turn in self.messages if turn["role"] != "system"
        ]

    def key(self) -> str:
        """A hash of the dialogue that ignores the system message, case, white space and the Unicode form."""
        calls = [turn["tool_calls"] for turn in self.messages if "tool_calls" in turn]
        content = [self.dialogue, calls] if calls else self.dialogue
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def exact_key(self) -> str:
        """The key of runs that were begun before data_rules 2: a hash of the messages as they are."""
        return hashlib.blake2b(json.dumps(self.messages, sort_keys=True).encode(), digest_size=16).hexdigest()


def normalize_text(text: str) -> str:
    """Fold case, white space and Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def parse_row(raw: RawRow) -> Row:
    """Convert a row to the `messages` schema. Raises BadRow with the reason if it is unusable."""
    if raw.defect:
        raise BadRow(raw.defect)
    row = {"messages": raw.row} if isinstance(raw.row, list) else raw.row
    if not isinstance(row, dict):
        raise BadRow("not an object")
    if any(row.get(name) for name in MEDIA):
        raise BadRow(HAS_MEDIA)
    schema, turns = _read_turns(row)
    if _is_preference(row) and not any(turn.role == "assistant" for turn in turns):
        raise BadRow(PREFERRED_TURNS)
    turns, notes = _arrange_turns(_add_system(turns, row))
    score, source = row.get("toxicity_score"), str(row.get("source") or "unknown")
    check_text(source)
    notes += tuple(f"`{name}` is not used" for name in ("rejected", "label") if row.get(name) is not None)
    if schema == "prompt/completion" and row.get("label") in BAD_LABELS:  # KTO's rows have both kinds of answers
        notes += (BAD_ANSWERS,)
    return Row(
        messages=[turn.message for turn in turns],
        source=source,
        toxicity_score=None if score is None else _parse_score(score),
        tools=_parse_tools(row),
        untrained=frozenset(index for index, turn in enumerate(turns) if turn.role == "assistant" and not turn.trained),
        schema=schema,
        notes=notes,
        unknown_keys=tuple(sorted({key for turn in turns for key in turn.unknown_keys})),
    )


def _read_turns(row: dict[str, Any]) -> tuple[str, list[Turn]]:
    """The name of the schema, and the turns. Raises BadRow if no known columns hold a conversation."""
    for column in CONVERSATIONS:
        if row.get(column) is not None:
            return _read_conversation(column, row[column])
    for (question, answer), schema in PAIRS.items():
        if row.get(question) is not None and row.get(answer) is not None:
            return schema, _read_pair(row, question, answer)
    if _is_preference(row):
        raise BadRow(_describe_preference(row))
    if row.get("input_ids") is not None:
        raise BadRow(TOKENIZED_DATA)
    if row.get("text") is not None:
        raise BadRow(ONE_TEXT)
    for names in [(name,) for name in CONVERSATIONS] + list(PAIRS):
        if all(name in row for name in names):
            raise BadRow(f"empty {next(name for name in names if row[name] is None)}")
    raise BadRow(NO_COLUMNS)


def _is_preference(row: dict[str, Any]) -> bool:
    return row.get("chosen") is not None and row.get("rejected") is not None


def _describe_preference(row: dict[str, Any]) -> str:
    """The reason of a row of preference data, which says what its `chosen` is."""
    chosen = row["chosen"] if isinstance(row["chosen"], list) else []
    roles = [turn.get("role", turn.get("from")) for turn in chosen if isinstance(turn, dict)]
    if any(ROLES.get(str(role).lower()) == "user" for role in roles):
        return PREFERRED_TALKS
    question = next((question for question, _ in PAIRS if row.get(question) is not None), None)
    if question is None:
        return PREFERRED_TEXTS
    return PREFERENCE_DATA if question == "prompt" else f"{PREFERENCE_DATA} beside {question}"


def _read_conversation(column: str, value: Any) -> tuple[str, list[Turn]]:
    turns = parse_cell(value)
    if isinstance(turns, dict):  # as older versions of datasets store a list of objects: one list per key
        turns = split_columns(turns)
    if not isinstance(turns, list):
        raise BadRow(f"{column} is not a list")
    is_sharegpt = any(isinstance(turn, dict) and turn.get("from") is not None for turn in turns)
    if column == "messages":
        schema = "messages with from and value" if is_sharegpt else "messages"
    elif column in EXPORTS:
        schema = EXPORTS[column]
    else:
        schema = f"ShareGPT {column}" if is_sharegpt else f"{column} with role and content"
    if isinstance(value, str):
        schema += " as text"
    return schema, [parse_turn(turn) for turn in turns]


def split_columns(columns: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The objects of {key: list of values}, or None if its values are not lists of one length."""
    lists = [values for values in columns.values() if isinstance(values, list)]
    if len(lists) < len(columns) or len({len(values) for values in lists}) != 1:
        return None
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


def _read_pair(row: dict[str, Any], question: str, answer: str) -> list[Turn]:
    """Turns of a question and an answer; assistant turns before the answer are context, as they are in TRL."""
    questions, answered = (_parse_turns_in_text(_write_number(row[name])) for name in (question, answer))
    if isinstance(questions, str):
        extra = [_read_context(name, row[name]) for name in CONTEXT if name != question and row.get(name) is not None]
        questions = "\n\n".join(text for text in (questions, *extra) if text.strip())
    history = _read_history(row.get("history"))
    context = questions if isinstance(questions, list) else [{"role": "user", "content": questions}]
    completion = answered if isinstance(answered, list) else [{"role": "assistant", "content": answered}]
    return [
        *map(parse_turn, history),
        *(parse_turn(turn).as_context() for turn in context),
        *map(parse_turn, completion),
    ]


def _write_number(value: Any) -> Any:
    """A number as text, such as an answer 14; any other value is unchanged."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return str(value) if is_number else value


def _read_context(column: str, value: Any) -> str:
    """More text of a question: a text, texts, or a number. Raises BadRow for anything else, which would be lost."""
    value = _write_number(value)
    if not value or (isinstance(value, float) and math.isnan(value)):  # tables store a missing value as NaN
        return ""
    parts = value if isinstance(value, list) else [value]
    texts = [_write_number(part) for part in parts if part is not None]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(f"`{column}` is not text")
    return "\n\n".join(text for text in texts if text.strip())


def _parse_turns_in_text(value: Any) -> Any:
    """The turns that a cell of a table has as JSON or as Python writes them; any other value is unchanged."""
    text = value.strip() if isinstance(value, str) else ""
    inner = text[1:-1].strip() if text.startswith("[") and text.endswith("]") else ""
    if not (inner.startswith("{") and inner.endswith("}") and ROLE_IN_TEXT.search(inner)):
        return value
    turns = parse_cell(value)
    if isinstance(turns, str):
        raise BadRow(UNREADABLE_TURNS)
    has_roles = isinstance(turns, list) and all(isinstance(t, dict) and {"role", "from"} & t.keys() for t in turns)
    return turns if has_roles else value


def _read_history(value: Any) -> list[dict[str, Any]]:
    """Earlier turns: a list of [question, answer] pairs, as LLaMA-Factory has it, or of turns."""
    history = parse_cell(value)
    if not history:
        return []
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return history
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("history is not a list of pairs")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in history for role, text in zip(roles, pair, strict=True)]


def _add_system(turns: list[Turn], row: dict[str, Any]) -> list[Turn]:
    """Put the text of a `system` column before the turns. Raises BadRow if they begin with another system message."""
    text = next((row[name] for name in SYSTEM if row.get(name)), None)
    if text is None:
        return turns
    system = parse_turn((text if isinstance(text, dict) else {"content": text}) | {"role": "system"})
    if turns and turns[0].role == "system":
        if turns[0].message["content"] != system.message["content"]:
            raise BadRow("two system messages")
        return turns
    return [system, *turns]


def _arrange_turns(turns: list[Turn]) -> tuple[list[Turn], tuple[str, ...]]:
    """Cut turns after the last answer, and check the order of the others; also what was changed."""
    has_system = bool(turns) and turns[0].role == "system"
    dialogue = turns[has_system:]
    if not any(turn.role == "assistant" for turn in dialogue):
        raise BadRow("no assistant turn")
    notes = set()
    while turns[-1].role in ("user", "tool"):
        turns = turns[:-1]
        notes.add("a last turn without an answer was cut")
    following = {"": {"user", "assistant"}, "user": {"assistant"}, "assistant": {"user", "tool"}}
    following |= {"system": following[""], "tool": {"tool", "assistant"}}
    previous = ""
    for index, turn in enumerate(turns):
        if turn.role not in following[previous] | ({"system"} if index == 0 else set()):
            raise BadRow("turns do not alternate user, assistant")
        previous = turn.role
        is_empty = not turn.message["content"].strip() and "tool_calls" not in turn.message
        if turn.role == "assistant" and is_empty:
            raise BadRow("empty assistant turn")
        if turn.role == "assistant" and index == has_system:
            notes.add("the assistant begins")
        if turn.role == "system" and turn.was_developer:
            notes.add("role developer was read as system")
    return turns, tuple(sorted(notes))


def _parse_tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = parse_cell(row.get("tools") or row.get("functions"))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools is not a list of objects")
    return [as_json(tool if "function" in tool else {"type": "function", "function": tool}) for tool in tools]


def _parse_score(score: Any) -> float | None:
    try:
        value = float(score)
    except (TypeError, ValueError, OverflowError):
        raise BadRow("toxicity_score is not a number") from None
    if math.isinf(value):
        raise BadRow("toxicity_score is infinite")
    return None if math.isnan(value) else value  # tables store a missing number as NaN


def describe_expected_columns() -> str:
    """What a dataset must have, in one line, for an error message."""
    pairs = ", ".join("/".join(pair) for pair in PAIRS)
    return f"messages or conversations (a list of turns with role and content, or from and value), or one of {pairs}"
