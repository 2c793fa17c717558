"""Choosing the next token from logits: temperature, top-p, and a penalty for what the answer has said already."""

from dataclasses import dataclass

import numpy as np

CANDIDATES = 256  # likeliest tokens that are sorted first


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `penalty` divides positive logits of the answer's tokens, and multiplies negative ones."""

    tokens: int
    temperature: float
    top_p: float
    penalty: float
    seed: int

    def describe(self) -> str:
        """The settings in one line."""
        if not self.temperature:
            return f"greedy, repetition penalty {self.penalty:g}, at most {self.tokens} tokens"
        return (
            f"temperature {self.temperature:g}, top-p {self.top_p:g}, repetition penalty {self.penalty:g}, "
            f"seed {self.seed}, at most {self.tokens} tokens"
        )


class Sampler:
    """Draws the tokens of one answer; `number` is that of the answer, so that a second try differs from the first."""

    def __init__(self, sampling: Sampling, number: int = 0) -> None:
        self._sampling = sampling
        self._draws = np.random.default_rng([sampling.seed, number])
        self._said: set[int] = set()

    def choose(self, logits: np.ndarray) -> int:
        """The next token, from logits [vocabulary]."""
        s = self._sampling
        scores = logits.astype(np.float64)
        if s.penalty != 1 and self._said:
            past_tokens = np.fromiter(self._said, np.int64)
            scores[past_tokens] = np.where(
                scores[past_tokens] > 0, scores[past_tokens] / s.penalty, scores[past_tokens] * s.penalty
            )
        token = int(scores.argmax()) if not s.temperature else self._draw(scores / s.temperature)
        self._said.add(token)
        return token

    def _draw(self, scores: np.ndarray) -> int:
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        kept = _likeliest(probabilities, self._sampling.top_p)
        return int(self._draws.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))


def _likeliest(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest likeliest tokens whose probabilities sum to at least top_p, likeliest first."""
    count = min(CANDIDATES, len(probabilities))
    while True:  # sorting the whole vocabulary at each token takes longer than a step of a small model
        candidates = probabilities.argpartition(-count)[-count:]
        candidates = candidates[np.lexsort((candidates, -probabilities[candidates]))]
        total = probabilities[candidates].cumsum()
        if total[-1] >= top_p or count == len(probabilities):
            return candidates[: int(np.searchsorted(total, top_p)) + 1]
        count = min(8 * count, len(probabilities))
