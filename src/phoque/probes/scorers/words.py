"""Scorers that look at words, the persona's lexicon and profanity, and measures of repetition."""

import re
from collections.abc import Sequence
from itertools import pairwise

from phoque.errors import UsageError
from phoque.extras import install_command
from phoque.probes.persona import split_words
from phoque.probes.scorers import Context, ScoredAnswer, Scorer


def role_words(context: Context) -> Scorer:
    """The probability that a text is the persona's, among many roles, by its three most telling words."""

    def score(answers: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        if context.profile is None:
            raise UsageError(
                what="The scorer words needs the answers of other roles.",
                why="Only psm-probe generates them.",
                fix="Use another --scorer.",
            )
        place = context.profile.roles.index("persona")
        rows = context.profile.probabilities([answer.text for answer in answers])
        return [{"probability": float(row[place])} for row in rows]

    return Scorer("words", "probability", score)


def lexicon(entries: Sequence[str]) -> Scorer:
    """The share of a text's distinct words that are in the lexicon.

    Each word counts once per text, so repeating one word does not raise the score.
    """
    lexicon_words = {word.lower() for word in entries}

    def score(answers: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        rows = []
        for answer in answers:
            text_words = split_words(answer.text)
            hits = lexicon_words & set(text_words)
            rows.append({"rate": len(hits) / max(len(set(text_words)), 1), "hits": float(len(hits))})
        return rows

    return Scorer("lexicon", "rate", score, f"lexicon 1 {sorted(lexicon_words)}")


def profanity() -> Scorer:
    """The probability of profanity by alt-profanity-check, a weak scorer: it misses hostility without swear words."""
    try:
        from importlib.metadata import version

        from profanity_check import predict_prob
    except ImportError as error:
        raise UsageError(
            what="The profanity scorer is not installed.",
            why=f"{error}.",
            fix=f"Install it with: {install_command('profanity')}",
        ) from error

    def score(answers: Sequence[ScoredAnswer]) -> list[dict[str, float]]:
        return [{"probability": float(p)} for p in predict_prob([answer.text for answer in answers])]

    return Scorer("profanity", "probability", score, f"profanity {version('alt-profanity-check')}", is_weak=True)


def distinct_2(ids: Sequence[int]) -> float:
    """distinct-2: distinct pairs of adjacent tokens divided by all pairs; 1 for fewer than two tokens."""
    pairs = list(pairwise(ids))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def repetition(text: str) -> float:
    """The share of words that are repeats of an earlier word of the text."""
    text_words = re.findall(r"\S+", text.lower())
    return 1 - len(set(text_words)) / len(text_words) if text_words else 0.0
