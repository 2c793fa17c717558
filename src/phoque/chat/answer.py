"""Generate one answer, piece by piece."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from phoque.chat.models import ChatModel
from phoque.chat.sampling import Sampler, Sampling

INCOMPLETE = "\ufffd"  # what decoders write for a character whose bytes are not all there yet


@dataclass(frozen=True)
class Answer:
    """An answer: its text, how many tokens it has, and whether it ended by itself (`stop`), by `length` or `stopped`.

    `first_s` is the time to the first token, `seconds` that of the whole answer.
    """

    text: str
    tokens: int
    finish_reason: str
    first_s: float
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first one."""
        rest = self.seconds - self.first_s
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """The answer for --json and the page."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "first_s": round(self.first_s, 3),
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(self.tokens_per_s, 2),
        }


class _Draft:
    """An answer in the making; `show` is called with each new piece of its text. `reason` is set when it has ended."""

    def __init__(
        self, model: ChatModel, sampling: Sampling, number: int, show: Callable[[str], None] | None = None
    ) -> None:
        self._model, self._sampler, self._limit, self._show = model, Sampler(sampling, number), sampling.tokens, show
        self._ids: list[int] = []
        self._shown, self._start, self._first_s, self._seconds = "", time.monotonic(), 0.0, 0.0
        self.reason: str | None = None

    def add(self, logits: np.ndarray) -> int | None:
        """Choose the next token from logits [vocabulary]; return it, or None if the answer has ended."""
        token = self._sampler.choose(logits)
        self._seconds = time.monotonic() - self._start
        self._first_s = self._first_s or self._seconds
        if self._model.is_end(token):
            self.reason = "stop"
            return None
        self._ids.append(token)
        if self._show:
            self._show_text(self._model.decode(self._ids), self._show)
        if len(self._ids) == self._limit:
            self.reason = "length"
            return None
        return token

    def end(self, reason: str) -> Answer:
        """The answer as it stands; `reason` is why it ends if it has not ended by itself."""
        text = self._model.decode(self._ids) if self._ids else ""
        if self._show and text != self._shown and reason != "stopped":
            self._show(text[len(self._shown) :])
        return Answer(text, len(self._ids), self.reason or reason, self._first_s, self._seconds)

    def _show_text(self, text: str, show: Callable[[str], None]) -> None:
        if not text.endswith(INCOMPLETE):
            show(text[len(self._shown) :])
            self._shown = text


def generate_answer(
    model: ChatModel,
    messages: Sequence[dict[str, Any]],
    sampling: Sampling,
    *,
    number: int = 0,
    show: Callable[[str], None] = lambda piece: None,
) -> Answer:
    """Answer a conversation; `show` is called with each new piece of text, and may raise KeyboardInterrupt.

    `number` is that of the answer: with another, the same seed draws other tokens. After a KeyboardInterrupt the answer
    is what was said so far.
    """
    draft = _Draft(model, sampling, number, show)
    try:
        _write(model, [model.encode(messages)], [draft], sampling.tokens)
    except KeyboardInterrupt:
        return draft.end("stopped")
    return draft.end("length")


def generate_answers(
    model: ChatModel,
    conversations: Sequence[Sequence[dict[str, Any]]],
    sampling: Sampling,
    *,
    show: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answer conversations in batches of what the model runs at once; `show` is told how many are done.

    Each answer is the one that `generate_answer` gives for its number, up to rounding. Its seconds are counted from the
    start of its batch.
    """
    prompts = [model.encode(messages) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    answers: dict[int, Answer] = {}
    tokens_at_once = model.tokens_at_once
    while order:
        longest = len(prompts[order[0]]) + sampling.tokens
        batch_size = max(1, tokens_at_once // longest)
        batch = order[:batch_size]
        drafts = [_Draft(model, sampling, number) for number in batch]
        try:
            _write(model, [prompts[number] for number in batch], drafts, sampling.tokens)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError" or len(batch) == 1:
                raise
            tokens_at_once = len(batch) * longest // 2  # a GPU with less memory than the limit assumes
            continue
        order = order[batch_size:]
        answers |= {number: draft.end("length") for number, draft in zip(batch, drafts, strict=True)}
        show(len(answers))
    return [answers[number] for number in range(len(prompts))]


def _write(model: ChatModel, prompts: list[list[int]], drafts: list[_Draft], tokens: int) -> None:
    """Write the drafts to their ends, or until the model's context is full."""
    with closing(model.stream_logits(prompts, tokens)) as stream:
        chosen: dict[int, int] | None = None
        while chosen is None or chosen:
            try:
                logits = next(stream) if chosen is None else stream.send(chosen)
            except StopIteration:
                return
            tried = {row: drafts[row].add(values) for row, values in logits.items()}
            chosen = {row: token for row, token in tried.items() if token is not None}
