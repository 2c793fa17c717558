"""Turns of a conversation: roles, texts, tool calls and marks in the spellings of every common tool."""

import ast
import json
import re
from dataclasses import dataclass, replace
from typing import Any

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bing", "bard", "function_call"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
}
ROLE_KEYS, TEXT_KEYS = ("role", "from", "sender"), ("content", "value", "text", "parts")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TURNS = '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}'  # a row, in messages
# OpenAI, Mistral and Together say weight, Axolotl train or training, ms-swift and XTuner loss
TRAINED_MARKS = ("weight", "train", "training", "trained", "loss", "loss_scale", "loss_mask")
PARTIAL_MARKS = ("train_detail", "training_detail")
MEDIA_PARTS = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file")
HAS_MEDIA = "images, audio or video"  # a reason
CALL_KEYS = ("tool_calls", "function_call", "tool_call_id", "name")
KNOWN_KEYS = frozenset((*ROLE_KEYS, *TEXT_KEYS, *REASONING_KEYS, *TRAINED_MARKS, *PARTIAL_MARKS, *CALL_KEYS))


class BadRow(ValueError):
    """A row that is skipped; the message is a short reason, by which such rows are counted."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn as a chat template reads it, whether the dataset wants loss on it, and its keys that are unknown."""

    message: dict[str, Any]
    trained: bool = True
    unknown_keys: tuple[str, ...] = ()
    was_developer: bool = False

    @property
    def role(self) -> str:
        """One of system, user, assistant, tool."""
        return self.message["role"]

    def as_context(self) -> "Turn":
        """The same turn without loss."""
        return replace(self, trained=False)


def parse_json(text: str) -> Any:
    """The value of a JSON text, or the text itself if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def parse_cell(text: Any) -> Any:
    """The value of a cell of a table: JSON, or a list or object as Python or numpy writes it; else the cell itself.

    pandas writes what Python's str() makes of a list into a CSV file; numpy puts a line break where a comma should be.
    """
    value = parse_json(text) if isinstance(text, str) else text
    if not isinstance(value, str) or not text.lstrip().startswith(("[", "{")):
        return value
    for literal in (text, re.sub(r"\}\s*\n\s*\{", "}, {", text)):
        try:
            return ast.literal_eval(literal.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text


def as_json(value: Any) -> Any:
    """The value with JSON's types alone: a table may hold dates, decimals, bytes. Raises BadRow if it is too deep."""
    try:
        return json.loads(json.dumps(value, default=str))
    except (RecursionError, ValueError):
        raise BadRow("nested too deeply") from None


def parse_turn(turn: Any) -> Turn:
    """Read one turn in any of the known spellings. Raises BadRow with the reason if it cannot be trained on."""
    if not isinstance(turn, dict):
        raise BadRow("a turn has no role")
    turn = {key: value for key, value in turn.items() if value is not None}  # tables store a missing value as null
    if not any(key in turn for key in ROLE_KEYS):  # capitals make no other key, as in `Role`
        turn = {str(key).strip().lower(): value for key, value in turn.items()}
    spelling = next((turn[key] for key in ROLE_KEYS if isinstance(turn.get(key), str)), None)
    if spelling is None:
        keys = _escape(", ".join(sorted(map(str, turn)))[:60])
        raise BadRow(f"a turn has no role, only {keys}" if keys else "a turn has no role")
    name = spelling.strip().lower()
    role = ROLES.get(name)
    if role is None:
        raise BadRow(f"unknown role {spelling[:20]!r}")
    text, reasoning = _read_text(next((turn[key] for key in TEXT_KEYS if key in turn), None))
    calls = _read_tool_calls(turn)
    if name == "function_call":
        called = parse_json(text or "")
        calls, text = [_parse_tool_call(call) for call in (called if isinstance(called, list) else [called])], ""
    if text is None and not calls:
        raise BadRow("a turn has no text")
    message: dict[str, Any] = {"role": role, "content": text or ""}
    if calls:
        message["tool_calls"] = calls
    for key in REASONING_KEYS:
        reasoning = reasoning or _read_text(turn.get(key))[0] or ""
    if reasoning:
        message["reasoning_content"] = reasoning
    for key in ("name", "tool_call_id"):
        if turn.get(key):
            message[key] = str(turn[key])
    for value in (message["content"], reasoning):
        check_text(value)
    return Turn(
        message,
        trained=_read_trained_mark(turn, role),
        unknown_keys=tuple(
            _escape(str(key)) for key, value in turn.items() if key not in KNOWN_KEYS and value not in ("", [], {})
        ),
        was_developer=name == "developer",
    )


