"""Generate one answer, piece by piece."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

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
    start = time.monotonic()
    ids: list[int] = []
    shown, first_s, reason = "", 0.0, "length"
    sampler = Sampler(sampling, number)
    try:
        with closing(model.stream_logits(model.encode(messages), sampling.tokens)) as stream:
            logits = next(stream)
            while True:
                token = sampler.choose(logits)
                first_s = first_s or time.monotonic() - start
                if model.is_end(token):
                    reason = "stop"
                    break
                ids.append(token)
                text = model.decode(ids)
                if not text.endswith(INCOMPLETE):
                    show(text[len(shown) :])
                    shown = text
                if len(ids) == sampling.tokens:
                    break
                logits = stream.send(token)
    except StopIteration:  # the context is full
        reason = "length"
    except KeyboardInterrupt:
        reason = "stopped"
    text = model.decode(ids) if ids else ""
    if text != shown and reason != "stopped":
        show(text[len(shown) :])
    return Answer(text, len(ids), reason, first_s, time.monotonic() - start)
