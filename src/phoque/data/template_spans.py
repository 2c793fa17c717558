"""Where the assistant's turns lie in a rendered conversation, found from what the chat template writes around texts.

Contents are replaced by sentinels, and the conversation is rendered again: what stands between the sentinels is what
the template adds. This needs no knowledge of the template's source, so it works for any template.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from phoque.data.template_renderer import Messages
from phoque.data.turns import BadRow

_Shape = tuple[tuple[str, bool], ...]  # the role of each turn, and whether it has a text
Render = Callable[..., str]  # (messages, tools, add_generation_prompt) -> text; raises TemplateError

_SENTINEL = "zq{}x8f3ax{}qz"
_SENTINELS = re.compile(r"zq(\d+)x8f3ax\1qz")
_CLOSING_TAGS = re.compile(r"</\w+>|\[/\w+\]")
MAX_SHOWN = 40  # characters of a difference that are shown


@dataclass(frozen=True, slots=True)
class TurnSpan:
    """What the model generates in one assistant turn: the characters [start, end) of the rendered text.

    It begins where the generation prompt ends and ends with the stop token. `content` is where the turn's text begins.
    `is_cut` says that the template leaves out the reasoning of the turn.
    """

    turn: int
    start: int
    content: int
    end: int
    is_cut: bool = False


@dataclass(frozen=True)
class _Layout:
    """What the template writes around the contents of a conversation of one shape.

    `literals[i]` stands before the content of turn `order[i]`, and the last one after all. `prompts` is, for each
    assistant turn, how many characters of the literal before it belong to the generation prompt.
    """

    order: list[int]
    literals: list[str]
    prompts: dict[int, int]


class SpanFinder:
    """Finds the spans of the assistant's turns in rendered conversations of one chat template."""

    def __init__(self, render: Render, stop_tokens: re.Pattern[str]) -> None:
        self._render, self._stop_tokens = render, stop_tokens
        self._layouts: dict[_Shape, _Layout | None] = {}
        self._stop = ""  # what ends a turn of plain text

    def find(self, text: str, messages: Messages, tools: Any = None) -> list[TurnSpan]:
        """The span of each assistant turn in `text`, which is `messages` rendered.

        Raises BadRow if the template leaves out or changes a text, or ends a turn without a stop token.
        """
        is_plain = not tools and all(turn.keys() <= {"role", "content"} for turn in messages)
        contents = self._match_layout(text, messages) if is_plain else None
        if contents is None:
            return self._find_one_by_one(text, messages, tools)
        return [
            TurnSpan(turn, start, content, self._find_end(text, end))
            for turn, start, content, end in contents
            if messages[turn]["role"] == "assistant"
        ]

    def _match_layout(self, text: str, messages: Messages) -> list[tuple[int, int, int, int]] | None:
        """(turn, start, content, end of the content) of every turn if the template only surrounds or trims contents."""
        shape = tuple((turn["role"], bool(turn["content"])) for turn in messages)
        if shape not in self._layouts:
            self._layouts[shape] = self._find_layout(shape)
        layout = self._layouts[shape]
        if layout is None:
            return None
        position, places = 0, []
        for index, turn in enumerate(layout.order):
            literal, following = layout.literals[index : index + 2]
            if not text.startswith(literal, position):
                return None
            start = position + layout.prompts.get(turn, len(literal))
            position += len(literal)
            content = messages[turn]["content"]
            is_last = index + 1 == len(layout.order)
            for variant in (content, content.strip(), content.rstrip(), content.lstrip()):
                end = position + len(variant)
                fits = text.startswith(variant, position) and text.startswith(following, end)
                if fits and (not is_last or end + len(following) == len(text)):
                    break
            else:
                return None
            places.append((turn, start, position, end))
            position = end
        return places

    def _find_layout(self, shape: _Shape) -> _Layout | None:
        messages = [
            {"role": role, "content": _sentinel(index) if is_filled else ""}
            for index, (role, is_filled) in enumerate(shape)
        ]
        text = self._render(messages)
        pieces = _SENTINELS.split(text)
        order, literals = [int(index) for index in pieces[1::2]], pieces[::2]
        if sorted(order) != [index for index, (_, is_filled) in enumerate(shape) if is_filled]:
            return None
        prompts = {}
        for position, turn in enumerate(order):
            tail = self._prompt_tail(messages[:turn]) if shape[turn][0] == "assistant" else None
            if tail is not None:
                prompts[turn] = count_shared(tail, literals[position])
        return _Layout(order, literals, prompts)

    def _prompt_tail(self, messages: Messages, tools: Any = None) -> str | None:
        """What the template writes after the last content, up to where the assistant's answer begins.

        None if the template cannot write it: some refuse a conversation without a user.
        """
        try:
            return _SENTINELS.split(self._render(messages, tools=tools, add_generation_prompt=True))[-1]
        except TemplateError:
            return None

    def _find_end(self, text: str, end: int) -> int:
        """The end of the stop token that follows the content. Raises BadRow if none does."""
        stop = self._stop_tokens.match(text, end)
        if stop is None:
            raise BadRow(
                f"the template ends the assistant's turn with {text[end : end + MAX_SHOWN]!r}, not a stop token"
            )
        self._stop = self._stop or stop[0].strip()
        return stop.end()

    def _find_one_by_one(self, text: str, messages: Messages, tools: Any) -> list[TurnSpan]:
        """Spans where a template's output depends on contents, or turns are more than text: one render per turn."""
        spans, previous_end = [], 0
        for index, turn in enumerate(messages):
            place = self._locate_content(text, messages, tools, index)
            if turn["role"] != "assistant":
                previous_end = place[1] if place else previous_end
                continue
            before = [*messages[: index - 1], messages[index - 1] | {"content": _sentinel(index - 1)}] if index else []
            tail = self._prompt_tail(before, tools)
            prompt_end = None if tail is None else previous_end + count_shared(tail, text[previous_end:])
            begin, end = place or (prompt_end or previous_end,) * 2
            start = begin if prompt_end is None else min(begin, prompt_end)
            content = self._check_content(text[begin:end], turn["content"], begin) if place else begin
            turn_end = self._find_turn_end(text, end, messages, tools, index)
            _check_calls(text[start:turn_end], turn)
            is_cut = not _is_reasoning_in(text[start:turn_end], turn)
            spans.append(TurnSpan(index, start, content, turn_end, is_cut))
            previous_end = end
        return spans

    def _locate_content(self, text: str, messages: Messages, tools: Any, index: int) -> tuple[int, int] | None:
        """Where a turn's content stands in `text`, or None if the template has no place for it.

        None is for an empty content, and for templates that write tool calls or text, not both. Raises BadRow if the
        template leaves out a text.
        """
        changed = [*messages[:index], messages[index] | {"content": _sentinel(index)}, *messages[index + 1 :]]
        other = self._render(changed, tools=tools)
        match = _SENTINELS.search(other)
        if match is None:
            turn = messages[index]
            if turn["content"] and ("tool_calls" not in turn or turn["content"].strip() not in text):
                raise BadRow(f"the template leaves out the text of the {turn['role']}'s turn")
            return None
        begin = count_shared(text, other[: match.start()])
        end = len(text) - count_shared(text[begin:][::-1], other[match.end() :][::-1])
        return begin, end

    def _check_content(self, rendered: str, content: str, begin: int) -> int:
        """Where the turn's text begins, after reasoning. Raises BadRow with the first difference if it was changed."""
        text, answer = rendered.strip(), content.strip()
        candidates = [answer, *(answer.rsplit(tag, 1)[-1].strip() for tag in _CLOSING_TAGS.findall(answer))]
        for candidate in candidates:  # a template may write reasoning elsewhere, or leave it out of earlier turns
            if text.endswith(candidate):
                return begin + rendered.rindex(candidate) if candidate else begin
        shared = count_shared(text, answer)
        before, after = (value[shared : shared + MAX_SHOWN] for value in (answer, text))
        raise BadRow(f"the template changes the text: {before!r} becomes {after!r}")

    def _find_turn_end(self, text: str, end: int, messages: Messages, tools: Any, index: int) -> int:
        """The end of the stop token of a turn, after its tool calls."""
        if "tool_calls" not in messages[index]:
            return self._find_end(text, end)
        alone = self._render(messages[: index + 1], tools=tools)  # what follows this turn is missing in it
        changed = [*messages[:index], messages[index] | {"content": _sentinel(index)}]
        tail = _SENTINELS.split(self._render(changed, tools=tools))[-1]
        for region in (text[end : count_shared(alone, text)], tail[: count_shared(tail, text[end:])]):
            if stops := [stop.end() for stop in self._stop_tokens.finditer(region)]:
                return end + stops[-1]
        following = self._locate_content(text, messages, tools, index + 1) if index + 1 < len(messages) else None
        stop = text.find(self._stop, end, following[0] if following else len(text)) if self._stop else -1
        if stop < 0:
            raise BadRow("the template ends a turn with tool calls without a stop token")
        return stop + len(self._stop)


def _check_calls(rendered: str, turn: dict[str, Any]) -> None:
    """Raise BadRow if the template leaves out one of several tool calls of a turn."""
    names = [call["function"]["name"] for call in turn.get("tool_calls", ())]
    if any(rendered.count(name) < names.count(name) for name in names):
        raise BadRow("the template leaves out a tool call")


def _is_reasoning_in(rendered: str, turn: dict[str, Any]) -> bool:
    """Whether a turn is rendered with all of its text and reasoning."""
    text = turn["content"].strip()
    tag = next(iter(_CLOSING_TAGS.findall(text)), None)
    thought = re.sub(r"^\S*>|^\[\w+\]", "", text.partition(tag)[0]).strip() if tag and text not in rendered else ""
    return thought in rendered and turn.get("reasoning_content", "").strip() in rendered


def count_shared(first: str, second: str) -> int:
    """The length of the longest common prefix, in characters."""
    shortest = min(len(first), len(second))
    if first[:shortest] == second[:shortest]:
        return shortest
    return next(index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def _sentinel(index: int) -> str:
    return _SENTINEL.format(index, index)