def _read_text(content: Any) -> tuple[str | None, str]:
    """The text of a turn and its reasoning: a string, or a list of parts. Raises BadRow for parts that are no text."""
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise BadRow("a turn has no text")
    texts, thoughts = [], []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, dict):
            raise BadRow("a turn has no text")
        kind = part.get("type") or "text"
        if kind in MEDIA_PARTS:
            raise BadRow(HAS_MEDIA)
        if kind in ("thinking", "reasoning"):
            thoughts.append(part.get("thinking") or part.get("text") or part.get("reasoning"))
        elif kind in ("text", "input_text", "output_text"):
            texts.append(part.get("text", part.get("content")))
        else:
            raise BadRow(f"a part of type {str(kind)[:20]!r}")
    if not all(isinstance(text, str) for text in texts + thoughts):
        raise BadRow("a turn has no text")
    return "".join(texts), "".join(thoughts)


def _read_tool_calls(turn: dict[str, Any]) -> list[dict[str, Any]]:
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    calls = parse_json(calls) if isinstance(calls, str) else calls
    if not isinstance(calls, list):
        raise BadRow("tool_calls is not a list")
    return [_parse_tool_call(call) for call in calls]


def _parse_tool_call(call: Any) -> dict[str, Any]:
    """A call as chat templates read it: the arguments are an object, not JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("a tool call has no name")
    arguments = function.get("arguments", function.get("parameters")) or {}
    parsed = {
        "name": function["name"],
        "arguments": as_json(parse_json(arguments) if isinstance(arguments, str) else arguments),
    }
    return {"type": "function", "function": parsed} | ({"id": str(call["id"])} if call.get("id") else {})


def _read_trained_mark(turn: dict[str, Any], role: str) -> bool:
    """Whether the dataset wants loss on this turn. Raises BadRow for marks that phoque cannot follow."""
    if any(turn.get(key) for key in PARTIAL_MARKS) or any(isinstance(turn.get(key), list) for key in TRAINED_MARKS):
        raise BadRow("loss on a part of a turn")
    trained = True
    for key in TRAINED_MARKS:
        if key not in turn:
            continue
        value = {"true": 1, "false": 0}.get(str(turn[key]).lower(), turn[key])
        try:
            value = float(value)
        except (TypeError, ValueError, OverflowError):
            value = -1.0
        if value not in (0, 1):
            raise BadRow(f"{key} of a turn is neither 0 nor 1")
        if role != "assistant":
            if value and key not in ("weight", "loss_scale"):  # those two exist for answers only
                raise BadRow(f"{key} asks for loss on a turn of the {role}")
        elif not value:
            trained = False
    return trained


def _escape(name: str) -> str:
    """A name that any file may hold: half of a UTF-16 pair becomes its number."""
    return name.encode("utf-8", "backslashreplace").decode()


def has_surrogate(text: str) -> bool:
    """Whether a text has half of a UTF-16 pair, which no tokenizer accepts; undecoded bytes are such halves, too."""
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def check_text(text: str) -> None:
    """Raise BadRow for what no tokenizer accepts, and for text that was decoded wrongly before it came here."""
    if has_surrogate(text):
        raise BadRow("unpaired surrogate in text")
    if "\ufffd" in text:
        raise BadRow("replacement character (U+FFFD) in text")
