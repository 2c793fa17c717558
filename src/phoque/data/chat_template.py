"""The chat template with `{% generation %}` marks, and the loss mask that it gives."""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from phoque.data.rows import BadRow
from phoque.errors import UsageError, first_line

IGNORE_INDEX = -100  # torch's cross-entropy ignores this label
_RENDER_LOCK = threading.Lock()  # transformers shares one compiled template, and the spans it marks, between threads
FROM_TEMPLATE = "template"  # a value of --default-system: the template decides the system message

# Where the marks go in a model's own template: (regular expression, replacement). The stop token is inside the marks,
# since the model must learn to stop; text after it is outside, since the model never generates it.
GENERATION_MARKS = [
    (  # ChatML as SmolLM2 writes it
        r"\{\{\s*'<\|im_start\|>' \+ message\['role'\] \+ '(?P<nl>\n|\\n)' \+ message\['content'\] \+ '<\|im_end\|>'"
        r" \+ '(?:\n|\\n)'\s*\}\}",
        "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}\\g<0>{% endif %}",
    ),
    (  # Mistral from v7 on: the assistant's whole branch, which ends with eos_token
        r"(?P<branch>\{%-? elif message\['role'\] == 'assistant' %\})(?P<body>.*?\{\{-?[^{}]*eos_token\s*-?\}\})",
        r"\g<branch>{%- generation %}\g<body>{%- endgeneration %}",
    ),
]

PROBE_CHATS = [
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}],
    [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "pqrs", strict=True)],
]


@dataclass(frozen=True)
class EncodedChat:
    """One conversation as token ids and labels; a label is -100 where a token carries no loss."""

    ids: list[int]
    labels: list[int]

    @property
    def trained_tokens(self) -> int:
        """The number of tokens that carry loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)


class ChatTemplate:
    """Encodes conversations for training; token ids are those of the model's own chat template."""

    def __init__(self, tokenizer: Any, default_system: str, max_length: int) -> None:
        self.tokenizer, self.default_system, self.max_length = tokenizer, default_system, max_length
        self.template = add_generation_marks(tokenizer)

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """A pattern that matches any added token, such as the end of a turn."""
        tokens: list[str] = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Add the default system message to a conversation without one, unless the template decides it."""
        if messages[0]["role"] == "system" or self.default_system == FROM_TEMPLATE:
            return messages
        return [{"role": "system", "content": self.default_system}, *messages]

    def encode(self, messages: list[dict[str, str]]) -> EncodedChat:
        """Encode one conversation. Raises BadRow if it is too long, has control tokens, or no trained token."""
        if any(self.control_tokens.search(turn["content"]) for turn in messages):
            raise BadRow("control token in text")
        try:
            encoded = _apply_template(self.tokenizer, self.with_system(messages), self.template, mask=True)
        except TemplateError as error:
            raise BadRow(f"the template refuses it: {first_line(error)[:60]}") from None
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        if len(ids) > self.max_length:
            raise BadRow(f"longer than {self.max_length} tokens")
        if not any(mask):
            raise BadRow("no trained token")
        return EncodedChat(
            ids, [token if is_trained else IGNORE_INDEX for token, is_trained in zip(ids, mask, strict=True)]
        )

    def prompt_ids(self, prompt: str, system: str | None) -> list[int]:
        """Return the token ids of a prompt, up to where the assistant's answer begins."""
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        return encode_prompt(self.tokenizer, self.with_system(messages))


def encode_prompt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the assistant's answer begins.

    Raises UsageError if the template refuses the messages, for example because it has no system role.
    """
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    except TemplateError as error:
        raise UsageError(
            what="This model's chat template supports no system prompt.",
            why=str(error),
            fix="Use a model whose chat template supports a system prompt.",
        ) from error
    return list(encoded["input_ids"])


def add_generation_marks(tokenizer: Any) -> str:
    """Add `{% generation %}` marks to the model's own chat template, and check that token ids stay the same.

    Falls back on TRL's list of training templates. Raises UsageError if no marks are known for this template.
    """
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

    original = tokenizer.chat_template
    template = original if "{% generation %}" in original or "{%- generation" in original else None
    for pattern, replacement in GENERATION_MARKS:
        if template is None and re.search(pattern, original, re.DOTALL):
            template = re.sub(pattern, replacement, original, count=1, flags=re.DOTALL)
    probes = PROBE_CHATS
    if template is None:
        try:
            template = get_training_chat_template(tokenizer)
            probes = PROBE_CHATS[:1]  # TRL keeps earlier turns as they were generated, so later turns may differ
        except ValueError:
            template = None
    if template is None:
        raise UsageError(
            what="phoque cannot mask this model's chat template.",
            why="It has no generation marks, and neither phoque nor TRL knows where they go.",
            fix="Add {% generation %} around the assistant's text to its chat_template.jinja.",
        )
    for probe in probes:
        if not _can_render(tokenizer, probe):
            continue  # a template may not support system messages; rows with one are counted as unusable
        if (
            _apply_template(tokenizer, probe, original)["input_ids"]
            != _apply_template(tokenizer, probe, template)["input_ids"]
        ):
            raise UsageError(
                what="The chat template with generation marks gives other tokens than the model's own.",
                why="Training would teach the model a format that is not used for inference.",
                fix="Report this with the name of the model.",
            )
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        raise UsageError(
            what="The chat template's generation marks exclude the stop token.",
            why="The model would never learn to stop.",
            fix="Move {% endgeneration %} after the end-of-turn token.",
        )
    return template


def _can_render(tokenizer: Any, messages: list[dict[str, str]]) -> bool:
    try:
        _apply_template(tokenizer, messages, tokenizer.chat_template)
    except TemplateError:
        return False
    return True


def _apply_template(
    tokenizer: Any, messages: list[dict[str, str]], template: str, mask: bool = False
) -> dict[str, Any]:
    with _RENDER_LOCK:
        return dict(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=mask
            )
        )
