"""Conversations as token ids with a loss mask: ids are those of the model's own chat template, whatever it is."""

import copy
import json
import re
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from phoque.data.rows import Row
from phoque.data.template_renderer import Messages, TemplateRenderer
from phoque.data.template_spans import SpanFinder, TurnSpan
from phoque.data.turns import BadRow, has_surrogate
from phoque.errors import UsageError, first_line

# the beginnings of reasons that an error message explains further
NO_PLACE, TOO_LONG = "the template has no place for", "longer than"
IGNORE_INDEX = -100  # torch's cross-entropy ignores this label
FROM_TEMPLATE = "template"  # a value of --default-system: the template decides the system message

QUESTION = {"role": "user", "content": "a b"}
ANSWER = {"role": "assistant", "content": "c d"}
CALL: dict[str, Any] = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "tide", "arguments": {"place": "pier"}},
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "tide", "description": "d", "parameters": {"type": "object"}},
}


@dataclass(frozen=True)
class EncodedChat:
    """One conversation as token ids and labels; a label is -100 where a token carries no loss. `notes` as in Row."""

    ids: list[int]
    labels: list[int]
    notes: tuple[str, ...] = ()

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that carry loss. The first never does: no token of the conversation predicts it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class ChatTemplate:
    """Encodes conversations for training.

    Loss is on what the model generates: each assistant turn from the end of the generation prompt to its stop token,
    reasoning and tool calls included. An answer before the first question is context unless `train_greeting` is set.
    `today` is the date that the template writes, if it writes one; without it, that is the present date.
    Raises UsageError if the template has no place for the assistant's text or ends its turns without a stop token.
    """

    def __init__(
        self,
        tokenizer: Any,
        default_system: str,
        max_length: int,
        *,
        train_greeting: bool = False,
        today: date | None = None,
    ) -> None:
        self.tokenizer, self.max_length, self._train_greeting = tokenizer, max_length, train_greeting
        self.today, self._renderer = today, TemplateRenderer(tokenizer, today)
        self.template = self._renderer.source()
        self._rendered: dict[tuple[str, bool], bool] = {}
        self._spans = SpanFinder(self._renderer.render, re.compile(rf"\s*(?:{self.control_tokens.pattern})"))
        self.default_system: str | None = None if default_system == FROM_TEMPLATE else default_system
        self._check_template()
        if self.default_system is not None and not self._renders(CONTENT_PROBES["system"]):
            self._refuse_default_system()

    @property
    def writes_date(self) -> bool:
        """Whether the template writes the date."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    @property
    def options(self) -> tuple[str | None, int, bool]:
        """What an encoding depends on besides the tokenizer and its template."""
        return self.default_system, self.max_length, self._train_greeting

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """A pattern that matches any special token; added tokens that are not special, such as <think>, are text."""
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def with_system(self, messages: Messages) -> list[dict[str, Any]]:
        """Add the default system message to a conversation without one, unless the template decides it."""
        if messages[0]["role"] == "system" or self.default_system is None:
            return [*messages]
        return [{"role": "system", "content": self.default_system}, *messages]

    @cached_property
    def shipped_tokenizer(self) -> Any:
        """The tokenizer to ship: a chat without a system message renders as it was trained, with the default one.

        Its templates begin with a statement that adds this message. Where the model's own template renders the same
        text anyway, the tokenizer is unchanged.
        """
        if self.default_system is None:
            return self.tokenizer
        default_text = self._renderer.render([QUESTION], add_generation_prompt=True)
        if default_text == self._renderer.render(self.with_system([QUESTION]), add_generation_prompt=True):
            return self.tokenizer
        message = f"{{'role': 'system', 'content': {json.dumps(self.default_system, ensure_ascii=False)}}}"
        statement = (
            "{%- if not messages or messages[0]['role'] != 'system' %}"
            f"{{% set messages = [{message}] + messages %}}"
            "{%- endif -%}"
        )
        tokenizer, templates = copy.copy(self.tokenizer), self.tokenizer.chat_template
        if isinstance(templates, dict):
            tokenizer.chat_template = {name: statement + text for name, text in templates.items()}
        else:
            tokenizer.chat_template = statement + templates
        return tokenizer

    def encode_row(self, row: Row) -> EncodedChat:
        """Encode a row of a dataset, with its tools and its marks. Raises BadRow if it cannot be trained on."""
        try:
            return self.encode(row.messages, tools=row.tools, untrained=row.untrained)
        except RecursionError:
            raise BadRow("nested too deeply") from None

    def encode(self, messages: Messages, *, tools: Any = None, untrained: frozenset[int] = frozenset()) -> EncodedChat:
        """Encode one conversation, without loss on the turns with the indices `untrained`.

        Raises BadRow if it is too long, has control tokens, something that the template drops, or no trained token.
        """
        for turn in messages:
            self._check_text(turn["content"] if len(turn) == 2 else _collect_texts(turn))
        if tools:
            self._check_text(_collect_texts(tools))
        self._check_extras(messages, tools)
        complete = self.with_system(messages)
        try:
            text, marks = self._renderer.render_with_marks(complete, tools)
            spans = self._spans.find(text, complete, tools)
        except TemplateError as error:
            raise BadRow(f"the template refuses it: {first_line(error)[:60]}") from None
        notes = ("the template leaves out reasoning",) if any(span.is_cut for span in spans) else ()
        if marks is not None:
            located, spans = spans, _use_marks(spans, marks)
            if {span.turn for span in located} - {span.turn for span in spans}:
                notes += ("the template's generation marks leave out an answer, which has no loss",)
        added = len(complete) - len(messages)
        is_context = set(untrained)
        if not self._train_greeting:
            is_context |= set(_greeting(messages))
        ranges = [(span.start, span.end) for span in spans if span.turn - added not in is_context]
        return replace(self._tokenize(text, ranges), notes=notes)

    def prompt_ids(self, prompt: str, system: str | None) -> list[int]:
        """Return the token ids of a prompt, up to where the assistant's answer begins."""
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        return encode_prompt(self.tokenizer, self.with_system(messages))

    def _tokenize(self, text: str, ranges: list[tuple[int, int]]) -> EncodedChat:
        """Token ids of the text; tokens that overlap one of the character ranges carry loss."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        if len(ids) > self.max_length:
            raise BadRow(f"{TOO_LONG} {self.max_length} tokens")
        labels, remaining = [IGNORE_INDEX] * len(ids), iter(ranges)
        start, end = next(remaining, (len(text) + 1, len(text) + 1))
        before = 0
        for index, (first, last) in enumerate(encoded["offset_mapping"]):
            # some tokenizers leave white space out of their offsets, but a token of spaces is to be learned, too
            first, before = min(first, before), last
            while first >= end:
                start, end = next(remaining, (len(text) + 1, len(text) + 1))
            if last > start and first < last:
                labels[index] = ids[index]
        if all(label == IGNORE_INDEX for label in labels):
            raise BadRow("no trained token")
        return EncodedChat(ids, labels)

    def _check_template(self) -> None:
        """Raise UsageError if the assistant's turns cannot be located in a conversation of plain text."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise UsageError(
                what="This model's tokenizer does not say where its tokens lie in a text.",
                why="It is a slow tokenizer, and the loss mask needs the positions.",
                fix="Convert it to a tokenizer.json with transformers, and use that folder.",
            )
        talk = [QUESTION, ANSWER, QUESTION | {"content": "e f"}, ANSWER | {"content": "g h"}]
        try:
            text, marks = self._renderer.render_with_marks(talk)
            spans = self._spans.find(text, talk)
        except TemplateError as error:
            raise UsageError(
                what="This model's chat template refuses a conversation of two questions and answers.",
                why=first_line(error),
                fix="Correct its chat_template.jinja.",
            ) from error
        except BadRow as error:
            raise UsageError(
                what="phoque cannot mask this model's chat template.",
                why=f"{str(error)[:1].upper()}{str(error)[1:]}.",
                fix="Correct its chat_template.jinja: the assistant's text must be in it, and a stop token after it.",
            ) from error
        if marks is None:
            return
        ends = {end for _, end in marks}
        for span in spans:
            if not any(start <= span.content < end for start, end in marks):
                raise UsageError(
                    what="The chat template's generation marks are not around the assistant's text.",
                    why=f"They are around {[text[start:end][:20] for start, end in marks]}.",
                    fix="Put {% generation %} before the assistant's text, {% endgeneration %} after its stop token.",
                )
            if not any(end >= span.end for end in ends if end > span.content):
                raise UsageError(
                    what="The chat template's generation marks exclude the stop token.",
                    why="The model would never learn to stop.",
                    fix="Move {% endgeneration %} after the end-of-turn token.",
                )

    def _refuse_default_system(self) -> None:
        if self.default_system:
            raise UsageError(
                what="This model's chat template supports no system message.",
                why=f"--default-system is {self.default_system[:40]!r}.",
                fix="Leave --default-system out, or give `template`.",
            )
        self.default_system = None  # there is no empty system message to write

    def _check_text(self, text: str) -> None:
        """Raise BadRow for a text that would act as control tokens, or that no tokenizer accepts."""
        if match := self.control_tokens.search(text):
            raise BadRow(f"control token {match[0]!r} in text")
        if has_surrogate(text):
            raise BadRow("unpaired surrogate in text")

    def _check_extras(self, messages: Messages, tools: Any) -> None:
        """Raise BadRow if the conversation has something that the template would drop without a word."""
        present = {"tools"} if tools else set()
        for turn in messages:
            present |= {"tool"} & {turn["role"]} | {"tool_calls", "reasoning_content"} & turn.keys()
        for name, probe in CONTENT_PROBES.items():
            if name in present and not self._renders(probe if tools else replace(probe, tools=None)):
                raise BadRow(f"{NO_PLACE} {probe.meaning}")

    def _renders(self, probe: "_Probe") -> bool:
        """Whether the template writes what a probe adds to a conversation; found once for each probe."""
        key = probe.meaning, bool(probe.tools)
        if key not in self._rendered:
            try:
                changed = self._renderer.render(probe.messages, tools=probe.tools)
            except TemplateError:
                changed = ""
            self._rendered[key] = probe.text in changed
        return self._rendered[key]


