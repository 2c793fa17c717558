"""The chat template with generation marks, and the loss mask that follows from it."""

import re
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from phoque.data.rows import BadRow
from phoque.errors import PhoqueError, first_line

IGNORED = -100  # torch's cross-entropy skips this label
_RENDERING = threading.Lock()  # transformers keeps a compiled template for all threads, and its marks inside it
FROM_TEMPLATE = "template"  # --default-system: leave a row without a system message to the template

# Where to put the marks into a model's own template: (what to find, what stands there instead). The stop token is
# inside the marks, what comes after it is not: the model has to learn to stop, and never writes the newline itself.
MARKS = [
    (  # ChatML as SmolLM2 writes it
        r"\{\{\s*'<\|im_start\|>' \+ message\['role'\] \+ '(?P<nl>\n|\\n)' \+ message\['content'\] \+ '<\|im_end\|>'"
        r" \+ '(?:\n|\\n)'\s*\}\}",
        "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}\\g<0>{% endif %}",
    ),
    (  # Mistral's, from v7 on: the whole branch of the assistant, which ends with eos_token
        r"(?P<branch>\{%-? elif message\['role'\] == 'assistant' %\})(?P<body>.*?\{\{-?[^{}]*eos_token\s*-?\}\})",
        r"\g<branch>{%- generation %}\g<body>{%- endgeneration %}",
    ),
]

PROBES = [
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}],
    [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "pqrs", strict=True)],
]


@dataclass(frozen=True)
class Encoded:
    """One conversation: token ids, and labels that are -100 wherever nothing is learnt."""

    ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """How many tokens carry loss."""
        return sum(label != IGNORED for label in self.labels)


class ChatTemplate:
    """Encodes conversations for training, with the token ids that the model's own template gives."""

    def __init__(self, tokenizer: Any, default_system: str, max_length: int) -> None:
        self.tokenizer, self.default_system, self.max_length = tokenizer, default_system, max_length
        self.template = marked_template(tokenizer)

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Matches any token that acts by itself, such as the end of a turn."""
        tokens: list[str] = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """The conversation with a system message, unless that is left to the template."""
        if messages[0]["role"] == "system" or self.default_system == FROM_TEMPLATE:
            return messages
        return [{"role": "system", "content": self.default_system}, *messages]

    def encode(self, messages: list[dict[str, str]]) -> Encoded:
        """Token ids and labels of one conversation. Raises BadRow if it is too long or holds control tokens."""
        if any(self.control_tokens.search(turn["content"]) for turn in messages):
            raise BadRow("control token in text")
        try:
            encoded = _apply(self.tokenizer, self.with_system(messages), self.template, mask=True)
        except TemplateError as error:
            raise BadRow(f"the template refuses it: {first_line(error)[:60]}") from None
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        if len(ids) > self.max_length:
            raise BadRow(f"longer than {self.max_length} tokens")
        if not any(mask):
            raise BadRow("no trained token")
        return Encoded(ids, [token if learnt else IGNORED for token, learnt in zip(ids, mask, strict=True)])

    def prompt_ids(self, prompt: str, system: str | None) -> list[int]:
        """Token ids of a prompt that the assistant is about to answer."""
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        return list(
            self.tokenizer.apply_chat_template(
                self.with_system(messages), add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        )


def marked_template(tokenizer: Any) -> str:
    """The model's own chat template with `{% generation %}` marks, proven to give the same token ids.

    Falls back on TRL's list of training templates. Raises PhoqueError (2) if no marks are known for this template.
    """
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

    own = tokenizer.chat_template
    template = own if "{% generation %}" in own or "{%- generation" in own else None
    for find, replace in MARKS:
        if template is None and re.search(find, own, re.DOTALL):
            template = re.sub(find, replace, own, count=1, flags=re.DOTALL)
    probes = PROBES
    if template is None:
        try:
            template = get_training_chat_template(tokenizer)
            probes = PROBES[:1]  # TRL keeps earlier turns as they were generated, so several turns may well differ
        except ValueError:
            template = None
    if template is None:
        raise PhoqueError(
            "This model's chat template is not one that phoque can mask.",
            "It has no generation marks, and neither phoque nor TRL knows where they go.",
            "Add {% generation %} around the assistant's text to its chat_template.jinja.",
        )
    for probe in probes:
        if not _takes(tokenizer, probe):
            continue  # a template may know no system message; rows with one are counted as unfit
        if _apply(tokenizer, probe, own)["input_ids"] != _apply(tokenizer, probe, template)["input_ids"]:
            raise PhoqueError(
                "The marked chat template gives other tokens than the model's own.",
                "Training on it would teach the model a format that it is never asked in.",
                "Report this with the name of the model.",
            )
    if not is_chat_template_stop_token_trained(tokenizer, chat_template=template):
        raise PhoqueError(
            "The chat template's marks leave out the stop token.",
            "The model would never learn to stop.",
            "Move {% endgeneration %} behind the end-of-turn token.",
        )
    return template


def _takes(tokenizer: Any, messages: list[dict[str, str]]) -> bool:
    try:
        _apply(tokenizer, messages, tokenizer.chat_template)
    except TemplateError:
        return False
    return True


def _apply(tokenizer: Any, messages: list[dict[str, str]], template: str, mask: bool = False) -> dict[str, Any]:
    with _RENDERING:
        return dict(
            tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=mask
            )
        )
