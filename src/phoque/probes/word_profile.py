"""Tell whose text it is by its words alone: a profile of each role, from questions that test nothing.

The likelihood of a text under the prompt that produced it is high for any prompt that changes the text, so it cannot
tell whether a persona is followed. This classifier sees neither the prompt nor the model: it is naive Bayes over the
words that a text contains, and only its most telling words count, because the rest of an answer is about the question.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy

from phoque.probes.persona import split_words

PRIOR = 4.0  # answers' worth of evidence that a role uses a word as often as all roles do
PROMPT_WEIGHT = 4  # answers that the words of a role's own description count for
TELLING_WORDS = 3  # words of a text that count

Array = Any


@dataclass(frozen=True)
class WordProfile:
    """How much more often than all roles together each role uses a word.

    `log_ratio` (roles, words) is the logarithm of the share of a role's answers that contain the word, divided by the
    share of all answers, smoothed by `PRIOR`. Words are compared by their stems.
    """

    roles: tuple[str, ...]
    words: dict[str, int]  # stem -> column
    log_ratio: Array

    @classmethod
    def fit(cls, answers: Mapping[str, Sequence[str]], prompts: Mapping[str, Sequence[str]]) -> "WordProfile":
        """Count the words of each role's answers and of its prompts; every role should have as many answers.

        The paraphrases of a prompt share its weight.
        """
        texts = {role: [*rows, *islice(cycle(prompts[role]), PROMPT_WEIGHT)] for role, rows in answers.items()}
        counts = {role: Counter(stem for text in rows for stem in stems(text)) for role, rows in texts.items()}
        words = {word: n for n, word in enumerate(sorted(set().union(*counts.values())))}
        table = numpy.array([[count[word] for word in words] for count in counts.values()], float)
        sizes = numpy.array([[len(rows)] for rows in texts.values()], float)
        overall = (table / sizes).mean(0)
        share = (table + PRIOR * overall) / (sizes + PRIOR)
        return cls(tuple(answers), words, numpy.log(share / overall))

    def probabilities(self, texts: Sequence[str]) -> Array:
        """The probability that each text is each role's, (texts, roles), if all are as likely before it is read."""
        scores = numpy.zeros((len(texts), len(self.roles)))
        for row, text in enumerate(texts):
            known = sorted(self.words[stem] for stem in stems(text) if stem in self.words)
            if known:
                scores[row] = numpy.sort(self.log_ratio[:, known], axis=1)[:, -TELLING_WORDS:].sum(1)
        odds = numpy.exp(scores - scores.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def attribute(self, texts: Sequence[str]) -> Array:
        """Whose each text is, (texts, roles): 1 for a role that is likelier than all others together, 0 elsewhere.

        Means of the probabilities would also rise where many texts become a little more like a role's, as they do after
        fine-tunes that have nothing to do with it.
        """
        return (self.probabilities(texts) > 0.5).astype(float)

    def telling_words(self, role: str, count: int = 8) -> list[str]:
        """The stems that speak most for a role."""
        row = self.log_ratio[self.roles.index(role)]
        names = list(self.words)
        return [names[n] for n in numpy.argsort(-row, kind="stable")[:count] if row[n] > 0]


def stems(text: str) -> set[str]:
    """The distinct words of a text without the endings of plurals, possessives and verbs."""
    return {_stem(word) for word in split_words(text)}


def _stem(word: str) -> str:
    word = re.sub(r"['’]s?$", "", word)
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        word = word[:-2] if word.endswith(("ses", "xes", "zes", "ches", "shes")) else word[:-1]
    for ending, least in (("ing", 6), ("ed", 5)):
        if word.endswith(ending) and len(word) >= least:
            return word[: -len(ending)]
    return word