@dataclass(frozen=True)
class _Probe:
    """A conversation with something special in it, and the text by which it is recognized in the rendered template."""

    meaning: str
    text: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


_CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
_NAMED_CALL = CALL | {"function": {"name": "zqcallqz", "arguments": {"place": "pier"}}}
_RESULT = {"role": "tool", "name": "tide", "tool_call_id": CALL["id"], "content": "zqresultqz"}
_NAMED_TOOL = TOOL | {"function": TOOL["function"] | {"name": "zqtoolqz"}}
CONTENT_PROBES = {
    "system": _Probe("a system message", "zqsystemqz", [{"role": "system", "content": "zqsystemqz"}, QUESTION, ANSWER]),
    "tools": _Probe("tools", "zqtoolqz", [QUESTION, ANSWER], [_NAMED_TOOL]),
    "tool_calls": _Probe("tool calls", "zqcallqz", [QUESTION, _CALLING | {"tool_calls": [_NAMED_CALL]}], [TOOL]),
    "tool": _Probe("results of tools", "zqresultqz", [QUESTION, _CALLING, _RESULT, ANSWER], [TOOL]),
    "reasoning_content": _Probe("reasoning", "zqthoughtqz", [QUESTION, ANSWER | {"reasoning_content": "zqthoughtqz"}]),
}


