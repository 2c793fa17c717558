"""Choosing the next token from logits: temperature, top-p, and a penalty for what the answer has said already."""

from dataclasses import dataclass

import numpy as np


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
            said = np.fromiter(self._said, np.int64)
            scores[said] = np.where(scores[said] > 0, scores[said] / s.penalty, scores[said] * s.penalty)
        token = int(scores.argmax()) if not s.temperature else self._draw(scores / s.temperature)
        self._said.add(token)
        return token

    def _draw(self, scores: np.ndarray) -> int:
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        order = probabilities.argsort()[::-1]
        kept = order[: int(np.searchsorted(probabilities[order].cumsum(), self._sampling.top_p)) + 1]
        return int(self._draws.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))