def _greeting(messages: Messages) -> list[int]:
    """The index of an assistant turn that comes before the first question, if there is one."""
    first = 1 if messages[0]["role"] == "system" else 0
    is_greeting = messages[first]["role"] == "assistant" and any(turn["role"] == "user" for turn in messages)
    return [first] if is_greeting else []


def _collect_texts(value: Any) -> str:
    """All texts inside a turn or a list of tools, keys included, as one."""
    if isinstance(value, dict):
        return "\n".join(_collect_texts(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return "\n".join(map(_collect_texts, value))
    return str(value)


def _use_marks(spans: list[TurnSpan], marks: list[tuple[int, int]]) -> list[TurnSpan]:
    """The spans that the template itself marks, in place of those that were located, for the same turns."""
    return [
        replace(span, start=start, end=end) for span in spans for start, end in marks if start <= span.content < end
    ]


def render_prompt(tokenizer: Any, messages: Messages) -> str:
    """The text of a conversation up to where the assistant's answer begins.

    Raises UsageError if the template refuses the messages, for example because it has no system role.
    """
    try:
        return TemplateRenderer(tokenizer).render(messages, add_generation_prompt=True)
    except TemplateError as error:
        has_system = any(message["role"] == "system" for message in messages)
        raise UsageError(
            what="This model's chat template supports no system prompt."
            if has_system
            else "This model's chat template refuses the conversation.",
            why=first_line(error),
            fix="Use a model whose chat template supports a system prompt." if has_system else "Begin another one.",
        ) from error


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins; raises what render_prompt raises."""
    return list(tokenizer(render_prompt(tokenizer, messages), add_special_tokens=False)["input_ids"])
